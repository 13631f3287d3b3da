"""Moves by request while the path works: policy, a user or an application prefers another one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sessiond.core import events as ev
from sessiond.core.effects import Answer
from sessiond.core.inputs import Kind
from sessiond.core.moving import request
from sessiond.core.session import Session
from sessiond.core.table import pair

if TYPE_CHECKING:
    from sessiond.core.machine import Core


def improve(core: Core, session: Session, event: Any) -> None:
    """Policy prefers another path while this one works; less and less often where it flaps."""
    if session.chosen:
        return
    allowed = session.moved_at + core.min_move_interval * 2**session.flaps
    if core.now < allowed:
        core.table.set_deadline(session, allowed)
        return
    request(core, session, core.better(session))


def rebind(core: Core, session: Session, asked: ev.RebindAsked) -> None:
    """A user or an application wants to be elsewhere."""
    plan = core.plan(session, to=asked.to)
    plan = [target for target in plan if pair(target) != pair(session.tuple)]
    if not plan:
        where = asked.to or "another path"
        core.out.effect(
            Answer(
                asked.ticket, f"{where} is not usable for this session: see 'sessionctl network'"
            )
        )
        return
    session.ticket, session.chosen = asked.ticket, True
    request(core, session, plan)


def refuse_rebind(core: Core, session: Session, asked: ev.RebindAsked) -> None:
    why = session.reason or f"it is {session.state.value}"
    core.out.effect(Answer(asked.ticket, f"the session can't be moved now: {why}"))


def expire(core: Core, session: Session, event: Any) -> None:
    """An established session's deadline: a shield nobody needed, or a better path now allowed."""
    if session.shielded:
        session.shielded, session.announced = False, 0
        core.run(session, "settle")
    if core.judge(session) is Kind.BETTER:
        improve(core, session, event)
