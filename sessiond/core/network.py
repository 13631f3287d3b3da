"""What this host's network looks like: one immutable snapshot, compared with the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Address(NamedTuple):
    """An address a session may use now.

    In a snapshot only if its link is up with carrier, its scope is global, and it is neither
    tentative, nor deprecated, nor failed (RFC 4862 section 5.5.4).
    """

    address: str
    prefix: int
    interface: str


class Route(NamedTuple):
    """A unicast route of the main table."""

    destination: str
    """``"192.0.2.0/24"``; the default route is ``"0.0.0.0/0"`` or ``"::/0"``."""
    interface: str
    metric: int


@dataclass(frozen=True, slots=True)
class Network:
    """One snapshot. Two snapshots are equal when nothing that matters to a session differs."""

    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
