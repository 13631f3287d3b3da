"""What the daemon does for its clients."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from libhsock.wire import Map
from sessiond.edges.local.caller import Caller


class Resolution(Protocol):
    """What a name was resolved to."""

    @property
    def candidates(self) -> Sequence[tuple[str, int]]:
        """Numeric address and port, best first."""

    @property
    def source(self) -> str:
        """Where they come from, for people."""


class Backend(Protocol):
    """What the daemon does for its clients. Every method may raise an HsockError, which becomes
    the reply; ``uid`` None means everybody's sessions, and other users' are NotFound."""

    async def resolve(self, name: str, service: str, version: int, srv: bool) -> Resolution:
        """The addresses of a name; ``version`` is 4, 6, or 0 for both."""

    def attach(
        self,
        caller: Caller,
        sock: socket.socket,
        fd: int,
        role: str,
        name: str | None,
        service: str | None,
    ) -> Map:
        """The record of the session made of ``sock``, which is closed after the call; ``fd`` is
        what the caller says its number is in its process."""

    def records(
        self, uid: int | None, after: str | None, limit: int
    ) -> tuple[list[Map], str | None]:
        """At most ``limit`` records after session ``after``, and the id for the next page."""

    def record(self, uid: int | None, session: str) -> Map:
        """One record."""

    async def rebind(self, uid: int | None, session: str, to: str | None) -> Map:
        """Move the session; its record once it has moved."""

    def detach(self, uid: int | None, session: str) -> None:
        """Forget the session."""

    def network(self) -> Map:
        """``wire.NetworkView`` as a map."""

    def stats(self, uid: int | None) -> Map:
        """Counters by name; a map of counters becomes ``"name.key"``."""

    def peers(self, name: str | None) -> Map:
        """``wire.PeerKeys`` as a map, of all peers or those with this name."""

    async def pin(self, name: str, key: str) -> None:
        """Accept only this key under a name; an administrator asks."""

    async def forget(self, name: str) -> None:
        """Drop what was pinned or remembered under a name; an administrator asks."""

    def fingerprint(self) -> Map:
        """``wire.HostKey`` as a map."""

    def subscribe(
        self, uid: int | None, session: str | None, deliver: Callable[[Map], None]
    ) -> Callable[[], None]:
        """Call ``deliver`` with each event, a map of ``wire.Event``, until the returned function
        is called. ``deliver`` doesn't block, doesn't raise, and never unsubscribes by itself."""
