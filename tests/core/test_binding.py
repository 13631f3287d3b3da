"""BINDING: what a host says that has no daemon, and whom it is believed of."""

from __future__ import annotations

import pytest

from sessiond.core import effects as ef
from sessiond.core import events as ev
from sessiond.core import messages as m
from sessiond.core.binding import REFUSAL_PAUSE
from sessiond.core.machine import Core
from sessiond.core.network import Address, Network, Route
from sessiond.core.paths import Policy
from sessiond.core.session import Session, State
from sessiond.core.tuples import Endpoint, FourTuple

PEER, PORT = "198.51.100.7", 2006
NETWORK = Network((Address("192.0.2.1", 24, "eth0"),), (Route("0.0.0.0/0", "eth0", 0),))
TUPLE = FourTuple(Endpoint("192.0.2.1", 40000), Endpoint(PEER, 7000))


class Host:
    """A core with one session, and the Binds it has sent."""

    def __init__(self, role: str = "connect") -> None:
        self.now = 0.0
        self.core = Core(b"h" * 16, PORT, Policy())
        self.binds: list[m.Bind] = []
        self.reports: list[ef.Report] = []
        both = frozenset((4, 6))
        self.post(ev.NetworkChanged(NETWORK))
        self.post(ev.Attached(1, TUPLE, 11, 22, both, role, session_id=b"s" * 16))

    @property
    def session(self) -> Session:
        return self.core.table.sessions[1]

    def state(self) -> State:
        return self.session.state

    def post(self, event: ev.Event) -> None:
        for effect in self.core.handle(event, self.now):
            if isinstance(effect, ef.Send):
                self.binds += [one for one in effect.messages if isinstance(one, m.Bind)]
            elif isinstance(effect, ef.Report):
                self.reports.append(effect)

    def refuse(self, address: str = PEER) -> None:
        """A host: nothing listens here."""
        self.post(ev.Unreachable(Endpoint(address, PORT), TUPLE.local.address))

    def wait(self) -> None:
        """Until the next deadline."""
        due = self.core.deadline()
        assert due is not None
        self.now = due
        self.post(ev.DeadlinePassed())

    def bound(self) -> None:
        """The peer's daemon agrees."""
        proof = m.proof("bound", self.session.id, 22, 11)
        answer = m.Bound(1, 9, proof, (4, 6), (PEER,))
        source = Endpoint(PEER, PORT)
        self.post(ev.Received(b"p" * 16, source, TUPLE.local.address, 1, answer))


def test_a_host_that_says_twice_that_nothing_listens_is_believed() -> None:
    host = Host()
    host.refuse()
    assert host.state() is State.BINDING
    host.wait()
    assert host.now == REFUSAL_PAUSE
    assert len(host.binds) == 2
    host.refuse()
    assert host.state() is State.PLAIN
    assert host.session.reason == (
        "no sessiond at 198.51.100.7: the host answered that nothing listens on UDP port 2006 "
        "(ICMP port unreachable)"
    )
    assert [report.kind for report in host.reports] == ["failed"]
    assert host.core.deadline() is None


def test_what_it_says_of_binds_sent_before_the_pause_counts_once() -> None:
    host = Host()
    host.wait()  # the second Bind
    for _ in host.binds:
        host.refuse()
    host.wait()
    assert host.state() is State.BINDING
    assert len(host.binds) == 3


def test_a_daemon_that_was_only_restarting_is_met() -> None:
    host = Host()
    host.refuse()
    host.wait()
    host.bound()
    assert host.state() is State.ESTABLISHED


def test_once_silent_again_the_peer_is_given_up_as_any_silent_one() -> None:
    host = Host()
    host.refuse()
    while host.state() is State.BINDING:
        host.wait()
    assert host.session.reason == "no sessiond answered at 198.51.100.7:2006"
    assert len(host.binds) == 6


def test_nobody_is_believed_of_a_session_that_is_one() -> None:
    host = Host()
    host.bound()
    for host.now in (10.0, 20.0):
        host.refuse()
    assert host.state() is State.ESTABLISHED
    assert host.core.deadline() is None


def test_of_another_host_it_says_nothing() -> None:
    host = Host()
    host.refuse("198.51.100.8")
    assert host.session.refused_at is None


@pytest.mark.parametrize("end", ["refused", "bound", "gone"])
def test_who_asks_no_more_is_forgotten(end: str) -> None:
    host = Host()
    assert host.core.table.asking
    match end:
        case "refused":
            host.refuse()
            host.wait()
            host.refuse()
        case "bound":
            host.bound()
        case "gone":
            host.post(ev.Ended(1, "closed"))
    assert not host.core.table.asking
