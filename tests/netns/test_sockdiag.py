"""The end of TCP sockets, told by the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import pytest

from sessiond.edges.sockdiag import DestroyWatch, alive
from tests.support.inside import in_own_network

SO_COOKIE = 57
SO_LINGER_RESET = b"\x01\0\0\0\0\0\0\0"
"""struct linger: on, 0 s: close() sends a RST and leaves no TIME_WAIT."""


class Ended(asyncio.Queue[int]):
    """The cookies that were reported, in order."""

    async def next(self) -> int:
        return await asyncio.wait_for(self.get(), 5)


@asynccontextmanager
async def watching(**options: Any) -> AsyncIterator[tuple[DestroyWatch, Ended]]:
    ended = Ended()
    watch = DestroyWatch(ended.put_nowait, **options)
    try:
        watch.start()
        yield watch, ended
    finally:
        watch.close()


def cookie(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little")


class Listener:
    """Makes connections of this namespace with itself."""

    def __init__(self, family: int = socket.AF_INET) -> None:
        self.sock = socket.socket(family)
        self.sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        self.sock.listen(4096)

    def connection(self) -> tuple[socket.socket, socket.socket]:
        """Both ends: connected, accepted."""
        sock = socket.create_connection(self.sock.getsockname()[:2])
        return sock, self.sock.accept()[0]

    def churn(self, number: int) -> None:
        """Connections that come and go at once."""
        for _ in range(number):
            for end in self.connection():
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, SO_LINGER_RESET)
                end.close()


@contextlib.contextmanager
def listener(family: int = socket.AF_INET) -> Iterator[Listener]:
    made = Listener(family)
    with made.sock:
        yield made


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@in_own_network
async def test_a_closed_socket_is_reported_once_and_others_are_not(family: int) -> None:
    with listener(family) as server:
        ours, accepted = server.connection()
        other, other_accepted = server.connection()
        async with watching() as (watch, ended):
            mine, peers = cookie(ours), cookie(accepted)
            watch.watch(mine)
            watch.watch(peers)
            with other, other_accepted:
                pass
            ours.close()
            accepted.close()
            assert {await ended.next(), await ended.next()} == {mine, peers}
            server.churn(5)
            last, end = server.connection()
            watch.watch(cookie(last))
            expected = cookie(last)
            last.close()
            end.close()
            assert await ended.next() == expected
            assert ended.empty()


@in_own_network
async def test_an_unwatched_socket_is_not_reported() -> None:
    with listener() as server:
        first, first_end = server.connection()
        second, second_end = server.connection()
        async with watching() as (watch, ended):
            watch.watch(cookie(first))
            watch.unwatch(cookie(first))
            watch.unwatch(cookie(first))
            expected = cookie(second)
            watch.watch(expected)
            for sock in (first, first_end, second, second_end):
                sock.close()
            assert await ended.next() == expected
            assert ended.empty()


@in_own_network
async def test_a_socket_lives_until_its_last_holder_closes_it() -> None:
    with listener() as server:
        ours, accepted = server.connection()
        async with watching() as (watch, ended):
            expected = cookie(ours)
            watch.watch(expected)
            copy = os.dup(ours.fileno())
            ours.close()
            server.churn(1)
            sentinel, end = server.connection()
            watch.watch(cookie(sentinel))
            tracer = cookie(sentinel)
            sentinel.close()
            end.close()
            assert await ended.next() == tracer
            assert alive([expected]) == {expected}
            os.close(copy)
            accepted.close()
            assert await ended.next() == expected


@in_own_network
async def test_lost_messages_are_made_good_by_a_dump() -> None:
    with listener() as server, ExitStack() as stay:
        async with watching(receive_buffer=1) as (watch, ended):
            kept = [stay.enter_context(end) for end in server.connection()]
            gone = server.connection()
            expected = {cookie(end) for end in gone}
            for end in (*kept, *gone):
                watch.watch(cookie(end))
            # The loop stands still meanwhile, and the buffer holds a few messages only.
            server.churn(200)
            for end in gone:
                end.close()
            assert {await ended.next(), await ended.next()} == expected
            assert watch.dumps >= 1
            assert ended.empty()
            kept[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, SO_LINGER_RESET)
            expected = {cookie(kept[0])}
            kept[0].close()
            assert {await ended.next()} == expected


@in_own_network
async def test_a_dump_finds_what_lives_in_both_families_and_not_what_lingers() -> None:
    with listener() as v4, listener(socket.AF_INET6) as v6, ExitStack() as stay:
        ends = [*v4.connection(), *v6.connection()]
        living = {cookie(stay.enter_context(end)) for end in ends}
        ours, accepted = v4.connection()
        lingering = cookie(ours)
        ours.close()
        accepted.close()
        assert alive([*living, lingering, 999_999_999]) == living


@in_own_network
async def test_a_dump_of_many_messages_is_read_to_its_end() -> None:
    with listener() as server, ExitStack() as stay:
        cookies = set()
        for _ in range(400):
            for end in server.connection():
                cookies.add(cookie(stay.enter_context(end)))
        assert alive(cookies) == cookies


@in_own_network
async def test_unrelated_connections_cost_microseconds() -> None:
    number = 10_000
    with listener() as server:
        async with watching() as (watch, ended):
            ours, accepted = server.connection()
            expected = cookie(ours)
            watch.watch(expected)
            spent = 0.0
            started = time.perf_counter()
            for _ in range(number // 500):
                server.churn(500)
                before = time.thread_time()
                await asyncio.sleep(0.02)
                spent += time.thread_time() - before
            lasted = time.perf_counter() - started
            ours.close()
            accepted.close()
            assert await ended.next() == expected
            assert watch.dumps == 0
            each = spent / number * 1e6
            print(f"\n{each:.1f} us of the loop for each of {number} connections in {lasted:.1f} s")
            # Both ends of each are here; seen: 3 us.
            assert each < 50
