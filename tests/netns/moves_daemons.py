"""Two hosts with real daemons and traffic between them, and what can happen to their networks."""

from __future__ import annotations

import errno
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_interface

import libhsock
from libhsock.client import Client
from libhsock.errors import Refused
from libhsock.wire import Record
from sessiond.rebind import tcp_state
from sessiond.rebind.process import Process
from tests.netns import traffic_support as traffic
from tests.support import namespace
from tests.support.dns import NameServer
from tests.support.host import Host
from tests.support.lab import Lab
from tests.support.sessiond import Sessiond
from tests.support.topology import LINKS, NAMESERVERS, Topology, two_hosts
from tests.support.wait import until
from tests.support.worker import Talk, Worker

NAME = "server.test"
PORT = 7000
SETTLE_SECONDS = 30.0
UPLINKS = {"client": ("wifi", "eth"), "server": ("lan0", "lan1")}
POLICY = """\
[policy]
gain_debounce_ms = 20
min_move_interval_ms = 100
"""
"""Quicker than usual, so that a minute is enough for many moves."""


def serve(talk: Talk, daemon: str, port: int, kind: traffic.Traffic, seed: int) -> traffic.Sums:
    """The server program."""
    os.environ["SESSIOND_SOCKET"] = daemon
    with libhsock.create_server(("", port)) as listener:
        talk.tell("listening")
        sock, _ = listener.accept()
    return traffic.run(talk, sock, kind, seed)


def connect(talk: Talk, daemon: str, port: int, kind: traffic.Traffic, seed: int) -> traffic.Sums:
    """The client program."""
    os.environ["SESSIOND_SOCKET"] = daemon
    sock = libhsock.create_connection((NAME, port))
    assert sock.session is not None
    talk.tell(sock.session.id)
    return traffic.run(talk, sock, kind, seed)


@dataclass
class Conversation:
    """A session with its programs."""

    session: str
    near: Worker
    far: Worker
    fd: int
    moves: int = 0

    def at(self) -> str:
        """Where the client's socket really is; nowhere for an instant while it is moved."""
        with Process.of(self.near.pid).take(self.fd, socket.AF_INET6) as sock:
            try:
                return str(tcp_state.tuple_of(sock))
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise
                return "nowhere"


@dataclass
class Network:
    """A host's uplinks, and which versions each has addresses of.

    Args:
        withdrawn: addresses are taken while the network still delivers to them; otherwise the way
            to the host is gone first, as where one leaves a network.
    """

    host: Host
    router: Host
    withdrawn: bool = False
    up: dict[str, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.up = {name: {4, 6} for name in UPLINKS[self.host.name]}

    @property
    def versions(self) -> set[int]:
        return set().union(*self.up.values())

    def addresses(self) -> list[str]:
        """Those a session may have now."""
        return [
            str(ip_interface(own).ip)
            for name, versions in self.up.items()
            for own in self.host.uplinks[name].addresses
            if ip_interface(own).version in versions
        ]

    def lose(self, name: str, how: int | str) -> None:
        """Args: how: 4 or 6, that version's addresses; "addresses", all; or "link"."""
        if how != "link" and not self.withdrawn:
            self._route("replace", name, how if isinstance(how, int) else 0)
        if isinstance(how, int):
            self.host.lose(name, version=how)
            self.up[name].discard(how)
            return
        if how == "link":
            self.host.lose(name, "link")
        else:
            self.host.lose(name)
        self.up[name].clear()

    def gain(self, name: str, number: int | None = None) -> None:
        """Args: number: of the host in its networks, if it is another one than before."""
        if number is not None:
            self.lose(name, "addresses")
        self._route("delete", name)
        self.host.gain(name, None if number is None else LINKS[name].addresses(number))
        self.up[name] = {4, 6}

    def _route(self, what: str, name: str, version: int = 0) -> None:
        """The router's black holes for an uplink's addresses."""
        own = [ip_interface(one).ip for one in self.host.uplinks[name].addresses]
        holes = [one for one in own if version in (0, one.version)]
        namespace.ip(
            *(f"route {what} blackhole {hole}" for hole in holes),
            namespace=self.router.namespace,
            force=True,
        )


class World:
    """Hosts, daemons and programs; what happens is drawn from a seed."""

    def __init__(
        self, lab: Lab, seed: int, delays: tuple[str, ...] = (), withdrawn: bool = False
    ) -> None:
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.net: Topology = two_hosts(lab, delays)
        self.names = lab.enter(NameServer(self.net.dns))
        self.networks = {
            host.name: Network(host, self.net.router, withdrawn)
            for host in (self.net.client, self.net.server)
        }
        self.publish()
        self.daemons = {
            name: lab.enter(Sessiond(network.host, POLICY, NAMESERVERS))
            for name, network in self.networks.items()
        }
        self.clients = {
            name: lab.enter(closing(Client(one.socket))) for name, one in self.daemons.items()
        }
        self.conversations = [self._open(n, kind) for n, kind in enumerate(traffic.TRAFFIC)]
        self.settle("all sessions bound")

    def _open(self, number: int, kind: traffic.Traffic) -> Conversation:
        port = PORT + number
        near, far = self.daemons["client"], self.daemons["server"]
        seeds = self.random.getrandbits(32), self.random.getrandbits(32)
        server = self.net.server.fork(serve, far.socket, port, kind, seeds[0])
        assert server.hear() == "listening"
        client = self.net.client.fork(connect, near.socket, port, kind, seeds[1])
        session = client.hear()
        server.hear()
        return Conversation(session, client, server, client.hear())

    def publish(self) -> None:
        """The server's name means its addresses."""
        self.names.set("server", *self.networks["server"].addresses())

    # What happens

    def request(self) -> None:
        """One session moves at the wish of either host's user, while nothing changes."""
        conversation = self.random.choice(self.conversations)
        side = self.random.choice(("client", "server"))
        record = self.clients[side].show(conversation.session)
        own = self.networks[side].addresses()
        elsewhere = [one for one in own if one != _address(record.local)]
        to = self.random.choice(elsewhere)
        moved = self.clients[side].rebind(conversation.session, to)
        assert _address(moved.local) == to, (to, moved)
        self.done["moves by request"] += 1
        self.settle(f"{side} asked for {to}")

    def event(self) -> None:
        """Something happens to the network of one host, or both."""
        events: tuple[tuple[int, Callable[[], str]], ...] = (
            (4, self._hop),
            (2, self._both_hop),
            (3, self._lose_or_gain),
            (2, self._lose_version),
            (2, self._renumber),
            (1, self._blackout),
            (3, self._ask),
        )
        weights = [weight for weight, _ in events]
        (chosen,) = self.random.choices([event for _, event in events], weights)
        self.done[chosen.__name__.strip("_")] += 1
        what = chosen()
        self._reconnect()
        self.settle(what)

    def _hop(self, side: str = "") -> str:
        """From one uplink to the other; the new one may come before or after the old one goes."""
        side = side or self._side()
        network = self.networks[side]
        old, new = self._shuffled(UPLINKS[side])
        if self.random.random() < 0.5:
            network.gain(new)
        network.lose(old, self.random.choice(("addresses", "link")))
        network.gain(new)
        return f"{side} left {old} for {new}"

    def _both_hop(self) -> str:
        return " and ".join(self._hop(side) for side in self._shuffled(("client", "server")))

    def _lose_or_gain(self) -> str:
        side = self._side()
        name = self.random.choice(UPLINKS[side])
        if self.networks[side].up[name]:
            self.networks[side].lose(name, self.random.choice(("addresses", "link")))
            return f"{side} lost {name}"
        self.networks[side].gain(name)
        return f"{side} has {name} again"

    def _lose_version(self) -> str:
        side, version = self._side(), self.random.choice((4, 6))
        for name in UPLINKS[side]:
            self.networks[side].lose(name, version)
        return f"{side} lost IPv{version}"

    def _renumber(self) -> str:
        side = self._side()
        name = self.random.choice(UPLINKS[side])
        number = self.random.randrange(3, 250)
        self.networks[side].gain(name, number)
        return f"{side} is number {number} on {name}"

    def _blackout(self) -> str:
        side = self._side()
        for name in UPLINKS[side]:
            self.networks[side].lose(name, self.random.choice(("addresses", "link")))
        time.sleep(self.random.uniform(0, 0.2))
        return f"{side} lost everything for a while"

    def _ask(self) -> str:
        """A request, whatever state the network is in; it may be refused."""
        side = self._side()
        conversation = self.random.choice(self.conversations)
        to = self.random.choice(self.networks[side].addresses())
        try:
            self.clients[side].rebind(conversation.session, to)
        except Refused as error:
            self.done["requests refused"] += 1
            return f"{side} asked in vain for {to}: {error}"
        return f"{side} asked for {to}"

    def _reconnect(self) -> None:
        """There is a path again, if there is none."""
        both = self.networks["client"].versions & self.networks["server"].versions
        if not both:
            for side, network in self.networks.items():
                network.gain(self.random.choice(UPLINKS[side]))
        self.publish()

    def _side(self) -> str:
        return self.random.choice(("client", "server"))

    def _shuffled(self, names: tuple[str, ...]) -> list[str]:
        return self.random.sample(names, len(names))

    # What must hold

    @property
    def moves(self) -> int:
        """Moves that sessions have made, as the client's daemon counts."""
        return sum(one.moves for one in self.conversations)

    def settle(self, what: str) -> None:
        """Wait until every session is at rest on addresses that are there, the same at both ends.

        Raises:
            AssertionError: with what happened, where the sessions are and what the daemons wrote.
        """
        for conversation in self.conversations:
            try:
                record = until(lambda: self._at_rest(conversation), what, SETTLE_SECONDS)  # noqa: B023
            except (TimeoutError, libhsock.HsockError) as error:
                raise AssertionError(self._told(what, error)) from error
            assert record is not None
            conversation.moves = record.moves

    def _at_rest(self, conversation: Conversation) -> Record | None:
        near, far = (self.clients[side].show(conversation.session) for side in ("client", "server"))
        agreed = near.state == far.state == "established" and near.mobile
        there = all(
            _address(record.local) in self.networks[side].addresses()
            for side, record in (("client", near), ("server", far))
        )
        same = (near.local, near.remote) == (far.remote, far.local)
        if agreed and there and same and conversation.at() == f"{near.local}>{near.remote}":
            return near
        return None

    def _told(self, what: str, error: Exception) -> str:
        lines = []
        for side, daemon in self.daemons.items():
            lines += [f"log of {side}:", *daemon.log.splitlines()[-40:]]
        lines.append(f"after {self.moves} moves, {what}: {error}")
        for side, client in self.clients.items():
            lines.append(f"{side} has {self.networks[side].addresses()}")
            lines += [f"  {record}" for record in client.sessions()]
        return "\n".join(lines)

    def finish(self) -> list[str]:
        """Stop the traffic and compare the sums; what is wrong."""
        wrong = []
        for one in self.conversations:
            one.near.tell("stop")
            one.far.tell("stop")
        for one in self.conversations:
            near, far = one.near.result(30), one.far.result(30)
            wrong += traffic.differences(near, far)
            self.done["bytes"] += near.sent_bytes + far.sent_bytes
        self.done["moves"] = self.moves
        return wrong


@contextmanager
def world(seed: int, delays: tuple[str, ...] = (), withdrawn: bool = False) -> Iterator[World]:
    """A world of its own."""
    with Lab() as lab:
        yield World(lab, seed, delays, withdrawn)


def _address(endpoint: str) -> str:
    """Of ``"10.0.1.2:7000"`` or ``"[2001:db8::1]:7000"``."""
    return endpoint.rpartition(":")[0].strip("[]")
