"""The blocking client of sessiond's local socket.

A ``Client`` keeps its connection to the daemon open and asks one request at a time on it. Threads
may share a client: each request that meets another under way takes a further connection. After a
fork, or when the daemon was restarted, a new one is opened. A stream of events has its own.
"""

from __future__ import annotations

import atexit
import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self, TypeVar

from libhsock import wire
from libhsock.dialog import Dialog
from libhsock.pool import TIMEOUT as TIMEOUT
from libhsock.pool import Pool, unavailable

R = TypeVar("R")

PLACES = 8
"""Connections at a time from one client, however many threads ask."""


class Connection(Dialog):
    """One connection to the daemon, greeted; not for two threads at once."""

    def __init__(self, path: str, name: str, timeout: float = TIMEOUT) -> None:
        """Connect and say hello; ``timeout`` in seconds. Raises OSError, ProtocolError, or the
        HsockError that the daemon replied."""
        super().__init__(path)
        self._timeout = 0.0
        with self.closed_by_errors():
            self.limit(timeout)
            self.sock.connect(path)
            self.call(wire.Hello(name))

    def limit(self, seconds: float) -> None:
        """How long a system call on the socket may take; past it: BlockingIOError."""
        if seconds == self._timeout:
            return
        # Kept by the kernel: a call is two system calls, and connect() waits for a full backlog.
        limit = struct.pack("ll", int(seconds), max(1, int(seconds % 1 * 1e6)))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._timeout = seconds

    def ask(self, call: wire.Call[Any], fds: Sequence[int] = ()) -> wire.Reply:
        """A request and its reply. Raises OSError and ProtocolError."""
        data = self.request(call)
        with contextlib.suppress(BrokenPipeError):  # the daemon may have said why it closed
            wire.send(self.sock, data, fds)
        return self.reply(self.receive())

    def call(self, call: wire.Call[R]) -> R:
        """A request and its result. Raises as the constructor does."""
        return call.parse(self.ask(call).unwrap())

    def receive(self) -> bytes:
        """The next packet's data; empty at the end."""
        received = wire.receive(self.sock)
        received.close()
        return received.data


class Client(Pool[Connection]):
    """What applications and sessionctl ask of sessiond.

    Every method raises DaemonUnavailable when there is no daemon or it doesn't answer in time,
    otherwise the HsockError that the daemon replied.
    """

    _late = BlockingIOError

    def _forget(self) -> None:
        super()._forget()
        self._places = threading.BoundedSemaphore(PLACES)

    def call(self, call: wire.Call[R], fds: Sequence[int] = (), timeout: float | None = None) -> R:
        """Ask, and wait for the answer; ``timeout`` in seconds, None: what is usual for it."""
        with self._asking(call, timeout) as limit, self._places:
            reply = self._ask(call, fds, limit)
        return call.parse(reply.unwrap())

    def _ask(self, call: wire.Call[Any], fds: Sequence[int], timeout: float) -> wire.Reply:
        # A connection kept since the last call may turn out dead: the daemon was restarted.
        while call.repeatable and (kept := self._kept()):
            with contextlib.suppress(ConnectionError):
                return self._ask_on(kept, call, fds, timeout)
        return self._ask_on(self._open(), call, fds, timeout)

    def _ask_on(
        self, connection: Connection, call: wire.Call[Any], fds: Sequence[int], timeout: float
    ) -> wire.Reply:
        with self._using(connection):
            connection.limit(timeout)
            return connection.ask(call, fds)

    def _open(self) -> Connection:
        return Connection(self.path, self._name, self._timeout)

    def hello(self) -> wire.Welcome:
        """Who the daemon is, and whether the caller administers it."""
        return self.call(wire.Hello(self._name))

    def resolve(
        self, name: str, service: str | int, *, family: wire.Family = 0, srv: bool = False
    ) -> wire.Resolution:
        """The addresses of a name, best first; ``family`` is 4, 6, or 0 for both."""
        return self.call(wire.Resolve(name, str(service), family, srv))

    def attach(
        self,
        fd: int,
        role: wire.Role = "attach",
        name: str | None = None,
        service: str | None = None,
        timeout: float | None = None,
    ) -> wire.Record:
        """Make a session of the connected TCP socket ``fd``; the caller keeps it."""
        return self.call(wire.Attach(fd, role, name, service), [fd], timeout)

    def page(self, after: str | None = None, limit: int = wire.MAX_PAGE) -> wire.Page:
        """One page of the caller's sessions."""
        return self.call(wire.List(after, limit))

    def sessions(self) -> Iterator[wire.Record]:
        """All of the caller's sessions, asked for a page at a time."""
        page = self.page()
        yield from page.sessions
        while page.next is not None:
            page = self.page(page.next)
            yield from page.sessions

    def show(self, session: str) -> wire.Record:
        """One session."""
        return self.call(wire.Show(session))

    def rebind(self, session: str, to: str | None = None) -> wire.Record:
        """Move a session now, to a local address or an interface; returns when it has moved."""
        return self.call(wire.Rebind(session, to))

    def detach(self, session: str) -> None:
        """Forget a session; the connection goes on as plain TCP."""
        self.call(wire.Detach(session))

    def network(self) -> wire.NetworkView:
        """The host's usable addresses and routes as the daemon sees them."""
        return self.call(wire.Network())

    def stats(self) -> dict[str, float]:
        """The daemon's counters by name."""
        return self.call(wire.GetStats()).counters

    def peers(self, name: str | None = None) -> tuple[wire.PeerKey, ...]:
        """The keys of peers that the daemon knows, of all or of the one with this name."""
        return self.call(wire.Peers() if name is None else wire.Peer(name)).peers

    def pin(self, name: str, key: str) -> None:
        """Accept only the key with this fingerprint under a name; for administrators."""
        self.call(wire.Pin(name, key))

    def forget(self, name: str) -> None:
        """Meet a name's peer again as if for the first time; for administrators."""
        self.call(wire.Forget(name))

    def fingerprint(self) -> str:
        """This host's own key."""
        return self.call(wire.Fingerprint()).key

    def events(self, session: str | None = None, timeout: float | None = None) -> EventStream:
        """What happens from now on to one session, or to all the caller may see."""
        monitor = wire.Monitor(session)
        with self._asking(monitor):
            connection = self._open()
            with connection.closed_by_errors():
                connection.call(monitor)
        return EventStream(connection, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class EventStream:
    """An iterator over events, subscribed from its construction on; not to be shared by a fork.

    It ends after the ``closed`` event of the one session it was asked for, and after an
    ``overflow``: events were lost because they were not read in time.
    """

    def __init__(self, connection: Connection | None, timeout: float | None = None) -> None:
        """``connection`` monitors; None: nothing will ever happen, it ends at once. ``timeout`` is
        the default of ``next``, seconds."""
        self._connection = connection
        self._timeout = timeout
        self._poll = select.poll()
        if connection is not None:
            self._poll.register(connection.sock, select.POLLIN)

    def next(self, timeout: float | None = None) -> wire.Event:
        """The next event.

        Raises TimeoutError when none came in ``timeout`` seconds (the stream goes on),
        StopIteration at the end, DaemonUnavailable when the daemon went away.
        """
        limit = self._timeout if timeout is None else timeout
        until = None if limit is None else time.monotonic() + limit
        while (connection := self._connection) is not None:
            left = None if until is None else max(0.0, until - time.monotonic()) * 1000
            if not self._poll.poll(left):
                raise TimeoutError(f"no event in {limit:g} s")
            try:
                event = connection.event(connection.receive())
            except OSError as error:
                raise unavailable(connection.path, error) from error
            if connection.over:
                self.close()
            if event is not None:
                return event
        raise StopIteration

    def fileno(self) -> int:
        """For select: readable when ``next`` won't wait; -1 at the end."""
        return -1 if self._connection is None else self._connection.sock.fileno()

    def close(self) -> None:
        """Idempotent; the iteration ends."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> wire.Event:
        return self.next()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()  # a loop left by ``break`` is no leak


def default_client() -> Client:
    """The process's client of the daemon that ``$SESSIOND_SOCKET`` names now."""
    path = wire.socket_path()
    client = _DEFAULTS.get(path)
    if client is None:
        client = _DEFAULTS.setdefault(path, Client(path))
    return client


_DEFAULTS: dict[str, Client] = {}


def _at_exit() -> None:
    for client in _DEFAULTS.values():
        client.close()


atexit.register(_at_exit)
