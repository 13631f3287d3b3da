"""Everything that can happen to the core. Each edge posts its own; nothing else gets in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sessiond.core.messages import Message
from sessiond.core.network import Network
from sessiond.core.outcomes import Outcome
from sessiond.core.tuples import Endpoint, FourTuple


@dataclass(frozen=True, slots=True)
class Attached:
    """An application asked for its connection to become a session."""

    handle: int
    tuple: FourTuple
    isn_local: int
    isn_remote: int
    versions: frozenset[int]
    role: str
    """``"connect"``, ``"accept"`` or ``"attach"`` (which end dialled is not known)."""
    name: str | None = None
    service: str | None = None
    refusal: str | None = None
    session_id: bytes = b""
    """128 random bits: the session's id unless the peer's Bind brings one."""
    vouched: bool = True
    """The name leads to the address, as this daemon knows itself or an administrator says. Else the
    peer's key is judged, and remembered, by the address: whoever may attach must not choose whose
    name a key is remembered for."""


CONNECTION_ENDED = "the connection ended"
"""The reason of an ordinary end; peers tell it each other with Close."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The kernel destroyed a session's socket, or its owner detached it."""

    handle: int
    reason: str


@dataclass(frozen=True, slots=True)
class NetworkChanged:
    """The next snapshot of the host's network."""

    after: Network
    settled: bool = True
    """False: nothing was lost, and more may follow what was gained."""


@dataclass(frozen=True, slots=True)
class Received:
    """An authentic message from a peer's daemon."""

    host: bytes
    """The peer host's identity: its public key."""
    source: Endpoint
    via: str
    """The local address it came to."""
    counter: int
    """Strictly rising per sender: only the newest moves the peer's address."""
    message: Message


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A host answers our messages with ICMP port unreachable (RFC 792, RFC 4443 section 3.1).

    It quotes what we sent, and is not authenticated.
    """

    to: Endpoint
    """Where nothing listens."""
    via: str
    """The local address that was sent from."""


@dataclass(frozen=True, slots=True)
class Untrusted:
    """The key of who answers at a dialled address is not that of the peer which was meant."""

    address: str
    name: str
    """As ``effects.Send`` has named the peer."""
    reason: str
    """Why, and what to do."""


class Result(NamedTuple):
    """The engine's report on one session."""

    handle: int
    generation: int
    outcome: Outcome | None
    """None where the step has nothing to tell (shield, settle, retreat)."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """An engine finished (a slice of) a batch."""

    step: str
    """The method of ``rebind.engine.Engine``."""
    results: Sequence[Result]


@dataclass(frozen=True, slots=True)
class RebindAsked:
    """A user or application wants a session moved though nothing changed."""

    handle: int
    to: str | None
    """An address or interface; None: the best other path."""
    ticket: Any
    """Handed back in ``effects.Answer``."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A peer's name was looked up again; no addresses when that failed."""

    name: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The earliest deadline the core offered is here."""


Event = (
    Attached
    | Ended
    | NetworkChanged
    | Received
    | Unreachable
    | Untrusted
    | StepDone
    | RebindAsked
    | Resolved
    | DeadlinePassed
)
