"""A source address of our choice for a socket whose port is locked, so that it can't be bound anew.

``connect`` takes such a socket's source from the route. So for the time of a batch there is a route
to the peer that prefers the address, in a table of its own, which a rule opens only to sockets with
a mark of our own (SO_MARK). What a socket sends later is routed as everything else is: the kernel
forgets a cached route when any route changes.

Netlink as in rtnetlink(7) and include/uapi/linux/{rtnetlink,fib_rules}.h. A daemon that is killed
in a batch leaves a rule for a mark that nobody has; the next one replaces what it needs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from sessiond.rebind.linux import SOL_SOCKET

MARK = 0x20060707
TABLE = 20060
PRIORITY = 1
"""Of the rule: after the local table's."""

_SO_MARK = 36

_NEWROUTE, _DELROUTE, _GETROUTE, _NEWRULE, _DELRULE = 24, 25, 26, 32, 33
_REQUEST, _ACK, _REPLACE, _EXCLUSIVE, _CREATE = 1, 4, 0x100, 0x200, 0x400
_ERROR = 2

_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC, _RTA_TABLE = 1, 2, 4, 5, 7, 15
_RTA_VIA = 18
_WAY = (_RTA_OIF, _RTA_GATEWAY, _RTA_VIA)
_FRA_PRIORITY, _FRA_FWMARK, _FRA_TABLE = 6, 10, 15
_RTN_UNICAST = _FR_ACT_TO_TBL = 1
_RTPROT_STATIC = 4
_RTNH_F_ONLINK = 4
_UNIVERSE, _LINK = 0, 253

_HEADER = struct.Struct("=IHHII")
_MESSAGE = struct.Struct("=8BI")  # struct rtmsg and, with the same layout, struct fib_rule_hdr
_ATTRIBUTE = struct.Struct("=HH")
_U32 = struct.Struct("=I")
_I32 = struct.Struct("=i")


class Steering:
    """The routes of one batch; ``close`` takes them away."""

    def __init__(self) -> None:
        self._netlink: socket.socket | None = None
        self._sources: dict[str, str] = {}
        self._undo: dict[bytes, int] = {}

    def prefer(self, source: str, destination: str, interface: str | None) -> None:
        """Give marked sockets this source address towards that destination, until told otherwise.

        Args:
            interface: the one to leave by; None: the one that the routes say.

        Raises:
            OSError: there is no route, or the address is not this host's.
        """
        if self._sources.get(destination) == source:
            return
        family = socket.AF_INET6 if ":" in destination else socket.AF_INET
        here, there = socket.inet_pton(family, source), socket.inet_pton(family, destination)
        way = self._way(family, here, there, interface)
        gateway = any(kind in (_RTA_GATEWAY, _RTA_VIA) for kind, _ in way)
        scope = _UNIVERSE if gateway or family == socket.AF_INET6 else _LINK
        flags = _RTNH_F_ONLINK if gateway else 0
        bits = 8 * len(there)
        route = _MESSAGE.pack(family, bits, 0, 0, 0, _RTPROT_STATIC, scope, _RTN_UNICAST, flags)
        route += _attribute(_RTA_DST, there) + _attribute(_RTA_TABLE, _U32.pack(TABLE))
        details = b"".join(_attribute(kind, value) for kind, value in way)
        self._open(family)
        self._ask(_NEWROUTE, _CREATE | _REPLACE, route + details + _attribute(_RTA_PREFSRC, here))
        self._sources[destination] = source
        self._undo[route] = _DELROUTE

    def close(self) -> None:
        """Nothing of it is left."""
        if self._netlink is None:
            return
        try:
            for what, kind in reversed(self._undo.items()):
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                    self._ask(kind, 0, what)  # it went with its interface or address
        finally:
            self._netlink.close()
            self._netlink = None
            self._undo.clear()
            self._sources.clear()

    def _way(
        self, family: int, here: bytes, there: bytes, interface: str | None
    ) -> list[tuple[int, bytes]]:
        bits = 8 * len(there)
        question = _MESSAGE.pack(family, bits, bits, 0, 0, 0, 0, 0, 0)
        question += _attribute(_RTA_DST, there) + _attribute(_RTA_SRC, here)
        if interface is not None:
            question += _attribute(_RTA_OIF, _U32.pack(socket.if_nametoindex(interface)))
        found = _attributes(self._ask(_GETROUTE, 0, question)[_MESSAGE.size :])
        return [(kind, value) for kind, value in found if kind in _WAY]

    def _open(self, family: int) -> None:
        rule = _MESSAGE.pack(family, 0, 0, 0, 0, 0, 0, _FR_ACT_TO_TBL, 0)
        for kind, value in ((_FRA_PRIORITY, PRIORITY), (_FRA_FWMARK, MARK), (_FRA_TABLE, TABLE)):
            rule += _attribute(kind, _U32.pack(value))
        if rule not in self._undo:
            with contextlib.suppress(FileExistsError):  # left by a daemon that was killed
                self._ask(_NEWRULE, _CREATE | _EXCLUSIVE, rule)
            self._undo[rule] = _DELRULE

    def _ask(self, kind: int, flags: int, payload: bytes) -> bytes:
        """One request; its answer's payload, empty where the answer is only yes."""
        if self._netlink is None:
            self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        if kind != _GETROUTE:
            flags |= _ACK
        size = _HEADER.size + len(payload)
        self._netlink.send(_HEADER.pack(size, kind, flags | _REQUEST, 1, 0) + payload)
        answer = self._netlink.recv(65536)
        _, answered, *_ = _HEADER.unpack_from(answer)
        if answered == _ERROR:
            (error,) = _I32.unpack_from(answer, _HEADER.size)
            if error:
                raise OSError(-error, os.strerror(-error))
            return b""
        return answer[_HEADER.size :]


@contextmanager
def marked(sock: socket.socket) -> Iterator[None]:
    """Let a socket use what ``Steering.prefer`` has set up."""
    before = sock.getsockopt(SOL_SOCKET, _SO_MARK)
    sock.setsockopt(SOL_SOCKET, _SO_MARK, MARK)
    try:
        yield
    finally:
        sock.setsockopt(SOL_SOCKET, _SO_MARK, before)


def _attribute(kind: int, value: bytes) -> bytes:
    size = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(size, kind) + value + bytes(-size % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        size, kind = _ATTRIBUTE.unpack_from(data)
        yield kind, data[_ATTRIBUTE.size : size]
        data = data[size + -size % 4 :]
