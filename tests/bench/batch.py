"""Many idle sessions between two programs, and one address that goes under all of them."""

from __future__ import annotations

import os
import resource
import select
import socket
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import libhsock
from tests.bench.rtnl import Scissors
from tests.support.host import Host
from tests.support.lab import Lab
from tests.support.sessiond import Sessiond
from tests.support.topology import Topology, two_hosts
from tests.support.wait import until
from tests.support.worker import Talk

PORT = 7000
IDLE_SECONDS = 10.0
LISTS = 5
_OPENING_SECONDS = 600
_MOVING_SECONDS = 60
_LOOK_SECONDS = 0.05
"""Between two looks at all connections, which cost processor time themselves."""
_PROGRESS = 500
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Batch:
    """What was found. Memory and processor time are of the client's and the server's daemon."""

    sessions: int
    opened_s: float
    """To open all of them, one after another."""
    moved_s: float
    """From the deletion of the address until every connection, at both ends, has the new one."""
    echoed_s: float
    """Then, for a byte to go to and fro on every connection, one after another."""
    bytes_per_session: tuple[float, float]
    """Resident memory more than before the first session."""
    bytes_per_session_after: tuple[float, float]
    """The same after the move."""
    idle_cpu_s: tuple[float, float]
    """In 10 s in which nothing happened."""
    move_cpu_s: tuple[float, float]
    list_s: float
    """``sessionctl list``, median of 5, from the start of the program to its end."""
    listed: int

    def to_map(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(sessions: int) -> Batch:
    """Open so many sessions and move them. Raises WorkerError, TimeoutError: it went wrong."""
    with Lab() as lab:
        net = two_hosts(lab, versions=(4,))
        near, far = (lab.enter(Sessiond(one, _CONFIG)) for one in (net.client, net.server))
        daemons = (near.pid, far.pid)
        memory = _memory(daemons)
        began = time.monotonic()
        server = net.server.fork(serve, far.socket, sessions)
        server.hear()
        address = net.server.address("lan0")
        client = net.client.fork(hold, near.socket, address, sessions)
        while client.hear(_OPENING_SECONDS) < sessions:
            pass
        opened = time.monotonic() - began
        grown = _per_session(memory, daemons, sessions)
        listing = [_timed_list(near) for _ in range(LISTS)]
        idle = _cpu(daemons)
        time.sleep(IDLE_SECONDS)
        idle_cpu = _minus(_cpu(daemons), idle)

        before = _cpu(daemons)
        with net.client.entered():
            scissors = Scissors("wifi", net.client.address("wifi"), 24)
        cut = scissors.cut()
        until(
            lambda: _all_moved(net, sessions),
            f"{sessions} connections on the other address",
            _MOVING_SECONDS,
            _LOOK_SECONDS,
        )
        moved = time.monotonic() - cut
        client.tell("echo")
        echoed = client.hear(_MOVING_SECONDS)
        scissors.close()
        return Batch(
            sessions=sessions,
            opened_s=opened,
            moved_s=moved,
            echoed_s=echoed,
            bytes_per_session=grown,
            bytes_per_session_after=_per_session(memory, daemons, sessions),
            idle_cpu_s=idle_cpu,
            move_cpu_s=_minus(_cpu(daemons), before),
            list_s=statistics.median(seconds for seconds, _ in listing),
            listed=listing[0][1],
        )


_CONFIG = '[log]\nlevel = "info"\n'


def hold(talk: Talk, daemon: str, address: str, count: int) -> None:
    """Open connections; tells how many there are. For each "echo" tells how many seconds a byte to
    and fro on each of them took."""
    _prepare(daemon, count)
    held = []
    for number in range(1, count + 1):
        held.append(libhsock.create_connection((address, PORT), 30))
        if number % _PROGRESS == 0 and number < count:
            talk.tell(number)
    for sock in held:
        if not sock.session.wait_mobile(30):
            raise RuntimeError(f"a session can't move: {sock.session.reason}")
    talk.tell(count)
    while talk.hear() == "echo":
        began = time.monotonic()
        for sock in held:
            sock.sendall(b"?")
            if sock.recv(10) != b"?":
                raise EOFError("a connection ended")
        talk.tell(time.monotonic() - began)


def serve(talk: Talk, daemon: str, count: int) -> None:
    """Accept connections and send back what comes."""
    _prepare(daemon, count)
    held: dict[int, socket.socket] = {}
    poll = select.epoll()
    with libhsock.create_server(("", PORT), backlog=1000) as listener:
        talk.tell("listening")
        for _ in range(count):
            sock, _ = listener.accept()
            held[sock.fileno()] = sock
            poll.register(sock, select.EPOLLIN)
        while True:
            for fd, _ in poll.poll():
                data = held[fd].recv(100)
                if not data:
                    return
                held[fd].sendall(data)


def _prepare(daemon: str, count: int) -> None:
    os.environ["SESSIOND_SOCKET"] = daemon
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + 1000, max(count + 1000, _hard_limit())))


def _hard_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def _all_moved(net: Topology, sessions: int) -> bool:
    """Asks first for what is cheap to answer near the end: the connections that are still there."""
    old, new = net.client.address("wifi"), net.client.address("eth")
    return (
        _count(net.server, f"dst {old}") == _count(net.client, f"src {old}") == 0
        and _count(net.server, f"dst {new}") == _count(net.client, f"src {new}") == sessions
    )


def _count(host: Host, which: str) -> int:
    listed = host.run("ss", "-tnH", "state", "established", *which.split(), timeout=60).stdout
    return listed.count("\n")


def _timed_list(daemon: Sessiond) -> tuple[float, int]:
    began = time.monotonic()
    listed = daemon.ctl("list").stdout
    return time.monotonic() - began, listed.count("\n")


Both = tuple[float, float]


def _memory(pids: tuple[int, int]) -> Both:
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    return pages[0] * float(resource.getpagesize()), pages[1] * float(resource.getpagesize())


def _cpu(pids: tuple[int, int]) -> Both:
    seconds = []
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        seconds.append((int(fields[11]) + int(fields[12])) / _TICK)
    return seconds[0], seconds[1]


def _minus(after: Both, before: Both) -> Both:
    return after[0] - before[0], after[1] - before[1]


def _per_session(before: Both, pids: tuple[int, int], sessions: int) -> Both:
    grown = _minus(_memory(pids), before)
    return grown[0] / sessions, grown[1] / sessions
