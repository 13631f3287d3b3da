"""One client's packets, and those that wait until it reads."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from abc import ABC, abstractmethod
from collections import deque

from libhsock import wire
from libhsock.errors import ProtocolError
from sessiond.edges.local.descriptors import close_foreign
from sessiond.edges.local.limits import Limits


class Channel(ABC):
    """A client's socket. While something waits to be sent, nothing is read from the client."""

    def __init__(self, sock: socket.socket, limits: Limits) -> None:
        self.closed = False
        self.ending = False
        """Nothing more is read or said; what waits is still sent."""
        self._sock = sock
        self._limits = limits
        self._waiting: deque[bytes] = deque()
        self._stall: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._loop.add_reader(sock, self.on_readable)

    @abstractmethod
    def on_readable(self) -> None:
        """There is something to ``receive``."""

    @abstractmethod
    def on_stall(self) -> None:
        """The client takes nothing of what waits; the channel is about to close."""

    @abstractmethod
    def on_close(self) -> None:
        """Nothing goes either way any more. Called once."""

    def receive(self) -> wire.Packet:
        """The next packet. Raises as ``wire.receive`` does, BlockingIOError where there is none."""
        return wire.receive(self._sock, close_foreign)

    @property
    def full(self) -> bool:
        """As much waits as may."""
        return len(self._waiting) >= self._limits.queue

    def send(self, data: bytes) -> None:
        """Send a packet, now or when the client has taken those that wait."""
        if self._waiting:
            self._waiting.append(data)
            return
        try:
            wire.send(self._sock, data)
        except BlockingIOError:
            # Until it reads, nothing further is read from it.
            self._waiting.append(data)
            self._loop.remove_reader(self._sock)
            self._loop.add_writer(self._sock, self._writable)
            self._await_reader()
        except OSError:
            self._loop.call_soon(self.close)  # not now: the backend may be amid its subscribers

    def end(self, data: bytes) -> None:
        """Send a last packet, then close. Idempotent."""
        if self.closed or self.ending:
            return
        self._loop.remove_reader(self._sock)
        self.send(data)
        self.ending = True
        if not self._waiting:
            self._drain()
            self.close()

    def give_up(self, data: bytes) -> None:
        """``end``, with a packet in place of all that wait; there are some."""
        self._waiting.clear()
        self._waiting.append(data)
        self.ending = True

    def close(self) -> None:
        """Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        if self._stall is not None:
            self._stall.cancel()
        self._sock.close()
        self.on_close()

    def _writable(self) -> None:
        try:
            while self._waiting:
                wire.send(self._sock, self._waiting[0])
                self._waiting.popleft()
                self._await_reader()
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if self._stall is not None:
            self._stall.cancel()
        self._loop.remove_writer(self._sock)
        if self.ending:
            self.close()
        else:
            self._loop.add_reader(self._sock, self.on_readable)

    def _await_reader(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
        self._stall = self._loop.call_later(self._limits.stall, self._too_late)

    def _too_late(self) -> None:
        self.on_stall()
        self.close()

    def _drain(self) -> None:
        # Closing with packets unread gives the client ECONNRESET in place of the reason.
        with contextlib.suppress(OSError, ProtocolError):
            for _ in range(self._limits.pending):
                received = self.receive()
                received.close(close_foreign)
                if not received.data:
                    return
