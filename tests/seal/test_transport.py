"""Sealed datagrams: what opens, what never does, and keys that change without a loss."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from sessiond.seal import transport as t
from sessiond.seal.datagram import OVERHEAD, Reason, Refused
from sessiond.seal.indices import Indices
from sessiond.seal.noise import MAX_NONCE, CipherState
from sessiond.seal.replay_window import WINDOW
from sessiond.seal.transport import Keypair, NoKeys, Transport

from . import calm
from .hosts import associate, flipped, host, shake


@pytest.fixture
def ends() -> tuple[Transport, Transport]:
    return associate(host("a"), host("b"))


def refused(end: Transport, datagram: bytes, now: float = 0.0) -> Reason:
    with pytest.raises(Refused) as caught:
        end.open(datagram, now)
    return caught.value.reason


def keypairs(alice: Indices[Any], bob: Indices[Any], now: float = 0.0) -> tuple[Keypair, Keypair]:
    """What a handshake begun by Alice gives, without its cost."""
    first, second = random.randbytes(32), random.randbytes(32)
    a, b = alice.allocate(None), bob.allocate(None)
    return (
        Keypair(True, CipherState(first), CipherState(second), a, b, now),
        Keypair(False, CipherState(second), CipherState(first), b, a, now),
    )


@given(payload=st.binary(max_size=1300))
@settings(max_examples=30, deadline=None)
def test_what_is_sealed_opens_at_the_other_end(payload: bytes) -> None:
    alice, bob = associate(host("a"), host("b"))
    for sender, receiver in ((alice, bob), (bob, alice)):
        datagram = sender.seal(payload, 0.0)
        assert len(datagram) == len(payload) + OVERHEAD
        assert receiver.open(datagram, 0.0)[:2] == (payload, True)


def test_the_header_is_as_documented() -> None:
    indices, others = Indices[Any](lambda: 7), Indices[Any](lambda: 0x01020304)
    alice = Transport(indices, counter=0x1122334455667788)
    alice.install(keypairs(indices, others)[0])
    header = alice.seal(b"", 0.0)[:16]
    assert header == struct.pack(">BBHIQ", 5, 1, 0, 0x01020304, 0x1122334455667788)


@pytest.mark.parametrize("initiator", [True, False])
def test_the_seal_is_as_documented(initiator: bool) -> None:
    key, indices = bytes(range(32)), Indices[Any](lambda: 7)
    end = Transport(indices)
    end.install(
        Keypair(initiator, CipherState(key), CipherState(key), indices.allocate(None), 8, 0.0)
    )
    header = struct.pack(">BBHIQ", 5, 1, 0, 7, 0x1122334455667788)
    nonce = bytes(4) + struct.pack("<Q", 0x1122334455667788)
    from_peer = bytes((not initiator,)) + header
    sealed = ChaCha20Poly1305(key).encrypt(nonce, b"by hand", from_peer)
    assert end.open(header + sealed, 0.0).payload == b"by hand"


def test_every_flipped_bit_is_refused(ends: tuple[Transport, Transport]) -> None:
    alice, bob = ends
    datagram = alice.seal(b"move 36 sessions", 0.0)
    for place, wrong in flipped(datagram):
        reason = refused(bob, wrong)
        if place >= 8:
            assert reason in (Reason.FORGED, Reason.REPLAYED)
    assert bob.open(datagram, 0.0).payload == b"move 36 sessions"


def test_every_truncation_and_extension_is_refused(ends: tuple[Transport, Transport]) -> None:
    alice, bob = ends
    datagram = alice.seal(b"move 36 sessions", 0.0)
    for size in range(len(datagram)):
        assert refused(bob, datagram[:size]) in (Reason.MALFORMED, Reason.FORGED)
    for more in range(1, 40):
        assert refused(bob, datagram + bytes(more)) is Reason.FORGED
    assert bob.open(datagram, 0.0).payload == b"move 36 sessions"


@calm
@given(junk=st.binary(max_size=100))
def test_junk_is_refused_and_nothing_else(junk: bytes) -> None:
    alice, _ = associate(host("a"), host("b"))
    refused(alice, junk)
    refused(alice, b"\x05\x01\x00\x00" + junk)


def test_a_replay_is_refused_also_under_the_previous_keys() -> None:
    one, other = host("a"), host("b")
    alice, bob = associate(one, other)
    old = alice.seal(b"old keys", 0.0)
    bob.open(old, 0.0)
    assert refused(bob, old) is Reason.REPLAYED
    rekey(alice, bob, *keypairs(one.indices, other.indices))
    new = alice.seal(b"new keys", 0.0)
    bob.open(new, 0.0)
    assert [refused(bob, datagram) for datagram in (old, new)] == [Reason.REPLAYED] * 2


def test_what_was_overtaken_by_a_whole_window_is_refused(
    ends: tuple[Transport, Transport],
) -> None:
    alice, bob = ends
    late, just_in_time = alice.seal(b"late", 0.0), alice.seal(b"just in time", 0.0)
    for _ in range(WINDOW - 1):
        newest = alice.seal(b"", 0.0)
    bob.open(newest, 0.0)
    assert refused(bob, late) is Reason.REPLAYED
    assert bob.open(just_in_time, 0.0)[:2] == (b"just in time", False)


def test_a_forged_counter_does_not_move_the_window(ends: tuple[Transport, Transport]) -> None:
    alice, bob = ends
    datagram = alice.seal(b"genuine", 0.0)
    for counter in (WINDOW, 2**63, MAX_NONCE - 1):
        forged = datagram[:8] + counter.to_bytes(8, "big") + datagram[16:]
        assert refused(bob, forged) is Reason.FORGED
    reserved = datagram[:8] + MAX_NONCE.to_bytes(8, "big") + datagram[16:]
    assert refused(bob, reserved) is Reason.MALFORMED
    assert bob.open(datagram, 0.0)[:2] == (b"genuine", True)


def test_a_reflected_datagram_is_refused(ends: tuple[Transport, Transport]) -> None:
    assert refused(ends[0], ends[0].seal(b"", 0.0)) is Reason.UNKNOWN


def test_a_reflected_datagram_is_refused_even_if_both_hosts_chose_one_index() -> None:
    one, other = host("a", Indices(lambda: 9)), host("b", Indices(lambda: 9))
    alice, bob = associate(one, other)
    # Bob's counter is ahead by one, so no replay window hides what is tested.
    alice.seal(b"", 0.0)
    assert refused(alice, alice.seal(b"", 0.0)) is Reason.FORGED
    bob.seal(b"", 0.0)
    assert refused(bob, bob.seal(b"", 0.0)) is Reason.FORGED


@pytest.mark.parametrize("initiator", [True, False])
def test_the_direction_is_bound_even_if_both_keys_were_one(initiator: bool) -> None:
    indices = Indices[Any]()
    index = indices.allocate(None)
    end = Transport(indices)
    end.install(
        Keypair(initiator, CipherState(bytes(32)), CipherState(bytes(32)), index, index, 0.0)
    )
    assert refused(end, end.seal(b"", 0.0)) is Reason.FORGED


def test_a_datagram_of_another_association_is_refused() -> None:
    one, other, third = host("a"), host("b"), host("c")
    alice_bob, bob_alice = associate(one, other)
    alice_carol, carol_alice = associate(one, third)
    bob_alice.seal(b"", 0.0)
    from_bob, from_carol = bob_alice.seal(b"bob", 0.0), carol_alice.seal(b"carol", 0.0)
    assert refused(alice_carol, from_bob) is Reason.UNKNOWN
    readdressed = from_carol[:8] + from_bob[8:]
    assert refused(alice_carol, readdressed) is Reason.FORGED
    assert one.indices.owner(int.from_bytes(from_bob[4:8], "big")) is alice_bob
    assert one.indices.owner(int.from_bytes(from_carol[4:8], "big")) is alice_carol
    assert alice_bob.open(from_bob, 0.0).payload == b"bob"
    assert alice_carol.open(from_carol, 0.0).payload == b"carol"


def test_no_counter_is_used_twice_and_the_last_ends_it() -> None:
    mine, theirs = Indices[Any](), Indices[Any]()
    alice, bob = Transport(mine, counter=MAX_NONCE - 2), Transport(theirs)
    initiators, responders = keypairs(mine, theirs)
    alice.install(initiators)
    bob.install(responders)
    for _ in range(2):
        bob.open(alice.seal(b"", 0.0), 0.0)
    with pytest.raises(NoKeys):
        alice.seal(b"", 0.0)


def test_keys_are_used_for_a_bounded_number_of_datagrams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(t, "REKEY_AFTER_MESSAGES", 3)
    monkeypatch.setattr(t, "REJECT_AFTER_MESSAGES", 5)
    one, other = host("a"), host("b")
    alice, bob = associate(one, other)
    for sent in range(5):
        assert (alice.rekey_at <= 0.0) is (sent >= 3)
        bob.open(alice.seal(b"", 0.0), 0.0)
    with pytest.raises(NoKeys):
        alice.seal(b"", 0.0)
    rekey(alice, bob, *keypairs(one.indices, other.indices))
    assert alice.rekey_at > 0.0
    bob.open(alice.seal(b"", 0.0), 0.0)


def test_the_initiator_renews_the_keys_and_the_responder_if_it_does_not(
    ends: tuple[Transport, Transport],
) -> None:
    alice, bob = ends
    assert alice.rekey_at == t.REKEY_AFTER_SECONDS
    assert bob.rekey_at == t.REKEY_AFTER_SECONDS + t.REKEY_SLACK_SECONDS


def test_keys_that_are_too_old_neither_seal_nor_open_and_are_forgotten() -> None:
    one, other = host("a"), host("b")
    alice, bob = associate(one, other, now=100.0)
    last = 100.0 + t.REJECT_AFTER_SECONDS
    assert alice.expires_at == last
    datagram = alice.seal(b"", last - 0.001)
    with pytest.raises(NoKeys):
        alice.seal(b"", last)
    assert refused(bob, datagram, last) is Reason.EXPIRED
    assert bob.open(datagram, last - 0.001).newest
    for end, indices in ((alice, one.indices), (bob, other.indices)):
        end.expire(last - 0.001)
        assert len(indices) == 1
        end.expire(last)
        assert len(indices) == 0
        assert (end.rekey_at, end.expires_at) == (float("-inf"), float("inf"))
    assert refused(bob, datagram, last) is Reason.UNKNOWN


def test_no_keys_no_datagrams() -> None:
    end = Transport(Indices())
    with pytest.raises(NoKeys, match="handshake"):
        end.seal(b"", 0.0)
    assert end.rekey_at == float("-inf")
    assert not end.confirmed


def test_closing_forgets_all_keys() -> None:
    one, other = host("a"), host("b")
    alice, bob = associate(one, other)
    alice.install(keypairs(one.indices, other.indices)[0])
    alice.close()
    assert len(one.indices) == 0
    with pytest.raises(NoKeys):
        alice.seal(b"", 0.0)
    assert refused(alice, bob.seal(b"", 0.0)) is Reason.UNKNOWN


def rekey(alice: Transport, bob: Transport, initiators: Keypair, responders: Keypair) -> None:
    alice.install(initiators)
    bob.install(responders)
    alice.open(bob.seal(b"", 0.0), 0.0)


def test_the_initiator_seals_under_new_keys_only_when_the_peer_is_known_to_have_them() -> None:
    one, other = host("a"), host("b")
    alice, bob = associate(one, other)
    done = shake(one, other)
    alice.install(done.initiators)
    assert not alice.confirmed
    # The confirmation is lost: Bob knows the old keys only, and nothing else is.
    assert bob.open(alice.seal(b"under the old keys", 0.0), 0.0).payload
    bob.install(done.responders)
    assert bob.confirmed
    assert alice.open(bob.seal(b"", 0.0), 0.0).newest
    assert alice.confirmed
    assert done.initiators.sent == 0
    bob.open(alice.seal(b"under the new ones", 0.0), 0.0)
    assert done.initiators.sent == 1


def test_at_first_contact_the_initiator_need_not_wait() -> None:
    one, other = host("a"), host("b")
    done = shake(one, other)
    alice, bob = Transport(one.indices), Transport(other.indices)
    alice.install(done.initiators)
    assert alice.rekey_at == t.REKEY_AFTER_SECONDS
    early = alice.seal(b"with the confirmation", 0.0)
    bob.install(done.responders)
    assert bob.open(early, 0.0).payload == b"with the confirmation"


def test_indices_of_dropped_keys_are_free() -> None:
    one, other = host("a"), host("b")
    alice, bob = associate(one, other)
    for _ in range(5):
        rekey(alice, bob, *keypairs(one.indices, other.indices))
        # Never confirmed: the next handshake takes its place.
        alice.install(keypairs(one.indices, other.indices)[0])
    assert len(one.indices) == 3
    assert sum(other.indices.owner(index) is bob for index in other.indices._owners) == 2


def test_two_handshakes_that_cross_leave_one_association() -> None:
    one, other = host("a"), host("b")
    alice, bob = associate(one, other)
    from_alice, from_bob = shake(one, other), shake(other, one)
    alice.install(from_alice.initiators)
    bob.install(from_bob.initiators)
    alice.install(from_bob.responders)
    bob.install(from_alice.responders)
    for number in range(4):
        to_bob, to_alice = alice.seal(b"%d" % number, 0.0), bob.seal(b"%d" % number, 0.0)
        assert bob.open(to_bob, 0.0)[:2] == (b"%d" % number, True)
        assert alice.open(to_alice, 0.0)[:2] == (b"%d" % number, True)
    assert alice.confirmed
    assert bob.confirmed


class UnderWay(NamedTuple):
    """Something sent and not yet delivered."""

    to: int
    what: bytes | Keypair
    """A datagram; or what the confirmation of a handshake gives to who reads it."""
    rekeying: int
    """Which one gave its keys."""


class Wire:
    """Two ends and what is between them, delivered in any order."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.indices = Indices[Any](), Indices[Any]()
        self.ends = Transport(self.indices[0]), Transport(self.indices[1])
        self.under_way: list[UnderWay] = []
        self.rekeyings = 0
        self.rekeying_of: dict[int, int] = {}
        """By the index of a keypair."""
        self.newest = [-1, -1]
        self.rekey()

    def send(self) -> None:
        end = self.data.draw(st.integers(0, 1))
        if self.rekeyings > 1 or all(own.confirmed for own in self.ends):
            self.put(1 - end, self.ends[end].seal(b"", 0.0))

    def rekey(self) -> None:
        """Begin, unless a change of keys is under way or datagrams of the one before are."""
        if all(sent.rekeying == self.rekeyings for sent in self.under_way) and (
            self.rekeyings == 0 or all(end.confirmed for end in self.ends)
        ):
            begins = self.data.draw(st.integers(0, 1))
            initiators, responders = keypairs(self.indices[begins], self.indices[1 - begins])
            self.rekeyings += 1
            for keypair in (initiators, responders):
                self.rekeying_of[keypair.local_index] = self.rekeyings
            self.ends[begins].install(initiators)
            self.put(1 - begins, responders)

    def deliver(self) -> None:
        if self.under_way:
            place = self.data.draw(st.integers(0, len(self.under_way) - 1))
            end, what, _ = self.under_way.pop(place)
            if isinstance(what, Keypair):
                self.ends[end].install(what)
                self.put(1 - end, self.ends[end].seal(b"", 0.0))
            else:
                counter = int.from_bytes(what[8:16], "big")
                opened = self.ends[end].open(what, 0.0)
                assert opened.newest is (counter > self.newest[end])
                self.newest[end] = max(self.newest[end], counter)

    def put(self, to: int, what: bytes | Keypair) -> None:
        index = what.local_index if isinstance(what, Keypair) else int.from_bytes(what[4:8], "big")
        self.under_way.append(UnderWay(to, what, self.rekeying_of[index]))


@given(
    data=st.data(),
    steps=st.lists(st.sampled_from([Wire.send, Wire.deliver, Wire.rekey]), max_size=80),
)
@settings(max_examples=200, deadline=None)
def test_no_datagram_is_lost_while_keys_change_whatever_the_order(
    data: st.DataObject, steps: list[Callable[[Wire], None]]
) -> None:
    wire = Wire(data)
    for step in steps:
        step(wire)
    while wire.under_way:
        wire.deliver()
    assert all(end.confirmed for end in wire.ends)
    assert [len(indices) for indices in wire.indices] == [min(2, wire.rekeyings)] * 2
