"""The asyncio client of sessiond's local socket; libhsock.client is the blocking one.

A client keeps a few connections, each with one request at a time, and remembers no event loop. A
request that is cancelled takes its connection with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from libhsock import wire
from libhsock.client import HOLD_OFF, LONG_TIMEOUT, TIMEOUT, unavailable
from libhsock.errors import DaemonUnavailable, HsockError, NotFound

R = TypeVar("R")

PLACES = 4
"""Connections at a time from one client; further requests queue."""


class AsyncConnection:
    """One connection to the daemon, greeted."""

    def __init__(self, path: str) -> None:
        """Connect. Raises OSError."""
        self.path = path
        self._ids = itertools.count(1)
        self.sock = wire.new_socket()
        self.sock.setblocking(False)
        try:
            self.sock.connect(path)
        except BaseException:
            self.close()
            raise

    @classmethod
    async def open(cls, path: str, name: str) -> Self:
        """Connect and say hello. Raises OSError, or the HsockError that the daemon replied."""
        connection = cls(path)
        try:
            hello = wire.Hello(name)
            hello.parse((await connection.ask(hello)).unwrap())
        except BaseException:
            connection.close()
            raise
        return connection

    async def ask(self, call: wire.Call[Any], fds: Sequence[int] = ()) -> wire.Reply:
        """A request and its reply. Raises OSError and ProtocolError."""
        id = next(self._ids)
        data = wire.request(id, call)
        with contextlib.suppress(BrokenPipeError):  # the daemon may have said why it closed
            try:
                wire.send(self.sock, data, fds)
            except BlockingIOError:
                await writable([self.sock])
                wire.send(self.sock, data, fds)
        return wire.reply_to(id, await self.receive())

    async def receive(self) -> bytes:
        """The next packet's data. Raises ConnectionResetError at the end."""
        data = await asyncio.get_running_loop().sock_recv(self.sock, wire.MAX_PACKET)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "sessiond closed the connection")
        return data

    def close(self) -> None:
        """Idempotent."""
        self.sock.close()


class AsyncClient:
    """``libhsock.client.Client`` for asyncio, with the same errors."""

    def __init__(
        self, path: str | None = None, *, name: str = "libhsock", timeout: float = TIMEOUT
    ) -> None:
        """Nothing is opened before the first call; parameters as those of ``Client``."""
        self.path = path or wire.socket_path()
        self._name = name
        self._timeout = timeout
        self._silent_until = 0.0
        self._forget()
        _CLIENTS.add(self)

    def _forget(self) -> None:
        self._idle: list[AsyncConnection] = []
        self._busy: set[AsyncConnection] = set()
        self._asking = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    async def call(self, call: wire.Call[R], fds: Sequence[int] = ()) -> R:
        """Ask, and wait for the answer."""
        if time.monotonic() < self._silent_until:
            raise DaemonUnavailable(f"sessiond at {self.path} let a request time out just now")
        limit = LONG_TIMEOUT if call.meets_network else self._timeout
        try:
            async with asyncio.timeout(limit):
                reply = await self._ask(call, fds)
        except TimeoutError as error:
            if not call.meets_network:
                self._silent_until = time.monotonic() + HOLD_OFF
            why = f"sessiond at {self.path} did not answer in {limit:g} s"
            raise DaemonUnavailable(why) from error
        except OSError as error:
            raise unavailable(self.path, error) from error
        return call.parse(reply.unwrap())

    async def _ask(self, call: wire.Call[Any], fds: Sequence[int]) -> wire.Reply:
        if call.meets_network:  # may take long: on a connection of its own, nobody waits for it
            return await self._ask_on(await self._open(), call, fds, keep=False)
        await self._place()
        try:
            while self._idle:
                with contextlib.suppress(ConnectionError):  # the daemon was restarted
                    return await self._ask_on(self._idle.pop(), call, fds)
            return await self._ask_on(await self._open(), call, fds)
        finally:
            self._leave()

    async def _open(self) -> AsyncConnection:
        return await AsyncConnection.open(self.path, self._name)

    async def _ask_on(
        self,
        connection: AsyncConnection,
        call: wire.Call[Any],
        fds: Sequence[int],
        keep: bool = True,
    ) -> wire.Reply:
        self._busy.add(connection)
        answered = False
        try:
            reply = await connection.ask(call, fds)
            answered = True
            return reply
        finally:
            self._busy.discard(connection)
            if answered and keep:
                self._idle.append(connection)
            else:
                connection.close()

    async def _place(self) -> None:
        # asyncio.Semaphore would remember the loop, and a client is kept as long as its loop lives.
        while self._asking >= PLACES:
            turn = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():
                    self._wake()  # the turn was given and isn't taken
                raise
        self._asking += 1

    def _leave(self) -> None:
        self._asking -= 1
        self._wake()

    def _wake(self) -> None:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    async def attach(
        self,
        fd: int,
        role: wire.Role = "attach",
        name: str | None = None,
        service: str | None = None,
    ) -> wire.Record:
        """Make a session of the connected TCP socket ``fd``; the caller keeps it."""
        return await self.call(wire.Attach(fd, role, name, service), [fd])

    async def show(self, session: str) -> wire.Record:
        """One session."""
        return await self.call(wire.Show(session))

    async def rebind(self, session: str, to: str | None = None) -> wire.Record:
        """Move a session now, to a local address or an interface; returns when it has moved."""
        return await self.call(wire.Rebind(session, to))

    def events(self, session: str | None = None, *, may_be_gone: bool = False) -> AsyncEventStream:
        """What happens to one session, or to all the caller may see."""
        return AsyncEventStream(self.path, self._name, session, may_be_gone=may_be_gone)

    def close(self) -> None:
        """Close what is open; the next call opens anew."""
        while self._idle:
            self._idle.pop().close()

    def _after_fork(self) -> None:
        for connection in [*self._idle, *self._busy]:
            connection.close()
        self._forget()


class AsyncEventStream:
    """An asynchronous iterator over events; ends as ``EventStream`` does.

    Subscribed from the entry of ``async with``, otherwise from the first step on.
    """

    def __init__(
        self, path: str, name: str, session: str | None = None, *, may_be_gone: bool = False
    ) -> None:
        """``may_be_gone``: a session that isn't there, or ``""``, is no error but the end."""
        self._path = path
        self._name = name
        self._session = session
        self._may_be_gone = may_be_gone
        self._over = may_be_gone and not session
        self._connection: AsyncConnection | None = None

    async def start(self) -> None:
        """Subscribe, unless it is done. Raises DaemonUnavailable, NotFound."""
        if self._over or self._connection is not None:
            return
        connection = None
        monitor = wire.Monitor(self._session)
        try:
            async with asyncio.timeout(TIMEOUT):
                connection = await AsyncConnection.open(self._path, self._name)
                monitor.parse((await connection.ask(monitor)).unwrap())
            self._connection = connection
        except NotFound:
            if not self._may_be_gone:
                raise
            self._over = True
        except HsockError:
            raise
        except OSError as error:
            raise unavailable(self._path, error) from error
        finally:
            if self._connection is None and connection is not None:
                connection.close()

    async def __anext__(self) -> wire.Event:
        await self.start()
        while self._connection is not None:
            try:
                event = wire.event(await self._connection.receive())
            except OSError as error:
                raise unavailable(self._path, error) from error
            if event is not None:
                if wire.ends(event, self._session):
                    self.close()
                return event
        raise StopAsyncIteration

    def __aiter__(self) -> Self:
        return self

    def close(self) -> None:
        """Idempotent; the iteration ends."""
        self._over = True
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()  # a loop left by ``break`` is no leak


async def writable(socks: Iterable[Any], within: float | None = None) -> list[Any]:
    """Those of the sockets that can be written to; none where that takes ``within`` seconds."""
    loop = asyncio.get_running_loop()
    some = asyncio.Event()
    ready: list[Any] = []

    def note(sock: Any) -> None:
        loop.remove_writer(sock)
        ready.append(sock)
        some.set()

    waiting = list(socks)
    for sock in waiting:
        loop.add_writer(sock, note, sock)
    try:
        async with asyncio.timeout(within):
            await some.wait()
    except TimeoutError:
        pass
    finally:
        for sock in waiting:
            loop.remove_writer(sock)
    return ready


def aclient(path: str | None = None) -> AsyncClient:
    """The running loop's client of the daemon at ``path``; it is closed with the loop's end."""
    loop = asyncio.get_running_loop()
    clients = _DEFAULTS.get(loop)
    if clients is None:
        clients = _DEFAULTS[loop] = {}
        weakref.finalize(loop, _close_all, clients)
    path = path or wire.socket_path()
    if path not in clients:
        clients[path] = AsyncClient(path)
    return clients[path]


def _close_all(clients: dict[str, AsyncClient]) -> None:
    for client in clients.values():
        client.close()


_CLIENTS: weakref.WeakSet[AsyncClient] = weakref.WeakSet()
_DEFAULTS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, AsyncClient]] = (
    weakref.WeakKeyDictionary()
)


def _after_fork() -> None:
    for client in _CLIENTS:
        client._after_fork()


os.register_at_fork(after_in_child=_after_fork)
