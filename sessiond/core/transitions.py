"""The life of a session: one table, one function a row.

A move, seen from its two ends (handover.md section 4)::

    mover                                         other end
    ESTABLISHED                                   ESTABLISHED
      | by request, old path works: PREPARING --Prepare-->  raises its shield
      |                                       <--Prepared--
      v
    MOVING   engine: depart            --Move(R_a)-->     FOLLOWING  engine: follow
             engine: arrive            <--Moved(R_b)--
    ESTABLISHED                        --Settled-->       ESTABLISHED  engine: settle

Each message is repeated until the next one answers it. Moves are ordered by the session's
generation; of two with the same number the initiator's wins, and the other end starts again, to the
initiator's new address, with the next. Where no path is left the session is WAITING, and leaves it
through the same move.

What (state, kind) is in neither ``TRANSITIONS`` nor ``IGNORED`` is a bug; a test proves there is
none. While an engine step is under way only its outcome and the socket's end count: peers repeat,
and the network is judged again afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, NamedTuple

from sessiond.core import events as ev
from sessiond.core import messages as m
from sessiond.core.association import INITIAL_RTO
from sessiond.core.effects import Answer, Forget
from sessiond.core.outcomes import Arrived, Departed, Failed, Followed
from sessiond.core.paths import forbidden
from sessiond.core.session import Session, State
from sessiond.core.table import pair
from sessiond.core.tuples import Endpoint, FourTuple

if TYPE_CHECKING:
    from sessiond.core.machine import Core

BIND_ATTEMPTS = 6
REQUEST_ATTEMPTS = 4
"""Times a Prepare or Move is sent on one path before the next path is tried."""
SHIELD_LIFE = 5.0
"""Seconds a shield stays up for a move that does not come."""
RETRY_FIRST, RETRY_MAX = 0.5, 30.0
"""Seconds between attempts on all paths while none answers."""
FLAP_WITHIN = 10
"""A path lost within so many ``min_move_interval`` after the move to it flaps."""
MAX_FLAPS = 6
MOVED_REPEAT_FIRST, MOVED_REPEAT_MAX = 1.0, 30.0
"""Seconds, at first and at most, between repetitions of Moved to a mover that does not settle."""


class Kind(Enum):
    """What a change of the network means for a session."""

    LOST = auto()
    PATH = auto()
    """Its path is usable."""
    BETTER = auto()
    """Usable, and policy prefers another one."""


class Incoming(NamedTuple):
    """A peer's message about one session."""

    event: ev.Received
    message: Any
    entry: Any


class Shielded(NamedTuple):
    """The engine raised the shield for a Prepare."""

    generation: int


def step(core: Core, session: Session, event: Any) -> None:
    """Apply one event to one session; the only way its state changes."""
    kind: Any = type(event)
    if kind is Kind:
        kind = event
    elif kind is Incoming:
        kind = type(event.message)
    if session.busy and kind not in UNDER_WAY:
        if kind is ev.RebindAsked:
            refuse_rebind(core, session, event)
        return
    row = TRANSITIONS.get((session.state, kind))
    if row is not None:
        row(core, session, event)
    elif (session.state, kind) not in IGNORED:
        raise LookupError(f"{session.state} has no row for {kind}")


# Binding


def begin(core: Core, session: Session) -> None:
    """A new session: the end that dialled asks the peer, the end that accepted is asked."""
    session.state = State.BINDING
    if session.role == "accept":
        session.reason = "the peer has not asked for a session (no sessiond there?)"
    else:
        session.initiator = True
        session.reason = "the peer's sessiond has not answered yet"
        send_bind(core, session)


def send_bind(core: Core, session: Session) -> None:
    """Ask, and ask again when no answer comes."""
    local, remote = session.tuple
    proof = m.proof("bind", session.id, session.isn_local, session.isn_remote)
    bind = m.Bind(
        session.id, session.handle, local, remote, proof, tuple(session.versions), core.addresses()
    )
    core.out.message(Endpoint(remote.address, core.port), local.address, bind)
    session.sent_at = core.now if session.attempts == 0 else session.sent_at
    core.table.set_deadline(session, core.now + INITIAL_RTO * 2**session.attempts)
    session.attempts += 1


def repeat_bind(core: Core, session: Session, event: Any) -> None:
    if session.attempts < BIND_ATTEMPTS:
        send_bind(core, session)
    else:
        asked = Endpoint(session.tuple.remote.address, core.port)
        stay_plain(core, session, f"no sessiond answered at {asked}")


def stay_plain(core: Core, session: Session, reason: str, *, told: bool = True) -> None:
    session.state, session.reason = State.PLAIN, reason
    core.run(session, "release")
    core.table.unbind(session)
    core.table.set_deadline(session, None)
    if told:
        core.report(session, "failed", reason=reason)


def bind_refused(core: Core, session: Session, incoming: Incoming) -> None:
    stay_plain(core, session, f"the peer refused the session: {incoming.entry.reason}")


def bound(core: Core, session: Session, incoming: Incoming) -> None:
    answer: m.Bound = incoming.message
    if not m.proves(answer.proof, "bound", session.id, session.isn_local, session.isn_remote):
        core.refused["bound without proof"] += 1
        return
    once = session.attempts == 1
    establish(core, session, incoming, answer.own, answer.versions, answer.addresses)
    if once and session.association is not None:
        session.association.sample(core.now - session.sent_at)


def adopt(core: Core, session: Session, incoming: Incoming) -> None:
    """The other end's Bind for a connection of ours, proven."""
    bind: m.Bind = incoming.message
    if session.state is State.BINDING:
        if session.initiator and session.id > bind.session:
            return  # both ends asked, not knowing who dialled: the greater id is the session's
        session.initiator = False
        core.table.rename(session, bind.session)
        establish(core, session, incoming, bind.handle, bind.versions, bind.addresses)
    if session.state is State.PLAIN:
        refused = m.RefusedEntry(bind.handle, 0, session.reason or "not mobile")
        to, via = incoming.event.source, incoming.event.via
        core.out.entry(to, via, m.Refused, refused)
    elif session.mobile and session.id == bind.session:
        proof = m.proof("bound", session.id, session.isn_local, session.isn_remote)
        answer = m.Bound(
            bind.handle, session.handle, proof, tuple(session.versions), core.addresses()
        )
        core.out.message(incoming.event.source, incoming.event.via, answer)


def establish(
    core: Core,
    session: Session,
    incoming: Incoming,
    peer_handle: int,
    versions: tuple[int, ...],
    addresses: tuple[str, ...],
) -> None:
    """Both ends agree that this connection is this session."""
    event = incoming.event
    association = core.table.association(event.host, event.source)
    association.heard(event.source, event.via, event.counter)
    association.addresses = addresses
    core.table.bind(session, association)
    session.peer_handle = peer_handle
    session.peer_versions = frozenset(versions)
    session.reason = None
    core.table.set_deadline(session, None)
    core.run(session, "enroll")
    rest(core, session)
    core.report(session, "bound")


# Leaving: the mover


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


def request(core: Core, session: Session, plan: list[FourTuple]) -> None:
    """Make before break: the old path works until the new one has answered."""
    session.forced = False
    session.plan = plan
    depart_next(core, session)


def depart_next(core: Core, session: Session, reason: str | None = None) -> None:
    """Try the next candidate, if there is one."""
    core.table.set_deadline(session, None)
    stop_waiting_for_peer(session)
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
    send_request(core, session)


def send_request(core: Core, session: Session) -> None:
    """Prepare or Move, on the path it is about, so that its answer proves the path."""
    target, association = session.target, session.association
    assert target is not None
    assert association is not None
    to = Endpoint(target.remote.address, core.port)
    via = target.local.address
    if session.state is State.PREPARING:
        core.out.entry(to, via, m.Prepare, m.Mark(session.peer_handle, session.generation))
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
        core.out.entry(to, via, m.Move, entry, target.local.address, target.remote.address)
    core.table.set_deadline(session, core.now + association.rto(session.attempts))
    session.attempts += 1


def repeat_request(core: Core, session: Session, event: Any) -> None:
    association = session.association
    if association is not None and association.working(core.now):
        core.table.set_deadline(session, core.now + association.rto())
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
    stop_waiting_for_peer(session)
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


def exhausted(core: Core, session: Session, reason: str | None) -> None:
    """No candidate is left: back to the old path where there is one, or wait for any."""
    if not session.forced and not session.departed:
        session.target, session.chosen = None, False
        answer_ticket(core, session, reason or "no usable path")
        rest(core, session)
        return
    if not session.forced:
        session.forced = True
        session.plan = [session.tuple]
        depart_next(core, session, reason)
        return
    if session.state is not State.WAITING:
        core.report(session, "waiting", reason=reason or "no usable address on this host")
        core.resolve(session)
    session.state = State.WAITING
    session.reason = reason or "no usable address on this host"
    answer_ticket(core, session, session.reason)
    if session.departed and core.usable(session.tuple):
        # The peer's daemon is silent even on the old path: plain TCP may still work there.
        session.departed = False
        core.run(session, "retreat")
    pause = min(RETRY_FIRST * 2 ** min(session.cycles, 10), RETRY_MAX)
    session.cycles += 1
    if reason is not None:
        core.table.set_deadline(session, core.now + pause)


def retry(core: Core, session: Session, event: Any) -> None:
    """Still waiting: every path once more, and where the peer's name leads now."""
    core.resolve(session)
    leave(core, session, event)


# Following: the other end


def raise_shield(core: Core, session: Session, incoming: Incoming) -> None:
    """The peer is about to leave: late segments must not meet a RST of its old tuple."""
    core.run(session, "shield", generation=incoming.entry.generation)


def shielded(core: Core, session: Session, event: Shielded) -> None:
    session.shielded = True
    association = session.association
    if association is not None:
        mark = m.Mark(session.peer_handle, event.generation)
        core.out.entry(association.endpoint, association.via, m.Prepared, mark)
    if session.state is State.ESTABLISHED:
        core.table.set_deadline(session, core.now + SHIELD_LIFE)


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
    answer_ticket(core, session, "the peer moved at the same time; ask again")
    core.table.set_deadline(session, None)
    stop_waiting_for_peer(session)
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


def follow_failed(core: Core, session: Session, failed: Failed) -> None:
    if failed.lost:
        lose(core, session, failed.reason)
        return
    refuse_move(core, session, session.generation, failed.reason)
    rest(core, session)


def refuse_move(core: Core, session: Session, generation: int, reason: str) -> None:
    association = session.association
    if association is not None:
        entry = m.RefusedEntry(session.peer_handle, generation, reason)
        core.out.entry(association.endpoint, association.via, m.Refused, entry)


def send_moved(core: Core, session: Session) -> None:
    """Moved, until the mover settles: its socket may be waiting for just this."""
    association = session.association
    assert association is not None
    entry = m.MovedEntry(session.peer_handle, session.generation, session.rcv_nxt, session.window)
    to = Endpoint(session.tuple.remote.address, core.port)
    core.out.entry(to, session.tuple.local.address, m.Moved, entry)
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


# Both ends


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
    answer_ticket(core, session, None)


def rest(core: Core, session: Session) -> None:
    """ESTABLISHED, unless the network changed meanwhile."""
    session.state = State.ESTABLISHED
    session.plan = []
    session.attempts = 0
    if session.shielded:
        core.table.set_deadline(session, core.now + SHIELD_LIFE)
    if not core.usable(session.tuple):
        leave(core, session, Kind.LOST)


def expire(core: Core, session: Session, event: Any) -> None:
    """An established session's deadline: a shield nobody needed, or a better path now allowed."""
    if session.shielded:
        session.shielded = False
        core.run(session, "settle")
    if core.judge(session) is Kind.BETTER:
        improve(core, session, event)


def send_settled(core: Core, session: Session) -> None:
    mark = m.Mark(session.peer_handle, session.settled)
    to = Endpoint(session.tuple.remote.address, core.port)
    core.out.entry(to, session.tuple.local.address, m.Settled, mark)


def stop_waiting_for_peer(session: Session) -> None:
    if session.association is not None:
        session.association.outstanding.discard(session.handle)


def answer_ticket(core: Core, session: Session, error: str | None) -> None:
    ticket, session.ticket = session.ticket, None
    if ticket is not None:
        core.out.effect(Answer(ticket, error))


def lose(core: Core, session: Session, reason: str) -> None:
    """The engine could not restore the socket; the application has its error."""
    core.report(session, "lost", reason=reason)
    remove(core, session, reason)


def end(core: Core, session: Session, ended: ev.Ended) -> None:
    core.report(session, "closed", reason=ended.reason)
    remove(core, session, ended.reason)


def remove(core: Core, session: Session, reason: str) -> None:
    association = session.association
    if association is not None:
        entry = m.CloseEntry(session.peer_handle, reason)
        core.out.entry(association.endpoint, association.via, m.Close, entry)
    answer_ticket(core, session, f"the session ended: {reason}")
    stop_waiting_for_peer(session)
    session.state = State.CLOSED
    core.table.remove(session)
    core.out.effect(Forget(session.handle))


def peer_closed(core: Core, session: Session, incoming: Incoming) -> None:
    """The peer keeps it no longer; TCP itself tells the application what that means."""
    if session.departed or session.shielded or session.state is State.FOLLOWING:
        core.run(session, "settle")
    session.departed = session.shielded = False
    stop_waiting_for_peer(session)
    answer_ticket(core, session, "the peer ended the session")
    why: str = incoming.entry.reason
    # An ordinary end: TCP's own is here or on its way, and there is nothing to complain of.
    told = why != ev.CONNECTION_ENDED
    stay_plain(core, session, f"the peer ended the session: {why}", told=told)


Row = Callable[["Core", Session, Any], None]
S = State

TRANSITIONS: dict[tuple[State, Any], Row] = {
    (S.BINDING, m.Bound): bound,
    (S.BINDING, m.Refused): bind_refused,
    (S.BINDING, ev.DeadlinePassed): repeat_bind,
    (S.ESTABLISHED, Kind.LOST): leave,
    (S.ESTABLISHED, Kind.BETTER): improve,
    (S.ESTABLISHED, ev.RebindAsked): rebind,
    (S.ESTABLISHED, ev.DeadlinePassed): expire,
    (S.ESTABLISHED, m.Moved): settle_again,
    (S.PREPARING, Kind.LOST): leave,
    (S.PREPARING, m.Moved): settle_again,
    (S.PREPARING, m.Prepared): depart,
    (S.PREPARING, m.Refused): request_refused,
    (S.PREPARING, ev.DeadlinePassed): repeat_request,
    (S.MOVING, Kind.LOST): reconsider,
    (S.MOVING, Kind.PATH): reconsider,
    (S.MOVING, Kind.BETTER): reconsider,
    (S.MOVING, Departed): departed,
    (S.MOVING, Arrived): arrived,
    (S.MOVING, Failed): depart_failed,
    (S.MOVING, m.Moved): arrive,
    (S.MOVING, m.Refused): request_refused,
    (S.MOVING, ev.DeadlinePassed): repeat_request,
    (S.FOLLOWING, Kind.LOST): leave,
    (S.FOLLOWING, Followed): followed,
    (S.FOLLOWING, Failed): follow_failed,
    (S.FOLLOWING, m.Settled): settle,
    (S.FOLLOWING, ev.DeadlinePassed): repeat_moved,
    (S.WAITING, Kind.LOST): leave,
    (S.WAITING, Kind.PATH): leave,
    (S.WAITING, Kind.BETTER): leave,
    (S.WAITING, ev.DeadlinePassed): retry,
    (S.WAITING, m.Moved): settle_again,
    **{(state, ev.Ended): end for state in State if state is not S.CLOSED},
    **{
        (state, ev.RebindAsked): refuse_rebind
        for state in (S.PLAIN, S.BINDING, S.PREPARING, S.MOVING, S.FOLLOWING, S.WAITING)
    },
    **{
        (state, kind): row
        for state in (S.ESTABLISHED, S.PREPARING, S.MOVING, S.FOLLOWING, S.WAITING)
        for kind, row in (
            (m.Prepare, raise_shield),
            (Shielded, shielded),
            (m.Move, follow),
            (m.Close, peer_closed),
        )
    },
}

UNDER_WAY = frozenset((Departed, Arrived, Followed, Failed, ev.Ended, m.Close))
"""What counts while an engine step is under way."""

IGNORED: frozenset[tuple[State, Any]] = frozenset(
    {
        *((S.PLAIN, kind) for kind in (*Kind, Shielded, Failed, ev.DeadlinePassed)),
        *(
            (S.PLAIN, kind) for kind in (Departed, Arrived, Followed)
        ),  # closed by the peer meanwhile
        *((S.BINDING, kind) for kind in Kind),
        *((S.ESTABLISHED, kind) for kind in (Kind.PATH, m.Bound, m.Prepared, m.Refused, m.Settled)),
        *((S.PREPARING, kind) for kind in (Kind.PATH, Kind.BETTER, m.Bound, m.Settled)),
        *((S.MOVING, kind) for kind in (m.Bound, m.Prepared, m.Settled)),
        *((S.FOLLOWING, kind) for kind in (Kind.PATH, Kind.BETTER)),
        *((S.FOLLOWING, kind) for kind in (m.Bound, m.Prepared, m.Refused, m.Moved)),
        *((S.WAITING, kind) for kind in (m.Bound, m.Prepared, m.Refused, m.Settled)),
        *((state, Failed) for state in (S.ESTABLISHED, S.PREPARING, S.WAITING)),  # shield, settle
        *((S.PLAIN, kind) for kind in (m.Bound, m.Refused)),
        *((S.CLOSED, kind) for kind in (*Kind, ev.Ended)),
    }
)
