"""Which counters were seen (RFC 6479): a bit for each of the newest; what is older is refused."""

from __future__ import annotations

WINDOW = 2048
"""Counters a datagram may be overtaken by and still be accepted."""
_ALL = (1 << WINDOW) - 1


class ReplayWindow:
    """Bit i of ``_seen`` stands for the counter ``newest`` - i."""

    def __init__(self) -> None:
        self.newest = -1
        self._seen = 0

    def fresh(self, counter: int) -> bool:
        """Whether it is neither seen nor too old to tell."""
        age = self.newest - counter
        return age < 0 or (age < WINDOW and not self._seen >> age & 1)

    def mark(self, counter: int) -> None:
        """Note a fresh counter as seen; only after its datagram has proved authentic."""
        ahead = counter - self.newest
        if ahead > 0:
            self._seen = (self._seen << min(ahead, WINDOW) | 1) & _ALL
            self.newest = counter
        else:
            self._seen |= 1 << -ahead
