"""An association: what two hosts have in common, whatever the number of sessions between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from sessiond.core.tuples import Endpoint

INITIAL_RTO = 0.25
"""Seconds before the first repetition while no round trip is measured. RFC 6298 says 1 s for bulk
data; these are a few small idempotent datagrams and a person may be waiting."""
MIN_RTO = 0.02
"""A peer needs a few milliseconds to stop a process and move its socket."""
MAX_RTO = 3.0
PATIENCE, MAX_PATIENCE = 0.00025, 0.25
"""Seconds more for each session that waits for an answer, and at most: the peer moves one after the
other, in some 0.1 ms, and to repeat what it has not come to yet makes it slower still."""


class Announcement(NamedTuple):
    """A Ping under way: what the peer is told, and what its answer will say."""

    token: int
    sent_at: float
    addresses: tuple[str, ...]


@dataclass(slots=True, eq=False)
class Association:
    """The peer host: where its daemon is, how far away, and which sessions are shared with it."""

    host: bytes
    """The peer host's identity."""
    endpoint: Endpoint
    """Where its daemon was heard last."""
    via: str = ""
    """The local address it was heard on."""
    counter: int = -1
    """Of the newest message; an older one does not change ``endpoint``."""
    addresses: tuple[str, ...] = ()
    """Announced by the peer."""
    resolved: tuple[str, ...] = ()
    """Found by its name."""
    sessions: set[int] = field(default_factory=set)
    """Handles of the sessions bound to it; it can touch no others."""
    outstanding: set[int] = field(default_factory=set)
    """Handles of the sessions whose Move waits for an answer."""
    srtt: float | None = None
    """Smoothed round trip in seconds (RFC 6298 section 2)."""
    rttvar: float = 0.0
    answered_at: float = float("-inf")
    """When it last answered a Move."""
    told: tuple[str, ...] | None = None
    """This host's addresses, as the peer has confirmed to know them."""
    announcement: Announcement | None = None
    """The newest."""
    announcements: int = 0
    """Sent since there was something new to tell."""
    deadline: float | None = None
    """When the announcement is repeated."""

    def heard(self, source: Endpoint, via: str, counter: int) -> bool:
        """Note where an authentic message came from; only the newest counts. True: it is that."""
        newest = counter > self.counter
        if newest:
            self.counter, self.endpoint, self.via = counter, source, via
        return newest

    def sample(self, rtt: float) -> None:
        """Take one measured round trip, in seconds, of a request sent once (RFC 6298, Karn)."""
        if self.srtt is None:
            self.srtt, self.rttvar = rtt, rtt / 2
        else:
            self.rttvar += (abs(self.srtt - rtt) - self.rttvar) / 4
            self.srtt += (rtt - self.srtt) / 8

    def rto(self, attempt: int = 0) -> float:
        """Seconds to wait for an answer before repetition number ``attempt`` + 1."""
        base = INITIAL_RTO if self.srtt is None else self.srtt + 4 * self.rttvar
        return float(min(max(base, MIN_RTO) * 2**attempt, MAX_RTO))

    def pause(self, attempt: int = 0) -> float:
        """Seconds to wait for the answer about one session of those that wait for one."""
        return self.rto(attempt) + min(PATIENCE * len(self.outstanding), MAX_PATIENCE)

    def working(self, now: float) -> bool:
        """Whether it is in the middle of a batch: a large one is slow, not lost."""
        return bool(self.outstanding) and now - self.answered_at < self.pause()
