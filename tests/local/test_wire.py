"""The one definition of the local protocol: what it reads, what it refuses, and that it never
fails in another way."""

from __future__ import annotations

import contextlib
import pickle
import socket
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libhsock import errors, wire
from libhsock.errors import HsockError, ProtocolError, UsageError

CALLS = [
    wire.Hello("test"),
    wire.Resolve("server.test", "7000", 6, True),
    wire.Attach(5, "connect", "server.test", "7000"),
    wire.Attach(0, "accept"),
    wire.List("ab", 10),
    wire.Show("ab"),
    wire.Rebind("ab", "eth0"),
    wire.Detach("ab"),
    wire.Monitor(),
    wire.Network(),
    wire.GetStats(),
    wire.Peers(),
    wire.Peer("server.test"),
    wire.Pin("server.test", "aaaa"),
    wire.Forget("server.test"),
    wire.Fingerprint(),
]
calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 9), inner),
    max_leaves=20,
)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.method)
def test_a_request_comes_out_as_it_went_in(call: wire.Call[Any]) -> None:
    message = wire.decode(wire.request(7, call))
    assert isinstance(message, wire.Request)
    assert (message.id, message.method) == (7, call.method)
    assert wire.parse(message) == call


@calm
@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    survive(data)


@calm
@given(VALUES)
def test_any_value_is_a_message_or_a_protocol_error(value: Any) -> None:
    survive(msgpack.packb(value))


@calm
@given(st.sampled_from(CALLS), st.data())
def test_any_damage_to_a_request_is_a_typed_error(call: wire.Call[Any], data: Any) -> None:
    packet = bytearray(wire.request(7, call))
    at = data.draw(st.integers(0, len(packet) - 1))
    match data.draw(st.sampled_from(["flip", "insert", "delete", "cut"])):
        case "flip":
            packet[at] ^= 1 << data.draw(st.integers(0, 7))
        case "insert":
            packet.insert(at, data.draw(st.integers(0, 255)))
        case "delete":
            del packet[at]
        case "cut":
            del packet[at:]
    survive(bytes(packet))


@calm
@given(st.sampled_from([*wire.CALLS]), st.dictionaries(st.text(), VALUES, max_size=3))
def test_any_parameters_are_a_call_or_a_usage_error(method: str, params: dict[str, Any]) -> None:
    with contextlib.suppress(UsageError):
        assert wire.parse(wire.Request(1, method, params)).method == method


@calm
@given(VALUES)
def test_any_result_is_a_record_or_a_protocol_error(value: Any) -> None:
    for shape in (
        *(wire.Record, wire.Event, wire.Page, wire.Resolution),
        *(wire.NetworkView, wire.PeerKeys, wire.HostKey),
    ):
        with contextlib.suppress(ProtocolError):
            assert shape.from_map(shape.from_map(value).to_map()) == shape.from_map(value)


def survive(data: bytes) -> None:
    try:
        message = wire.decode(data)
        if isinstance(message, wire.Request):
            wire.parse(message)
    except (ProtocolError, UsageError):
        pass


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "incomplete|unpack"),
        (b"\xc1", "malformed"),
        (msgpack.packb([0, 1, "list"]), "neither"),
        (msgpack.packb([0, 0, "list", {}]), "neither"),
        (msgpack.packb([0, 2**32, "list", {}]), "neither"),
        (msgpack.packb([False, 1, "list", {}]), "message type"),
        (msgpack.packb([0.0, 1, "list", {}]), "message type"),
        (msgpack.packb([0, 1, "list", []]), "neither"),
        (msgpack.packb([0, 1, "list", {1: 2}]), "key"),
        (msgpack.packb([0, 1, b"list", {}]), "type bytes"),
        (msgpack.packb([0, 1, "list", {"a": msgpack.ExtType(5, b"x")}]), "ExtType"),
        (msgpack.packb([0, 1, "list", {"a": msgpack.Timestamp(0)}]), "Timestamp"),
        (msgpack.packb([0, 1, "list", {}]) + b"\xc0", "extra"),
        (b"\x94\x00\x01\xa4list\x82\xa1a\x01\xa1a\x02", "twice"),
        (b"\x94\x00\x01\xa4list\x81\xa1a\xa2\xff\xfe", "utf-8"),
        (b"\xdd\xff\xff\xff\xff", "exceeds|malformed"),
        (b"\x91" * 60000 + b"\xc0", "deep|malformed"),
        (b"\x91" * 9 + b"\xc0", "message type|levels"),
        (msgpack.packb([0, 1, "list", {"a": [[[[[[[]]]]]]]}]), "levels"),
        (b"\x00" * 70000, "limit is 65536"),
        (msgpack.packb([1, 1, {"code": 5}, None]), "code"),
        (msgpack.packb([1, 1, "no", None]), "instead of a map"),
        (msgpack.packb([1, 1, {"code": "x", "message": "y"}, 5]), "neither"),
    ],
)
def test_what_is_malformed_is_refused_with_the_reason(data: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=f"(?i){why}"):
        wire.decode(data)


@pytest.mark.parametrize(
    ("method", "params", "why"),
    [
        ("nonsense", {}, "unknown method 'nonsense'"),
        ("show", {}, "show: field 'session' is missing"),
        ("show", {"session": "ab", "colour": "red"}, "show: unknown field 'colour'"),
        ("show", {"session": ""}, "show: session: 0 is not in 1..64"),
        ("show", {"session": "a" * 65}, "show: session: 65 is not in 1..64"),
        ("show", {"session": 5}, "show: session: int instead of str"),
        ("list", {"limit": True}, "list: limit: bool instead of int"),
        ("list", {"limit": 0}, "list: limit: 0 is not in 1..2147483647"),
        ("attach", {"fd": -1, "role": "connect"}, "attach: fd: -1 is not in 0..2147483647"),
        ("attach", {"fd": 1, "role": "boss"}, "attach: role: not one of connect, accept, attach"),
        ("resolve", {"name": "a", "service": "1", "family": False}, "family: not one of 0, 4, 6"),
        ("hello", {"client": "x", "versions": "1"}, "hello: versions: str instead of an array"),
        ("hello", {"client": "x", "versions": []}, "hello: versions: 0 is not in 1..16"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(method: str, params: Any, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        wire.parse(wire.Request(1, method, params))
    assert why in str(caught.value)


def test_replies_of_newer_daemons_are_understood() -> None:
    record = {"session": "ab", "state": "levitating", "mobile": True, "local": "a", "remote": "b"}
    read = wire.Record.from_map(record | {"colour": "red"})
    assert (read.state, read.gap_ms) == ("levitating", None)
    newer = wire.decode(msgpack.packb([1, 3, {"code": "tired", "message": "no"}, None]))
    assert isinstance(newer, wire.Reply)
    assert type(newer.error) is HsockError


def test_what_a_client_does_not_read_of_a_reply_is_no_fault_of_it() -> None:
    newer: Any = {"later": [[[[[[[[[["deep"]]]]]]]]]], "bytes": b"x"}
    packet = msgpack.packb([1, 3, None, newer])
    assert wire.reply_to(3, packet).unwrap() == newer
    with pytest.raises(ProtocolError):
        wire.decode(packet)


@calm
@given(st.binary(max_size=300) | VALUES.map(msgpack.packb))
def test_any_bytes_are_for_a_client_a_reply_or_a_typed_error(data: bytes) -> None:
    with contextlib.suppress(HsockError):
        assert wire.reply_to(3, data).id in (0, 3)
    with contextlib.suppress(HsockError):
        assert isinstance(wire.event(data), wire.Event | None)


def test_a_float_may_travel_as_an_int() -> None:
    assert wire.Event.from_map({"session": "a", "kind": "moved", "time": 5}).time == 5.0


def test_what_does_not_fit_is_refused_by_the_sender() -> None:
    with pytest.raises(UsageError, match="the limit is 65536"):
        wire.reply(1, {"text": "x" * wire.MAX_PACKET})
    with pytest.raises(UsageError, match="can't be said"):
        wire.reply(1, {"number": 2**70})


def test_an_error_always_fits() -> None:
    long = errors.CouldNotConnect("x" * 100_000, ["y" * 10_000] * 1000)
    assert len(wire.failure(1, long)) < wire.MAX_PACKET


@pytest.mark.parametrize("kind", [*errors.BY_CODE.values(), errors.ConnectTimedOut])
def test_errors_keep_their_kind_on_the_way(kind: type[HsockError]) -> None:
    reply = wire.decode(wire.failure(4, kind("no", ["this", "that"])))
    assert isinstance(reply, wire.Reply)
    with pytest.raises(errors.BY_CODE[kind.code]) as caught:
        reply.unwrap()
    assert str(caught.value) == "no; tried: this, that"
    copied = pickle.loads(pickle.dumps(kind("no", ["this"])))
    assert (type(copied), copied.message, copied.tried) == (kind, "no", ("this",))


def test_errors_of_connecting_are_what_existing_code_catches() -> None:
    assert issubclass(errors.CouldNotConnect, ConnectionError)
    assert issubclass(errors.ConnectTimedOut, TimeoutError)
    assert issubclass(errors.NameNotResolved, socket.gaierror)
    assert issubclass(errors.NoLocalAddress, OSError)
    assert all(issubclass(kind, HsockError) for kind in errors.BY_CODE.values())
