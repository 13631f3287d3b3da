"""All sessions of this host, found by what names them, and their deadlines."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from sessiond.core.association import Association
from sessiond.core.session import Session
from sessiond.core.tuples import Endpoint, FourTuple

Pair = tuple[str, str]
"""Local and remote address: what a change of the network is decided by."""


class Table:
    """Keeps every index in step. Idle sessions cost memory here and nothing else."""

    def __init__(self) -> None:
        self.sessions: dict[int, Session] = {}
        self.by_id: dict[bytes, Session] = {}
        self.by_tuple: dict[FourTuple, Session] = {}
        self.by_pair: dict[Pair, set[Session]] = {}
        self.asking: dict[Pair, set[Session]] = {}
        """Those whose Bind waits for its answer."""
        self.associations: dict[bytes, Association] = {}
        self._deadlines: list[tuple[float, int, Session | Association]] = []
        self._order = itertools.count()

    def add(self, session: Session) -> None:
        """Take a new session in."""
        self.sessions[session.handle] = session
        self.by_id[session.id] = session
        self._index(session)

    def remove(self, session: Session) -> None:
        """Drop a session and, with its last session, its association."""
        self._unindex(session)
        self.sessions.pop(session.handle, None)
        self.by_id.pop(session.id, None)
        self.by_id.pop(session.first_id, None)
        self.unbind(session)

    def rename(self, session: Session, session_id: bytes) -> None:
        """Give a session the id the initiator chose; the application may know the first one."""
        session.id = session_id
        self.by_id[session_id] = session

    def retuple(self, session: Session, new: FourTuple) -> None:
        """Note a session's new tuple."""
        self._unindex(session)
        session.tuple = new
        self._index(session)

    def ask(self, session: Session) -> None:
        """Note that a session asks its peer, until it is bound or unbound."""
        _put(self.asking, session)

    def bind(self, session: Session, association: Association) -> None:
        """Put a session into an association."""
        _take(self.asking, session)
        session.association = association
        association.sessions.add(session.handle)
        self.associations[association.host] = association

    def unbind(self, session: Session) -> None:
        """Take a session out of its association."""
        _take(self.asking, session)
        association, session.association = session.association, None
        if association is not None:
            association.sessions.discard(session.handle)
            if not association.sessions:
                self.associations.pop(association.host, None)

    def association(self, host: bytes, source: Endpoint) -> Association:
        """The association with a host; a fresh one is kept only once a session is bound to it."""
        return self.associations.get(host) or Association(host, source)

    def set_deadline(self, one: Session | Association, when: float | None) -> None:
        """Give a session or an association its one deadline, or none."""
        one.deadline = when
        if when is not None:
            heapq.heappush(self._deadlines, (when, next(self._order), one))

    def deadline(self) -> float | None:
        """The earliest deadline of all."""
        while self._deadlines:
            when, _, one = self._deadlines[0]
            if one.deadline == when and self._has(one):
                return when
            heapq.heappop(self._deadlines)
        return None

    def due(self, now: float) -> Iterator[Session | Association]:
        """Those whose deadline has passed; it is cleared as they are given out."""
        while (when := self.deadline()) is not None and when <= now:
            *_, one = heapq.heappop(self._deadlines)
            one.deadline = None
            yield one

    def _has(self, one: Session | Association) -> bool:
        if isinstance(one, Session):
            return self.sessions.get(one.handle) is one
        return self.associations.get(one.host) is one

    def _index(self, session: Session) -> None:
        self.by_tuple[session.tuple] = session
        _put(self.by_pair, session)

    def _unindex(self, session: Session) -> None:
        if self.by_tuple.get(session.tuple) is session:
            del self.by_tuple[session.tuple]
        _take(self.by_pair, session)


def pair(tuple_: FourTuple) -> Pair:
    """The addresses of a tuple."""
    return tuple_.local.address, tuple_.remote.address


def _put(index: dict[Pair, set[Session]], session: Session) -> None:
    index.setdefault(pair(session.tuple), set()).add(session)


def _take(index: dict[Pair, set[Session]], session: Session) -> None:
    key = pair(session.tuple)
    found = index.get(key)
    if found is not None:
        found.discard(session)
        if not found:
            del index[key]
