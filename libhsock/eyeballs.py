"""Happy eyeballs (RFC 8305 section 5) without a loop: who waits, and how, is the caller's affair.

    race = Race("server.test:7000", candidates)
    while (sock := race.step(now, ready)) is None:
        ready = <the sockets of race.pending that became writable, or none at race.due>

Both ``create_connection`` and ``open_connection`` run the same race.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from libhsock.errors import ConnectTimedOut, CouldNotConnect, HsockError, NoLocalAddress

S = TypeVar("S", bound=socket.socket)
Candidate = tuple[str, int]
"""Numeric address and port."""

DELAY = 0.25
"""Seconds one attempt is ahead of the next (RFC 8305 section 8, Connection Attempt Delay)."""
_NO_WAY_OUT = {errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
"""Errors of connect() that say that this host has no address or route, and nothing of the peer."""


class Race(Generic[S]):
    """Attempts at several addresses of one host, staggered; the first to connect wins."""

    def __init__(
        self, peer: str, candidates: Sequence[Candidate], make: Callable[[int], S]
    ) -> None:
        """``peer`` names the host in errors; ``make`` gives a socket for an address of a family
        (AF_INET or AF_INET6) or raises OSError."""
        self._peer = peer
        self._left = list(candidates)
        self._make = make
        self._failed: list[tuple[Candidate, int]] = []
        self.pending: dict[S, Candidate] = {}
        """The attempts under way."""
        self.due = 0.0
        """When the next attempt begins, if there is one; see ``more``."""

    @property
    def more(self) -> bool:
        """There are candidates not tried yet."""
        return bool(self._left)

    def step(self, now: float, ready: Iterable[S] = ()) -> S | None:
        """Look at what became writable and start what is due.

        Returns the winner, non-blocking, with all others closed. Raises CouldNotConnect or
        NoLocalAddress when nothing is left to try.
        """
        for sock in ready:
            problem = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not problem:
                return self._won(sock)
            self._lost(sock, problem)
            self.due = now
        while self._left and (now >= self.due or not self.pending):
            if (winner := self._start(now)) is not None:
                return self._won(winner)
        if not self.pending:
            raise self._error()
        return None

    def _start(self, now: float) -> S | None:
        address, port = candidate = self._left.pop(0)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            sock = self._make(family)
        except OSError as error:
            self._failed.append((candidate, error.errno or 0))
            return None
        self.pending[sock] = candidate
        sock.setblocking(False)
        if sock.family == socket.AF_INET6 and family == socket.AF_INET:
            address = f"::ffff:{address}"
        problem = _connect(sock, (address, port))
        if problem == errno.EINPROGRESS:
            self.due = now + DELAY
        elif problem:
            self._lost(sock, problem)
        else:
            return sock
        return None

    def _lost(self, sock: S, problem: int) -> None:
        self._failed.append((self.pending.pop(sock), problem))
        sock.close()

    def _won(self, sock: S) -> S:
        del self.pending[sock]
        self.close()
        return sock

    def candidates(self, candidates: Sequence[Candidate]) -> None:
        """What to try, best first, where it wasn't known at the start."""
        self._left = list(candidates)

    def close(self) -> None:
        """Give up all attempts under way."""
        for sock in self.pending:
            sock.close()
        self.pending.clear()

    def timed_out(self, seconds: float) -> HsockError:
        """The error that says that the caller's time is up."""
        tried = self._tried() + [f"{text(c)}: no answer" for c in self.pending.values()]
        why = f"could not connect to {self._peer} in {seconds:g} s"
        return ConnectTimedOut(why, tried)

    def _error(self) -> HsockError:
        if not self._failed:
            return CouldNotConnect(f"{self._peer} has no address to connect to")
        if all(problem in _NO_WAY_OUT for _, problem in self._failed):
            why = f"this host has no usable address or route to {self._peer}"
            return NoLocalAddress(why, self._tried())
        why = f"could not connect to {self._peer}"
        return CouldNotConnect(why, self._tried(), self._failed[0][1])

    def _tried(self) -> list[str]:
        return [f"{text(candidate)}: {os.strerror(no)}" for candidate, no in self._failed]


def _connect(sock: socket.socket, address: Candidate) -> int:
    try:
        return sock.connect_ex(address)
    except socket.gaierror:
        return errno.EADDRNOTAVAIL  # the scope of a link-local address is no interface here


def interleave(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Families by turns, the first one's first, each in its own order (RFC 8305 section 4)."""
    rest = list(candidates)
    found: list[Candidate] = []
    while rest:
        family = _version(found[-1]) if found else 0
        chosen = next((one for one in rest if _version(one) != family), rest[0])
        rest.remove(chosen)
        found.append(chosen)
    return found


def _version(candidate: Candidate) -> int:
    return 6 if ":" in candidate[0] else 4


def text(candidate: Candidate) -> str:
    """``"192.0.2.1:80"`` or ``"[2001:db8::1]:80"``."""
    address, port = candidate
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
