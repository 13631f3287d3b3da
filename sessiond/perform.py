"""Effects to edge calls: the only dispatch from what the core wants to what the host does."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sessiond.core import effects as ef
from sessiond.core import events as ev
from sessiond.rebind.engine import Connection, Engine

SLICE = 256
"""Sessions an engine handles before peers and applications are listened to again: some 10 ms."""
CROWD = 32
"""Sessions in one step that make it likely that more are on their way: a message is full."""
GATHER_SECONDS = 0.002
"""How long a crowd waits for the rest: stopping a process costs as much as moving a session or
two, and is done once a step."""
BURY_SECONDS, BURY_AT_LATEST = 0.01, 1.0
"""Without a step, and at most, until what steps have left undone is done: where the peer is near
or in a batch, most handovers are over by then, and there is nothing left to do."""


class Daemons(Protocol):
    """Those of other hosts."""

    def send(self, send: ef.Send) -> None: ...


class Names(Protocol):
    """What is needed of the resolver edge."""

    async def addresses(self, name: str, service: str) -> tuple[str, ...]: ...


class Audience(Protocol):
    """Who hears what becomes of sessions and requests."""

    def report(self, report: ef.Report) -> None: ...

    def answer(self, answer: ef.Answer) -> None: ...

    def forget(self, handle: int) -> None: ...


class Performer:
    """Carries effects out, in order, without ever blocking.

    Engine work runs here, in the thread that may ptrace(2), slice by slice.

    Args:
        engine: moves sockets.
        connections: the application's socket of each session, by handle.
        post: takes the events that answer effects.
    """

    def __init__(
        self,
        daemons: Daemons,
        engine: Engine,
        connections: dict[int, Connection],
        names: Names,
        audience: Audience,
        post: Callable[[ev.Event], None],
    ) -> None:
        self._daemons = daemons
        self._engine = engine
        self._connections = connections
        self._names = names
        self._audience = audience
        self._post = post
        self._work: deque[tuple[str, list[ef.Step]]] = deque()
        self._next: asyncio.Handle | None = None
        self._stepped = self._bury_by = 0.0
        self._unburied: list[Connection] = []
        self._lookups: set[asyncio.Task[None]] = set()

    def perform(self, effect: ef.Effect) -> None:
        """Carry one effect out; what it leads to is posted."""
        match effect:
            case ef.Send():
                self._daemons.send(effect)
            case ef.Run(step, batch):
                self._queue(step, batch)
            case ef.Resolve(name, service):
                task = asyncio.create_task(self._look_up(name, service))
                self._lookups.add(task)
                task.add_done_callback(self._lookups.discard)
            case ef.Report():
                self._audience.report(effect)
            case ef.Answer():
                self._audience.answer(effect)
            case ef.Forget(handle):
                self._queue("forget", [ef.Step(handle, 0)])  # what it is still to do comes first

    def _queue(self, step: str, batch: Sequence[ef.Step]) -> None:
        """Cut a batch in slices, its first sessions joining those that wait for the same step."""
        last = self._work[-1] if self._work else None
        room = SLICE - len(last[1]) if last is not None and last[0] == step else 0
        if last is not None:
            last[1].extend(batch[:room])
        for start in range(room, len(batch), SLICE):
            self._work.append((step, list(batch[start : start + SLICE])))
        if self._next is None and not self._crowding():
            self._work_on()
        else:
            self._go_on()

    def _crowding(self) -> bool:
        """Whether what waits is part of something larger that is on its way."""
        return len(self._work) == 1 and CROWD <= len(self._work[0][1]) < SLICE

    def _go_on(self) -> None:
        """The next slice when the loop comes round, or when a crowd has gathered."""
        loop = asyncio.get_running_loop()
        if self._crowding():
            if self._next is None:
                self._next = loop.call_later(GATHER_SECONDS, self._work_on)
        elif self._work:
            if self._next is not None:
                self._next.cancel()
            self._next = loop.call_soon(self._work_on)

    def _work_on(self) -> None:
        """One slice."""
        self._next = None
        step, batch = self._work.popleft()
        known = [entry for entry in batch if entry.handle in self._connections]
        outcomes = self._outcomes(step, known)
        self._stepped = asyncio.get_running_loop().time()
        results = [
            ev.Result(entry.handle, entry.generation, outcome)
            for entry, outcome in zip(known, outcomes, strict=True)
        ]
        self._post(ev.StepDone(step, results))
        self._go_on()

    def _outcomes(self, step: str, batch: Sequence[ef.Step]) -> Sequence[Any]:
        sockets = [self._connections[entry.handle] for entry in batch]
        pairs = zip(sockets, batch, strict=True)
        engine = self._engine
        match step:
            case "depart":
                self._bury_later(sockets)
                return engine.depart([(sock, entry.tuple) for sock, entry in pairs if entry.tuple])
            case "arrive":
                return engine.arrive([(sock, entry.rcv_nxt, entry.window) for sock, entry in pairs])
            case "follow":
                self._bury_later(sockets)
                return engine.follow(
                    [
                        (sock, entry.tuple, entry.rcv_nxt, entry.window, entry.hold)
                        for sock, entry in pairs
                        if entry.tuple
                    ]
                )
            case "forget":
                for entry in batch:
                    self._audience.forget(entry.handle)
                return [None] * len(batch)
            case "enroll":
                return engine.enroll(sockets)
            case "release":
                return engine.release(sockets)
            case "shield":
                return engine.shield(sockets)
            case "settle":
                return engine.settle(sockets)
            case "retreat":
                return engine.retreat(sockets)
        raise LookupError(f"no engine step {step}")

    def _bury_later(self, sockets: Sequence[Connection]) -> None:
        """When the Moves are out and nothing else is to be done; most have arrived by then."""
        if not self._unburied:
            loop = asyncio.get_running_loop()
            self._bury_by = loop.time() + BURY_AT_LATEST
            loop.call_later(BURY_SECONDS, self._bury)
        self._unburied += sockets

    def bury(self) -> None:
        """What steps have left undone, now: addresses have come back."""
        if self._unburied:
            self._engine.bury(self._unburied)
            self._unburied = []

    def _bury(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() < min(self._bury_by, self._stepped + BURY_SECONDS):
            loop.call_later(BURY_SECONDS, self._bury)
            return
        batch, self._unburied = self._unburied[:SLICE], self._unburied[SLICE:]
        self._engine.bury(batch)
        if self._unburied:
            loop.call_soon(self._bury)

    async def _look_up(self, name: str, service: str) -> None:
        self._post(ev.Resolved(name, await self._names.addresses(name, service)))
