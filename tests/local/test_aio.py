"""asyncio's streams with sessions, and the asynchronous client."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import libhsock
from libhsock import aclient, wire
from libhsock.aio import AsyncClient
from libhsock.errors import (
    ConnectTimedOut,
    CouldNotConnect,
    DaemonUnavailable,
    NameNotResolved,
    NotFound,
    Refused,
    UsageError,
)
from libhsock.testing import FakeDaemon
from tests.local.support import descriptors, eventually

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def shouting(**options: Any) -> AsyncIterator[int]:
    """The port of a server that says its role and every line in capitals."""
    busy: set[asyncio.Task[Any] | None] = set()

    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        busy.add(asyncio.current_task())
        session = libhsock.session(writer)
        while line := await reader.readline():
            writer.write(f"{session.record.role}: ".encode() + line.upper())
        await close(writer)
        busy.discard(asyncio.current_task())

    server = await libhsock.start_server(shout, **options)
    async with server:
        yield server.sockets[0].getsockname()[1]
        async with asyncio.timeout(10):
            while busy:
                await asyncio.wait([task for task in busy if task])


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_streams_have_sessions_at_both_ends(fake: FakeDaemon) -> None:
    async with shouting() as port:
        reader, writer = await libhsock.open_connection("server.test", port, timeout=10)
        writer.write(b"hello\n")
        assert await reader.readline() == b"accept: HELLO\n"
        session = libhsock.session(writer)
        assert (session.peer, session.mobile) == ("server.test", True)
        assert (await session.arefresh()).remote == f"[::1]:{port}"
        assert libhsock.session(writer) is session
        assert libhsock.session(writer.transport).id == session.id
        await close(writer)


async def test_events_and_moves(fake: FakeDaemon) -> None:
    async with shouting() as port:
        _, writer = await libhsock.open_connection("server.test", port)
        session = libhsock.session(writer)
        async with session.aevents() as events:
            assert (await session.arebind("192.0.2.9")).moves == 1
            fake.lose(session)
            kinds = [event.kind async for event in events]
        assert kinds == ["moving", "moved", "lost", "closed"]
        assert (await session.arefresh()).mobile is False
        with pytest.raises(Refused):
            await session.arebind()
        assert [event async for event in session.aevents()] == []
        await close(writer)


async def test_waiting_until_it_is_mobile(fake: FakeDaemon) -> None:
    async with shouting() as port:
        _, writer = await libhsock.open_connection("server.test", port)
        session = libhsock.session(writer)
        assert await session.await_mobile(10)
        fake.update(session, state="binding", mobile=False)
        assert not await session.await_mobile(0.02)
        waiting = asyncio.create_task(session.await_mobile(10))
        await asyncio.sleep(0)
        fake.bind(session)
        assert await waiting
        await session.adetach()
        assert not await session.await_mobile(10)
        await close(writer)


async def test_tls(fake: FakeDaemon, tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    client, server = tls
    async with shouting(ssl=server) as port:
        reader, writer = await libhsock.open_connection("server.test", port, ssl=client)
        writer.write(b"secret\n")
        assert await reader.readline() == b"accept: SECRET\n"
        assert libhsock.session(writer).mobile
        await close(writer)
        with pytest.raises(ssl.SSLCertVerificationError):
            await libhsock.open_connection("localhost", port, ssl=client)


@pytest.mark.usefixtures("no_daemon")
async def test_without_a_daemon() -> None:
    async with shouting() as port:
        reader, writer = await libhsock.open_connection("localhost", port, timeout=10)
        writer.write(b"hello\n")
        assert await reader.readline() == b"accept: HELLO\n"
        session = libhsock.session(writer)
        assert (session.id, session.mobile) == (None, False)
        assert "sessiond is not running" in str(session.reason)
        assert [event async for event in session.aevents()] == []
        await close(writer)
        with pytest.raises(NameNotResolved):
            await libhsock.open_connection("no.invalid", port)
        with pytest.raises(UsageError, match="no host name"):
            await libhsock.open_connection("a..b", port)


async def test_the_ways_to_fail(fake: FakeDaemon) -> None:
    with pytest.raises(CouldNotConnect) as caught:
        await libhsock.open_connection("server.test", 1)
    assert len(caught.value.tried) == 2
    with pytest.raises(UsageError):
        await libhsock.open_connection("server.test", 1 << 16)


async def test_with_a_hanging_daemon_a_timeout_holds(fake: FakeDaemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        fake.silence("resolve", "attach")
        port = server.getsockname()[1]
        _, writer = await libhsock.open_connection("localhost", port, timeout=1)
        reason = libhsock.session(writer).record.reason
        assert reason == "plain TCP: sessiond did not answer in time"
        await close(writer)


async def test_the_time_is_up(fake: FakeDaemon) -> None:
    with silent_port() as port:
        with pytest.raises(ConnectTimedOut) as caught:
            await libhsock.open_connection("server.test", port, timeout=0.05)
        assert caught.value.tried == (f"[::1]:{port}: no answer",)


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """A port of ::1 on which nobody answers: its backlog is full."""
    with socket.socket(socket.AF_INET6) as listener, contextlib.ExitStack() as fill:
        listener.bind(("::1", 0))
        listener.listen(0)
        for _ in range(4):
            sock = fill.enter_context(socket.socket(socket.AF_INET6))
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


async def test_a_silent_address_is_overtaken(fake: FakeDaemon) -> None:
    with silent_port() as port:
        async with shouting(host="127.0.0.1", port=port):
            _, writer = await libhsock.open_connection("server.test", port, timeout=10)
            assert libhsock.session(writer).remote == f"127.0.0.1:{port}"
            await close(writer)


async def test_many_connections_share_few_of_the_daemons(fake: FakeDaemon) -> None:
    async with shouting() as port:
        opened = await asyncio.gather(
            *(libhsock.open_connection("127.0.0.1", port) for _ in range(200))
        )
        assert len({libhsock.session(writer).id for _, writer in opened}) == 200
        for reader, writer in opened:
            writer.write(b"x\n")
            assert await reader.readline() == b"accept: X\n"
        for _, writer in opened:
            await close(writer)
    hellos = [call for call in fake.calls if isinstance(call, wire.Hello)]
    assert len(hellos) <= aclient.PLACES + 1  # and one of the blocking client


async def test_a_restarted_daemon_is_found_again(fake: FakeDaemon) -> None:
    (session,) = fake.add()
    client = AsyncClient()
    assert (await client.show(session)).session == session
    fake.stop()
    with pytest.raises(DaemonUnavailable, match="not running"):
        await client.show(session)
    fake.start()
    assert (await client.show(session)).session == session
    fake.stop()
    fake.start()
    assert (await client.show(session)).session == session
    async with client.events() as events:
        fake.stop()
        with pytest.raises(DaemonUnavailable, match="went away"):
            await anext(events)
    fake.start()
    client.close()


async def test_a_hanging_daemon_costs_one_timeout(fake: FakeDaemon) -> None:
    fake.silence("show")
    client = AsyncClient(timeout=0.05)
    with pytest.raises(DaemonUnavailable, match=r"in 0\.05 s"):
        await client.show("ab")
    with pytest.raises(DaemonUnavailable, match="just now"):
        await client.call(wire.GetStats())


async def test_a_cancelled_request_does_not_disturb_the_next(fake: FakeDaemon) -> None:
    ids = fake.add(30)
    client = AsyncClient()
    fake.silence("stats")
    stuck = [asyncio.create_task(client.call(wire.GetStats())) for _ in range(8)]
    await asyncio.sleep(0.01)
    for task in stuck:
        task.cancel()
    await asyncio.gather(*stuck, return_exceptions=True)
    shown = await asyncio.gather(*(client.show(one) for one in ids))
    assert [record.session for record in shown] == ids
    client.close()


async def test_events_of_a_session_that_is_not_there(fake: FakeDaemon) -> None:
    client = AsyncClient()
    with pytest.raises(NotFound):
        await anext(client.events("ab"))


def test_each_loop_has_its_client_and_leaves_nothing(fake: FakeDaemon) -> None:
    async def once() -> None:
        async with shouting() as port:
            _, writer = await libhsock.open_connection("server.test", port)
            async for _ in _first(libhsock.session(writer), fake):
                break
            await close(writer)

    asyncio.run(once())
    gc.collect()
    before = descriptors().keys()
    for _ in range(5):
        asyncio.run(once())
    gc.collect()
    eventually(lambda: descriptors().keys() == before)


async def _first(session: libhsock.Session, fake: FakeDaemon) -> AsyncIterator[libhsock.Event]:
    async with session.aevents() as events:
        fake.move(session)
        async for event in events:
            yield event


async def test_events_of_a_hanging_daemon_cost_one_timeout(fake: FakeDaemon) -> None:
    fake.silence("monitor")
    client = AsyncClient(timeout=0.2)
    with pytest.raises(DaemonUnavailable, match=r"did not answer in 0\.2 s"):
        await client.events().start()
    with pytest.raises(DaemonUnavailable, match="just now"):
        await client.events().start()
    client.close()
