"""Bad input, from applications, local clients and the network: a clear answer, and nothing left."""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

import libhsock
from libhsock import wire
from libhsock.client import Client, Connection
from libhsock.errors import HsockError
from sessiond.peer_codec import encode
from sessiond.seal.datagram import SIZES, header, sealed_header
from tests.netns import apps
from tests.netns.session_support import Conversation, World, descriptors, resident
from tests.support.lab import Lab, missing
from tests.support.wait import until
from tests.support.worker import Talk

RANDOM_SEED = 2006
FRAMES = 3000


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One for all of these tests: the daemon has to stand them all."""
    if why_not := missing():
        pytest.skip(why_not)
    with Lab() as lab:
        yield World(lab)


@pytest.fixture
def talk(world: World) -> Conversation:
    """What goes on all the while."""
    return world.talk()


# Opening


def open_(talk: Talk, daemon: str, name: str, port: int, asynchronously: bool) -> Any:
    """The error of a connection that can't be opened."""
    import asyncio

    apps.use(daemon)
    try:
        if asynchronously:
            asyncio.run(libhsock.open_connection(name, port, timeout=10))
        else:
            libhsock.create_connection((name, port), timeout=10)
    except HsockError as error:
        return type(error).__name__, error.message, error.tried
    return None


@pytest.mark.parametrize("asynchronously", [False, True])
def test_each_way_opening_fails_has_its_error(world: World, asynchronously: bool) -> None:
    def attempt(name: str, port: int) -> Any:
        worker = world.client.fork(open_, world.near.socket, name, port, asynchronously)
        return worker.result(30)

    kind, message, tried = attempt("nobody.test", 7000)
    assert kind == "NameNotResolved"
    assert "nobody.test" in message
    assert sorted(tried) == ["nobody.test. A: no such name", "nobody.test. AAAA: no such name"]

    kind, message, _ = attempt("fe80::1%lo", 7000)
    assert kind == "UsageError"
    assert "only valid on one link" in message

    kind, message, tried = attempt("server.test", 7999)
    assert kind == "CouldNotConnect"
    assert "server.test" in message
    assert any("10.1.1.2" in one for one in tried), tried
    assert any("2001:db8:11::2" in one for one in tried), tried
    assert all("refused" in one.lower() for one in tried), tried

    world.client.lose("wifi")
    world.client.lose("eth")
    kind, message, tried = attempt("10.1.1.2", 7000)
    assert kind == "NoLocalAddress"
    assert any("10.1.1.2" in one for one in tried), tried
    world.client.gain("wifi")
    world.client.gain("eth")
    until(lambda: len(world.moves.client.network().addresses) == 4, "the addresses are back")


# The local socket


class Measure:
    """A daemon's descriptors, memory and log before and after."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.pid = world.near.pid
        self._descriptors = descriptors(self.pid)
        self._memory = resident(self.pid)
        self._lines = len(world.near.log.splitlines())

    def check(self, lines: int) -> None:
        """It goes on, holds nothing more, and has not said much of it."""
        assert self._world.near.process.poll() is None
        until(
            lambda: descriptors(self.pid) <= self._descriptors,
            f"the daemon holds {descriptors(self.pid)} descriptors, not {self._descriptors}",
        )
        assert resident(self.pid) - self._memory < 4096
        new = self._world.near.log.splitlines()[self._lines :]
        assert len(new) <= lines, "\n".join(new[:50])
        assert "Traceback" not in self._world.near.log


@pytest.fixture
def measure(world: World, talk: Conversation) -> Measure:
    with closing(Client(world.near.socket, name="warm")) as client:
        client.hello()
        world.record(talk)
    return Measure(world)


def _frames(sound: list[bytes]) -> Iterator[bytes]:
    """Noise, and sound messages that were cut, bent or put together."""
    chance = random.Random(RANDOM_SEED)
    for number in range(FRAMES):
        base = chance.choice(sound)
        match number % 5:
            case 0:
                yield chance.randbytes(chance.randrange(1, 200))
            case 1:
                yield base[: chance.randrange(1, len(base))]
            case 2:
                bent = bytearray(base)
                bent[chance.randrange(len(bent))] ^= 1 << chance.randrange(8)
                yield bytes(bent)
            case 3:
                yield base + chance.randbytes(chance.randrange(1, 50))
            case _:
                yield base + chance.choice(sound)


def test_malformed_packets_from_local_clients(
    world: World, talk: Conversation, measure: Measure
) -> None:
    calls: tuple[wire.Call[Any], ...] = (
        *(wire.Hello("x"), wire.List(None, 10), wire.Show("ab"), wire.Rebind("ab", "eth")),
    )
    for number, frame in enumerate(_frames([wire.request(1, call) for call in calls])):
        with wire.new_socket() as sock:
            sock.connect(world.near.socket)
            sock.settimeout(10)
            if number % 2:
                sock.send(wire.request(7, wire.Hello("x")))
                sock.recv(65536)
            sock.send(frame)
            sock.recv(65536)  # an answer, or the end
    measure.check(lines=60)
    world.finish(talk)


def test_an_oversized_packet_from_a_local_client(
    world: World, talk: Conversation, measure: Measure
) -> None:
    with wire.new_socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sock.connect(world.near.socket)
        sock.send(bytes(150_000))
        answer = wire.decode(sock.recv(65536))
        assert isinstance(answer, wire.Reply)
        with pytest.raises(HsockError, match=r"long|large|bytes|size"):
            answer.unwrap()
        assert sock.recv(65536) == b""
    measure.check(lines=3)
    world.finish(talk)


def test_clients_that_say_nothing_or_leave_amid_a_request(
    world: World, talk: Conversation, measure: Measure
) -> None:
    for _ in range(300):
        with wire.new_socket() as sock:
            sock.connect(world.near.socket)
            sock.send(wire.request(1, wire.Hello("x")))
            sock.send(wire.request(2, wire.Resolve("nobody.test", "7000", 0, False)))
    measure.check(lines=5)
    world.finish(talk)


def _strange(undo: ExitStack) -> list[int]:
    """Descriptors of everything that is no connected TCP socket."""
    pipe = os.pipe()
    directory = os.open("/", os.O_PATH)
    for fd in (*pipe, directory):
        undo.callback(os.close, fd)
    unix = socket.socketpair()
    udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    fresh = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    listening = socket.create_server(("127.0.0.1", 0))
    socks = [undo.enter_context(one) for one in (*unix, udp, fresh, listening)]
    return [*pipe, directory, *(one.fileno() for one in socks)]


def _attach(world: World, number: int, *fds: int) -> str:
    """What the daemon says to it."""
    with closing(Connection(world.near.socket, "test")) as connection:
        reply = connection.ask(wire.Attach(number, "attach", None, None), fds)
        with pytest.raises(HsockError) as caught:
            reply.unwrap()
    return str(caught.value)


def test_descriptors_that_are_no_connected_tcp_sockets(
    world: World, talk: Conversation, measure: Measure
) -> None:
    with ExitStack() as undo:
        said = [_attach(world, fd, fd) for fd in _strange(undo) * 20]
    known = re.compile("no socket|no TCP socket|no peer|a listening socket")
    assert all(known.search(one) for one in said), set(said)
    assert len(list(world.moves.client.sessions())) == 1
    measure.check(lines=20)
    world.finish(talk)


def test_a_connection_of_another_network_namespace(
    world: World, talk: Conversation, measure: Measure
) -> None:
    with ExitStack() as undo:
        listening = undo.enter_context(socket.create_server(("127.0.0.1", 0)))
        here = undo.enter_context(socket.create_connection(listening.getsockname()))
        said = _attach(world, here.fileno(), here.fileno())
    assert said == "the socket is in another network namespace: ask the sessiond there"
    measure.check(lines=0)
    world.finish(talk)


def lie(talk: Talk, daemon: str, name: str) -> tuple[str, bool]:
    """Attach a connection under a number that is another's: the answer, and whether it works."""
    sock = socket.create_connection((name, apps.PORT))
    with closing(Connection(daemon, "test")) as connection:
        try:
            reply = connection.ask(wire.Attach(0, "attach", None, None), [sock.fileno()])
            record = wire.Attach.reply.from_map(reply.unwrap())
            said = f"{record.mobile}: {record.reason}"
        except HsockError as error:
            said = str(error)
    sock.sendall(b"Hello Server 1!")
    return said, sock.recv(100) == b"Hello Server 1!"


def test_a_descriptor_that_is_not_the_one_it_says(
    world: World, talk: Conversation, measure: Measure
) -> None:
    worker = world.client.fork(lie, world.near.socket, world.server.address("lan1", 6))
    said, alive = worker.result(30)
    assert alive
    assert "False" in said, said
    world.finish(talk)


def test_more_or_fewer_descriptors_than_one(
    world: World, talk: Conversation, measure: Measure
) -> None:
    with ExitStack() as undo:
        fds = [undo.enter_context(socket.socket()).fileno() for _ in range(5)]
        assert "attach came with 0 descriptors" in _attach(world, 3)
        for count in (2, 5):
            assert "more than 1 descriptor" in _attach(world, 3, *fds[:count])
    measure.check(lines=5)
    world.finish(talk)


# The UDP port


def test_malformed_datagrams_from_the_network(
    world: World, talk: Conversation, measure: Measure
) -> None:
    sound = _sound_datagrams()
    with world.net.router.entered():
        stranger = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with stranger:
        for frame in _frames(sound):
            stranger.sendto(frame[:60000], (world.client.address("wifi", 6), 2006))
        for size in (0, 1, 1500, 9000, 65000):
            stranger.sendto(bytes(size), (world.client.address("wifi", 6), 2006))
    world.client.lose("wifi")
    world.moves.wait("moved")  # it has come to the end of them and does its work
    measure.check(lines=40)
    world.finish(talk)
    world.client.gain("wifi")


def _sound_datagrams() -> list[bytes]:
    from sessiond.core import messages as m

    messages: list[Any] = [
        m.Ping(1, ("2001:db8::1", "10.0.0.1")),
        m.Prepare((m.Mark(7, 1), m.Mark(8, 2))),
        m.Close((m.CloseEntry(7, "why"),)),
    ]
    payloads = [payload for one in messages for payload in encode([one])]
    sealed = [sealed_header(7, 1) + payload + bytes(16) for payload in payloads]
    others = [header(kind, 7) + os.urandom(size - 8) for kind, size in SIZES.items()]
    return payloads + sealed + others
