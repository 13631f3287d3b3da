"""A session: one TCP connection whose 4-tuple may change under it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from sessiond.core.association import Association
from sessiond.core.tuples import FourTuple


class State(Enum):
    """What a session is doing; the values are what users see."""

    PLAIN = "plain"
    """Plain TCP: not mobile, ``reason`` says why."""
    BINDING = "binding"
    """The peer's daemon has not agreed yet."""
    ESTABLISHED = "established"
    PREPARING = "preparing"
    """A move by request: the old path works, the new one is being asked for (Prepare)."""
    MOVING = "moving"
    """The mover: from the first engine step until the socket is live on the new tuple."""
    FOLLOWING = "following"
    """The other end: from Move until the mover has settled."""
    WAITING = "waiting"
    """No usable path; moves when one comes."""
    CLOSED = "closed"


@dataclass(slots=True, eq=False)
class Session:
    """All the core knows of one session. Only the rows of ``transitions`` change it."""

    handle: int
    id: bytes
    tuple: FourTuple
    """The tuple both ends agreed on last; the socket's own, except while MOVING or FOLLOWING."""
    isn_local: int
    isn_remote: int
    role: str
    versions: frozenset[int]
    """IP versions this end's socket can be moved to."""
    created: float
    first_id: bytes = b""
    """The id it was attached with, where the initiator's Bind brought another."""
    name: str | None = None
    service: str | None = None
    vouched: bool = True
    """See ``events.Attached``."""
    state: State = State.PLAIN
    reason: str | None = None
    initiator: bool = False
    """Sent the Bind that was accepted; wins a tie between simultaneous moves."""
    association: Association | None = None
    peer_handle: int = 0
    peer_versions: frozenset[int] = frozenset()
    generation: int = 0
    """Of the newest move either end has tried."""
    settled: int = 0
    """Of the newest move this end made, as the mover, to its end."""
    deadline: float | None = None
    attempts: int = 0
    """Requests sent without an answer at this step."""
    busy: bool = False
    """An engine step is under way; its result comes before anything else is decided."""
    shielded: bool = False
    """The engine's shield is up, or soon will be, for a move the peer announced or may have made.
    """
    announced: int = 0
    """Generation of the newest move that the peer has announced (Prepare)."""
    changes: int = 0
    """Of the network, when the engine step under way was decided."""
    departed: bool = False
    """The socket is locked or on the new tuple and waits for the peer."""
    forced: bool = False
    """This move answers a loss: there is no old path to fall back on."""
    target: FourTuple | None = None
    """Where a MOVING or PREPARING session is going."""
    plan: list[FourTuple] = field(default_factory=list)
    """Candidates not tried yet, best first."""
    cycles: int = 0
    """How often the whole plan failed."""
    rcv_nxt: int = 0
    """R_a or R_b of the handover under way, told to the peer; repeated with each retransmission."""
    window: int = 0
    """The receive window told with it, in bytes."""
    pending: bool = False
    since: float = 0.0
    """When the event came that set the move off."""
    refused_at: float | None = None
    """When the peer's host first answered a Bind with ICMP port unreachable."""
    sent_at: float = 0.0
    """When the request that waits for its answer was first sent (for the round trip)."""
    moved_at: float = float("-inf")
    moves: int = 0
    flaps: int = 0
    """Losses in a row that came soon after a move; each doubles the patience with preferences."""
    gap: float | None = None
    """Seconds, of the last move."""
    chosen: bool = False
    """A user put it where it is: preferences do not move it from there, only a loss does."""
    ticket: Any = None

    @property
    def known_as(self) -> str:
        """What the peer's key is judged by: its name, or its address."""
        return self.name if self.name and self.vouched else self.tuple.remote.address

    @property
    def in_handover(self) -> bool:
        """The engine has done something to the socket that it has still to end."""
        return self.departed or self.shielded or self.state in (State.MOVING, State.FOLLOWING)

    @property
    def waits_for_peer(self) -> bool:
        """A handover is under way that the peer is to end."""
        return self.state in (State.MOVING, State.FOLLOWING)

    @property
    def mobile(self) -> bool:
        """Whether the session follows its hosts."""
        return self.state not in (State.PLAIN, State.BINDING, State.CLOSED)

    def await_no_answer(self) -> None:
        """Its Move is answered, or given up."""
        if self.association is not None:
            self.association.outstanding.discard(self.handle)
