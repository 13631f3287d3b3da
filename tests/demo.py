"""``make demo``: live TCP connections follow their hosts, on this machine, in half a minute.

The laboratory of ``tests.support.topology``: a client with "wifi" and "eth", a server with two
uplinks, a router, and Knot DNS; a sessiond on the client and on the server. A program downloads a
file by name, another is an interactive echo session. Meanwhile the client loses wifi, then IPv4,
and then the server is renumbered. It ends with the file's hash on both sides and what the kernels
counted. Exit status: 0 as it should be, 1 something was not, 2 it can't run here.
"""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from libhsock import Event, HsockError, Kind
from libhsock.client import Client, EventStream
from tests import demo_apps
from tests.demo_screen import Screen
from tests.support.counters import Counters
from tests.support.dns import NameServer
from tests.support.lab import Lab, LabError, missing
from tests.support.sessiond import Sessiond
from tests.support.topology import NAMESERVERS, Topology, two_hosts
from tests.support.worker import Worker, WorkerError

SIZE = 250_000_000
SERVER = "server.test"
WIFI_MS, ETH_MS = 6.0, 2.0
"""One-way delays of the client's uplinks."""
POLICY = "[policy]\nprefer_ipv6 = false\n"
"""Else the first move would be to IPv6 already."""
# Not EstabResets: the engine's own connect(AF_UNSPEC) counts there.
COUNTED = {
    "RetransSegs": "segments sent again",
    "TCPTimeouts": "retransmission timeouts",
    "OutRsts": "resets sent",
}


class Scene(NamedTuple):
    """Something that happens to the network when a part of the file has come."""

    at: float
    """Fraction of the file."""
    says: str
    act: Callable[[], None]


@dataclass
class State:
    """What the timeline knows."""

    received: int = 0
    size: int = SIZE
    rate: float = 0.0
    typed: str = ""
    echo_ms: float = 0.0
    echoes: list[float] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    """Of sessions: what they are for."""
    moves: list[Event] = field(default_factory=list)
    lost: list[Event] = field(default_factory=list)
    since: tuple[float, int] = (0.0, 0)

    def arrived(self, received: int, size: int) -> None:
        """Bytes of the file so far."""
        now = time.monotonic()
        moment, before = self.since
        if now - moment > 0.5:
            self.rate = (received - before) / (now - moment)
            self.since = (now, received)
        self.received, self.size = received, size

    def echoed(self, key: str, ms: float) -> None:
        """A key came back."""
        self.typed = (self.typed + key)[-80:]
        self.echo_ms = ms
        self.echoes.append(ms)


class Demo:
    """One performance in a laboratory."""

    def __init__(self, lab: Lab, screen: Screen, undo: ExitStack) -> None:
        self.lab, self.screen, self.state = lab, screen, State()
        self.net: Topology = two_hosts(lab, delays=("wifi", "eth"))
        self.net.delays["wifi"].set(delay_ms=WIFI_MS)
        self.net.delays["eth"].set(delay_ms=ETH_MS)
        self.names = lab.enter(NameServer(self.net.dns))
        self.names.set("server", self.net.server.address("lan0"))
        ends = (self.net.client, self.net.server)
        self.daemons = [lab.enter(Sessiond(one, POLICY, NAMESERVERS)) for one in ends]
        client = undo.enter_context(Client(self.daemons[0].socket))
        self.events: EventStream = undo.enter_context(client.events())

    def play(self) -> bool:
        """Everything, once. Returns whether all was as it should be."""
        file = self.net.server.directory / "file"
        copy = self.net.client.directory / "copy"
        self.screen.text(f"making a file of {SIZE / 1e6:.0f} MB of random bytes …")
        hash_there = demo_apps.make_file(file, SIZE)
        near, far = (daemon.socket for daemon in self.daemons)
        self.net.server.fork(demo_apps.serve, far, file).hear()
        before = self._counters()
        self.screen.restart()
        self.screen.happens(f"the client opens {SERVER}: a download, and an echo session beside it")
        download = self.net.client.fork(demo_apps.download, near, SERVER, copy)
        echo = self.net.client.fork(demo_apps.type_at_terminal, near, SERVER)
        self.state.names = {download.hear(): "download", echo.hear(): "echo"}
        with Client(near) as daemon:
            for session, what in self.state.names.items():
                record = daemon.show(session)
                self.screen.follows(
                    f"{what:8}  {record.local} ⇄ {record.remote}, session {session[:8]}"
                )
        hash_here = self._perform(download, echo)
        echo.tell("stop")
        echo.result()
        return self._account(hash_there, hash_here, copy, self._counters() - before)

    def _perform(self, download: Worker, echo: Worker) -> str:
        """The scenes, at their times, while the programs run. Returns the copy's hash."""
        scenes = self._scenes()
        while True:
            sources = [self.events.fileno(), download.fileno(), echo.fileno()]
            ready, _, _ = select.select(sources, [], [], 0.1)
            if self.events.fileno() in ready:
                self._event(self.events.next())
            if echo.fileno() in ready:
                self.state.echoed(*echo.hear())
            if download.fileno() in ready:
                said = download.next()
                if said.last:
                    return str(said.what)
                self.state.arrived(*said.what)
            if scenes and self.state.received > scenes[0].at * self.state.size:
                scene = scenes.pop(0)
                self.screen.happens(scene.says)
                scene.act()
            state = self.state
            self.screen.progress(state.received, state.size, state.rate, state.typed, state.echo_ms)

    def _scenes(self) -> list[Scene]:
        client, server, names = self.net.client, self.net.server, self.names
        both = (server.address("lan0"), server.address("lan0", 6))
        new = (server.address("lan1"), server.address("lan1", 6))
        return [
            Scene(
                0.2,
                "the client leaves the wifi: link down, addresses gone; there is ethernet",
                lambda: client.lose("wifi", "link"),
            ),
            Scene(
                0.4,
                "DNS: the server has an IPv6 address too",
                lambda: names.set("server", *both),
            ),
            Scene(
                0.45,
                "the client loses IPv4: only IPv6 is left",
                lambda: client.lose("eth", version=4),
            ),
            Scene(
                0.65,
                f"DNS: {SERVER} is to be {new[1]}",
                lambda: names.set("server", *new),
            ),
            Scene(
                0.7,
                "the server is renumbered: its addresses go, others are there",
                lambda: server.lose("lan0"),
            ),
        ]

    def _event(self, event: Event) -> None:
        what = self.state.names.get(event.session, event.session[:8])
        if event.kind == Kind.MOVED:
            self.state.moves.append(event)
            gap = f", {event.gap_ms:.1f} ms" if event.gap_ms is not None else ""
            self.screen.follows(
                f"{what:8}  {event.local} ⇄ {event.remote}  by {event.engine}{gap}"
                f"   {self.state.received / 1e6:.0f} MB"
            )
        elif event.kind in (Kind.WAITING, Kind.FAILED, Kind.LOST):
            self.state.lost.append(event)
            self.screen.follows(f"{what:8}  {event.kind}: {event.reason}")

    def _account(self, there: str, here: str, copy: Path, counted: Counters) -> bool:
        screen, state = self.screen, self.state
        screen.finish()
        screen.text()
        moved = {name: 0 for name in state.names.values()}
        for event in state.moves:
            name = state.names.get(event.session)
            if name:
                moved[name] += 1
        checks = [
            (
                there == here and copy.stat().st_size == SIZE,
                f"{SIZE / 1e6:.0f} MB, SHA-256 {there[:16]}… on the server, {here[:16]}… here",
            ),
            (
                all(count >= 3 for count in moved.values()),
                f"moves: download {moved['download']}, echo {moved['echo']}",
            ),
            (
                bool(state.echoes),
                f"{len(state.echoes)} keys came back, the slowest after {max(state.echoes):.0f} ms",
            ),
        ]
        for good, text in checks:
            screen.verdict(good, text)
        # For the reader, not a verdict: a host answers a late segment on a tuple that was left with
        # a reset, and the shield at the other end drops it. One that reached a program ends the
        # transfer: the verdicts above say so.
        numbers = ", ".join(f"{counted[name]} {what}" for name, what in COUNTED.items())
        screen.text(f"    counted by both kernels: {numbers}")
        return all(good for good, _ in checks)

    def _counters(self) -> Counters:
        return self.net.client.counters() + self.net.server.counters()


def main() -> int:
    """Run it; the exit status."""
    if why_not := missing():
        print(f"the demo can't run here: {why_not}", file=sys.stderr)
        return 2
    screen = Screen()
    screen.title("Live TCP connections follow their hosts")
    try:
        with ExitStack() as undo, Lab() as lab:
            return 0 if Demo(lab, screen, undo).play() else 1
    except (LabError, WorkerError, HsockError) as error:
        screen.finish()
        print(f"the demo broke off: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        screen.finish()
        return 130


if __name__ == "__main__":
    sys.exit(main())
