"""The other end: from a mover's Prepare or Move to its Settled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sessiond.core import messages as m
from sessiond.core.ending import lose
from sessiond.core.inputs import Incoming, Kind, Shielded
from sessiond.core.moving import (
    depart_next,
    finish,
    keep_shielded,
    leave,
    rest,
    send_settled,
)
from sessiond.core.outcomes import Failed, Followed
from sessiond.core.paths import forbidden
from sessiond.core.session import Session, State
from sessiond.core.tuples import Endpoint, FourTuple

if TYPE_CHECKING:
    from sessiond.core.machine import Core

MOVED_REPEAT_FIRST, MOVED_REPEAT_MAX = 1.0, 30.0
"""Seconds, at first and at most, between repetitions of Moved to a mover that does not settle."""


def raise_shield(core: Core, session: Session, incoming: Incoming) -> None:
    """The peer is about to leave: late segments must not meet a RST of its old tuple."""
    session.announced = max(session.announced, incoming.entry.generation)
    keep_shielded(core, session)


def shielded(core: Core, session: Session, event: Shielded) -> None:
    association = session.association
    if association is not None:
        mark = m.Mark(session.peer_handle, event.generation)
        to, via = association.endpoint, association.via
        core.out.entry(to, via, association.host, m.Prepared, mark)


def follow(core: Core, session: Session, incoming: Incoming) -> None:
    """The mover has left for a new tuple."""
    entry: m.MoveEntry = incoming.entry
    if entry.generation == session.generation and session.state is State.FOLLOWING:
        send_moved(core, session)
        return
    if not takes_precedence(session, entry):
        core.refused["stale move"] += 1
        return
    move: m.Move = incoming.message
    remote = Endpoint(move.local, entry.local_port)
    why = forbidden(move.local, core.network, allow_loopback=core.allow_loopback)
    if why is not None:
        refuse_move(core, session, entry.generation, f"{move.local} {why}")
        return
    core.answer(session, "the peer moved at the same time; ask again")
    core.table.set_deadline(session, None)
    session.await_no_answer()
    session.generation = entry.generation
    if session.state is not State.MOVING:
        session.since = core.now
    target = FourTuple(Endpoint(move.remote, entry.remote_port), remote)
    if not core.usable(target):
        # We have left that address: meet the peer at its new one with the next generation.
        session.forced = True
        session.plan = core.plan(session, remote=remote)
        depart_next(core, session)
        return
    session.state = State.FOLLOWING
    session.target, session.attempts = target, 0
    core.run(
        session,
        "follow",
        tuple=target,
        rcv_nxt=entry.rcv_nxt,
        window=entry.window,
        hold=entry.pending,
    )


def takes_precedence(session: Session, entry: m.MoveEntry) -> bool:
    """Whether the peer's Move counts against what this end knows and does."""
    if entry.generation != session.generation:
        return entry.generation > session.generation
    if session.state is State.PREPARING:
        return True  # only asked so far: who has left goes first
    return session.state is State.MOVING and not session.initiator


def followed(core: Core, session: Session, outcome: Followed) -> None:
    assert session.target is not None
    session.rcv_nxt, session.window = outcome.rcv_nxt, outcome.window
    finish(core, session, session.target)
    send_moved(core, session)
    if session.changes != core.changes and not core.usable(session.tuple):
        leave(core, session, Kind.LOST)


def follow_failed(core: Core, session: Session, failed: Failed) -> None:
    if failed.lost:
        lose(core, session, failed.reason)
        return
    refuse_move(core, session, session.generation, failed.reason)
    if session.departed:
        leave(core, session, Kind.LOST)  # it is not where it could rest
    else:
        rest(core, session)


def refuse_move(core: Core, session: Session, generation: int, reason: str) -> None:
    association = session.association
    if association is not None:
        entry = m.RefusedEntry(session.peer_handle, generation, reason)
        to, via = association.endpoint, association.via
        core.out.entry(to, via, association.host, m.Refused, entry)


def send_moved(core: Core, session: Session) -> None:
    """Moved, until the mover settles: its socket may be waiting for just this."""
    association = session.association
    assert association is not None
    entry = m.MovedEntry(session.peer_handle, session.generation, session.rcv_nxt, session.window)
    to = Endpoint(session.tuple.remote.address, core.port)
    core.out.entry(to, session.tuple.local.address, association.host, m.Moved, entry)
    # A lost Moved is asked for again by the mover; this is for a lost Settled, and not urgent.
    pause = min(MOVED_REPEAT_FIRST * 2**session.attempts, MOVED_REPEAT_MAX)
    session.attempts = min(session.attempts + 1, 16)
    core.table.set_deadline(session, core.now + pause)


def repeat_moved(core: Core, session: Session, event: Any) -> None:
    send_moved(core, session)


def settle(core: Core, session: Session, incoming: Incoming) -> None:
    if incoming.entry.generation == session.generation:
        core.table.set_deadline(session, None)
        core.run(session, "settle")
        rest(core, session)


def settle_again(core: Core, session: Session, incoming: Incoming) -> None:
    """Our Settled was lost; or the peer took a move we gave up: move on from where it is."""
    if incoming.entry.generation == session.settled:
        send_settled(core, session)
    elif incoming.entry.generation > session.settled:
        leave(core, session, incoming)
