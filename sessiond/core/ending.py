"""PLAIN and CLOSED: a session is none any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sessiond.core import events as ev
from sessiond.core import messages as m
from sessiond.core.effects import Forget
from sessiond.core.inputs import Incoming
from sessiond.core.session import Session, State

if TYPE_CHECKING:
    from sessiond.core.machine import Core


def stay_plain(core: Core, session: Session, reason: str, *, told: bool = True) -> None:
    session.state, session.reason = State.PLAIN, reason
    core.run(session, "release")
    core.table.unbind(session)
    core.table.set_deadline(session, None)
    if told:
        core.report(session, "failed", reason=reason)


def peer_closed(core: Core, session: Session, incoming: Incoming) -> None:
    """The peer keeps it no longer; TCP itself tells the application what that means."""
    session.departed = session.shielded = False
    session.await_no_answer()
    core.answer(session, "the peer ended the session")
    why: str = incoming.entry.reason
    # An ordinary end: TCP's own is here or on its way, and there is nothing to complain of.
    told = why != ev.CONNECTION_ENDED
    stay_plain(core, session, f"the peer ended the session: {why}", told=told)


def end(core: Core, session: Session, ended: ev.Ended) -> None:
    core.report(session, "closed", reason=ended.reason)
    if ended.reason != ev.CONNECTION_ENDED:
        core.run(session, "release")
    remove(core, session, ended.reason)


def lose(core: Core, session: Session, reason: str) -> None:
    """The engine could not restore the socket; the application has its error."""
    core.report(session, "lost", reason=reason)
    remove(core, session, reason)


def remove(core: Core, session: Session, reason: str) -> None:
    association = session.association
    if association is not None:
        entry = m.CloseEntry(session.peer_handle, reason)
        to, via = association.endpoint, association.via
        core.out.entry(to, via, association.host, m.Close, entry)
        core.gone(session, reason)
    core.answer(session, f"the session ended: {reason}")
    session.await_no_answer()
    session.state = State.CLOSED
    core.table.remove(session)
    core.out.effect(Forget(session.handle))
