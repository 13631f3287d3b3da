"""The asyncio client of sessiond's local socket; libhsock.client is the blocking one.

A client keeps a few connections, each with one request at a time, and remembers no event loop. A
request that is cancelled takes its connection with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Self, TypeVar

from libhsock import wire
from libhsock.dialog import Dialog
from libhsock.errors import NotFound
from libhsock.pool import Pool, unavailable

R = TypeVar("R")

PLACES = 4
"""Connections at a time from one client; further requests queue."""


class AsyncConnection(Dialog):
    """One connection to the daemon."""

    @classmethod
    async def open(cls, path: str, name: str) -> Self:
        """Connect and say hello. Raises OSError, or the HsockError that the daemon replied."""
        connection = cls(path)
        with connection.closed_by_errors():
            connection.sock.setblocking(False)
            connection.sock.connect(path)
            await connection.call(wire.Hello(name))
        return connection

    async def ask(self, call: wire.Call[Any], fds: Sequence[int] = ()) -> wire.Reply:
        """A request and its reply. Raises OSError and ProtocolError."""
        data = self.request(call)
        with contextlib.suppress(BrokenPipeError):  # the daemon may have said why it closed
            try:
                wire.send(self.sock, data, fds)
            except BlockingIOError:
                await writable([self.sock])
                wire.send(self.sock, data, fds)
        return self.reply(await self.receive())

    async def call(self, call: wire.Call[R]) -> R:
        """A request and its result. Raises as ``open`` does."""
        return call.parse((await self.ask(call)).unwrap())

    async def receive(self) -> bytes:
        """The next packet's data; empty at the end."""
        return await asyncio.get_running_loop().sock_recv(self.sock, wire.MAX_PACKET)


class AsyncClient(Pool[AsyncConnection]):
    """``libhsock.client.Client`` for asyncio, with the same parameters and errors."""

    def _forget(self) -> None:
        super()._forget()
        self._taken = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    async def call(self, call: wire.Call[R], fds: Sequence[int] = ()) -> R:
        """Ask, and wait for the answer."""
        with self._asking(call) as limit:
            async with asyncio.timeout(limit):
                reply = await self._ask(call, fds)
        return call.parse(reply.unwrap())

    async def _ask(self, call: wire.Call[Any], fds: Sequence[int]) -> wire.Reply:
        if call.meets_network:  # may take long: on a connection of its own, nobody waits for it
            return await self._ask_on(await self._open(), call, fds, keep=False)
        async with self._place():
            while (kept := self._kept()) is not None:
                with contextlib.suppress(ConnectionError):  # the daemon was restarted
                    return await self._ask_on(kept, call, fds)
            return await self._ask_on(await self._open(), call, fds)

    async def _ask_on(
        self,
        connection: AsyncConnection,
        call: wire.Call[Any],
        fds: Sequence[int],
        keep: bool = True,
    ) -> wire.Reply:
        with self._using(connection, keep):
            return await connection.ask(call, fds)

    async def _open(self) -> AsyncConnection:
        return await AsyncConnection.open(self.path, self._name)

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        # asyncio.Semaphore would remember the loop, and a client is kept as long as its loop lives.
        while self._taken >= PLACES:
            turn = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():
                    self._wake()  # the turn was given and isn't taken
                raise
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1
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
        """What happens to one session, or to all the caller may see. ``may_be_gone``: a session
        that isn't there, or ``""``, is no error but the end."""
        return AsyncEventStream(self, session, may_be_gone)

    async def monitor(self, session: str | None) -> AsyncConnection:
        """A connection that tells what happens."""
        monitor = wire.Monitor(session)
        with self._asking(monitor) as limit:
            async with asyncio.timeout(limit):
                connection = await self._open()
                with connection.closed_by_errors():
                    await connection.call(monitor)
        return connection


class AsyncEventStream:
    """An asynchronous iterator over events; ends as ``EventStream`` does.

    Subscribed from the entry of ``async with``, otherwise from the first step on.
    """

    def __init__(self, client: AsyncClient, session: str | None, may_be_gone: bool) -> None:
        """Made by ``AsyncClient.events``."""
        self._client = client
        self._session = session
        self._may_be_gone = may_be_gone
        self._over = may_be_gone and not session
        self._connection: AsyncConnection | None = None

    async def start(self) -> None:
        """Subscribe, unless it is done. Raises DaemonUnavailable, NotFound."""
        if self._over or self._connection is not None:
            return
        try:
            self._connection = await self._client.monitor(self._session)
        except NotFound:
            if not self._may_be_gone:
                raise
            self._over = True

    async def __anext__(self) -> wire.Event:
        await self.start()
        while (connection := self._connection) is not None:
            try:
                event = connection.event(await connection.receive())
            except OSError as error:
                raise unavailable(connection.path, error) from error
            if connection.over:
                self.close()
            if event is not None:
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

    async def __aexit__(self, *error: object) -> None:
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


_DEFAULTS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, AsyncClient]] = (
    weakref.WeakKeyDictionary()
)
