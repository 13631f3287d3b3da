"""What the daemon knows of applications: whose socket each session is, and what to tell whom."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sessiond.core import effects as ef
from sessiond.core.session import Session
from sessiond.rebind.engine import Connection, Engine

log = logging.getLogger("sessiond.session")

LOGGED_ONE_BY_ONE = 32
"""Sessions to which the same happens at once; of more, the log says how many."""

Deliver = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that attached a session."""

    uid: int
    pid: int
    created: float
    """Unix seconds."""


@dataclass(eq=False, slots=True)
class Subscription:
    """Somebody who wants to hear of sessions."""

    uid: int | None
    """Only of this user's sessions; None: of all."""
    session: int | None
    """Only of the one with this handle."""
    deliver: Deliver


class Registry:
    """Sessions as applications and people see them. Implements ``perform.Audience``.

    Args:
        engine: is told which sockets are mobile from now on.
        unwatch: called with the cookie of a socket that is no session any more.
    """

    def __init__(self, engine: Engine, unwatch: Callable[[int], None]) -> None:
        self._reports: list[tuple[ef.Report, Owner | None]] = []
        self._loop = asyncio.get_running_loop()
        self._engine = engine
        self._unwatch = unwatch
        self.connections: dict[int, Connection] = {}
        self.owners: dict[int, Owner] = {}
        self.by_cookie: dict[int, int] = {}
        self.per_uid: Counter[int] = Counter()
        self.subscriptions: set[Subscription] = set()

    def add(self, handle: int, connection: Connection, owner: Owner) -> None:
        """Note whose socket a new session is."""
        self.connections[handle] = connection
        self.owners[handle] = owner
        self.by_cookie[connection.cookie] = handle
        self.per_uid[owner.uid] += 1

    def record(self, session: Session) -> dict[str, Any]:
        """A session as docs/local-protocol.md describes it."""
        owner = self.owners[session.handle]
        association = session.association
        rtt = association.srtt if association is not None else None
        return {
            "session": session.id.hex(),
            "state": session.state.value,
            "mobile": session.mobile,
            "reason": session.reason,
            "engine": self._engine.name if session.mobile else None,
            "role": session.role,
            "peer": session.name or session.tuple.remote.address,
            "peer_daemon": str(association.endpoint) if association is not None else None,
            "local": str(session.tuple.local),
            "remote": str(session.tuple.remote),
            "generation": session.generation,
            "moves": session.moves,
            "gap_ms": _ms(session.gap),
            "pid": owner.pid,
            "fd": self.connections[session.handle].fd,
            "uid": owner.uid,
            "created": owner.created,
            "rtt_ms": _ms(rtt),
        }

    # perform.Audience

    def report(self, report: ef.Report) -> None:
        """Log it, and tell who listens, once what is urgent has been done."""
        if not self._reports:
            self._loop.call_soon(self._tell_all)
        self._reports.append((report, self.owners.get(report.handle)))

    def _tell_all(self) -> None:
        reports, self._reports = self._reports, []
        kinds = Counter(report.kind for report, _ in reports)
        for report, owner in reports:
            if kinds[report.kind] <= LOGGED_ONE_BY_ONE:
                _log(report, self._engine.name)
            self._tell(report, owner)
        for kind, count in kinds.items():
            if count > LOGGED_ONE_BY_ONE:
                _log_many(kind, [report for report, _ in reports if report.kind == kind])

    def _tell(self, report: ef.Report, owner: Owner | None) -> None:
        if self.subscriptions and owner is not None:
            event = self._event(report)
            for listener in list(self.subscriptions):
                mine = listener.uid is None or listener.uid == owner.uid
                if mine and listener.session in (None, report.handle):
                    listener.deliver(event)

    def answer(self, answer: ef.Answer) -> None:
        """A rebind by request ended; its ticket is the function that wants to know."""
        answer.ticket(answer.error)

    def forget(self, handle: int) -> None:
        """The session is gone."""
        connection = self.connections.pop(handle, None)
        owner = self.owners.pop(handle, None)
        if connection is not None and owner is not None:
            self.per_uid[owner.uid] -= 1
            self.by_cookie.pop(connection.cookie, None)
            self._unwatch(connection.cookie)

    def _event(self, report: ef.Report) -> dict[str, Any]:
        event: dict[str, Any] = {
            "session": report.session.hex(),
            "kind": report.kind,
            "time": time.time(),
            "local": str(report.tuple.local),
            "remote": str(report.tuple.remote),
        }
        if report.kind == "moved":
            event["engine"] = self._engine.name
            event["gap_ms"] = _ms(report.gap)
            event["generation"] = report.generation
        if report.reason is not None:
            event["reason"] = report.reason
        return event


def _level(kind: str) -> int:
    return logging.WARNING if kind in ("failed", "lost", "waiting") else logging.INFO


def _log_many(kind: str, reports: list[ef.Report]) -> None:
    """Thousands of sessions move for one reason: one line a batch, with its worst."""
    gaps = [report.gap for report in reports if report.gap is not None]
    worst = f", gap up to {_ms(max(gaps))}ms" if gaps else ""
    first = reports[0]
    text = f"{len(reports)} sessions {kind}, the first {first.session.hex()[:8]}: {first.tuple}"
    log.log(_level(kind), "%s%s", text, worst)


def _log(report: ef.Report, engine: str) -> None:
    level = _level(report.kind)
    if not log.isEnabledFor(level):
        return
    peer = report.name or report.tuple.remote.address
    text = f"session {report.session.hex()[:8]} {report.kind}: {report.tuple} peer={peer}"
    if report.before is not None:
        text += f" before={report.before} generation={report.generation} engine={engine}"
        text += f" gap={_ms(report.gap)}ms"
    if report.reason is not None:
        text += f" reason: {report.reason}"
    log.log(level, text)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
