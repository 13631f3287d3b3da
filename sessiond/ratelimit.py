"""A bound on how often something is said."""

from __future__ import annotations

import time


class RateLimit:
    """A token bucket (one second deep).

    Args:
        per_second: how often ``allows`` may be true.
    """

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._tokens = per_second
        self._last = time.monotonic()

    def allows(self) -> bool:
        """Whether it may be said once more now."""
        now = time.monotonic()
        earned = (now - self._last) * self._per_second
        self._tokens = min(self._per_second, self._tokens + earned)
        self._last = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
