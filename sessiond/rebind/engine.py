"""The narrow interface behind which the rebind engines stand.

An engine takes batches, because a thousand sessions move for one reason, and answers each entry on
its own, in order. No call raises for what one connection did: that is a ``Failed``. Every call may
be repeated: locking what is locked or moving what has moved is harmless.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from sessiond.core.outcomes import Arrived, Departed, Failed, Followed
from sessiond.core.tuples import FourTuple
from sessiond.rebind.process import Process


class Facts(NamedTuple):
    """What an engine learns about a connection when a session is made of it."""

    tuple: FourTuple
    isn_local: int
    """This host's initial sequence number (handover.md section 7)."""
    isn_remote: int
    versions: frozenset[int]
    """IP versions the socket can be moved to: {4}, {6} or {4, 6}."""
    refusal: str | None
    """Why this connection can't be moved, or None."""


@dataclass(slots=True)
class Connection:
    """An application's TCP socket. The daemon keeps no descriptor of it: closing stays the
    application's, and the daemon takes it by pidfd_getfd(2) for the time of a step."""

    process: Process
    fd: int
    """Its number in that process."""
    cookie: int
    """SO_COOKIE: the kernel's name of the socket, never reused."""
    notes: Any = field(default=None)
    """The engine's own, None while the connection is not being moved."""
    user_timeout: int | None = None
    """The application's TCP_USER_TIMEOUT in milliseconds, while the session is mobile."""
    family: int = -1
    """AF_INET or AF_INET6; -1: not known."""


class Engine(Protocol):
    """handover.md sections 3 and 4, one method a step."""

    name: str

    def inspect(
        self, sock: socket.socket, process: Process, fd: int, *, quiet: bool
    ) -> tuple[Connection, Facts]:
        """Learn what a new session's connection is. Never raises: see ``Facts.refusal``.

        Args:
            sock: the socket, as the application handed it over; not kept.
            process: who has it under the number ``fd``.
            quiet: no other thread uses it yet, the process need not be stopped.
        """

    def enroll(self, batch: Sequence[Connection]) -> list[Failed | None]:
        """The session is mobile from now on: no silence may end the connection."""

    def release(self, batch: Sequence[Connection]) -> list[Failed | None]:
        """The session is plain TCP again; what a handover has done to it is undone."""

    def shield(self, batch: Sequence[Connection]) -> list[Failed | None]:
        """Drop inbound RSTs from now on (the answer to Prepare)."""

    def depart(self, batch: Sequence[tuple[Connection, FourTuple]]) -> list[Departed | Failed]:
        """Mover, step 1: lock, read R_a; move at once if nothing transmitted is unacknowledged.

        A local port of 0 in the target means: keep the port, or take any free one if it is taken.
        """

    def bury(self, batch: Sequence[Connection]) -> None:
        """What ``depart`` has left undone because it has some milliseconds' time."""

    def arrive(self, batch: Sequence[tuple[Connection, int, int]]) -> list[Arrived | Failed]:
        """Mover, step 3, with R_b and the peer's window from ``Moved``: case 1 opens the window;
        case 2 moves, trimmed by R_b, live. The shield is off after it."""

    def follow(
        self, batch: Sequence[tuple[Connection, FourTuple, int, int, bool]]
    ) -> list[Followed | Failed]:
        """The other end, step 2: move to the tuple, trimmed by R_a, with the mover's window. The
        last element holds the output (closed window) until the mover's first segment or
        ``settle``."""

    def settle(self, batch: Sequence[Connection]) -> list[Failed | None]:
        """The handover is over: the window open, lock and shield off, the app's own filter back."""

    def retreat(self, batch: Sequence[Connection]) -> list[Failed | None]:
        """Undo ``depart`` without the peer: live on the tuple it had before, its shield up."""
