"""One packet of the local socket in or out, with the descriptors beside it."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable, Sequence
from typing import NamedTuple

from libhsock.errors import ProtocolError

MAX_PACKET = 64 * 1024
"""Bytes of one packet."""
MAX_FDS = 1
"""Descriptors beside one packet."""

_FD = array.array("i").itemsize
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * _FD)


class Packet(NamedTuple):
    """What one receive brought; its descriptors belong to who received it."""

    data: bytes
    """Empty: the other side has closed."""
    fds: list[int]

    def close(self, close: Callable[[int], None] = os.close) -> None:
        """Close the descriptors that are still in ``fds``."""
        while self.fds:
            close(self.fds.pop())


def new_socket() -> socket.socket:
    """An unconnected, blocking socket of the local protocol's kind."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(None)  # whatever the application made the default
    return sock


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send one packet, whole or not at all. Raises OSError."""
    if fds:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        sock.sendmsg([data], [rights], socket.MSG_NOSIGNAL)
    else:
        sock.send(data, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket, close: Callable[[int], None] = os.close) -> Packet:
    """The next packet. Descriptors are close-on-exec; ``close`` gets rid of unwanted ones.

    Raises ProtocolError for a packet or a number of descriptors past the limits, with no
    descriptor left open, and OSError.
    """
    data, ancillary, flags, _ = sock.recvmsg(MAX_PACKET, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    packet = Packet(data, [])
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            packet.fds.extend(memoryview(payload[: len(payload) // _FD * _FD]).cast("i"))
    # CMSG_SPACE has room for padding, in which the kernel may deliver one descriptor more.
    if flags & socket.MSG_CTRUNC or len(packet.fds) > MAX_FDS:
        packet.close(close)
        raise ProtocolError(f"more than {MAX_FDS} descriptor beside a packet")
    if flags & socket.MSG_TRUNC:
        packet.close(close)
        raise ProtocolError(f"a packet larger than {MAX_PACKET} bytes")
    return packet
