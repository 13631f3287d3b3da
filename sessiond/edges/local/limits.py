"""What clients may cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Of all clients together and of each."""

    clients: int = 4096
    """Connections in all; two descriptors each."""
    pending: int = 16
    """Requests of one connection under way at a time."""
    queue: int = 256
    """Events waiting for one client, beside what its socket holds."""
    greeting: float = 5.0
    """Seconds from connecting to ``hello``."""
    stall: float = 10.0
    """Seconds for a client to take something of what waits for it."""
