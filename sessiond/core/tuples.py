"""Endpoints and 4-tuples: the names of the two ends of a TCP connection."""

from __future__ import annotations

from typing import NamedTuple


class Endpoint(NamedTuple):
    """One end of a connection.

    ``address`` is canonical text: ``"192.0.2.1"`` or ``"2001:db8::1"``. An IPv4 address is always
    written as IPv4, also where the socket is AF_INET6 and the kernel shows it mapped.
    """

    address: str
    port: int

    @property
    def version(self) -> int:
        """4 or 6."""
        return 6 if ":" in self.address else 4

    def __str__(self) -> str:
        return (
            f"[{self.address}]:{self.port}" if self.version == 6 else f"{self.address}:{self.port}"
        )


class FourTuple(NamedTuple):
    """A TCP connection as one of its hosts sees it."""

    local: Endpoint
    remote: Endpoint

    def mirrored(self) -> FourTuple:
        """The same connection as the other host sees it (no translator between them)."""
        return FourTuple(self.remote, self.local)

    def __str__(self) -> str:
        return f"{self.local}>{self.remote}"
