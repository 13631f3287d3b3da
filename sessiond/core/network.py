"""What this host's network looks like: one immutable snapshot, compared with the next."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    """One snapshot. Two snapshots are equal when nothing that matters to a session differs.

    Of one interface's addresses of a family the one to prefer comes first.
    """

    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.addresses, self.routes)))

    def __hash__(self) -> int:
        """Kept, because what is planned on a snapshot is remembered by it."""
        return self._hash

    def lost_in(self, after: Network) -> bool:
        """Whether an address or a route of this snapshot is not in a later one."""
        return not (
            set(self.addresses) <= set(after.addresses) and set(self.routes) <= set(after.routes)
        )

    def interfaces_of(self, address: str) -> list[str]:
        """The interfaces an address of this host is on; none: it is not usable."""
        return [own.interface for own in self.addresses if own.address == address]
