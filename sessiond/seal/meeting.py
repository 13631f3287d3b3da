"""A handshake that this host begins: whom it is with, what waits for it, when it is repeated."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from sessiond.seal.cookie import Source
from sessiond.seal.handshake import Host, Initiator

REPEAT_FIRST = 0.25
"""Seconds before the first repetition, doubled for each; as those of the Bind that waits for it."""
MEETING_SECONDS = 10.0
"""When one without an answer is given up."""
GRACE_SECONDS = 1.0
"""How long the right peer may still answer after a wrong one: a forger may be faster."""
MAX_WAITING = 64
"""Payloads; the oldest is dropped, for whoever sent it repeats it."""


class Named(NamedTuple):
    """A peer whose key is not known yet."""

    address: str
    name: str
    """As dialled; the address where there was no other."""


class Waiting(NamedTuple):
    """A payload and its path."""

    payload: bytes
    to: Source
    via: str


class Meeting(Initiator):
    """An initiator with its timer.

    Args:
        host: this one.
        peer: who is to answer: a name, or the key of a known peer whose keys are due.
        now: seconds, of any clock that does not jump.
    """

    def __init__(self, host: Host, peer: bytes | Named, now: float) -> None:
        super().__init__(host)
        self.peer = peer
        self.to: Source = ("", 0)
        self.via = ""
        self.waiting: deque[Waiting] = deque(maxlen=MAX_WAITING)
        self.refusal: str | None = None
        """Why the one that answered is not trusted."""
        self.due: float | None = None
        self._confirmation: bytes | None = None
        self._ends_at = now + MEETING_SECONDS
        self._sent_at = float("-inf")
        self._pause = REPEAT_FIRST

    def over(self, now: float) -> bool:
        """Whether it is time to give up."""
        return now >= self._ends_at

    @property
    def next_at(self) -> float:
        """When to repeat, or to give up."""
        if self.refusal is not None:
            return self._ends_at
        return min(self._sent_at + self._pause, self._ends_at)

    def fresh(self, to: Source, via: str, now: float) -> bool:
        """Whether it was tried on this path a moment ago."""
        return (to, via) == (self.to, self.via) and now < self._sent_at + REPEAT_FIRST

    def wait(self, waiting: Waiting) -> None:
        """Keep a payload until there are keys."""
        if waiting not in self.waiting:
            self.waiting.append(waiting)

    def datagram(self, now: float) -> bytes:
        """What to send now."""
        if self._sent_at != float("-inf"):
            self._pause *= 2
        self._sent_at = now
        return self._confirmation or self.initiation()

    def refuse(self, line: str, now: float) -> None:
        """Whoever answered is not trusted; the right one has a moment left."""
        if self.refusal is None:
            self._ends_at = min(self._ends_at, now + GRACE_SECONDS)
        self.refusal = line

    def confirmed_by(self, confirmation: bytes, now: float) -> None:
        """From now on this is what is repeated."""
        self._confirmation = confirmation
        self.refusal = None
        self._sent_at, self._pause = now, REPEAT_FIRST
        self._ends_at = now + MEETING_SECONDS
