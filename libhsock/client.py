"""The blocking client of sessiond's local socket.

A ``Client`` keeps its connection to the daemon open and asks one request at a time on it. Threads
may share a client: each request that meets another under way takes a further connection. After a
fork, or when the daemon was restarted, a new one is opened. A stream of events has its own.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import itertools
import os
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from libhsock import wire
from libhsock.errors import DaemonUnavailable, HsockError

R = TypeVar("R")

TIMEOUT = 5.0
"""Seconds the daemon has for an answer it can give by itself."""
LONG_TIMEOUT = 35.0
"""Seconds for one that meets the network: a name to resolve, a session to move."""
HOLD_OFF = 5.0
"""Seconds in which a daemon that let a request time out isn't asked again, so that a program does
not pay TIMEOUT for each of its connections while the daemon hangs."""
PLACES = 8
"""Connections at a time from one client, however many threads ask."""


class Connection:
    """One connection to the daemon, greeted; not for two threads at once."""

    def __init__(self, path: str, name: str, timeout: float = TIMEOUT) -> None:
        """Connect and say hello; ``timeout`` in seconds. Raises OSError, ProtocolError, or the
        HsockError that the daemon replied."""
        self.path = path
        self._ids = itertools.count(1)
        self._timeout = 0.0
        self.sock = wire.new_socket()
        try:
            self.limit(timeout)
            self.sock.connect(path)
            self.call(wire.Hello(name))
        except BaseException:
            self.close()
            raise

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
        id = next(self._ids)
        with contextlib.suppress(BrokenPipeError):  # the daemon may have said why it closed
            wire.send(self.sock, wire.request(id, call), fds)
        return wire.reply_to(id, self.receive())

    def call(self, call: wire.Call[R]) -> R:
        """A request and its result. Raises as the constructor does."""
        return call.parse(self.ask(call).unwrap())

    def receive(self) -> bytes:
        """The next packet's data. Raises ConnectionResetError at the end."""
        received = wire.receive(self.sock)
        received.close()
        if not received.data:
            raise ConnectionResetError(errno.ECONNRESET, "sessiond closed the connection")
        return received.data

    def close(self) -> None:
        """Idempotent."""
        self.sock.close()


class Client:
    """What applications and sessionctl ask of sessiond.

    Every method raises DaemonUnavailable when there is no daemon or it doesn't answer in time,
    otherwise the HsockError that the daemon replied.
    """

    def __init__(
        self, path: str | None = None, *, name: str = "libhsock", timeout: float = TIMEOUT
    ) -> None:
        """Nothing is opened before the first call.

        ``path`` None means ``$SESSIOND_SOCKET``, else the default; ``name`` is the program's, for
        the daemon's log; ``timeout`` is in seconds.
        """
        self.path = path or wire.socket_path()
        self._name = name
        self._timeout = timeout
        self._silent_until = 0.0
        self._forget()
        _CLIENTS.add(self)

    def _forget(self) -> None:
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._places = threading.BoundedSemaphore(PLACES)

    def call(self, call: wire.Call[R], fds: Sequence[int] = (), timeout: float | None = None) -> R:
        """Ask, and wait for the answer; ``timeout`` in seconds, None: what is usual for it."""
        if time.monotonic() < self._silent_until:
            raise DaemonUnavailable(f"sessiond at {self.path} let a request time out just now")
        if timeout is None:
            timeout = LONG_TIMEOUT if call.meets_network else self._timeout
        try:
            with self._places:
                reply = self._ask(call, fds, timeout)
        except BlockingIOError as error:
            if timeout >= self._timeout and not call.meets_network:
                self._silent_until = time.monotonic() + HOLD_OFF
            why = f"sessiond at {self.path} did not answer in {timeout:g} s"
            raise DaemonUnavailable(why) from error
        except OSError as error:
            raise unavailable(self.path, error) from error
        return call.parse(reply.unwrap())

    def _ask(self, call: wire.Call[Any], fds: Sequence[int], timeout: float) -> wire.Reply:
        # A connection kept since the last call may turn out dead: the daemon was restarted.
        while call.repeatable and (kept := self._kept()):
            with contextlib.suppress(ConnectionError):
                return self._ask_on(kept, call, fds, timeout)
        fresh = Connection(self.path, self._name, self._timeout)
        return self._ask_on(fresh, call, fds, timeout)

    def _kept(self) -> Connection | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _ask_on(
        self, connection: Connection, call: wire.Call[Any], fds: Sequence[int], timeout: float
    ) -> wire.Reply:
        self._busy.add(connection)
        try:
            connection.limit(timeout)
            reply = connection.ask(call, fds)
        except BaseException:
            connection.close()
            raise
        finally:
            self._busy.discard(connection)
        self._idle.append(connection)
        return reply

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

    def events(self, session: str | None = None, timeout: float | None = None) -> EventStream:
        """What happens from now on to one session, or to all the caller may see."""
        try:
            connection = Connection(self.path, self._name, self._timeout)
            try:
                connection.call(wire.Monitor(session))
            except BaseException:
                connection.close()
                raise
        except HsockError:
            raise
        except OSError as error:
            raise unavailable(self.path, error) from error
        return EventStream(connection, session, timeout)

    def close(self) -> None:
        """Close what is open; the next call opens anew."""
        while self._idle:
            self._idle.pop().close()

    def _after_fork(self) -> None:
        # The parent goes on using its connections, and may have been inside a call.
        for connection in [*self._idle, *self._busy]:
            connection.close()
        self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class EventStream:
    """An iterator over events, subscribed from its construction on; not to be shared by a fork.

    It ends after the ``closed`` event of the one session it was asked for, and after an
    ``overflow``: events were lost because they were not read in time.
    """

    def __init__(
        self,
        connection: Connection | None,
        session: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """``connection`` monitors ``session``; None: nothing will ever happen, it ends at once.
        ``timeout`` is the default of ``next``, seconds."""
        self._connection = connection
        self._session = session
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
        while self._connection is not None:
            left = None if until is None else max(0.0, until - time.monotonic()) * 1000
            if not self._poll.poll(left):
                raise TimeoutError(f"no event in {limit:g} s")
            try:
                event = wire.event(self._connection.receive())
            except OSError as error:
                raise unavailable(self._connection.path, error) from error
            if event is not None:
                if wire.ends(event, self._session):
                    self.close()
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()  # a loop left by ``break`` is no leak


def unavailable(path: str, error: OSError) -> DaemonUnavailable:
    """What an error of the local socket means, in words."""
    match error.errno:
        case errno.ENOENT:
            why = f"sessiond is not running: there is no {path}"
        case errno.ECONNREFUSED:
            why = f"sessiond is not running: nobody listens at {path}"
        case errno.EACCES | errno.EPERM:
            why = f"this user may not open {path}"
        case errno.EPIPE | errno.ECONNRESET | errno.ENOTCONN:
            why = f"sessiond at {path} went away in the middle of a request"
        case errno.EAGAIN:
            why = f"sessiond at {path} is too busy to take a connection"
        case _:
            why = f"the socket of sessiond at {path} failed: {error.strerror or error}"
    return DaemonUnavailable(why)


def default_client() -> Client:
    """The process's client of the daemon that ``$SESSIOND_SOCKET`` names now."""
    path = wire.socket_path()
    client = _DEFAULTS.get(path)
    if client is None:
        client = _DEFAULTS.setdefault(path, Client(path))
    return client


_CLIENTS: weakref.WeakSet[Client] = weakref.WeakSet()
_DEFAULTS: dict[str, Client] = {}


def _after_fork() -> None:
    for client in _CLIENTS:
        client._after_fork()


def _at_exit() -> None:
    for client in _DEFAULTS.values():
        client.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
