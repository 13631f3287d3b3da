"""What is on the wire: five types of datagram, each with the same eight bytes in front.

All integers are in network byte order.

    type 1 | version 1 | zero 2 | index 4 | ...

    1 INITIATION    sender's index | e 32 | cookie 16 | zeros 68
    2 RESPONSE      receiver's index | Noise message of 116 (payload: sender's index 4, instance 16)
    3 CONFIRMATION  receiver's index | Noise message of 80 (payload: instance 16)
    4 COOKIE        receiver's index | e 32, of the initiation | cookie 16
    5 SEALED        receiver's index | counter 8 | sealed payload and tag

An *index* is a number a host gives to a handshake or to keys of its own, so that a datagram needs
no address to be understood. An *instance* is 16 random bytes a daemon chooses when it starts. The
answer to a datagram is never longer than the datagram.
"""

from __future__ import annotations

import struct
from enum import IntEnum, StrEnum

from sessiond.seal.noise import KEY_BYTES, TAG_BYTES

VERSION = 1
COOKIE_BYTES = 16
INSTANCE_BYTES = 16
INDEX = struct.Struct(">I")
_HEADER = struct.Struct(">BBHI")
_COUNTER = struct.Struct(">Q")


class Type(IntEnum):
    """The first byte."""

    INITIATION = 1
    RESPONSE = 2
    CONFIRMATION = 3
    COOKIE = 4
    SEALED = 5


_RESPONSE_BYTES = (
    _HEADER.size + KEY_BYTES + KEY_BYTES + TAG_BYTES + INDEX.size + INSTANCE_BYTES + TAG_BYTES
)
SIZES = {
    Type.INITIATION: _RESPONSE_BYTES,
    Type.RESPONSE: _RESPONSE_BYTES,
    Type.CONFIRMATION: _HEADER.size + KEY_BYTES + TAG_BYTES + INSTANCE_BYTES + TAG_BYTES,
    Type.COOKIE: _HEADER.size + KEY_BYTES + COOKIE_BYTES,
}
"""Bytes of each type that has one size."""
OVERHEAD = _HEADER.size + _COUNTER.size + TAG_BYTES
"""Bytes of a sealed datagram besides its payload."""
_NUMBERS = frozenset(Type)


class Reason(StrEnum):
    """Why a datagram changed nothing; what is counted by."""

    MALFORMED = "malformed"
    VERSION = "other version"
    UNKNOWN = "unknown index"
    FORGED = "forged"
    REPLAYED = "replayed"
    EXPIRED = "expired"
    BUSY = "too many handshakes"
    OURSELVES = "our own key"
    UNTRUSTED = "untrusted key"


class Refused(Exception):
    """A datagram was not accepted, and nothing changed.

    Attributes:
        reason: for a counter.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def header(type_: Type, index: int) -> bytes:
    """The first eight bytes."""
    return _HEADER.pack(type_, VERSION, 0, index)


def parse(datagram: bytes) -> tuple[Type, int, bytes]:
    """Take a datagram apart; nothing of it is authentic yet.

    Returns:
        Its type, its index and what follows.

    Raises:
        Refused: MALFORMED or VERSION.
    """
    if len(datagram) < _HEADER.size:
        raise Refused(Reason.MALFORMED, f"{len(datagram)} bytes")
    number, version, zero, index = _HEADER.unpack_from(datagram)
    if version != VERSION:
        raise Refused(Reason.VERSION, f"version {version}, this daemon speaks {VERSION}")
    if zero or number not in _NUMBERS:
        raise Refused(Reason.MALFORMED, f"type {number}, reserved {zero}")
    type_ = Type(number)
    if len(datagram) < OVERHEAD or len(datagram) != SIZES.get(type_, len(datagram)):
        raise Refused(Reason.MALFORMED, f"{type_.name} of {len(datagram)} bytes")
    return type_, index, datagram[_HEADER.size :]


def expect(type_: Type, datagram: bytes) -> tuple[int, bytes]:
    """Take a datagram of one type apart.

    Returns:
        Its index and what follows.

    Raises:
        Refused: MALFORMED or VERSION.
    """
    found, index, body = parse(datagram)
    if found is not type_:
        raise Refused(Reason.MALFORMED, f"{found.name} where {type_.name} is due")
    return index, body


def sealed_header(index: int, counter: int) -> bytes:
    """What stands before the sealed payload, and is bound to it."""
    return header(Type.SEALED, index) + _COUNTER.pack(counter)


def sealed_body(body: bytes) -> tuple[int, bytes]:
    """The counter and the sealed payload of a parsed SEALED datagram."""
    (counter,) = _COUNTER.unpack_from(body)
    return counter, body[_COUNTER.size :]
