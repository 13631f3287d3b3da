"""Who is at the other end of a local connection, and whether it administers."""

from __future__ import annotations

import errno
import grp
import logging
import os
import socket
import struct
from dataclasses import dataclass

log = logging.getLogger(__name__)

SO_PEERGROUPS = 59
SO_PEERPIDFD = 77
_GROUPS_BYTES = 1024
"""What Python's getsockopt takes at most: 256 supplementary groups."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as the kernel says; fixed when the process connected."""

    uid: int
    gid: int
    pid: int
    admin: bool
    pidfd: int
    """The process itself, where ``pid`` may be reused. Closed with the connection: dup to keep."""

    @property
    def scope(self) -> int | None:
        """The uid whose sessions the caller may see; None: all."""
        return None if self.admin else self.uid


def caller_of(sock: socket.socket, admin_gid: int | None) -> Caller:
    """Who is at the other end, as the kernel noted it at connect(). Raises OSError."""
    pid, uid, gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    admin = uid == 0 or (admin_gid is not None and admin_gid in {gid, *_groups(sock)})
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        pidfd = os.pidfd_open(pid)  # before Linux 6.5
    return Caller(uid, gid, pid, admin, pidfd)


def _groups(sock: socket.socket) -> tuple[int, ...]:
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        log.warning("a client has more than %d groups: they don't count", _GROUPS_BYTES // 4)
        return ()
    return struct.unpack(f"{len(raw) // 4}I", raw)


def gid_of(group: str) -> int | None:
    """The number of a group, by its name; None: there is none, so only root administers."""
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        log.info("there is no group %r: only root administers all sessions", group)
        return None
