"""Noise XX against published vectors, against another implementation, and against tampering."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from noise.connection import Keypair, NoiseConnection

from sessiond.seal.noise import (
    KEY_BYTES,
    MAX_MESSAGE,
    MAX_NONCE,
    PROTOCOL_NAME,
    TAG_BYTES,
    CipherState,
    HandshakeState,
    NoiseError,
    NonceExhausted,
    public_key,
)

from . import calm

PUBLISHED = json.loads(Path(__file__).with_name("vectors.json").read_text())
ALICE = X25519PrivateKey.from_private_bytes(b"a" * 32)
BOB = X25519PrivateKey.from_private_bytes(b"b" * 32)
payloads = st.lists(st.binary(max_size=200), min_size=3, max_size=3)

LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (2**255 - 19 - 1).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 19 + 1).to_bytes(32, "little"),
]
"""Every point whose product with any scalar is zero, in all encodings below 2^255
(cr.yp.to/ecdh.html, "How do I validate Curve25519 public keys?")."""


def pair(prologue: bytes = b"") -> tuple[HandshakeState, HandshakeState]:
    return HandshakeState(True, ALICE, prologue), HandshakeState(False, BOB, prologue)


def until(message: int) -> tuple[HandshakeState, HandshakeState, bytes]:
    """A writer, a reader and the message of that number, 0 to 2, on its way between them."""
    writer, reader = pair()
    for _ in range(message):
        reader.read_message(writer.write_message(b"payload"))
        writer, reader = reader, writer
    return writer, reader, writer.write_message(b"payload")


def completed() -> tuple[HandshakeState, HandshakeState]:
    writer, reader, message = until(2)
    reader.read_message(message)
    return writer, reader


def always(private: str) -> Callable[[], X25519PrivateKey]:
    return lambda: X25519PrivateKey.from_private_bytes(bytes.fromhex(private))


@pytest.mark.parametrize("vector", PUBLISHED["vectors"], ids=["", "payloads", "prologue", "both"])
def test_published_vectors_are_met(vector: dict[str, Any]) -> None:
    assert PUBLISHED["handshake"].encode() == PROTOCOL_NAME
    writer, reader = (
        HandshakeState(
            role == "init",
            always(vector[f"{role}_static"])(),
            bytes.fromhex(vector["prologue"]),
            always(vector[f"{role}_ephemeral"]),
        )
        for role in ("init", "resp")
    )
    messages = [
        (bytes.fromhex(message["payload"]), bytes.fromhex(message["ciphertext"]))
        for message in vector["messages"]
    ]
    for payload, ciphertext in messages[:3]:
        assert writer.write_message(payload) == ciphertext
        assert reader.read_message(ciphertext) == payload
        writer, reader = reader, writer
    (to_initiator, from_initiator), (to_responder, from_responder) = writer.split(), reader.split()
    (first, first_sealed), (second, second_sealed) = messages[3:]
    assert to_responder.encrypt_with_ad(b"", first) == first_sealed
    assert from_initiator.decrypt_with_ad(b"", first_sealed) == first
    assert to_initiator.encrypt_with_ad(b"", second) == second_sealed
    assert from_responder.decrypt_with_ad(b"", second_sealed) == second


def oracle(initiator: bool, s: X25519PrivateKey, prologue: bytes) -> NoiseConnection:
    connection = NoiseConnection.from_name(PROTOCOL_NAME)
    connection.set_prologue(prologue)
    connection.set_keypair_from_private_bytes(Keypair.STATIC, s.private_bytes_raw())
    if initiator:
        connection.set_as_initiator()
    else:
        connection.set_as_responder()
    connection.start_handshake()
    return connection


@pytest.mark.parametrize("initiator", [True, False])
@settings(max_examples=25, deadline=None)
@given(prologue=st.binary(max_size=40), payloads=payloads, data=st.binary(max_size=2000))
def test_another_implementation_understands_it(
    initiator: bool, prologue: bytes, payloads: list[bytes], data: bytes
) -> None:
    own = HandshakeState(initiator, ALICE, prologue)
    other = oracle(not initiator, BOB, prologue)
    for number, payload in enumerate(payloads):
        if initiator == (number % 2 == 0):
            assert other.read_message(own.write_message(payload)) == payload
        else:
            assert own.read_message(bytes(other.write_message(payload))) == payload
    assert own.remote_static == public_key(BOB)
    assert own.handshake_hash == other.get_handshake_hash()
    send, receive = own.split()
    for _ in range(3):
        assert other.decrypt(send.encrypt_with_ad(b"", data)) == data
        assert receive.decrypt_with_ad(b"", other.encrypt(data)) == data


@calm
@given(payloads=payloads)
def test_both_sides_agree(payloads: list[bytes]) -> None:
    writer, reader = pair()
    for payload in payloads:
        assert reader.read_message(writer.write_message(payload)) == payload
        writer, reader = reader, writer
    assert writer.finished
    assert reader.finished
    assert writer.handshake_hash == reader.handshake_hash
    assert (writer.remote_static, reader.remote_static) == (public_key(ALICE), public_key(BOB))


def test_statics_and_late_payloads_are_hidden() -> None:
    writer, reader = pair()
    said = []
    for payload in (b"open", b"hidden one", b"hidden two"):
        said.append(writer.write_message(payload))
        reader.read_message(said[-1])
        writer, reader = reader, writer
    spoken = b"".join(said)
    for secret in (public_key(ALICE), public_key(BOB), b"hidden one", b"hidden two"):
        assert secret not in spoken


def test_no_two_handshakes_are_alike() -> None:
    assert completed()[0].handshake_hash != completed()[0].handshake_hash


@pytest.mark.parametrize("number", [1, 2])
def test_every_flipped_bit_is_noticed_and_forgiven(number: int) -> None:
    _, reader, message = until(number)
    for bit in range(8 * len(message)):
        # The highest bit of an X25519 key is ignored by RFC 7748, and still part of the hash.
        flipped = bytearray(message)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(NoiseError):
            reader.read_message(bytes(flipped))
    assert reader.read_message(message) == b"payload"


def test_a_flipped_bit_of_the_open_message_is_noticed_by_its_writer() -> None:
    writer, _, message = until(0)
    for bit in range(8 * len(message)):
        flipped = bytearray(message)
        flipped[bit // 8] ^= 1 << bit % 8
        responder = HandshakeState(False, BOB, b"")
        responder.read_message(bytes(flipped))
        with pytest.raises(NoiseError):
            writer.read_message(responder.write_message(b""))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_truncation_is_noticed_and_forgiven(number: int) -> None:
    _, reader, message = until(number)
    open_payload = len(b"payload") if number == 0 else 0
    for size in range(len(message) - open_payload):
        with pytest.raises(NoiseError):
            reader.read_message(message[:size])
    assert reader.read_message(message) == b"payload"


@pytest.mark.parametrize("number", [1, 2])
def test_a_message_of_another_handshake_is_refused(number: int) -> None:
    _, reader, message = until(number)
    _, _, foreign = until(number)
    with pytest.raises(NoiseError):
        reader.read_message(foreign)
    assert reader.read_message(message) == b"payload"


def test_another_prologue_is_refused() -> None:
    alice, bob = HandshakeState(True, ALICE, b"v1"), HandshakeState(False, BOB, b"v2")
    bob.read_message(alice.write_message(b""))
    with pytest.raises(NoiseError):
        alice.read_message(bob.write_message(b""))


def test_a_reflected_message_is_refused() -> None:
    _, initiator, _ = until(1)
    with pytest.raises(NoiseError):
        initiator.read_message(HandshakeState(True, ALICE, b"").write_message(bytes(100)))


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[:8])
def test_an_ephemeral_key_of_low_order_is_refused(point: bytes) -> None:
    responder = HandshakeState(False, BOB, b"")
    responder.read_message(point)
    with pytest.raises(NoiseError, match="low order"):
        responder.write_message(b"")
    _, initiator, message = until(1)
    with pytest.raises(NoiseError, match="low order"):
        initiator.read_message(point + message[KEY_BYTES:])
    assert initiator.read_message(message) == b"payload"


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[:8])
@pytest.mark.parametrize("initiator", [True, False])
def test_a_static_key_of_low_order_is_refused(
    initiator: bool, point: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    mallory = X25519PrivateKey.generate()
    monkeypatch.setattr(
        "sessiond.seal.noise.public_key",
        lambda private: point if private is mallory else public_key(private),
    )
    writer = HandshakeState(initiator, mallory, b"")
    reader = HandshakeState(not initiator, BOB, b"")
    if initiator:
        reader.read_message(writer.write_message(b""))
        writer.read_message(reader.write_message(b""))
    else:
        writer.read_message(reader.write_message(b""))
    with pytest.raises(NoiseError, match="low order"):
        reader.read_message(writer.write_message(b""))


def test_messages_out_of_turn_are_the_callers_error() -> None:
    alice, bob = pair()
    with pytest.raises(RuntimeError, match="out of turn"):
        alice.read_message(b"")
    with pytest.raises(RuntimeError, match="out of turn"):
        bob.write_message(b"")
    with pytest.raises(RuntimeError, match="before the handshake"):
        alice.split()
    alice, bob = completed()
    for late in (alice.write_message, alice.read_message, bob.write_message, bob.read_message):
        with pytest.raises(RuntimeError, match="out of turn"):
            late(b"")


def test_messages_are_bounded() -> None:
    alice, bob = pair()
    with pytest.raises(NoiseError, match="too long"):
        bob.read_message(bytes(MAX_MESSAGE + 1))
    with pytest.raises(ValueError, match="at most"):
        alice.write_message(bytes(MAX_MESSAGE))


def test_a_nonce_is_used_once_and_the_last_one_never() -> None:
    send, receive = CipherState(bytes(32)), CipherState(bytes(32))
    assert send.encrypt_with_ad(b"", b"x") != send.encrypt_with_ad(b"", b"x")
    send.set_nonce(MAX_NONCE - 1)
    receive.set_nonce(MAX_NONCE - 1)
    assert receive.decrypt_with_ad(b"", send.encrypt_with_ad(b"", b"x")) == b"x"
    with pytest.raises(NonceExhausted):
        send.encrypt_with_ad(b"", b"x")
    with pytest.raises(NonceExhausted):
        receive.decrypt_with_ad(b"", bytes(TAG_BYTES))


def test_a_failed_opening_leaves_the_nonce() -> None:
    send, receive = CipherState(bytes(32)), CipherState(bytes(32))
    with pytest.raises(NoiseError):
        receive.decrypt_with_ad(b"", bytes(TAG_BYTES))
    sealed = send.encrypt_with_ad(b"ad", b"x")
    with pytest.raises(NoiseError):
        receive.decrypt_with_ad(b"other", sealed)
    assert receive.decrypt_with_ad(b"ad", sealed) == b"x"
