"""Messages to payloads and back: the one place where a peer's messages are read.

A payload is a msgpack array of messages and a message an array ``[type, field, ...]`` in the order
of its class in ``core.messages``. Everything is checked against the types there before the core
sees it; what does not fit is a ``Malformed`` with a short reason. Who says it, and in which order,
is sealed around the payload (``sessiond.seal``).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import msgpack
import msgspec

from sessiond.core import messages as m
from sessiond.core.tuples import Endpoint

MAX_PAYLOAD = 1168
"""Bytes; sealed they are 1,200, which fit every IPv6 path (RFC 8200 section 5) with room for a
tunnel."""
MAX_WINDOW = 1 << 30
"""Bytes (RFC 7323 section 2.3)."""
MAX_TEXT = 200
MAX_ADDRESSES = 32

_TYPES: tuple[type, ...] = (
    m.Bind,
    m.Bound,
    m.Ping,
    m.Pong,
    m.Prepare,
    m.Prepared,
    m.Move,
    m.Moved,
    m.Settled,
    m.Refused,
    m.Close,
)
_NUMBERS = {type_: number for number, type_ in enumerate(_TYPES, start=1)}
_LIMITS = {
    "max_str_len": MAX_TEXT,
    "max_bin_len": 64,
    "max_array_len": 4 * m.ENTRIES_PER_MESSAGE,
    "max_map_len": 0,
    "max_ext_len": 0,
}


class Malformed(ValueError):
    """A payload that is not of this protocol; nothing of it was used."""


def encode(messages: Sequence[m.Message]) -> Iterator[bytes]:
    """Payloads of at most ``MAX_PAYLOAD`` bytes that carry the messages in order."""
    parts: list[bytes] = []
    room = _ROOM
    for message in messages:
        part = msgpack.packb((_NUMBERS[type(message)], *message))
        if parts and len(part) > room:
            yield _payload(parts)
            parts, room = [], _ROOM
        parts.append(part)
        room -= len(part)
    if parts:
        yield _payload(parts)


def decode(payload: bytes) -> list[m.Message]:
    """Read one payload.

    Raises:
        Malformed: it is no array of messages, or a field is not what it must be.
    """
    try:
        outer = msgpack.unpackb(payload, use_list=False, **_LIMITS)
        return [_message(item) for item in msgspec.convert(outer, tuple[Any, ...])]
    except Malformed:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise Malformed(str(error)[:MAX_TEXT]) from error


_PACKER = msgpack.Packer()
_ROOM = MAX_PAYLOAD - 3
"""Without the array's own header."""


def _payload(parts: list[bytes]) -> bytes:
    return b"".join((_PACKER.pack_array_header(len(parts)), *parts))


def _message(raw: Any) -> m.Message:
    if not isinstance(raw, tuple) or not raw or not isinstance(raw[0], int):
        raise Malformed("a message is not an array that begins with its type")
    if not 1 <= raw[0] <= len(_TYPES):
        raise Malformed(f"message type {raw[0]} is unknown")
    message: m.Message = msgspec.convert(raw[1:], _TYPES[raw[0] - 1])
    _check(message)
    return message


def _check(message: m.Message) -> None:
    """What the types alone don't say: ranges, lengths, canonical addresses."""
    match message:
        case m.Bind():
            _need(len(message.session) == 16, "session id")
            _endpoints(message.local, message.remote)
            _need(len(message.proof) == m.PROOF_BYTES, "proof")
            _addresses(message.addresses)
        case m.Bound():
            _need(len(message.proof) == m.PROOF_BYTES, "proof")
            _addresses(message.addresses)
        case m.Ping():
            _addresses(message.addresses)
        case m.Pong():
            _endpoints(message.observed)
            _addresses(message.addresses)
        case m.Move():
            _addresses((message.local, message.remote))
            for entry in message.entries:
                _need(0 < entry.local_port < 65536 and 0 < entry.remote_port < 65536, "port")
                _sequence(entry.rcv_nxt, entry.window)
        case m.Moved():
            for moved in message.entries:
                _sequence(moved.rcv_nxt, moved.window)


def _sequence(rcv_nxt: int, window: int) -> None:
    _need(0 <= rcv_nxt < 2**32, "rcv_nxt")
    _need(0 <= window <= MAX_WINDOW, "window")


def _endpoints(*endpoints: Endpoint) -> None:
    for endpoint in endpoints:
        _addresses((endpoint.address,))
        _need(0 <= endpoint.port < 65536, "port")


def _addresses(addresses: Sequence[str]) -> None:
    _need(len(addresses) <= MAX_ADDRESSES, "too many addresses")
    for address in addresses:
        _need(_is_canonical(address), "address, or not in canonical form")


@lru_cache(maxsize=4096)
def _is_canonical(address: str) -> bool:
    try:
        return str(ipaddress.ip_address(address)) == address
    except ValueError:
        return False


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise Malformed(f"bad {what}")
