"""What the local protocol tells of: sessions, events, and the host's network.

They are part of the protocol's one definition and are used by their names in ``libhsock.wire``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from libhsock.shape import Shape

Map = dict[str, Any]

Name = Annotated[str, range(1, 256)]
SessionId = Annotated[str, range(1, 65)]
Port = Annotated[int, range(0, 65536)]


class State(StrEnum):
    """The states a session shows. A newer daemon may show others."""

    PLAIN = "plain"
    BINDING = "binding"
    ESTABLISHED = "established"
    PREPARING = "preparing"
    MOVING = "moving"
    FOLLOWING = "following"
    WAITING = "waiting"
    CLOSED = "closed"


class Kind(StrEnum):
    """The kinds of event. A newer daemon may tell others."""

    BOUND = "bound"
    MOVING = "moving"
    MOVED = "moved"
    WAITING = "waiting"
    FAILED = "failed"
    LOST = "lost"
    CLOSED = "closed"
    OVERFLOW = "overflow"


class Record(Shape, kw_only=True):
    """One session as ``list``, ``show``, ``attach`` and ``rebind`` tell it."""

    session: SessionId
    """Hexadecimal, 128 random bits."""
    state: str
    """One of ``State``."""
    mobile: bool
    """True: the connection follows its hosts when an address changes."""
    reason: str | None = None
    """Why it is not mobile, or what limits it: one sentence."""
    engine: str | None = None
    role: str = "attach"
    peer: str | None = None
    """The peer's name or address as the application gave it."""
    peer_daemon: str | None = None
    """``"address:port"`` of the sessiond on the other host, once it is known."""
    local: str
    """``"192.0.2.1:40000"`` or ``"[2001:db8::1]:40000"``."""
    remote: str
    generation: int = 0
    moves: int = 0
    gap_ms: float | None = None
    """How long the last move held the stream up, milliseconds."""
    pid: int = 0
    fd: int = -1
    """The socket's number in that process when it was attached."""
    uid: int = 0
    created: float = 0.0
    """Unix seconds."""
    rtt_ms: float | None = None


class Event(Shape, kw_only=True):
    """What happened to a session."""

    session: str
    """Empty for ``overflow``, which is about the stream of events itself."""
    kind: str
    """One of ``Kind``."""
    time: float
    """Unix seconds."""
    local: str | None = None
    remote: str | None = None
    engine: str | None = None
    gap_ms: float | None = None
    generation: int | None = None
    reason: str | None = None

    def to_map(self) -> Map:
        """Without the fields that say nothing: events are many, and most fields are nil."""
        return {name: value for name, value in super().to_map().items() if value is not None}


class Welcome(Shape):
    """The reply to ``hello``."""

    version: int
    daemon: str
    """Name and version of the daemon, for people."""
    admin: bool
    """The caller sees and moves everybody's sessions."""


class Resolution(Shape):
    """The reply to ``resolve``."""

    candidates: tuple[tuple[Name, Port], ...]
    """Numeric address and port, best first."""
    source: str
    """Where they come from, for people: ``"dns"``, ``"srv"``, ``"hosts"``, ``"literal"``."""


class Page(Shape):
    """The reply to ``list``."""

    sessions: tuple[Record, ...]
    next: str | None = None
    """Give it as ``after`` for the next page; None: this was the last."""


class NetworkAddress(Shape):
    """A usable address of this host."""

    address: str
    prefix: int
    interface: str


class NetworkRoute(Shape):
    """A unicast route of this host's main table."""

    destination: str
    interface: str
    metric: int = 0


class NetworkView(Shape):
    """The reply to ``network``: what the daemon sees of this host's network."""

    addresses: tuple[NetworkAddress, ...] = ()
    routes: tuple[NetworkRoute, ...] = ()


class PeerKey(Shape):
    """A key that a peer must have."""

    name: str
    """A DNS name or an address."""
    key: str
    """A fingerprint."""
    source: str
    """Why: ``configuration``, ``pinned`` (by request) or ``first-use``."""


class PeerKeys(Shape):
    """The reply to ``peers`` and ``peer``."""

    peers: tuple[PeerKey, ...] = ()


class HostKey(Shape):
    """The reply to ``fingerprint``: this host's own key."""

    key: str


class Stats(Shape):
    """The reply to ``stats``."""

    counters: dict[str, float]
    """Each counter by its name, whole numbers as int."""


class Done(Shape):
    """The reply to requests that have nothing to tell but that they were done."""
