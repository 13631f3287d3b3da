"""Sockets with a session: opened by name, dialled by happy eyeballs, attached to sessiond.

They are AF_INET6 and dual-stack where the kernel has IPv6, so that a connection can change its IP
version, and their local port is never bound explicitly, so that it can change too (handover.md
section 3). Without a daemon everything works as plain TCP.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from typing import Any, Self

from libhsock import names, wire
from libhsock.client import default_client
from libhsock.errors import DaemonUnavailable, HsockError, UsageError
from libhsock.eyeballs import Candidate, Race
from libhsock.sessions import Session, plain_record

_UNSET: Any = object()
LEAST = 0.1
"""Seconds that telling the daemon may take even where the caller's time is used up."""


class HSocket(socket.socket):
    """A ``socket.socket`` whose connection has a session; everything else is as usual."""

    __slots__ = ("_session",)

    _session: Session

    @property
    def session(self) -> Session:
        """The connection's session. Raises UsageError on a socket that isn't connected."""
        try:
            return self._session
        except AttributeError:
            raise UsageError("only a connected socket has a session") from None

    def accept(self) -> tuple[HSocket, Any]:
        """As ``socket.accept``, with a session of its own for what comes back.

        The daemon is asked before it returns; asyncio servers use ``start_server`` instead.
        """
        plain, address = super().accept()
        sock = _take_over(plain)
        sock._session = attach_session(sock, "accept")
        return sock, address

    def dup(self) -> Self:
        """As ``socket.dup``; both are the same connection and session."""
        copy = super().dup()
        if hasattr(self, "_session"):
            copy._session = self._session.through(copy)
        return copy


def create_connection(
    address: tuple[str, int | str],
    timeout: float | None = _UNSET,
    *,
    family: wire.Family = 0,
    srv: bool = False,
) -> HSocket:
    """Open a connection to a service by name, as ``socket.create_connection`` does.

    ``address`` is the host's name and a port or service name. ``timeout`` in seconds bounds the
    whole of it and becomes the socket's; by default it is ``socket.getdefaulttimeout()``.
    ``family`` 4 or 6 allows only that IP version for the first path. ``srv`` asks for SRV records
    of the service first, which only sessiond can.

    Raises NameNotResolved, NoLocalAddress, CouldNotConnect (ConnectTimedOut), all of them OSErrors
    with ``tried``, and UsageError.
    """
    limit = socket.getdefaulttimeout() if timeout is _UNSET else timeout
    deadline = None if limit is None else time.monotonic() + limit
    target = names.target(address, family, srv)
    race = Race(str(target), _resolve(target, deadline), stream_socket)
    try:
        sock = _run(race, deadline, limit)
    finally:
        race.close()
    sock.settimeout(limit)
    sock._session = attach_session(sock, "connect", target, _left(deadline))
    return sock


def create_server(
    address: tuple[str, int],
    *,
    backlog: int | None = None,
    reuse_port: bool = False,
) -> HSocket:
    """Listen on a local address; ``accept`` gives sockets with sessions.

    Host ``""`` is every address of both IP versions; an IPv4 address works too. ``backlog`` and
    ``reuse_port`` are those of ``socket.create_server``. Raises OSError, NameNotResolved.
    """
    sock = server_socket(address, backlog, reuse_port)
    return sock


def attach(
    sock: socket.socket, *, peer: str | None = None, service: str | int | None = None
) -> HSocket:
    """Give a connected TCP socket from elsewhere a session.

    As with ``ssl``'s wrapping, the descriptor goes over to the socket returned and ``sock`` is left
    detached. ``peer`` is the host's name, by which it can be found again when it has moved. What
    can move depends on how the socket was made: AF_INET stays IPv4, a bound port stays.

    Raises UsageError: not a connected TCP socket, or one of a class of its own such as
    ``ssl.SSLSocket``, for which ``libhsock.session(sock)`` is there.
    """
    if isinstance(sock, HSocket) and hasattr(sock, "_session"):
        return sock
    if type(sock) not in (socket.socket, HSocket):
        kind = type(sock).__name__
        raise UsageError(f"a {kind} can't be taken over; libhsock.session() gives it a session")
    check_attachable(sock)
    taken = _take_over(sock)
    target = None if peer is None else names.target((peer, service or taken.getpeername()[1]))
    taken._session = attach_session(taken, "attach", target)
    return taken


def attach_session(
    sock: socket.socket,
    role: wire.Role,
    target: names.Target | None = None,
    timeout: float | None = None,
) -> Session:
    """Make a session of a connection; one that sessiond doesn't know where that fails."""
    client = default_client()
    name, service = (target.name, target.service) if target else (None, None)
    try:
        record = client.attach(sock.fileno(), role, name, service, timeout)
    except HsockError as error:
        record = plain_record(sock, role, name, f"plain TCP: {error}")
    return Session(client, sock, record)


def check_attachable(sock: socket.socket) -> None:
    """Raises UsageError unless it is a connected TCP socket."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        raise UsageError("only TCP sockets have sessions")
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise UsageError("a listening socket has no session; create_server makes one that attaches")
    try:
        sock.getpeername()
    except OSError as error:
        raise UsageError(f"the socket is not connected: {error.strerror}") from None


def stream_socket(family: int) -> HSocket:
    """A TCP socket to reach an address of ``family`` from: dual-stack, or AF_INET where the kernel
    has no IPv6. Raises OSError."""
    try:
        sock = HSocket(socket.AF_INET6, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT or family != socket.AF_INET:
            raise
        return HSocket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    return sock


def server_socket(address: tuple[str, int], backlog: int | None, reuse_port: bool) -> HSocket:
    """A listening dual-stack socket. Raises OSError, NameNotResolved."""
    host, port = address
    flags = socket.AI_PASSIVE | socket.AI_V4MAPPED | socket.AI_ALL
    question = (host or "::", port, socket.AF_INET6, socket.SOCK_STREAM, 0, flags)
    try:
        *_, where = socket.getaddrinfo(*question)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise names.target((host, port)).unanswered(error) from error
    sock = stream_socket(socket.AF_INET)
    if sock.family == socket.AF_INET:
        where = (str(where[0]).removeprefix("::ffff:").replace("::", ""), port)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(where)
        sock.listen(*([] if backlog is None else [backlog]))
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"{error.strerror} (while listening on {address})") from None
    return sock


def _take_over(plain: socket.socket) -> HSocket:
    timeout = plain.gettimeout()
    sock = HSocket(plain.family, plain.type, plain.proto, fileno=plain.detach())
    sock.settimeout(timeout)
    return sock


def _resolve(target: names.Target, deadline: float | None) -> list[Candidate]:
    if (known := target.literal()) is not None:
        return known
    left = _left(deadline)
    try:
        # Half the time: a daemon that hangs must leave enough to do without it.
        half = None if left is None else left / 2
        resolution = default_client().call(target.call(), timeout=half)
        return target.resolved(resolution)
    except DaemonUnavailable:
        pass  # the system's resolver does instead, and the session will say that there's no daemon
    try:
        return target.answered(socket.getaddrinfo(*target.question()))
    except (OSError, UnicodeError) as error:
        raise target.unanswered(error) from error


def _run(race: Race[HSocket], deadline: float | None, limit: float | None) -> HSocket:
    ready: list[HSocket] = []
    while (winner := race.step(time.monotonic(), ready)) is None:
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            raise race.timed_out(limit or 0.0)
        ends = [t for t in (deadline, race.due if race.more else None) if t is not None]
        ready = _writable(race, min(ends) - now if ends else None)
    return winner


def _writable(race: Race[HSocket], seconds: float | None) -> list[HSocket]:
    by_fd = {sock.fileno(): sock for sock in race.pending}
    poll = select.poll()
    for fd in by_fd:
        poll.register(fd, select.POLLOUT)
    found = poll.poll(None if seconds is None else max(0.0, seconds) * 1000)
    return [by_fd[fd] for fd, _ in found]


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(LEAST, deadline - time.monotonic())
