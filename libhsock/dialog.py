"""The talk on one connection to the daemon, without I/O: packets to send come out, packets received
go in. ``libhsock.client`` and ``.aclient`` carry them."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

from libhsock import wire


class Dialog:
    """One connection, one request at a time, or events from ``Monitor`` on."""

    def __init__(self, path: str) -> None:
        """``sock`` is still to be connected to ``path``."""
        self.path = path
        self.sock: socket.socket = wire.new_socket()
        self.over = False
        """No event will follow: the one session monitored has ended, or events were lost."""
        self._id = 0
        self._monitored: str | None = None

    def request(self, call: wire.Call[Any]) -> bytes:
        """The packet that asks. Raises UsageError when it is too large."""
        self._id += 1
        if isinstance(call, wire.Monitor):
            self._monitored = call.session
        return wire.request(self._id, call)

    def reply(self, data: bytes) -> wire.Reply:
        """What the packet after a request says. Raises ConnectionResetError, ProtocolError."""
        return wire.reply_to(self._id, _told(data))

    def event(self, data: bytes) -> wire.Event | None:
        """What a packet after the reply to ``Monitor`` tells; None: nothing for this version.

        Raises ConnectionResetError, ProtocolError, or the error with which the daemon ends it.
        """
        event = wire.event(_told(data))
        self.over = event is not None and wire.ends(event, self._monitored)
        return event

    @contextlib.contextmanager
    def closed_by_errors(self) -> Iterator[None]:
        """What fails inside leaves no connection."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        self.sock.close()


def _told(data: bytes) -> bytes:
    if not data:
        raise ConnectionResetError(errno.ECONNRESET, "sessiond closed the connection")
    return data
