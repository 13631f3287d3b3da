"""Two cores joined in memory: a virtual clock, a network that loses, and sockets that obey TCP.

The sockets are a model of what matters in a handover: sequence numbers, a lock, a shield, a closed
window, and the RST with which a host answers a segment for a tuple it does not have. A socket that
such a RST kills fails the test, and so does a byte that is trimmed without having been received.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sessiond.core import effects as ef
from sessiond.core import events as ev
from sessiond.core.machine import Core
from sessiond.core.network import Address, Network, Route
from sessiond.core.outcomes import Arrived, Departed, Failed, Followed, Outcome
from sessiond.core.paths import Policy
from sessiond.core.session import Session
from sessiond.core.tuples import Endpoint, FourTuple
from sessiond.peer_codec import MAX_PAYLOAD, decode, encode

PORT = 2006
ENGINE_TIME = 0.0003
SETTLES = 0.1


@dataclass(eq=False)
class Socket:
    """One end of a TCP connection; offsets count bytes from the start of the stream."""

    tuple: FourTuple
    written: int = 0
    snd_una: int = 0
    snd_nxt: int = 0
    rcv_nxt: int = 0
    locked: bool = False
    shield: bool = False
    window: bool = True
    before: FourTuple | None = None
    target: FourTuple | None = None
    tombstones: set[FourTuple] = field(default_factory=set)
    """The tuples it has left since it was at rest: segments for them are swallowed, not refused."""

    def move(self, new: FourTuple, peer_rcv_nxt: int) -> None:
        """Trim by what the peer has, and send the rest as new."""
        assert peer_rcv_nxt <= self.snd_nxt, "trimmed bytes nobody received"
        # What TCP itself acknowledged since counts too: the peer may be on the same tuple still.
        una = max(self.snd_una, peer_rcv_nxt)
        self.tombstones.add(self.tuple)
        self.tombstones.discard(new)
        self.tuple, self.snd_una, self.snd_nxt = new, una, una
        self.locked = False


class Host:
    """A core with its sockets and its part of the network."""

    def __init__(self, world: World, name: bytes, addresses: Sequence[str]) -> None:
        self.world = world
        self.name = name
        self.core = Core(name.ljust(16, b"."), PORT, Policy())
        self.counter = 0
        self.sockets: dict[int, Socket] = {}
        self.reports: list[ef.Report] = []
        self.answers: list[ef.Answer] = []
        self.addresses: frozenset[str] = frozenset()
        self.wake: float | None = None
        self.have(*addresses)

    def have(self, *addresses: str) -> None:
        """Make these the host's addresses, each on an interface of its own, once and for all."""
        self.addresses = frozenset(addresses)
        self.post(ev.NetworkChanged(network(addresses)))

    def come_to_have(self, *addresses: str) -> None:
        """The same as ``edges.rtnl`` tells it: what is only gained has to settle."""
        after = network(addresses)
        self.addresses = frozenset(addresses)
        if self.core.network.lost_in(after):
            self.post(ev.NetworkChanged(after))
        else:
            self.post(ev.NetworkChanged(after, settled=False))
            self.world.after(SETTLES, lambda: self.post(ev.NetworkChanged(self.core.network)))

    def post(self, event: ev.Event) -> None:
        """Hand the core an event and carry out what it asks."""
        for effect in self.core.handle(event, self.world.now):
            self._perform(effect)
        due = self.core.deadline()
        if due is not None and due != self.wake:
            self.wake = due
            self.world.at(due, self._deadline)

    def session(self) -> Session:
        """The only session."""
        (session,) = self.core.table.sessions.values()
        return session

    def _deadline(self) -> None:
        due = self.core.deadline()
        if due is not None and due <= self.world.now:
            self.wake = None
            self.post(ev.DeadlinePassed())

    def _perform(self, effect: ef.Effect) -> None:
        match effect:
            case ef.Send(to, via, peer, messages):
                for payload in encode(messages):
                    self.world.transmit(self, payload, to, via, peer)
            case ef.Run(step, batch):
                self.world.after(ENGINE_TIME, lambda: self._run(step, batch))
            case ef.Report():
                self.reports.append(effect)
            case ef.Answer():
                self.answers.append(effect)
            case ef.Resolve(name):
                answer = ev.Resolved(name, tuple(self.world.names.get(name, ())))
                self.world.after(0.001, lambda: self.post(answer))
            case ef.Forget(handle):
                del self.sockets[handle]

    def _run(self, step: str, batch: Sequence[ef.Step]) -> None:
        results = []
        for entry in batch:
            sock = self.sockets.get(entry.handle)
            if sock is not None:
                outcome = getattr(self, f"_{step}")(sock, entry)
                results.append(ev.Result(entry.handle, entry.generation, outcome))
        self.post(ev.StepDone(step, results))

    def _enroll(self, sock: Socket, entry: ef.Step) -> None:
        pass

    def _release(self, sock: Socket, entry: ef.Step) -> None:
        if sock.before is not None and sock.tuple != sock.before:
            sock.move(sock.before, sock.snd_una)
        self._settle(sock, entry)

    # The engine's steps, as rebind.engine.Engine promises them

    def _shield(self, sock: Socket, entry: ef.Step) -> None:
        sock.shield = True

    def _depart(self, sock: Socket, entry: ef.Step) -> Outcome:
        assert entry.tuple is not None
        if entry.tuple.local.address not in self.addresses:
            return Failed("no such address")
        if sock.before is None:
            sock.before = sock.tuple
        sock.locked, sock.target = True, entry.tuple
        # To the tuple it is on it does not move, nor is it apart for an instant: it is locked.
        pending = sock.snd_una < sock.snd_nxt or entry.tuple == sock.tuple
        if not pending:
            sock.move(entry.tuple, sock.snd_una)
            sock.shield = True
        sock.window = pending and entry.tuple != sock.tuple and sock.window
        return Departed(sock.rcv_nxt, 65535, pending, entry.tuple)

    def _arrive(self, sock: Socket, entry: ef.Step) -> Outcome:
        assert sock.target is not None
        if sock.locked:
            sock.move(sock.target, entry.rcv_nxt)
        self._settle(sock, entry)
        return Arrived(0)

    def _follow(self, sock: Socket, entry: ef.Step) -> Outcome:
        assert entry.tuple is not None
        sock.move(entry.tuple, entry.rcv_nxt)
        sock.before = entry.tuple  # both ends have agreed on it
        sock.shield, sock.window = True, not entry.hold
        return Followed(sock.rcv_nxt, 65535, 0)

    def _settle(self, sock: Socket, entry: ef.Step) -> None:
        sock.tombstones.clear()
        sock.locked = sock.shield = False
        sock.window, sock.before = True, None

    def _retreat(self, sock: Socket, entry: ef.Step) -> None:
        assert sock.before is not None
        sock.move(sock.before, sock.snd_una)
        self._settle(sock, entry)
        sock.shield = True


class Heard(NamedTuple):
    """What arrives at a host."""

    host: bytes
    source: Endpoint
    via: str
    counter: int
    payload: bytes


@dataclass
class World:
    """Time, the wire, and the two hosts."""

    seed: int = 0
    rtt: float = 0.02
    loss: float = 0.0
    now: float = 100.0
    hosts: list[Host] = field(default_factory=list)
    names: dict[str, Sequence[str]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    """Addresses to and from which nothing gets through, though their host thinks otherwise."""
    one_way: set[tuple[str, str]] = field(default_factory=set)
    """Source and destination of what gets lost, though the answers would not."""
    datagrams: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._queue: list[tuple[float, int, Callable[[], Any]]] = []
        self._order = itertools.count()

    def host(self, name: bytes, *addresses: str) -> Host:
        """Add a host."""
        host = Host(self, name, addresses)
        self.hosts.append(host)
        return host

    def connect(self, client: Host, server: Host, *, name: str | None = None) -> None:
        """A TCP connection between the two, attached at both ends."""
        local = Endpoint(min(client.addresses), 40000 + len(client.sockets))
        remote = Endpoint(min(server.addresses), 7000)
        seen = FourTuple(local, remote)
        for host, tuple_, role, isns in (
            (client, seen, "connect", (11, 22)),
            (server, seen.mirrored(), "accept", (22, 11)),
        ):
            handle = len(host.sockets) + 1
            host.sockets[handle] = Socket(tuple_)
            both = frozenset((4, 6))
            session_id = self.random.randbytes(16)
            dialled = name if role == "connect" else None
            host.post(
                ev.Attached(
                    handle, tuple_, *isns, both, role, dialled, "7000", session_id=session_id
                )
            )

    def at(self, when: float, what: Callable[[], Any]) -> None:
        """Do something at a time."""
        heapq.heappush(self._queue, (when, next(self._order), what))

    def after(self, delay: float, what: Callable[[], Any]) -> None:
        """Do something a while from now."""
        self.at(self.now + delay, what)

    def run(self, seconds: float) -> None:
        """Let time pass; TCP gets its turn after everything that happens."""
        end = self.now + seconds
        self.pump()
        while self._queue and self._queue[0][0] <= end:
            self.now, _, what = heapq.heappop(self._queue)
            what()
            self.pump()
        self.now = end

    def transmit(
        self, sender: Host, payload: bytes, to: Endpoint, via: str, peer: bytes | str
    ) -> None:
        """A datagram between daemons, as if sealed: only the peer meant can read it."""
        assert len(payload) <= MAX_PAYLOAD
        assert to.port == PORT
        self.datagrams += 1
        sender.counter += 1
        counter = sender.counter
        if not self._passes(sender, via, to.address) or self.random.random() < self.loss:
            return
        receiver = self.owner(to.address)
        delay = self.rtt / 2 * (1 + self.random.random() * (0.5 if self.loss else 0))
        met = isinstance(peer, str) or (receiver is not None and peer == receiver.core.host)
        meant = receiver if met else None
        heard = Heard(sender.core.host, Endpoint(via, PORT), to.address, counter, payload)
        self.after(delay, lambda: self._receive(meant, heard))

    def owner(self, address: str) -> Host | None:
        """Who has an address."""
        return next((host for host in self.hosts if address in host.addresses), None)

    def pump(self) -> None:
        """Every socket sends what it may; instantly, which only makes strays more likely."""
        for host in self.hosts:
            for sock in list(host.sockets.values()):
                if sock.window and not sock.locked and sock.written > sock.snd_una:
                    sock.snd_nxt = sock.written
                    self._segment(host, sock)

    def _segment(self, host: Host, sock: Socket) -> None:
        local, remote = sock.tuple
        receiver = self.owner(remote.address)
        if receiver is None or not self._passes(host, local.address, remote.address):
            return
        mirrored = sock.tuple.mirrored()
        other = next((s for s in receiver.sockets.values() if s.tuple == mirrored), None)
        if other is None:
            silent = any(mirrored in other.tombstones for other in receiver.sockets.values())
            assert sock.shield or silent, f"RST kills {host.name!r} on {sock.tuple}"
        elif not other.locked:
            assert sock.snd_una <= other.rcv_nxt, "a byte was lost"
            other.rcv_nxt = max(other.rcv_nxt, sock.snd_nxt)
            other.window = True
            sock.snd_una = other.rcv_nxt

    def _passes(self, sender: Host, source: str, destination: str) -> bool:
        passes = (source, destination) not in self.one_way
        return passes and source in sender.addresses and not {source, destination} & self.broken

    def _receive(self, receiver: Host | None, heard: Heard) -> None:
        host, source, via, counter, payload = heard
        if receiver is None or via not in receiver.addresses:
            return
        for message in decode(payload):
            receiver.post(ev.Received(host, source, via, counter, message))


def network(addresses: Sequence[str]) -> Network:
    """A snapshot in which every address reaches everything of its family."""
    found = tuple(
        Address(address, 64 if ":" in address else 24, f"if-{address}") for address in addresses
    )
    routes = tuple(
        Route("::/0" if ":" in a.address else "0.0.0.0/0", a.interface, 100) for a in found
    )
    return Network(found, routes)
