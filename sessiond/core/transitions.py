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
from typing import TYPE_CHECKING, Any

from sessiond.core import events as ev
from sessiond.core import messages as m
from sessiond.core.binding import bind_refused, bound, repeat_bind, unreachable, untrusted
from sessiond.core.ending import end, peer_closed
from sessiond.core.following import (
    follow,
    follow_failed,
    followed,
    raise_shield,
    repeat_moved,
    settle,
    settle_again,
    shielded,
)
from sessiond.core.inputs import Incoming, Kind, Shielded, Undone
from sessiond.core.moving import (
    arrive,
    arrived,
    depart,
    depart_failed,
    departed,
    leave,
    make_up,
    reconsider,
    repeat_request,
    request_refused,
    retry,
)
from sessiond.core.outcomes import Arrived, Departed, Failed, Followed
from sessiond.core.preference import expire, improve, rebind, refuse_rebind
from sessiond.core.session import Session, State

if TYPE_CHECKING:
    from sessiond.core.machine import Core


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


Row = Callable[["Core", Session, Any], None]
S = State

TRANSITIONS: dict[tuple[State, Any], Row] = {
    (S.BINDING, m.Bound): bound,
    (S.BINDING, m.Refused): bind_refused,
    (S.BINDING, ev.Unreachable): unreachable,
    (S.BINDING, ev.Untrusted): untrusted,
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
            (Undone, make_up),
            (m.Move, follow),
            (m.Close, peer_closed),
        )
    },
}

UNDER_WAY = frozenset((Departed, Arrived, Followed, Failed, Undone, ev.Ended, m.Close))
"""What counts while an engine step is under way."""

IGNORED: frozenset[tuple[State, Any]] = frozenset(
    {
        *((S.PLAIN, kind) for kind in (*Kind, Shielded, Failed, Undone, ev.DeadlinePassed)),
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
        *((S.PLAIN, kind) for kind in (m.Bound, m.Refused)),
        *((S.CLOSED, kind) for kind in (*Kind, ev.Ended)),
    }
)
