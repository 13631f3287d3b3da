"""The laboratory of the gap benchmark: one round-trip time, any contender, run after run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Literal, NamedTuple

from libhsock import wire
from libhsock.client import Client
from tests.bench import reconnect, steady
from tests.bench.rtnl import Scissors
from tests.bench.stream import Gap
from tests.support.lab import Lab
from tests.support.sessiond import Sessiond
from tests.support.topology import two_hosts
from tests.support.wait import until
from tests.support.worker import Worker

PORT = 7000
RATE_MBIT = 400
"""Of the element: a line that two processors fill with time to spare."""
STANDING = 64 << 10
"""Bytes of the smallest receive window: they queue for 1.3 ms at that rate."""
FLOWING = 20
"""Frames after which a stream is on its way."""
ROUND_TRIPS = {"ticks": 2, "bulk": 10}
"""How many a stream gets to fill the path before the move."""


class Case(NamedTuple):
    """What is measured ``runs`` times for each contender."""

    rtt_ms: float
    kind: str
    download: bool
    move: str
    """``"loss"`` of the address, or ``"request"`` while it works."""

    def __str__(self) -> str:
        return f"{self.kind} {'down' if self.download else 'up'}, {self.move}, {self.rtt_ms:g} ms"


class Track:
    """A laboratory with one round-trip time, in which runs are made."""

    def __init__(self, lab: Lab, rtt_ms: float, contenders: Sequence[str]) -> None:
        self.rtt_ms = rtt_ms
        self.net = two_hosts(lab, delays=("lan0",), versions=(4,))
        self.element = self.net.delays["lan0"]
        self.element.set(delay_ms=rtt_ms / 2, rate_mbit=RATE_MBIT)
        self.target = (self.net.server.address("lan0"), PORT)
        self._fill_windows()
        steady.allow_mptcp(self.net.client, self.net.server)
        with self.net.client.entered():
            address = self.net.client.address("wifi")
            self._scissors = lab.enter(closing(Scissors("wifi", address, 24)))
        self.daemons: tuple[str, str] | None = None
        if "sessiond" in contenders:
            ends = [lab.enter(Sessiond(host)) for host in (self.net.client, self.net.server)]
            self.daemons = (ends[0].socket, ends[1].socket)

    def _fill_windows(self) -> None:
        """A window that the line just carries: a full pipe and no queue, which would be measured
        instead of the handover. And no host remembers a path from one run to the next."""
        bytes_per_ms = RATE_MBIT * 1000 / 8
        window = max(STANDING, round(0.9 * bytes_per_ms * self.rtt_ms))
        for host in (self.net.client, self.net.server):
            host.sysctl("net/ipv4/tcp_rmem", f"4096 {2 * window} {2 * window}")
            host.sysctl("net/ipv4/tcp_no_metrics_save", 1)
            host.sysctl("net/ipv4/tcp_fastopen", 0x207)

    def run(self, case: Case, contender: str) -> Gap:
        """One connection, one move."""
        self._restore()
        with ExitStack() as undo:
            client, server, session = self._start(case, contender, undo)
            receiver = client if case.download else server
            self._flow(case)
            receiver.tell(self._move(case, session))
            found: Gap = receiver.result()
            return found

    def _restore(self) -> None:
        self.net.client.gain("wifi")
        steady.restore_mptcp(self.net.client)

    def _start(self, case: Case, contender: str, undo: ExitStack) -> tuple[Worker, Worker, str]:
        near, far = self.net.client, self.net.server
        window = 0.25 + 4 * case.rtt_ms / 1000
        if contender.startswith("reconnect"):
            addresses = (near.address("wifi"), near.address("eth"))
            fast_open = contender.endswith("tfo")
            plan = reconnect.Plan(
                case.kind, case.download, self.target, addresses, window, fast_open
            )
            server = far.fork(reconnect.server, plan)
            undo.callback(server.stop)
            server.hear()
            client = near.fork(reconnect.client, plan)
        else:
            daemons = self.daemons if contender == "sessiond" else None
            steadily = steady.Plan(case.kind, case.download, self.target, window, daemons)
            if contender == "mptcp-helper":
                helper = near.fork(steady.helper, near.address("wifi"))
                undo.callback(helper.stop)
                helper.hear()
            server = far.fork(steady.server, steadily)
            undo.callback(server.stop)
            server.hear()
            client = near.fork(steady.client, steadily)
        undo.callback(client.stop)
        return client, server, client.hear()

    def _flow(self, case: Case) -> None:
        """Let the stream fill the path."""
        direction: Literal["ab", "ba"] = "ba" if case.download else "ab"
        before = self.element.stats(direction)["sent"]
        until(lambda: self.element.stats(direction)["sent"] > before + FLOWING, f"{case} to flow")
        time.sleep(0.1 + ROUND_TRIPS[case.kind] * case.rtt_ms / 1000)

    def _move(self, case: Case, session: str) -> float:
        """Make what is measured happen; when, CLOCK_MONOTONIC in seconds."""
        if case.move == "loss":
            return self._scissors.cut()
        assert self.daemons is not None
        with closing(Client(self.daemons[0])) as daemon:
            moment = time.monotonic()
            daemon.call(wire.Rebind(session, "eth"))
        return moment
