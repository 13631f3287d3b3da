"""BINDING: two daemons agree that a connection is a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sessiond.core import events as ev
from sessiond.core import messages as m
from sessiond.core.association import INITIAL_RTO
from sessiond.core.ending import stay_plain
from sessiond.core.inputs import Incoming
from sessiond.core.moving import rest
from sessiond.core.session import Session, State
from sessiond.core.tuples import Endpoint

if TYPE_CHECKING:
    from sessiond.core.machine import Core

BIND_ATTEMPTS = 6
REFUSAL_PAUSE = 1.0
"""Seconds from the first ICMP port unreachable to the Bind after which one more is believed: the
peer's daemon may just be starting again."""


def begin(core: Core, session: Session) -> None:
    """A new session: the end that dialled asks the peer, the end that accepted is asked."""
    session.state = State.BINDING
    if session.role == "accept":
        session.reason = "the peer has not asked for a session (no sessiond there?)"
    else:
        session.initiator = True
        core.table.ask(session)
        session.reason = "the peer's sessiond has not answered yet"
        send_bind(core, session)


def send_bind(core: Core, session: Session) -> None:
    """Ask, and ask again when no answer comes."""
    local, remote = session.tuple
    proof = m.proof("bind", session.id, session.isn_local, session.isn_remote)
    bind = m.Bind(
        session.id,
        session.handle,
        local,
        remote,
        proof,
        tuple(session.versions),
        core.addresses(),
        session.role == "connect",
    )
    to = Endpoint(remote.address, core.port)
    core.out.message(to, local.address, session.known_as, bind)
    session.sent_at = core.now if session.attempts == 0 else session.sent_at
    core.table.set_deadline(session, core.now + INITIAL_RTO * 2**session.attempts)
    session.attempts += 1


def repeat_bind(core: Core, session: Session, event: Any) -> None:
    if session.attempts < BIND_ATTEMPTS:
        send_bind(core, session)
    else:
        asked = Endpoint(session.tuple.remote.address, core.port)
        stay_plain(core, session, f"no sessiond answered at {asked}")


def unreachable(core: Core, session: Session, event: Any) -> None:
    """Nothing listens at the peer's host, it says: ask once more, and believe it."""
    if session.refused_at is None:
        session.refused_at = core.now
        core.table.set_deadline(session, core.now + REFUSAL_PAUSE)
    elif core.now >= session.refused_at + REFUSAL_PAUSE:
        reason = (
            f"no sessiond at {session.tuple.remote.address}: the host answered that nothing "
            f"listens on UDP port {core.port} (ICMP port unreachable)"
        )
        stay_plain(core, session, reason)


def untrusted(core: Core, session: Session, event: ev.Untrusted) -> None:
    """Who answers at the peer's address may not be the peer."""
    stay_plain(core, session, event.reason)


def bind_refused(core: Core, session: Session, incoming: Incoming) -> None:
    stay_plain(core, session, f"the peer refused the session: {incoming.entry.reason}")


def bound(core: Core, session: Session, incoming: Incoming) -> None:
    answer: m.Bound = incoming.message
    if not m.proves(answer.proof, "bound", session.id, session.isn_local, session.isn_remote):
        core.refused["bound without proof"] += 1
        return
    once = session.attempts == 1
    establish(core, session, incoming, answer.own, answer.versions, answer.addresses)
    if once and session.association is not None:
        session.association.sample(core.now - session.sent_at)


def adopt(core: Core, session: Session, incoming: Incoming) -> None:
    """The other end's Bind for a connection of ours, proven."""
    bind: m.Bind = incoming.message
    if session.state is State.BINDING:
        if session.initiator and not gives_way(session, bind):
            return
        session.initiator = False
        core.table.rename(session, bind.session)
        establish(core, session, incoming, bind.handle, bind.versions, bind.addresses)
    if session.state is State.PLAIN:
        refused = m.RefusedEntry(bind.handle, 0, session.reason or "not mobile")
        event = incoming.event
        core.out.entry(event.source, event.via, event.host, m.Refused, refused)
    elif session.association is None or session.association.host != incoming.event.host:
        core.refused["foreign session"] += 1
    elif session.mobile and session.id == bind.session:
        proof = m.proof("bound", session.id, session.isn_local, session.isn_remote)
        answer = m.Bound(
            bind.handle, session.handle, proof, tuple(session.versions), core.addresses()
        )
        event = incoming.event
        core.out.message(event.source, event.via, event.host, answer)


def gives_way(session: Session, bind: m.Bind) -> bool:
    """Whether the other end's Bind stands where both have asked.

    Who dialled has a peer in mind, whose key is judged by that name: it does not take another's
    word, who may have read the initial sequence numbers off the wire. Where neither end knows who
    dialled, the greater id is the session's.
    """
    if session.role == "connect":
        return False
    return bind.dialled or session.id < bind.session


def establish(
    core: Core,
    session: Session,
    incoming: Incoming,
    peer_handle: int,
    versions: tuple[int, ...],
    addresses: tuple[str, ...],
) -> None:
    """Both ends agree that this connection is this session."""
    event = incoming.event
    association = core.table.association(event.host, event.source)
    association.heard(event.source, event.via, event.counter)
    association.addresses = addresses
    core.table.bind(session, association)
    session.peer_handle = peer_handle
    session.peer_versions = frozenset(versions)
    session.reason = None
    core.table.set_deadline(session, None)
    core.run(session, "enroll")
    rest(core, session)
    core.report(session, "bound")
