"""A connection with an engine at each end, moved in the order of handover.md section 4."""

from __future__ import annotations

import contextlib
import socket
from ipaddress import ip_interface
from typing import NamedTuple

from sessiond.core.outcomes import Departed, Failed, Followed
from sessiond.core.tuples import FourTuple
from sessiond.rebind import tcp_state
from sessiond.rebind.process import Process
from sessiond.rebind.repair import Repair
from tests.support.host import Host

ATTEMPTS = 20
BUSY = "does not stop"
"""What the reason says where a process was not stopped in time; these machines are small."""


class Refused(NamedTuple):
    """An engine did not take a step, and everything is as it was."""

    reason: str


class Moved(NamedTuple):
    """Both ends are on the new tuple."""

    pending: bool
    """Case 2: the mover had unacknowledged bytes."""
    resent: int
    """Bytes put on the new path again, by both ends."""


class End:
    """One host's end of a connection: the application's socket, and the engine that moves it.

    Args:
        host: where the application runs.
        pid: the application's process.
        fd: the socket's number in it.
    """

    def __init__(self, host: Host, pid: int, fd: int) -> None:
        self.host = host
        self._process = Process.of(pid)
        self._fd = fd
        with host.entered(), self._process.take(fd) as sock:
            self.engine = Repair(self._interface_of)
            self.connection, self.facts = self.engine.inspect(sock, self._process, fd, quiet=False)
        assert self.facts.refusal is None, self.facts.refusal
        self._one("enroll")

    @property
    def tuple(self) -> FourTuple:
        """Where the socket is now."""
        with self._process.take(self._fd) as sock:
            return tcp_state.tuple_of(sock)

    def shield(self) -> None:
        self._one("shield")

    def depart(self, target: FourTuple) -> Departed | Failed:
        with self.host.entered():
            (outcome,) = self.engine.depart([(self.connection, target)])
        return outcome

    def follow(self, moved: Departed) -> Followed | Failed:
        told = (moved.tuple.mirrored(), moved.rcv_nxt, moved.window, moved.pending)
        with self.host.entered():
            (outcome,) = self.engine.follow([(self.connection, *told)])
        return outcome

    def arrive(self, followed: Followed) -> int:
        """Bytes resent."""
        with self.host.entered():
            (outcome,) = self.engine.arrive([(self.connection, followed.rcv_nxt, followed.window)])
        assert not isinstance(outcome, Failed), outcome
        return outcome.resent

    def settle(self) -> None:
        self._one("settle")

    def retreat(self) -> None:
        self._one("retreat")

    def _one(self, step: str) -> None:
        for _ in range(ATTEMPTS):
            with self.host.entered():
                (outcome,) = getattr(self.engine, step)([self.connection])
            if outcome is None:
                return
            assert not outcome.lost, outcome
            assert BUSY in outcome.reason, outcome
        raise AssertionError(outcome)

    def _interface_of(self, address: str) -> str | None:
        for uplink in self.host.uplinks.values():
            if any(str(ip_interface(own).ip) == address for own in uplink.addresses):
                return uplink.interface
        return None


def deliver(sender: End, receiver: End, path: FourTuple) -> None:
    """A message between the two daemons on a path: what was sent there before it has arrived.

    Args:
        path: as the sender sees it; a datagram takes it, as messages of the daemons do.
    """
    family = socket.AF_INET6 if path.local.version == 6 else socket.AF_INET
    with receiver.host.entered():
        inbox = socket.socket(family, socket.SOCK_DGRAM)
    with sender.host.entered():
        outbox = socket.socket(family, socket.SOCK_DGRAM)
    with inbox, outbox:
        inbox.bind((path.remote.address, 0))
        outbox.bind((path.local.address, 0))
        inbox.settimeout(0.05)
        for _ in range(ATTEMPTS):
            outbox.sendto(b"", inbox.getsockname()[:2])
            with contextlib.suppress(TimeoutError):
                inbox.recv(1)
                return
        raise AssertionError(f"nothing arrives on {path}")


def hand_over(mover: End, other: End, target: FourTuple) -> Moved | Refused:
    """One move by request.

    Args:
        target: the new tuple, as the mover sees it.
    """
    deliver(mover, other, target)  # Prepare
    other.shield()
    deliver(other, mover, target.mirrored())  # Prepared
    departed = mover.depart(target)
    if isinstance(departed, Failed):
        assert not departed.lost, departed.reason
        other.settle()
        return Refused(departed.reason)
    deliver(mover, other, target)  # Move
    followed = other.follow(departed)
    deliver(other, mover, target.mirrored())  # Moved, or Refused
    if isinstance(followed, Failed):
        assert not followed.lost, followed.reason
        mover.retreat()
        other.settle()
        return Refused(followed.reason)
    resent = followed.resent + mover.arrive(followed)
    deliver(mover, other, target)  # Settled
    other.settle()
    return Moved(departed.pending, resent)
