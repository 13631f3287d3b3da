"""The core: one door for events, one clock given from outside, effects out.

``handle`` takes an event apart into what it means for each session and looks every (state, kind)
pair up in ``transitions.TRANSITIONS``. Nothing here knows of sockets, tasks or bytes.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from sessiond.core import events as ev
from sessiond.core import messages as m
from sessiond.core.announcing import announce, announce_anew, confirmed, keep_told
from sessiond.core.association import Association
from sessiond.core.binding import adopt, begin
from sessiond.core.effects import Answer, Effect, Report, Resolve, Step
from sessiond.core.inputs import Incoming, Kind, Shielded, Undone
from sessiond.core.network import Network
from sessiond.core.outbox import Outbox
from sessiond.core.outcomes import Failed
from sessiond.core.paths import Policy, better, candidates, usable
from sessiond.core.session import Session, State
from sessiond.core.table import Pair, Table, pair
from sessiond.core.transitions import step
from sessiond.core.tuples import Endpoint, FourTuple

HANDOVER_STEPS = frozenset(("depart", "arrive", "follow"))
"""Engine steps with an outcome that the machine waits for."""
EARLY_BINDS = 4096
"""Binds kept for connections whose application has not accepted or attached them yet."""
EARLY_BIND_LIFE = 60.0
"""Seconds."""
GONE = 4096
"""Sessions remembered after their end, so that a peer whose Close was lost is told again."""


class Gone(NamedTuple):
    """A session that was."""

    host: bytes
    """The peer it was shared with."""
    peer_handle: int
    reason: str


class Core:
    """All sessions of a host and what is decided about them.

    Args:
        host: this host's identity, as peers see it.
        port: the UDP port of every daemon.
        policy: which address serves which session.
        min_move_interval: seconds between two moves that only follow a preference.
        move_on_better: move also when a preferred path appears while this one works.
        allow_loopback: let sessions use loopback addresses (tests).
    """

    def __init__(
        self,
        host: bytes,
        port: int,
        policy: Policy,
        *,
        min_move_interval: float = 1.0,
        move_on_better: bool = True,
        allow_loopback: bool = False,
    ) -> None:
        self.host = host
        self.port = port
        self.policy = policy
        self.min_move_interval = min_move_interval
        self.move_on_better = move_on_better
        self.allow_loopback = allow_loopback
        self.network = Network()
        self.changes = 0
        """How often that was replaced."""
        self.table = Table()
        self.refused: Counter[str] = Counter()
        """What was dropped and why, for the statistics."""
        self.now = 0.0
        self.out = Outbox()
        self._judged: dict[Pair, Kind] = {}
        self._announced: tuple[str, ...] = ()
        self._gone: OrderedDict[int, Gone] = OrderedDict()
        self._early: OrderedDict[FourTuple, tuple[float, ev.Received]] = OrderedDict()
        self._resolving: set[str] = set()
        self.tokens = itertools.count(1)
        """One for each announcement, whoever it is for."""

    def handle(self, event: ev.Event, now: float) -> list[Effect]:
        """Take one event in.

        Args:
            event: what happened.
            now: seconds on a clock that never goes back.

        Returns:
            What the world is asked to do, in order.
        """
        self.now = now
        self.out = Outbox()
        _HANDLERS[type(event)](self, event)
        return self.out.effects()

    def deadline(self) -> float | None:
        """When ``DeadlinePassed`` is due, on the clock of ``handle``; None: not at all."""
        return self.table.deadline()

    # Requests of this host

    def _attached(self, event: ev.Attached) -> None:
        session = Session(
            handle=event.handle,
            id=event.session_id,
            first_id=event.session_id,
            tuple=event.tuple,
            isn_local=event.isn_local,
            isn_remote=event.isn_remote,
            role=event.role,
            versions=event.versions,
            created=self.now,
            name=event.name,
            vouched=event.vouched,
            service=event.service,
            reason=event.refusal,
        )
        self.table.add(session)
        if event.refusal is None:
            begin(self, session)
            early = self._early.pop(event.tuple, None)
            if early is not None and self.now - early[0] < EARLY_BIND_LIFE:
                self._received(early[1])

    def _ended(self, event: ev.Ended) -> None:
        session = self.table.sessions.get(event.handle)
        if session is not None:
            step(self, session, event)

    def _rebind_asked(self, event: ev.RebindAsked) -> None:
        session = self.table.sessions.get(event.handle)
        if session is None:
            self.out.effect(Answer(event.ticket, "the session is gone"))
        else:
            step(self, session, event)

    # The network

    def _network_changed(self, event: ev.NetworkChanged) -> None:
        self.network = event.after
        self.changes += 1
        self._judged.clear()
        if not event.settled:
            for session in list(self.table.sessions.values()):
                if session.state is State.WAITING and self._has_its_path(session):
                    step(self, session, Kind.PATH)
            return
        for sessions in list(self.table.by_pair.values()):
            for session in list(sessions):
                step(self, session, self.judge(session))
        if self._announced != self.addresses():
            self._announced = self.addresses()
            for association in self.table.associations.values():
                moving = any(self.table.sessions[one].busy for one in association.sessions)
                announce_anew(self, association, soon=moving)

    def _has_its_path(self, session: Session) -> bool:
        """Whether one without a path need not wait for the network to settle.

        That is if what may follow can't make policy prefer the other family (another interface it
        still would move to), and unless its paths come and go.
        """
        plan = self.plan(session)
        if not plan or session.flaps:
            return False
        wanted = 6 if self.policy.prefer_ipv6 else session.tuple.remote.version
        remotes = (session.tuple.remote, *(Endpoint(one, 0) for one in self._known(session)))
        possible = session.versions & session.peer_versions & {one.version for one in remotes}
        return plan[0].remote.version == wanted or wanted not in possible

    def judge(self, session: Session) -> Kind:
        """What the network as it is means for a session; the same for all on its addresses."""
        key = pair(session.tuple)
        kind = self._judged.get(key)
        if kind is None:
            kind = Kind.PATH if usable(self.network, session.tuple) else Kind.LOST
            if kind is Kind.PATH and self.move_on_better and self.better(session):
                kind = Kind.BETTER
            self._judged[key] = kind
        return kind

    def usable(self, tuple_: FourTuple) -> bool:
        """Whether the local address is there, with a route to the remote one."""
        return usable(self.network, tuple_)

    def plan(
        self, session: Session, *, to: str | None = None, remote: Endpoint | None = None
    ) -> list[FourTuple]:
        """Where a session could go now, best first.

        Args:
            to: only this address or interface of this host.
            remote: where the peer is known to be by now, if not where the tuple says.
        """
        current = session.tuple if remote is None else FourTuple(session.tuple.local, remote)
        known = tuple(dict.fromkeys((current.remote.address, *self._known(session))))
        versions = session.versions & session.peer_versions
        return candidates(self.network, current, known, versions, self.policy, to=to)

    def _known(self, session: Session) -> tuple[str, ...]:
        """Where the peer is, by what it and its name have told."""
        association = session.association
        return () if association is None else association.addresses + association.resolved

    def better(self, session: Session) -> list[FourTuple]:
        """Paths that policy prefers to the one a session is on."""
        return better(self.network, session.tuple, self.policy)

    def addresses(self) -> tuple[str, ...]:
        """This host's addresses that a peer may use."""
        return tuple(address.address for address in self.network.addresses)

    # Peers

    def _received(self, event: ev.Received) -> None:
        if event.host == self.host:
            self.refused["own message"] += 1
            return
        match event.message:
            case m.Bind():
                self._bind(event, event.message)
            case m.Bound(handle=handle):
                session = self.table.sessions.get(handle)
                if session is not None:
                    step(self, session, Incoming(event, event.message, None))
            case m.Ping() | m.Pong():
                self._liveness(event, event.message)
            case batch:
                self._batch(event, batch)

    def _bind(self, event: ev.Received, bind: m.Bind) -> None:
        session = self.table.by_tuple.get(FourTuple(bind.remote, bind.local))
        if session is None:
            self._early[FourTuple(bind.remote, bind.local)] = (self.now, event)
            if len(self._early) > EARLY_BINDS:
                self._early.popitem(last=False)
        elif not m.proves(bind.proof, "bind", bind.session, session.isn_local, session.isn_remote):
            self.refused["bind without proof"] += 1
        else:
            adopt(self, session, Incoming(event, bind, None))

    def _liveness(self, event: ev.Received, message: m.Ping | m.Pong) -> None:
        association = self.table.associations.get(event.host)
        if association is None:
            self.refused["no association"] += 1
            return
        newest = association.heard(event.source, event.via, event.counter)
        news = newest and association.addresses != message.addresses
        if newest:
            association.addresses = message.addresses
        if isinstance(message, m.Ping):
            answer = m.Pong(message.token, event.source, self.addresses())
            self.out.message(event.source, event.via, event.host, answer)
        else:
            confirmed(self, association, message.token)
        keep_told(self, association)
        if news:
            self._meet(association)

    def _meet(self, association: Association) -> None:
        """A peer has other addresses: what had no path may have one."""
        for handle in list(association.sessions):
            session = self.table.sessions[handle]
            if session.state is State.WAITING:
                step(self, session, Kind.PATH)

    def _batch(self, event: ev.Received, message: Any) -> None:
        association = self.table.associations.get(event.host)
        if association is not None:
            association.heard(event.source, event.via, event.counter)
            keep_told(self, association)
        for entry in message.entries:
            session = self.table.sessions.get(entry.handle)
            if session is None:
                self.refused["unknown session"] += 1
                self._tell_gone(event, message, entry.handle)
            elif session.association is not association or (
                association is None and (session.state, type(message)) != _BIND_REFUSED
            ):
                self.refused["foreign session"] += 1
            else:
                step(self, session, Incoming(event, message, entry))

    def _unreachable(self, event: ev.Unreachable) -> None:
        for session in list(self.table.asking.get((event.via, event.to.address), ())):
            step(self, session, event)

    def gone(self, session: Session, reason: str) -> None:
        """A session was removed: its peer is to know, even if the first Close is lost."""
        if session.association is not None:
            self._gone[session.handle] = Gone(session.association.host, session.peer_handle, reason)
            if len(self._gone) > GONE:
                self._gone.popitem(last=False)

    def _tell_gone(self, event: ev.Received, message: Any, handle: int) -> None:
        gone = self._gone.get(handle)
        if gone is not None and gone.host == event.host and not isinstance(message, m.Close):
            entry = m.CloseEntry(gone.peer_handle, gone.reason)
            self.out.entry(event.source, event.via, event.host, m.Close, entry)

    def _untrusted(self, event: ev.Untrusted) -> None:
        for (_, remote), sessions in list(self.table.asking.items()):
            for session in list(sessions) if remote == event.address else ():
                if event.name == session.known_as:
                    step(self, session, event)

    # The engine, names and time

    def _step_done(self, event: ev.StepDone) -> None:
        for handle, generation, outcome in event.results:
            session = self.table.sessions.get(handle)
            if session is None:
                continue
            if event.step in HANDOVER_STEPS:
                session.busy = False
                step(self, session, outcome)
            elif isinstance(outcome, Failed):
                step(self, session, Undone(event.step, outcome))
            elif event.step == "shield":
                step(self, session, Shielded(generation))

    def _resolved(self, event: ev.Resolved) -> None:
        self._resolving.discard(event.name)
        if not event.addresses:
            return
        for session in list(self.table.sessions.values()):
            association = session.association
            if session.name == event.name and association is not None:
                news = association.resolved != event.addresses
                association.resolved = event.addresses
                if session.state is State.WAITING:
                    step(self, session, Kind.PATH)
                if news:
                    keep_told(self, association)

    def _deadline_passed(self, event: ev.DeadlinePassed) -> None:
        for one in list(self.table.due(self.now)):
            if isinstance(one, Association):
                announce(self, one)
            else:
                step(self, one, event)

    # What transitions say to the world

    def run(self, session: Session, name: str, **details: Any) -> None:
        """Have the engine take a step; between two of a handover nothing else is decided."""
        if name in HANDOVER_STEPS:
            session.busy, session.changes = True, self.changes
        details.setdefault("generation", session.generation)
        self.out.step(name, Step(session.handle, **details))

    def report(self, session: Session, kind: str, **details: Any) -> None:
        """Tell people and applications."""
        report = Report(
            session.handle,
            session.id,
            kind,
            session.tuple,
            session.generation,
            session.name,
            **details,
        )
        self.out.effect(report)

    def answer(self, session: Session, error: str | None) -> None:
        """Tell whoever asked for the move, if anybody did; None: it is made."""
        ticket, session.ticket = session.ticket, None
        if ticket is not None:
            self.out.effect(Answer(ticket, error))

    def resolve(self, session: Session) -> None:
        """Look the peer's name up again, if it has one, once for all who wait for it."""
        if session.name is not None and session.name not in self._resolving:
            self._resolving.add(session.name)
            self.out.effect(Resolve(session.name, session.service or ""))


_BIND_REFUSED = (State.BINDING, m.Refused)
"""The one batched message that comes before there is an association."""

_HANDLERS: dict[type, Callable[[Core, Any], None]] = {
    ev.Attached: Core._attached,
    ev.Ended: Core._ended,
    ev.NetworkChanged: Core._network_changed,
    ev.Received: Core._received,
    ev.Unreachable: Core._unreachable,
    ev.Untrusted: Core._untrusted,
    ev.StepDone: Core._step_done,
    ev.RebindAsked: Core._rebind_asked,
    ev.Resolved: Core._resolved,
    ev.DeadlinePassed: Core._deadline_passed,
}
