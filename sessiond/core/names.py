"""What becomes of a name: endpoints, or one of a few errors that say why and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from sessiond.core.tuples import Endpoint

Source = Literal["literal", "hosts", "dns"]


class ResolveError(Exception):
    """A name gave no endpoint.

    Attributes:
        tried: what was asked, and what came of it.
    """

    def __init__(self, message: str, tried: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.tried = tuple(tried)


class BadName(ResolveError):
    """The caller's: not a name, a service or an address that anything could be asked about."""


class NoSuchName(ResolveError):
    """The name does not exist (NXDOMAIN)."""


class NoAddress(ResolveError):
    """The name exists and has no address of a wanted family, or no such service."""


class ServersFailed(ResolveError):
    """No nameserver gave a usable answer: lame, broken or refusing servers, a loop of aliases."""


class NoAnswer(ResolveError):
    """No nameserver answered in time, or there is none to ask."""


class Resolution(NamedTuple):
    """Where a name and a service are."""

    candidates: tuple[Endpoint, ...]
    """Best first, at least one."""
    source: Source
    expires: float
    """On ``time.monotonic``; infinite for literals."""
