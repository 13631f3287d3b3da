"""Everything the core asks of the world. ``perform`` maps each to one edge call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sessiond.core.messages import Message
from sessiond.core.tuples import Endpoint, FourTuple


class Step(NamedTuple):
    """One session's entry in a batch for the engine; a step uses what it needs of it."""

    handle: int
    generation: int
    tuple: FourTuple | None = None
    rcv_nxt: int = 0
    window: int = 0
    hold: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """Run one step of a handover; answered by ``events.StepDone``."""

    step: str
    """The method of ``rebind.engine.Engine``."""
    batch: Sequence[Step]


@dataclass(frozen=True, slots=True)
class Send:
    """Messages to a peer's daemon, in as few datagrams as they fit."""

    to: Endpoint
    via: str
    """The local address they leave from."""
    peer: bytes | str
    """Its identity; before that is known, the name or address it was dialled by."""
    messages: Sequence[Message]


@dataclass(frozen=True, slots=True)
class Resolve:
    """Look a peer's name up anew; answered by ``events.Resolved``."""

    name: str
    service: str


@dataclass(frozen=True, slots=True)
class Report:
    """Something a person or an application wants to know about a session."""

    handle: int
    session: bytes
    """Its id."""
    kind: str
    """bound, moving, moved, waiting, failed, lost or closed."""
    tuple: FourTuple
    generation: int = 0
    name: str | None = None
    """The peer, as the application named it."""
    reason: str | None = None
    before: FourTuple | None = None
    """The tuple it had, where it changed."""
    gap: float | None = None
    """Seconds from the event that set the move off to the socket being live again."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a RebindAsked: ``error`` None means moved."""

    ticket: Any
    error: str | None


@dataclass(frozen=True, slots=True)
class Forget:
    """The session is gone: drop what the edges hold for it."""

    handle: int


Effect = Run | Send | Resolve | Report | Answer | Forget
