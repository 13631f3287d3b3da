"""Where every edge posts its events, and the one place the daemon waits."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from sessiond.core.events import DeadlinePassed, Event


class Inbox:
    """A queue with a deadline.

    Args:
        clock: seconds; the event loop's own, so that deadlines need no conversion.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def post(self, event: Event) -> None:
        """Hand in an event; from the loop's thread."""
        self._events.append(event)
        self.wake()

    async def next(self, deadline: Callable[[], float | None]) -> Event:
        """The next event, or ``DeadlinePassed`` when it is time for that first.

        Args:
            deadline: gives the earliest one; asked anew whenever there was a ``wake``.
        """
        while not self._events:
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
