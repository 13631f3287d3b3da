"""What a supervisor such as systemd is told, and the sockets it hands over.

The protocols are those of sd_notify(3) and sd_listen_fds(3). Without a supervisor nothing is said
and nothing is handed over. Both read the environment once and clear it, so that no child of the
daemon speaks in its name.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import MutableMapping
from typing import NamedTuple

_FIRST_FD = 3
"""SD_LISTEN_FDS_START."""

Environment = MutableMapping[str, str]


class ActivationError(OSError):
    """What the supervisor hands over can't be used. The message says what of it and why."""


class Supervisor:
    """The supervisor's end of the daemon's life.

    ``watchdog_s`` is how often ``alive`` is due at least, in seconds, or None: half the time after
    which the supervisor takes the daemon for hung (WATCHDOG_USEC).
    """

    def __init__(self, environ: Environment | None = None) -> None:
        environ = os.environ if environ is None else environ
        self._address = _notify_address(environ)
        self.watchdog_s = _watchdog_s(environ)

    def ready(self, status: str) -> None:
        """The daemon serves (READY=1), as ``status`` says in a line."""
        self._tell("READY=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """A line for ``systemctl status``."""
        self._tell(f"STATUS={status}")

    def alive(self) -> None:
        """Put off the watchdog (WATCHDOG=1)."""
        self._tell("WATCHDOG=1")

    async def keep_alive(self) -> None:
        """Feed the watchdog for as long as the loop turns; returns at once where there is none."""
        while self.watchdog_s is not None:
            self.alive()
            await asyncio.sleep(self.watchdog_s)

    def stopping(self) -> None:
        """The daemon is about to end (STOPPING=1)."""
        self._tell("STOPPING=1")

    def _tell(self, *assignments: str) -> None:
        if self._address is None:
            return
        message = "\n".join(line.replace("\n", " ") for line in assignments).encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            # A supervisor that does not read must not stop the daemon's one loop: the message is
            # given up, as sd_notify(3) advises.
            sender.setblocking(False)
            try:
                sender.sendto(message, self._address)
            except (BlockingIOError, ConnectionRefusedError, FileNotFoundError):
                return


def _notify_address(environ: Environment) -> str | None:
    address = environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return None
    if address[0] not in "/@":
        raise ActivationError(
            f"NOTIFY_SOCKET is {address!r}; a path or an abstract name beginning with @ is allowed"
        )
    return "\0" + address[1:] if address[0] == "@" else address


def _watchdog_s(environ: Environment) -> float | None:
    interval = _number(environ, "WATCHDOG_USEC")
    addressee = _number(environ, "WATCHDOG_PID")
    if interval is None or addressee not in (None, os.getpid()):
        return None
    if interval == 0:
        raise ActivationError("WATCHDOG_USEC is 0; a time above 0 is allowed")
    return interval / 2 / 1e6


class Inherited(NamedTuple):
    """A socket that was open before the daemon started."""

    name: str
    """FileDescriptorName= of its unit, ``""`` where there is none."""
    socket: socket.socket


def inherited_sockets(
    environ: Environment | None = None, *, first_fd: int = _FIRST_FD
) -> list[Inherited]:
    """The sockets handed over with LISTEN_FDS; they are the caller's to close.

    Raises:
        ActivationError: A variable is malformed, or a descriptor is not open or not a socket.
    """
    environ = os.environ if environ is None else environ
    count = _number(environ, "LISTEN_FDS")
    addressee = _number(environ, "LISTEN_PID")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if count is None or addressee != os.getpid():
        return []
    names += [""] * (count - len(names))
    return [
        Inherited(name, _adopt(fd))
        for fd, name in zip(range(first_fd, first_fd + count), names, strict=False)
    ]


def activated_socket(
    environ: Environment | None = None, *, first_fd: int = _FIRST_FD
) -> socket.socket | None:
    """The listening local socket that the supervisor handed over (sessiond.socket), or None.

    Raises:
        ActivationError: It handed over something else, or more than one. Nothing stays open.
    """
    sockets = [one.socket for one in inherited_sockets(environ, first_fd=first_fd)]
    if not sockets:
        return None
    if len(sockets) == 1 and _listens_locally(sockets[0]):
        return sockets[0]
    for sock in sockets:
        sock.close()
    raise ActivationError(
        f"LISTEN_FDS hands over {len(sockets)} descriptor(s); one listening AF_UNIX SOCK_SEQPACKET "
        "socket is expected, as sessiond.socket has it"
    )


def _listens_locally(sock: socket.socket) -> bool:
    kind = (sock.family, sock.type)
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    return kind == (socket.AF_UNIX, socket.SOCK_SEQPACKET) and bool(listens)


def _adopt(fd: int) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        return socket.socket(fileno=fd)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ENOTSOCK):
            raise
        raise ActivationError(f"descriptor {fd} of LISTEN_FDS: {error.strerror}") from error


def _number(environ: Environment, name: str) -> int | None:
    text = environ.pop(name, None)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise ActivationError(f"{name} is {text!r}; a number is allowed")
    return int(text)
