"""The UDP edge between daemons: one socket per usable local address, so that a datagram leaves from
the address it is about and an answer proves that path."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import socket
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

import asyncio_dgram

from sessiond.core.tuples import Endpoint

log = logging.getLogger(__name__)

RECEIVE_BUFFER = 4 * 1024 * 1024
"""Bytes. A peer that moves 10,000 sessions sends some 300 datagrams at once."""
ERRORS_AT_ONCE = 256
"""Read before the loop serves others again."""

SO_RCVBUFFORCE = 33  # asm-generic/socket.h; needs CAP_NET_ADMIN
IP_RECVERR, IPV6_RECVERR = 11, 25  # linux/in.h, in6.h
RECVERR = {
    socket.AF_INET: (socket.IPPROTO_IP, IP_RECVERR),
    socket.AF_INET6: (socket.IPPROTO_IPV6, IPV6_RECVERR),
}
EXTENDED_ERROR = struct.Struct("=IBBB")
"""The beginning of sock_extended_err (linux/errqueue.h): errno, origin, ICMP type and code."""
PORT_UNREACHABLE = {(2, 3, 3), (3, 1, 4)}
"""SO_EE_ORIGIN_ICMP (RFC 792) and SO_EE_ORIGIN_ICMP6 (RFC 4443 section 3.1)."""
QUOTED = 2048
"""Bytes; an ICMP message quotes less (RFC 1812 section 4.3.2.3, RFC 4443 section 2.4)."""
ANCILLARY = 256
"""Bytes; an extended error takes 16, the address that sent it 28, each with a header."""

Receiver = Callable[[bytes, Endpoint, str], None]


class _Open(NamedTuple):
    socket: socket.socket
    stream: asyncio_dgram.aio.DatagramStream
    reader: asyncio.Task[None]


class PeerUdp:
    """Datagrams to and from the daemons of other hosts.

    Args:
        port: the UDP port of every daemon.
        receive: called with each datagram, its source and the local address it came to.
        unreachable: called where a host answers that nothing listens there (ICMP port
            unreachable), with what it quotes of the datagram, its beginning or all of it, the
            endpoint it went to and the local address it left from. Anybody can forge this.
    """

    def __init__(self, port: int, receive: Receiver, unreachable: Receiver) -> None:
        self._port = port
        self._receive = receive
        self._unreachable = unreachable
        self._open: dict[str, _Open] = {}
        self._loop = asyncio.get_running_loop()
        # A stream tells an error only when the next datagram has come.
        self._failing = select.epoll()
        self._loop.add_reader(self._failing, self._read_errors)
        self.unsent = 0
        """Datagrams that no socket or route was there for; peers and timers repeat them."""

    async def listen(self, addresses: Iterable[str]) -> dict[str, str]:
        """Have a socket on exactly these addresses.

        Returns:
            The addresses that could not be used, with the reason.
        """
        wanted = set(addresses)
        gone = [self._drop(address) for address in self._open.keys() - wanted]
        if gone:
            await asyncio.wait(gone)  # closed: the address can be bound again
        failed: dict[str, str] = {}
        for address in wanted - self._open.keys():
            try:
                sock = _bound(address, self._port)
            except OSError as error:
                failed[address] = str(error)
                continue
            stream = await asyncio_dgram.from_socket(sock)
            reader = asyncio.create_task(self._read(address, stream))
            self._open[address] = _Open(sock, stream, reader)
            self._failing.register(sock, select.EPOLLERR)
        return failed

    def send(self, datagram: bytes, to: Endpoint, via: str) -> None:
        """Send one datagram from the local address ``via``; never blocks, may be lost."""
        found = self._open.get(via)
        if found is None:
            self.unsent += 1
            return
        try:
            try:
                found.socket.sendto(datagram, to)
            except OSError:
                # Maybe not of this datagram: what ICMP says of an earlier one comes first, and
                # this one is not sent then (sock_error() in net/core/sock.c).
                if not self._drain_errors(via, found.socket):
                    raise
                found.socket.sendto(datagram, to)
        except OSError as error:
            self.unsent += 1
            log.debug("datagram to %s via %s not sent: %s", to, via, error)

    def close(self) -> None:
        """Give all sockets back."""
        for address in list(self._open):
            self._drop(address)
        self._loop.remove_reader(self._failing)
        self._failing.close()

    def _drop(self, address: str) -> asyncio.Task[None]:
        gone = self._open.pop(address)
        self._failing.unregister(gone.socket)
        gone.stream.close()
        return gone.reader

    async def _read(self, address: str, stream: asyncio_dgram.aio.DatagramStream) -> None:
        while True:
            try:
                data, source = await stream.recv()
            except OSError:  # of a datagram we sent: ``_read_errors`` has the details
                continue
            except asyncio_dgram.TransportClosed:
                return
            assert isinstance(source, tuple)
            self._receive(data, Endpoint(source[0], source[1]), address)

    def _read_errors(self) -> None:
        for address, one in self._open.items():
            self._drain_errors(address, one.socket)
            with contextlib.suppress(OSError):
                _ = one.stream.exception  # or they gather there

    def _drain_errors(self, address: str, sock: socket.socket) -> bool:
        """Empty a socket's error queue (ip(7), IP_RECVERR); whether anything was in it."""
        found = False
        for _ in range(ERRORS_AT_ONCE):
            try:
                quoted, ancillary, _, to = sock.recvmsg(QUOTED, ANCILLARY, socket.MSG_ERRQUEUE)
            except BlockingIOError:
                break
            found = True
            for level, kind, data in ancillary:
                if (level, kind) == RECVERR[sock.family]:
                    _, *what = EXTENDED_ERROR.unpack_from(data)
                    if tuple(what) in PORT_UNREACHABLE:
                        self._unreachable(quoted, Endpoint(to[0], to[1]), address)
        return found


def _bound(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        with contextlib.suppress(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        sock.setsockopt(*RECVERR[family], 1)
        sock.bind((address, port))
    except OSError:
        sock.close()
        raise
    return sock
