"""The UDP edge between daemons: one socket per usable local address, so that a datagram leaves from
the address it is about and an answer proves that path."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterable

import asyncio_dgram

from sessiond.core.tuples import Endpoint

log = logging.getLogger(__name__)

RECEIVE_BUFFER = 4 * 1024 * 1024
"""Bytes. A peer that moves 10,000 sessions sends some 300 datagrams at once."""

SO_RCVBUFFORCE = 33  # asm-generic/socket.h; needs CAP_NET_ADMIN

Receiver = Callable[[bytes, Endpoint, str], None]


class PeerUdp:
    """Datagrams to and from the daemons of other hosts.

    Args:
        port: the UDP port of every daemon.
        receive: called with each datagram, its source and the local address it came to.
    """

    def __init__(self, port: int, receive: Receiver) -> None:
        self._port = port
        self._receive = receive
        self._sockets: dict[str, socket.socket] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}
        self.unsent = 0
        """Datagrams that no socket or route was there for; peers and timers repeat them."""

    async def listen(self, addresses: Iterable[str]) -> dict[str, str]:
        """Have a socket on exactly these addresses.

        Returns:
            The addresses that could not be used, with the reason.
        """
        wanted = set(addresses)
        for gone in self._sockets.keys() - wanted:
            self._drop(gone)
        failed: dict[str, str] = {}
        for address in wanted - self._sockets.keys():
            try:
                sock = _bound(address, self._port)
            except OSError as error:
                failed[address] = str(error)
                continue
            stream = await asyncio_dgram.from_socket(sock)
            self._sockets[address] = sock
            self._readers[address] = asyncio.create_task(self._read(address, stream))
        return failed

    def send(self, datagram: bytes, to: Endpoint, via: str) -> None:
        """Send one datagram from the local address ``via``; never blocks, may be lost."""
        sock = self._sockets.get(via)
        if sock is None:
            self.unsent += 1
            return
        try:
            sock.sendto(datagram, to)
        except OSError as error:
            self.unsent += 1
            log.debug("datagram to %s via %s not sent: %s", to, via, error)

    def close(self) -> None:
        """Give all sockets back."""
        for address in list(self._sockets):
            self._drop(address)

    def _drop(self, address: str) -> None:
        self._readers.pop(address).cancel()
        del self._sockets[address]

    async def _read(self, address: str, stream: asyncio_dgram.aio.DatagramStream) -> None:
        try:
            while True:
                data, source = await stream.recv()
                assert isinstance(source, tuple)
                self._receive(data, Endpoint(source[0], source[1]), address)
        except asyncio_dgram.TransportClosed:
            return
        finally:
            stream.close()


def _bound(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        with contextlib.suppress(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        sock.bind((address, port))
    except OSError:
        sock.close()
        raise
    return sock
