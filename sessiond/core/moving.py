"""The mover: from the loss of a path, or the wish for another, to rest on the next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sessiond.core import messages as m
from sessiond.core.ending import lose
from sessiond.core.inputs import Incoming, Kind, Undone
from sessiond.core.outcomes import Arrived, Departed, Failed
from sessiond.core.session import Session, State
from sessiond.core.tuples import Endpoint, FourTuple

if TYPE_CHECKING:
    from sessiond.core.machine import Core

REQUEST_ATTEMPTS = 4
"""Times a Prepare or Move is sent on one path before the next path is tried."""
SHIELD_LIFE = 5.0
"""Seconds a shield stays up for a move that does not come."""
SETTLE_AGAIN = 0.1
"""Seconds until a settle that failed is tried again; in case 2 the window may be closed so long."""
RETRY_FIRST, RETRY_MAX = 0.5, 30.0
"""Seconds between attempts on all paths while none answers."""
FLAP_WITHIN = 10
"""A path lost within so many ``min_move_interval`` after the move to it flaps."""
MAX_FLAPS = 6


def leave(core: Core, session: Session, event: Any) -> None:
    """The path is lost, or there may be one again: move, without asking on the old one."""
    if session.state is not State.MOVING:
        session.since = core.now
    if session.state is State.ESTABLISHED:
        soon = core.now - session.moved_at < FLAP_WITHIN * core.min_move_interval
        session.flaps = min(session.flaps + 1, MAX_FLAPS) if soon else 0
    session.forced, session.chosen = True, False
    session.plan = core.plan(session)
    depart_next(core, session)


def reconsider(core: Core, session: Session, event: Any) -> None:
    """The network changed under a move: carry on if its target is still there."""
    target = session.target
    if target is None or not core.usable(target):
        leave(core, session, event)


def request(core: Core, session: Session, plan: list[FourTuple]) -> None:
    """Make before break: the old path works until the new one has answered."""
    session.forced = False
    session.plan = plan
    depart_next(core, session)


def depart_next(core: Core, session: Session, reason: str | None = None) -> None:
    """Try the next candidate, if there is one."""
    core.table.set_deadline(session, None)
    session.await_no_answer()
    if not session.plan:
        exhausted(core, session, reason)
        return
    session.target = session.plan.pop(0)
    session.generation += 1
    session.attempts = 0
    if session.forced:
        depart(core, session, None)
    else:
        session.state = State.PREPARING
        send_request(core, session)


def depart(core: Core, session: Session, event: Any) -> None:
    """Prepared, or no old path to be careful of: the engine's first step."""
    if isinstance(event, Incoming) and event.entry.generation != session.generation:
        return
    if not session.forced:
        session.since = core.now
    if session.state is not State.MOVING:
        core.report(session, "moving")
    session.state = State.MOVING
    session.attempts = 0
    core.table.set_deadline(session, None)
    core.run(session, "depart", tuple=session.target)


def departed(core: Core, session: Session, outcome: Departed) -> None:
    session.departed = True
    session.target = outcome.tuple
    session.rcv_nxt, session.window = outcome.rcv_nxt, outcome.window
    session.pending = outcome.pending
    association = session.association
    if association is not None:
        association.outstanding.add(session.handle)
    if session.changes != core.changes and not core.usable(outcome.tuple):
        leave(core, session, Kind.LOST)
    else:
        send_request(core, session)


def send_request(core: Core, session: Session) -> None:
    """Prepare or Move, on the path it is about, so that its answer proves the path."""
    target, association = session.target, session.association
    assert target is not None
    assert association is not None
    to = Endpoint(target.remote.address, core.port)
    via = target.local.address
    if session.state is State.PREPARING:
        mark = m.Mark(session.peer_handle, session.generation)
        core.out.entry(to, via, association.host, m.Prepare, mark)
    else:
        entry = m.MoveEntry(
            session.peer_handle,
            session.generation,
            target.local.port,
            target.remote.port,
            session.rcv_nxt,
            session.window,
            session.pending,
        )
        common = target.local.address, target.remote.address
        core.out.entry(to, via, association.host, m.Move, entry, *common)
    core.table.set_deadline(session, core.now + association.pause(session.attempts))
    session.attempts += 1


def repeat_request(core: Core, session: Session, event: Any) -> None:
    association = session.association
    if association is not None and association.working(core.now):
        core.table.set_deadline(session, core.now + association.pause())
    elif session.attempts < REQUEST_ATTEMPTS:
        send_request(core, session)
    else:
        depart_next(core, session, f"the peer's sessiond did not answer on {session.target}")


def request_refused(core: Core, session: Session, incoming: Incoming) -> None:
    if incoming.entry.generation == session.generation:
        depart_next(core, session, f"the peer refused: {incoming.entry.reason}")


def depart_failed(core: Core, session: Session, failed: Failed) -> None:
    if failed.lost:
        lose(core, session, failed.reason)
    else:
        depart_next(core, session, failed.reason)


def arrive(core: Core, session: Session, incoming: Incoming) -> None:
    """Moved: the peer is there. The engine's last step."""
    if incoming.entry.generation != session.generation or not session.departed:
        return
    core.table.set_deadline(session, None)
    session.await_no_answer()
    if session.association is not None:
        session.association.answered_at = core.now
    entry: m.MovedEntry = incoming.entry
    core.run(session, "arrive", rcv_nxt=entry.rcv_nxt, window=entry.window)


def arrived(core: Core, session: Session, outcome: Arrived) -> None:
    assert session.target is not None
    finish(core, session, session.target)
    session.settled = session.generation
    send_settled(core, session)
    rest(core, session)


def send_settled(core: Core, session: Session) -> None:
    association = session.association
    assert association is not None
    mark = m.Mark(session.peer_handle, session.settled)
    to = Endpoint(session.tuple.remote.address, core.port)
    core.out.entry(to, session.tuple.local.address, association.host, m.Settled, mark)


def exhausted(core: Core, session: Session, reason: str | None) -> None:
    """No candidate is left: back to the old path where there is one, or wait for any."""
    if not session.forced and not session.departed:
        session.target, session.chosen = None, False
        core.answer(session, reason or "no usable path")
        rest(core, session)
        return
    if not session.forced:
        session.forced = True
        session.plan = [session.tuple]
        depart_next(core, session, reason)
        return
    alone = not core.network.addresses
    nowhere = "no usable address on this host" if alone else "no path to an address of the peer"
    session.reason = reason or nowhere
    if session.state is not State.WAITING:
        core.report(session, "waiting", reason=session.reason)
        core.resolve(session)
    session.state = State.WAITING
    core.answer(session, session.reason)
    if session.departed and core.usable(session.tuple):
        # The peer's daemon is silent even on the old path: plain TCP may still work there.
        session.departed, session.shielded = False, True
        core.run(session, "retreat")
    pause = min(RETRY_FIRST * 2 ** min(session.cycles, 10), RETRY_MAX)
    session.cycles += 1
    if not alone:
        core.table.set_deadline(session, core.now + pause)


def keep_shielded(core: Core, session: Session) -> None:
    """For the move that the peer has announced, for a while."""
    session.shielded = True
    core.run(session, "shield", generation=session.announced)
    if session.state is State.ESTABLISHED:
        core.table.set_deadline(session, core.now + SHIELD_LIFE)


def make_up(core: Core, session: Session, undone: Undone) -> None:
    """A step failed that nobody waits for. A socket that is gone is told of by its end."""
    if undone.step == "retreat":
        if undone.failed.lost:
            lose(core, session, undone.failed.reason)
        else:
            session.departed = True  # the next attempt finds it where it is
    elif undone.step == "settle" and session.state is State.ESTABLISHED:
        session.shielded = True
        core.table.set_deadline(session, core.now + SETTLE_AGAIN)


def retry(core: Core, session: Session, event: Any) -> None:
    """Still waiting: every path once more, and where the peer's name leads now."""
    core.resolve(session)
    leave(core, session, event)


def finish(core: Core, session: Session, new: FourTuple) -> None:
    """The socket is live on its new tuple."""
    before = session.tuple
    core.table.retuple(session, new)
    session.departed = False
    session.shielded = False
    session.reason = None
    session.cycles = 0
    session.moves += 1
    session.moved_at = core.now
    session.gap = core.now - session.since
    core.report(session, "moved", before=before, gap=session.gap)
    core.answer(session, None)


def rest(core: Core, session: Session) -> None:
    """ESTABLISHED, unless the network changed meanwhile."""
    session.state = State.ESTABLISHED
    session.plan = []
    session.attempts = 0
    if session.announced > session.generation:
        keep_shielded(core, session)  # what ended took down the shield for the next as well
    elif session.shielded:
        core.table.set_deadline(session, core.now + SHIELD_LIFE)
    if not core.usable(session.tuple):
        leave(core, session, Kind.LOST)
