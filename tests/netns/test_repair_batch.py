"""Many sockets at once, what is on the wire, and how long it takes."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest

from sessiond.core.outcomes import Arrived, Departed, Followed
from sessiond.core.tuples import FourTuple
from sessiond.rebind import linux as lx
from sessiond.rebind.engine import Connection
from sessiond.rebind.process import CannotStop, Process, Shared, stopped
from tests.netns.repair_support import (
    App,
    Ends,
    Host,
    Net,
    addresses,
    needs_root,
    receive,
    target,
)

pytestmark = needs_root


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net()
    yield net
    net.close()


class Crowd:
    """Many connections between two processes, this one's descriptors being copies."""

    def __init__(self, net: Net, size: int) -> None:
        self.net = net
        pairs = [net.pair(4) if i == 0 else _again(net) for i in range(size)]
        self.clients = [client for client, _ in pairs]
        self.servers = [server for _, server in pairs]
        self.left = [_connection(net.left, sock) for sock in self.clients]
        self.right = [_connection(net.right, sock) for sock in self.servers]

    def move(self, number: int) -> dict[str, float]:
        """All at once to another address of the left host; seconds for each step."""
        took: dict[str, float] = {}

        def timed(host: Host, step: str, batch: Sequence[Any]) -> list[Any]:
            with host.entered():
                start = time.perf_counter()
                outcomes: list[Any] = getattr(host.engine, step)(batch)
                took[step] = time.perf_counter() - start
            return outcomes

        targets = [target(_where(sock), local=addresses(4, number)) for sock in self.clients]
        departed: list[Departed] = timed(
            self.net.left, "depart", list(zip(self.left, targets, strict=True))
        )
        assert {type(d) for d in departed} == {Departed}, departed[:3]
        moves = [
            (connection, d.tuple.mirrored(), d.rcv_nxt, d.window, d.pending)
            for connection, d in zip(self.right, departed, strict=True)
        ]
        followed: list[Followed] = timed(self.net.right, "follow", moves)
        assert {type(f) for f in followed} == {Followed}, followed[:3]
        moved = [(c, f.rcv_nxt, f.window) for c, f in zip(self.left, followed, strict=True)]
        arrived: list[Arrived] = timed(self.net.left, "arrive", moved)
        assert {type(a) for a in arrived} == {Arrived}, arrived[:3]
        assert set(timed(self.net.right, "settle", self.right)) == {None}
        return took


def _again(net: Net) -> tuple[socket.socket, socket.socket]:
    """One more connection to the listener of the first."""
    listener = net.listener
    with net.left.entered():
        client = net.undo.enter_context(socket.socket(socket.AF_INET6))
        client.connect(("::ffff:10.9.0.2", 7000))
    return client, net.undo.enter_context(listener.accept()[0])


def _connection(host: Host, sock: socket.socket) -> Connection:
    return Connection(Process.of(os.getpid()), sock.fileno(), lx.cookie(sock), family=sock.family)


def _where(sock: socket.socket) -> FourTuple:
    return FourTuple(lx.endpoint(sock.getsockname()), lx.endpoint(sock.getpeername()))


@contextlib.contextmanager
def descriptors(number: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < number:
        pytest.skip(f"needs {number} descriptors, {before[1]} are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.timeout(120)
def test_two_thousand_idle_connections_move_in_one_batch(net: Net) -> None:
    size = 2000
    with descriptors(4 * size + 200):
        crowd = Crowd(net, size)
        before = net.left.counters(), net.right.counters()
        for number in (3, 5, 1):
            took = crowd.move(number)
            print({step: f"{seconds / size * 1e6:.1f} us" for step, seconds in took.items()})
        after = net.left.counters(), net.right.counters()
        for old, now in zip(before, after, strict=True):
            for name in ("Tcp.RetransSegs", "TcpExt.TCPTimeouts", "Tcp.OutRsts", "Tcp.OutSegs"):
                assert now[name] == old[name], name  # nothing at all was sent
        for client, server in zip(crowd.clients, crowd.servers, strict=True):
            client.send(b"ping")
            assert server.recv(4) == b"ping"
            server.send(b"pong")
            assert client.recv(4) == b"pong"


def test_a_process_is_stopped_once_for_all_its_connections(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = net.pair(4)
    with App(client, "echo") as app:
        ends = Ends(net, client, server, {"left": app})
        connection = ends.connections["left"]
        stops: list[list[Process]] = []

        def counted(
            batch: Mapping[Process, Sequence[Shared]],
        ) -> contextlib.AbstractContextManager[dict[Process, CannotStop]]:
            stops.append(list(batch))
            return stopped(batch)

        monkeypatch.setattr("sessiond.rebind.repair.stopped", counted)
        new = target(ends.where("left"), local="10.9.0.3")
        with net.left.entered():
            outcomes = net.left.engine.depart([(connection, new)] * 3)
        assert [type(outcome) for outcome in outcomes] == [Departed] * 3
        assert stops == [[connection.process]]
        with net.left.entered():
            assert net.left.engine.retreat([connection]) == [None]


class Segment(NamedTuple):
    """What a TCP segment on the wire says."""

    source: str
    sequence: int
    flags: int
    data: bytes


FIN, SYN, RST = 1, 2, 4


@contextlib.contextmanager
def wire(host: Host) -> Iterator[Callable[[], list[Segment]]]:
    """See every IPv4 TCP segment that a host receives or sends."""
    with host.entered():
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
        tap.bind(("veth", 0x0003))
    tap.setsockopt(socket.SOL_SOCKET, lx.SO_RCVBUFFORCE, 1 << 24)
    tap.setblocking(False)

    def seen() -> list[Segment]:
        segments = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frame = tap.recv(1 << 17)
                if frame[12:14] == b"\x08\x00" and frame[23] == 6:
                    segments.append(_segment(frame[14:]))
        return segments

    with tap:
        yield seen


def _segment(packet: bytes) -> Segment:
    header, total = (packet[0] & 15) * 4, struct.unpack_from("!H", packet, 2)[0]
    segment = packet[header:total]
    sequence, flags = struct.unpack_from("!I", segment, 4)[0], segment[13]
    return Segment(
        socket.inet_ntoa(packet[12:16]), sequence, flags, segment[segment[12] >> 4 << 2 :]
    )


@pytest.mark.parametrize("pending", [False, True])
def test_the_wire_shows_one_connection_that_continues(net: Net, pending: bool) -> None:
    """No SYN, FIN or RST, and the numbers go on where they were, from another address."""
    ends = Ends(net, *net.pair(4))
    client, server = ends.socks.values()
    words = [b"Hello Server %d!" % i for i in range(1, 8)]
    with wire(net.right) as seen:
        client.sendall(words[0])
        assert receive(server, len(words[0])) == words[0]
        for word, number in zip(words[1:], (3, 5, 7, 1, 3, 5), strict=True):
            new = target(ends.where("left"), local=addresses(4, number))
            with ends.losing() if pending else contextlib.nullcontext():
                if pending:
                    client.sendall(word)
                departed = ends.depart("left", new)
            ends.finish("left", departed)
            if not pending:
                client.sendall(word)
            assert receive(server, len(word)) == word
        segments = seen()
    assert {segment.flags & (FIN | SYN | RST) for segment in segments} == {0}
    stream: dict[int, int] = {}
    first = segments[0].sequence
    for segment in segments:
        if segment.source != "10.9.0.2":
            start = (segment.sequence - first) & 0xFFFFFFFF
            stream.update({start + i: byte for i, byte in enumerate(segment.data)})
    assert bytes(stream[i] for i in range(len(stream))) == b"".join(words)
    sources = [s.source for s in segments if s.source != "10.9.0.2" and s.data]
    assert list(dict.fromkeys(sources)) == ["10.9.0.1", "10.9.0.3", "10.9.0.5", "10.9.0.7"]


def test_one_handover_takes_no_time_worth_mentioning(net: Net) -> None:
    """Both ends, in their own processes, one after the other; data waiting at the mover's end."""
    client, server = net.pair(4)
    with App(client, "echo") as left, App(server, "echo") as right:
        ends = Ends(net, client, server, {"left": left, "right": right})
        took: list[float] = []
        for number in range(50):
            new = target(ends.where("left"), local=addresses(4, (3, 5, 7, 1)[number % 4]))
            start = time.perf_counter()
            ends.move("left", new)
            took.append(time.perf_counter() - start)
    took.sort()
    print(f"both ends, all steps: median {took[25] * 1e6:.0f} us, worst {took[-1] * 1e6:.0f} us")
    assert took[25] < 0.02
