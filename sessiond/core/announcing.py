"""Each peer is told where this host can be reached, until it says that it knows.

A session at rest does not notice that its peer is gone, and the peer may have only addresses where
it cannot reach what it knows of this host. So while a peer has not confirmed what this host has to
tell, it is looked for: at the pace of its round trip at first, then now and then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sessiond.core import messages as m
from sessiond.core.association import Announcement, Association
from sessiond.core.paths import candidates
from sessiond.core.tuples import Endpoint, FourTuple

if TYPE_CHECKING:
    from sessiond.core.machine import Core

QUICK = 6
"""Announcements at the pace of the round trip, each on the next way to the peer."""
SOON = 0.02
"""Seconds."""
PAUSE = 30.0
"""Seconds between those that follow, each on all ways, while the peer's name is looked up."""
WAYS = 16
"""Ways tried at once at most."""


def announce_anew(core: Core, association: Association, *, soon: bool = False) -> None:
    """There is something new to tell, or to tell it to.

    Args:
        soon: not now: sessions move, and that is more urgent at both ends.
    """
    association.announcements = 0
    if soon:
        core.table.set_deadline(association, core.now + SOON)
    else:
        announce(core, association)


def announce(core: Core, association: Association) -> None:
    """Tell a peer now, and again until it answers."""
    core.table.set_deadline(association, None)
    if not core.network.addresses:
        return
    found = ways(core, association)
    number = association.announcements
    association.announcements += 1
    if number < QUICK and found:
        tell(core, association, [found[number % len(found)]])
        core.table.set_deadline(association, core.now + association.rto(number))
        return
    tell(core, association, found[:WAYS])
    core.table.set_deadline(association, core.now + PAUSE)
    for handle in association.sessions:
        core.resolve(core.table.sessions[handle])


def tell(core: Core, association: Association, paths: list[FourTuple]) -> None:
    """On these paths; the answer to any of them will do."""
    ping = m.Ping(next(core.tokens), core.addresses())
    association.announcement = Announcement(ping.token, core.now, ping.addresses)
    for path in paths:
        to = Endpoint(path.remote.address, core.port)
        core.out.message(to, path.local.address, association.host, ping)


def ways(core: Core, association: Association) -> list[FourTuple]:
    """First to where the peer was heard last, then to wherever else it may be."""
    current = FourTuple(Endpoint(association.via, core.port), association.endpoint)
    both = frozenset((4, 6))

    def to(*peers: str) -> list[FourTuple]:
        return candidates(core.network, current, peers, both, core.policy)

    found = to(association.endpoint.address)
    found += to(*association.addresses, *association.resolved)
    return list(dict.fromkeys(found))


def keep_told(core: Core, association: Association) -> None:
    """A peer that was just heard, but has not confirmed what it was told: tell it again."""
    if association.told == core.addresses():
        return
    if association.deadline is None or association.announcements > QUICK:
        announce_anew(core, association)


def confirmed(core: Core, association: Association, token: int) -> None:
    """The peer knows what it was told with this token."""
    told = association.announcement
    if told is not None and told.token == token:
        association.sample(core.now - told.sent_at)
        association.told, association.announcement = told.addresses, None
        core.table.set_deadline(association, None)
