"""Getting rid of descriptors that clients sent."""

from __future__ import annotations

import os
import socket
import struct
import threading


def close_foreign(fd: int) -> None:
    """Close a descriptor that a client sent, without ever blocking: closing the last descriptor of
    a lingering TCP socket waits for its peer, and of a FUSE file for the client's own server."""
    if _closes_at_once(fd):
        os.close(fd)
    else:
        threading.Thread(target=os.close, args=(fd,), name="close", daemon=True).start()


def _closes_at_once(fd: int) -> bool:
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        on, seconds = struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
        return not (on and seconds)
    finally:
        sock.detach()
