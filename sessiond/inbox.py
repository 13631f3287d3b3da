"""Where every edge posts its events, and the one place the daemon waits."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from sessiond.core.events import DeadlinePassed, Event

Handler = Callable[[Event], None]
Deadline = Callable[[], float | None]
"""Gives the earliest one; asked anew whenever there was a ``wake``."""


class Inbox:
    """A queue with a deadline.

    Args:
        clock: seconds; the event loop's own, so that deadlines need no conversion.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._handle: Handler | None = None
        self._handling = False
        self._error: Exception | None = None

    def post(self, event: Event) -> None:
        """Hand in an event; from the loop's thread.

        While ``serve`` waits it is handled here and now: a round of the loop later would be a round
        trip's tenth on a local network.
        """
        self._events.append(event)
        if self._handle is None or self._handling or self._waiter is None:
            self.wake()
            return
        self._handling = True
        try:
            while self._events:
                self._handle(self._events.popleft())
        except Exception as error:  # it belongs to ``serve``, not to who posted
            self._error = error
        finally:
            self._handling = False
            self.wake()

    async def serve(self, handle: Handler, deadline: Deadline) -> None:
        """Have all events handled, one after the other, and DeadlinePassed in its time, for ever.

        Raises:
            Exception: what ``handle`` raised.
        """
        self._handle = handle
        try:
            while True:
                event = await self.next(deadline)
                self._handling = True
                try:
                    handle(event)
                finally:
                    self._handling = False
        finally:
            self._handle = None

    async def next(self, deadline: Deadline) -> Event:
        """The next event, or ``DeadlinePassed`` when it is time for that first."""
        while not self._events:
            if self._error is not None:
                raise self._error
            due = deadline()
            if due is not None and self._clock() >= due:
                return DeadlinePassed()
            await self._wait(due)
        return self._events.popleft()

    def wake(self) -> None:
        """Have ``next`` look at its deadline again: something was handled past the queue."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self, deadline: float | None) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None if deadline is None else loop.call_at(deadline, self.wake)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()
