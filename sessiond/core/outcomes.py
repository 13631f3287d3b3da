"""What a rebind engine reports about one connection after one step of a handover.

Sequence numbers are 32-bit, as on the wire.
"""

from __future__ import annotations

from typing import NamedTuple

from sessiond.core.tuples import FourTuple


class Departed(NamedTuple):
    """The mover's socket has left, or is ready to leave, its old tuple (handover.md section 4)."""

    rcv_nxt: int
    """R_a: the next byte expected from the peer; final, the socket is locked or has moved."""
    window: int
    """Bytes this end can take beyond rcv_nxt."""
    pending: bool
    """True is case 2: transmitted bytes are unacknowledged, the socket is locked on the old tuple
    and moves in ``arrive``. False is case 1: it is on the new tuple already, window closed."""
    tuple: FourTuple
    """The new tuple, ports resolved."""


class Arrived(NamedTuple):
    """The mover's socket is live on the new tuple."""

    resent: int
    """Bytes put on the new path again because the peer had not received them."""


class Followed(NamedTuple):
    """The other end's socket is on the new tuple."""

    rcv_nxt: int
    """R_b: the next byte this end expects from the mover."""
    window: int
    """Bytes this end can take beyond rcv_nxt."""
    resent: int


class Failed(NamedTuple):
    """A step that was not taken.

    ``lost`` False: the connection is live on the tuple it had before, as if nothing was tried.
    ``lost`` True: it could not be restored; the application has got one clean error.
    """

    reason: str
    lost: bool = False


Outcome = Departed | Arrived | Followed | Failed
