"""The table is whole: whatever can come in a state has a row, or is ignored on purpose."""

from __future__ import annotations

import itertools

import pytest

from sessiond.core import events as ev
from sessiond.core import messages as m
from sessiond.core.inputs import Kind, Shielded, Undone
from sessiond.core.outcomes import Arrived, Departed, Failed, Followed
from sessiond.core.session import State
from sessiond.core.transitions import IGNORED, TRANSITIONS

FROM_THE_NETWORK = tuple(Kind)
FROM_PEERS = (m.Prepare, m.Prepared, m.Move, m.Moved, m.Settled, m.Refused, m.Close, m.Bound)
FROM_CLIENTS = (ev.RebindAsked, ev.Ended)
ASSOCIATED = (
    State.ESTABLISHED,
    State.PREPARING,
    State.MOVING,
    State.FOLLOWING,
    State.WAITING,
)


def possible() -> list[tuple[State, object]]:
    """Every pair that can meet."""
    alive = [state for state in State if state is not State.CLOSED]
    pairs: list[tuple[State, object]] = []
    pairs += itertools.product(alive, FROM_THE_NETWORK)
    pairs += itertools.product(alive, FROM_CLIENTS)
    pairs += itertools.product(ASSOCIATED, FROM_PEERS)
    # ICMP is not authenticated: only who asks for a session hears it (``Table.asking``).
    pairs += [(State.BINDING, ev.Unreachable), (State.BINDING, ev.Untrusted)]
    pairs += [(State.BINDING, m.Bound), (State.BINDING, m.Refused), (State.PLAIN, m.Bound)]
    # Steps that nobody waits for meet whatever state the session is in by then.
    pairs += itertools.product((State.PLAIN, *ASSOCIATED), (Shielded, Undone))
    # Timers run where something is waited for.
    pairs += [(state, ev.DeadlinePassed) for state in (State.BINDING, *ASSOCIATED)]
    # A step's outcome meets the state that asked for it.
    pairs += itertools.product((State.MOVING,), (Departed, Arrived, Failed))
    pairs += itertools.product((State.FOLLOWING,), (Followed, Failed))
    # The peer can close a session while a step is under way.
    pairs += itertools.product((State.PLAIN,), (Departed, Arrived, Followed, Failed))
    return pairs


@pytest.mark.parametrize(("state", "kind"), possible(), ids=lambda value: str(value)[-40:])
def test_every_pair_that_can_meet_is_decided(state: State, kind: object) -> None:
    assert ((state, kind) in TRANSITIONS) != ((state, kind) in IGNORED)


def test_nothing_is_both_handled_and_ignored() -> None:
    assert not TRANSITIONS.keys() & IGNORED
