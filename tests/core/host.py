"""A core with one session, and a peer that is values only."""

from __future__ import annotations

from sessiond.core import effects as ef
from sessiond.core import events as ev
from sessiond.core import messages as m
from sessiond.core.machine import Core
from sessiond.core.network import Address, Network, Route
from sessiond.core.outcomes import Arrived, Departed
from sessiond.core.paths import Policy
from sessiond.core.session import Session, State
from sessiond.core.tuples import Endpoint, FourTuple

ETH, ETH6, WIFI = "192.0.2.1", "2001:db8::1", "203.0.113.1"
PEER, PEER6, PORT = "198.51.100.7", "2001:db8:7::7", 2006
TUPLE = FourTuple(Endpoint(ETH, 40000), Endpoint(PEER, 7000))


def network(*addresses: str) -> Network:
    """Each on its interface, with a default route."""
    found = tuple(Address(one, 24, {WIFI: "wifi"}.get(one, "eth")) for one in addresses)
    routes = tuple(
        Route("::/0" if ":" in one.address else "0.0.0.0/0", one.interface, 0) for one in found
    )
    return Network(found, routes)


class Host:
    """The core, and what it has sent, told and asked of the engine."""

    def __init__(self, policy: Policy | None = None, role: str = "connect") -> None:
        self.now = 0.0
        self.core = Core(b"h" * 16, PORT, policy or Policy())
        self.sent: list[m.Message] = []
        self.runs: list[tuple[str, ef.Step]] = []
        self.reports: list[ef.Report] = []
        both = frozenset((4, 6))
        self.have(ETH)
        self.post(ev.Attached(1, TUPLE, 11, 22, both, role, session_id=b"s" * 16))

    @property
    def session(self) -> Session:
        return self.core.table.sessions[1]

    def state(self) -> State:
        return self.session.state

    def have(self, *addresses: str, settled: bool = True) -> None:
        """These are the host's addresses now."""
        self.post(ev.NetworkChanged(network(*addresses), settled))

    def post(self, event: ev.Event) -> None:
        for effect in self.core.handle(event, self.now):
            if isinstance(effect, ef.Send):
                self.sent += effect.messages
            elif isinstance(effect, ef.Run):
                self.runs += [(effect.step, step) for step in effect.batch]
            elif isinstance(effect, ef.Report):
                self.reports.append(effect)

    def wait(self) -> None:
        """Until the next deadline."""
        due = self.core.deadline()
        assert due is not None
        self.now = due
        self.post(ev.DeadlinePassed())

    def hear(self, message: m.Message) -> None:
        """From the peer's daemon."""
        source, counter = Endpoint(PEER, PORT), len(self.sent) + int(self.now * 1000)
        self.post(ev.Received(b"p" * 16, source, ETH, counter, message))

    def bound(self, *addresses: str) -> None:
        """The peer's daemon agrees; it has these addresses."""
        proof = m.proof("bound", self.session.id, 22, 11)
        self.hear(m.Bound(1, 9, proof, (4, 6), addresses or (PEER,)))

    def departing(self) -> list[FourTuple | None]:
        """Where the engine was asked to go so far."""
        return [step.tuple for name, step in self.runs if name == "depart"]

    def move(self) -> None:
        """The engine and the peer carry the move under way out."""
        generation, target = self.session.generation, self.session.target
        assert target is not None
        self.done("depart", Departed(0, 65535, False, target))
        self.hear(m.Moved((m.MovedEntry(1, generation, 0, 65535),)))
        self.done("arrive", Arrived(0))

    def done(self, step: str, outcome: Departed | Arrived) -> None:
        """The engine has taken a step."""
        self.post(ev.StepDone(step, (ev.Result(1, self.session.generation, outcome),)))
