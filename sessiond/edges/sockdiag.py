"""Tells when a TCP socket is no more, by its cookie (SO_COOKIE), without holding it.

The kernel multicasts every TCP socket it destroys (net/core/sock_diag.c,
sock_diag_broadcast_destroy); most are nobody's session. After reading what has come this rests for
a moment, so that a busy server's closings are read in batches. The socket of a process that ended
while bytes or a FIN were unacknowledged is destroyed only when TCP has done with it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from struct import Struct

from pyroute2.netlink import (
    NETLINK_SOCK_DIAG,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
)

log = logging.getLogger(__name__)

# linux/sock_diag.h, inet_diag.h
SOCK_DIAG_BY_FAMILY = 20
SKNLGRP_INET_TCP_DESTROY, SKNLGRP_INET6_TCP_DESTROY = 1, 3
GROUPS = 1 << SKNLGRP_INET_TCP_DESTROY - 1 | 1 << SKNLGRP_INET6_TCP_DESTROY - 1
SO_RCVBUFFORCE, KERNEL = 33, 0
TCP_TIME_WAIT, TCP_LISTEN, TCP_NEW_SYN_RECV = 6, 10, 12
CONNECTIONS = 0xFFF & ~(1 << TCP_TIME_WAIT | 1 << TCP_LISTEN | 1 << TCP_NEW_SYN_RECV)
"""Bits of states: of full sockets in the table of connections."""
TIMEWAIT_TIMER = 3
"""idiag_timer of what TIME_WAIT, or an orphan's FIN_WAIT2, has left of a socket and its cookie."""

_HEADER = Struct("=IHHII")
_REQUEST = Struct("=BBBxI48x")
"""inet_diag_req_v2: family, protocol, extensions, states, no socket in particular."""
_TIMER = 16 + 2
_COOKIE = Struct("=II")
_COOKIE_AT = 16 + 44
"""In nlmsghdr + inet_diag_msg: idiag_timer and id.idiag_cookie, low half first."""

RECEIVE = 1 << 16
MESSAGES_AT_ONCE = 2000
"""Read before the loop serves others again: some 3 ms."""


class DestroyWatch:
    """Reports the end of the sockets that are watched, each once.

    Args:
        on_destroy: called in the event loop with the cookie; it is not watched any more.
        rest: seconds without reading after each batch.
        receive_buffer: bytes of messages the kernel keeps for us; 4 MiB hold some 3,000.
    """

    def __init__(
        self,
        on_destroy: Callable[[int], None],
        *,
        rest: float = 0.01,
        receive_buffer: int = 4 << 20,
    ) -> None:
        self._on_destroy = on_destroy
        self._rest = rest
        self._receive_buffer = receive_buffer
        self._loop = asyncio.get_running_loop()
        self._events: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watched: set[int] = set()
        self._buffer = bytearray(RECEIVE)
        self.dumps = 0
        """How often messages were lost, and all connections looked through instead."""

    def start(self) -> None:
        """Listen from now on, in this network namespace.

        Raises:
            OSError: the kernel offers no sock_diag, or not to us.
        """
        self._events = sock = _diag_socket()
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, self._receive_buffer)
        except PermissionError:  # then rmem_max is the limit, and dumps are more frequent
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        sock.bind((0, GROUPS))
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    def close(self) -> None:
        """Report nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._events is not None:
            self._loop.remove_reader(self._events)
            self._events.close()
            self._events = None

    def watch(self, cookie: int) -> None:
        """Report the end of this socket, which the caller holds, or finds ``alive`` afterwards."""
        self._watched.add(cookie)

    def unwatch(self, cookie: int) -> None:
        """Do not report it; harmless where it was not watched."""
        self._watched.discard(cookie)

    def _readable(self) -> None:
        assert self._events is not None, "the reader is gone before the socket is"
        self._loop.remove_reader(self._events)
        self._timer = self._loop.call_later(self._rest, self._resume)
        ended, lost = self._drain(self._events)
        if lost:
            self.dumps += 1
            ended |= self._watched - alive(self._watched)
            log.debug("sock_diag messages were lost; a dump found %d sockets gone", len(ended))
        self._watched -= ended
        for cookie in ended:
            self._on_destroy(cookie)

    def _resume(self) -> None:
        assert self._events is not None, "close() cancels this"
        self._loop.add_reader(self._events, self._readable)

    def _drain(self, sock: socket.socket) -> tuple[set[int], bool]:
        """Cookies of the watched sockets that ended, and whether messages were lost."""
        ended: set[int] = set()
        lost = False
        receive, buffer, unpack = sock.recvfrom_into, self._buffer, _COOKIE.unpack_from
        watched = self._watched
        for _ in range(MESSAGES_AT_ONCE):
            try:
                size, (sender, _) = receive(buffer)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            low, high = unpack(buffer, _COOKIE_AT)
            cookie = high << 32 | low
            if cookie in watched and sender == KERNEL and size >= _COOKIE_AT + _COOKIE.size:
                ended.add(cookie)
        return ended, lost


def alive(cookies: Iterable[int]) -> set[int]:
    """Which of these sockets are connections now.

    Blocks for some 1.5 ms per 1,000 connections of the host, so that a rebind engine in the same
    thread can't move a socket past it. A file whose connection was reset is not a connection.

    Raises:
        OSError: the kernel offers no sock_diag, or not to us.
    """
    wanted = set(cookies)
    found: set[int] = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        for message in _dump(family):
            if message[_TIMER] != TIMEWAIT_TIMER:
                low, high = _COOKIE.unpack_from(message, _COOKIE_AT)
                found.add(high << 32 | low)
    return wanted & found


def _dump(family: int) -> Iterator[memoryview]:
    """Each message, with its header, of a dump of TCP connections."""
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, CONNECTIONS)
    flags = NLM_F_REQUEST | NLM_F_DUMP
    with _diag_socket() as sock:
        size = _HEADER.size + len(request)
        sock.send(_HEADER.pack(size, SOCK_DIAG_BY_FAMILY, flags, 1, 0) + request)
        while True:
            view = memoryview(sock.recv(RECEIVE))
            while view:
                size, kind, _, _, _ = _HEADER.unpack_from(view)
                if kind in (NLMSG_DONE, NLMSG_ERROR):
                    _check(int.from_bytes(view[16:20], sys.byteorder, signed=True))
                    return
                yield view
                view = view[size + 3 & ~3 :]


def _check(result: int) -> None:
    if -result not in (0, errno.ENOENT):  # ENOENT: no such family in this kernel
        raise OSError(-result, f"the kernel refuses a sock_diag dump: {os.strerror(-result)}")


def _diag_socket() -> socket.socket:
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    return socket.socket(socket.AF_NETLINK, kind, NETLINK_SOCK_DIAG)
