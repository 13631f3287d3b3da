"""How engine work is cut and gathered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

from sessiond.core import effects as ef
from sessiond.core import events as ev
from sessiond.core.tuples import Endpoint, FourTuple
from sessiond.perform import CROWD, SLICE, Performer
from sessiond.rebind.engine import Connection, Engine

WHERE = FourTuple(Endpoint("192.0.2.1", 1), Endpoint("192.0.2.2", 2))


class Recorder:
    """An engine that notes how many connections each call was for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.called = asyncio.Event()

    def __getattr__(self, step: str) -> Any:
        def call(batch: Sequence[Any]) -> list[None]:
            self.calls.append((step, len(batch)))
            self.called.set()
            return [None] * len(batch)

        return call


class Rig:
    """A performer whose every connection is known."""

    def __init__(self, sessions: int) -> None:
        self.engine = Recorder()
        self.done: list[ev.StepDone] = []
        connections = {handle: cast(Connection, handle) for handle in range(sessions)}
        nobody: Any = None
        self.performer = Performer(
            nobody,
            cast(Engine, self.engine),
            connections,
            nobody,
            nobody,
            self._post,
        )

    def _post(self, event: ev.Event) -> None:
        assert isinstance(event, ev.StepDone)
        self.done.append(event)

    def run(self, step: str, handles: range) -> None:
        self.performer.perform(ef.Run(step, [ef.Step(one, 1, tuple=WHERE) for one in handles]))

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.engine.called.clear()
            await asyncio.wait_for(self.engine.called.wait(), 5)

    async def until_done(self, sessions: int) -> None:
        await self.until(lambda: sum(size for _, size in self.engine.calls) >= sessions)


async def test_one_session_is_moved_at_once() -> None:
    rig = Rig(1)
    rig.run("settle", range(1))
    assert rig.engine.calls == [("settle", 1)]


async def test_a_batch_is_cut_in_slices_the_first_at_once() -> None:
    rig = Rig(1000)
    rig.run("settle", range(1000))
    assert rig.engine.calls == [("settle", SLICE)]
    await rig.until_done(1000)
    assert [size for _, size in rig.engine.calls] == [SLICE, SLICE, SLICE, 1000 - 3 * SLICE]
    assert [r.handle for one in rig.done for r in one.results] == list(range(1000))


async def test_a_crowd_waits_for_the_rest() -> None:
    rig = Rig(3 * CROWD)
    for start in range(0, 3 * CROWD, CROWD):
        rig.run("settle", range(start, start + CROWD))
    assert rig.engine.calls == []
    await rig.until_done(3 * CROWD)
    assert rig.engine.calls == [("settle", 3 * CROWD)]


async def test_a_full_slice_does_not_wait() -> None:
    rig = Rig(2 * SLICE)
    for start in range(0, SLICE, CROWD):
        rig.run("settle", range(start, start + CROWD))
    await rig.until_done(SLICE)
    assert rig.engine.calls == [("settle", SLICE)]


async def test_steps_stay_in_order() -> None:
    rig = Rig(CROWD)
    rig.run("settle", range(CROWD))
    rig.run("retreat", range(1))
    rig.run("settle", range(1, 2))
    await rig.until_done(CROWD + 2)
    assert rig.engine.calls == [("settle", CROWD), ("retreat", 1), ("settle", 1)]


async def test_what_a_departure_left_undone_is_done_when_the_rest_is() -> None:
    rig = Rig(2 * SLICE)
    rig.run("depart", range(2 * SLICE))
    await rig.until(lambda: len(rig.engine.calls) == 4)
    assert [step for step, _ in rig.engine.calls] == ["depart", "depart", "bury", "bury"]
