"""What two daemons say to each other about the sessions between their hosts.

Every session has a *handle* on each host, chosen by that host and told to the other when the
session is bound; a message names a session by the handle of the host that reads it. Moves carry the
session's generation: it strictly rises, and what names an older one is ignored.

All requests are idempotent and repeated until answered; ``peer_codec`` turns them into datagrams.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import NamedTuple

from sessiond.core.tuples import Endpoint

ENTRIES_PER_MESSAGE = 36
"""So that a full batch stays within one datagram of 1,200 bytes whatever the values."""

PROOF_BYTES = 32


class Bind(NamedTuple):
    """Initiator: this TCP connection of yours is session ``session``."""

    session: bytes
    """128 random bits, chosen by the initiator."""
    handle: int
    local: Endpoint
    remote: Endpoint
    """The connection as the sender sees it."""
    proof: bytes
    versions: tuple[int, ...]
    """IP versions the sender's socket can be moved to."""
    addresses: tuple[str, ...]
    """Where else the sender can be reached now."""
    dialled: bool
    """The sender opened the connection, and so knows whom it meant."""


class Bound(NamedTuple):
    """Answer to Bind: I hold the other end of it."""

    handle: int
    own: int
    """The handle of the sender of this message."""
    proof: bytes
    versions: tuple[int, ...]
    addresses: tuple[str, ...]


class Ping(NamedTuple):
    """Measures the round trip and announces the sender's addresses."""

    token: int
    addresses: tuple[str, ...]


class Pong(NamedTuple):
    """Answer to Ping."""

    token: int
    observed: Endpoint
    """The source the Ping came from, as the sender of this message saw it."""
    addresses: tuple[str, ...]


class Mark(NamedTuple):
    """A session at a generation: the entry of Prepare, Prepared and Settled."""

    handle: int
    generation: int


class Prepare(NamedTuple):
    """A move by request is coming: raise the shield (handover.md section 2)."""

    entries: tuple[Mark, ...]


class Prepared(NamedTuple):
    """Answer to Prepare: the shield is up."""

    entries: tuple[Mark, ...]


class MoveEntry(NamedTuple):
    """One session of a Move; ports as the sender of the message sees them."""

    handle: int
    generation: int
    local_port: int
    remote_port: int
    rcv_nxt: int
    """R_a: the next byte the mover expects."""
    window: int
    """Bytes it can take beyond that: acknowledgements on their way may be lost with the path."""
    pending: bool
    """The mover has unacknowledged bytes: stay silent on the new tuple until it speaks (case 2)."""


class Move(NamedTuple):
    """The sender's sessions leave for a new pair of addresses."""

    local: str
    remote: str
    entries: tuple[MoveEntry, ...]


class MovedEntry(NamedTuple):
    """One session of a Moved."""

    handle: int
    generation: int
    rcv_nxt: int
    """R_b: the next byte the other end expects."""
    window: int
    """Bytes it can take beyond that."""


class Moved(NamedTuple):
    """Answer to Move: this end is on the new tuple."""

    entries: tuple[MovedEntry, ...]


class Settled(NamedTuple):
    """Answer to Moved: both ends are on the new tuple, shields may fall."""

    entries: tuple[Mark, ...]


class RefusedEntry(NamedTuple):
    """A Bind (generation 0), Prepare or Move that this end will not or can't carry out."""

    handle: int
    generation: int
    reason: str


class Refused(NamedTuple):
    """Nothing was changed; the reason is for people."""

    entries: tuple[RefusedEntry, ...]


class CloseEntry(NamedTuple):
    """One session of a Close."""

    handle: int
    reason: str


class Close(NamedTuple):
    """The sender no longer keeps these sessions; their TCP connections live or end on their own."""

    entries: tuple[CloseEntry, ...]


Message = Bind | Bound | Ping | Pong | Prepare | Prepared | Move | Moved | Settled | Refused | Close


def proof(kind: str, session: bytes, isn_own: int, isn_peer: int) -> bytes:
    """Show that the sender knows both initial sequence numbers of a connection.

    They are 64 bits that nobody off the path knows, equal on both hosts and untouched by NAT
    (handover.md section 7).

    Args:
        kind: ``"bind"`` or ``"bound"``: a proof of the one is none of the other.
        session: the session's id.
        isn_own, isn_peer: as the sender of the proof sees them.
    """
    key = isn_own.to_bytes(4, "big") + isn_peer.to_bytes(4, "big")
    return hmac.digest(key, b"sessiond " + kind.encode() + b"\0" + session, hashlib.sha256)


def proves(given: bytes, kind: str, session: bytes, isn_own: int, isn_peer: int) -> bool:
    """Check a proof made by the other end (whose own ISN is our peer's)."""
    return hmac.compare_digest(given, proof(kind, session, isn_peer, isn_own))
