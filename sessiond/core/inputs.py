"""What the table decides by, where that is not an event or an outcome itself."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any, NamedTuple

from sessiond.core import events as ev
from sessiond.core.outcomes import Failed


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


class Undone(NamedTuple):
    """A step failed that no handover waits for."""

    step: str
    failed: Failed


class Shielded(NamedTuple):
    """The engine raised the shield for a Prepare."""

    generation: int
