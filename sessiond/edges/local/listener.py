"""The socket at a path where clients connect."""

from __future__ import annotations

import errno
import os
import socket
import stat

from libhsock import wire


def listen(path: str) -> socket.socket:
    """A listening socket at ``path`` that everybody may connect to; what a killed daemon left there
    is replaced. Raises OSError: EADDRINUSE where somebody listens or the path is something else."""
    os.makedirs(os.path.dirname(path) or ".", mode=0o755, exist_ok=True)
    _remove_stale(path)
    sock = wire.new_socket()
    try:
        sock.bind(path)
        os.chmod(path, 0o666)
        sock.listen(512)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EADDRINUSE, "there is something that is no socket", path)
    with wire.new_socket() as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise
    raise OSError(errno.EADDRINUSE, "another daemon listens there", path)


def identity(path: str) -> tuple[int, int] | None:
    """Which file is at a path; None: there is none."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
