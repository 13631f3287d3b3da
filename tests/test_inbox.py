"""Events are handled one after the other, at once where nothing is before them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from sessiond.core import events as ev
from sessiond.inbox import Inbox


def event(number: int) -> ev.Ended:
    return ev.Ended(number, "")


class Desk:
    """What is handled; an event may lead to others, or fail."""

    def __init__(self) -> None:
        self.inbox = Inbox(asyncio.get_running_loop().time)
        self.handled: list[ev.Event] = []
        self.leads_to: dict[int, list[int]] = {}
        self.fails_at: int | None = None
        self.due: float | None = None
        self.seen = asyncio.Event()

    def handle(self, one: ev.Event) -> None:
        self.handled.append(one)
        if isinstance(one, ev.DeadlinePassed):
            self.due = None
        elif isinstance(one, ev.Ended):
            if one.handle == self.fails_at:
                raise LookupError("no row")
            for number in self.leads_to.get(one.handle, ()):
                self.inbox.post(event(number))
        self.seen.set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[asyncio.Task[None]]:
        serving = asyncio.create_task(self.inbox.serve(self.handle, lambda: self.due))
        await asyncio.sleep(0)  # it begins to wait
        yield serving
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError, LookupError):
            await serving


async def test_an_event_is_handled_when_it_is_posted() -> None:
    desk = Desk()
    async with desk.open():
        desk.inbox.post(event(1))
        assert desk.handled == [event(1)]
        desk.inbox.post(event(2))
        assert desk.handled == [event(1), event(2)]


async def test_what_an_event_leads_to_comes_after_it() -> None:
    desk = Desk()
    desk.leads_to = {1: [2, 3], 2: [4]}
    async with desk.open():
        desk.inbox.post(event(1))
    assert desk.handled == [event(number) for number in (1, 2, 3, 4)]


async def test_what_came_before_the_start_comes_first() -> None:
    desk = Desk()
    desk.inbox.post(event(1))
    async with desk.open():
        desk.inbox.post(event(2))
        assert desk.handled == [event(1), event(2)]


async def test_what_handling_raises_ends_the_serving_not_the_poster() -> None:
    desk = Desk()
    desk.fails_at = 1
    async with desk.open() as serving:
        desk.inbox.post(event(1))
        with pytest.raises(LookupError, match="no row"):
            await serving


async def test_a_deadline_set_past_the_queue_is_kept() -> None:
    desk = Desk()
    async with desk.open():
        desk.due = asyncio.get_running_loop().time() + 0.01
        desk.inbox.wake()
        await asyncio.wait_for(desk.seen.wait(), 5)
    assert desk.handled == [ev.DeadlinePassed()]
