"""Connections that one end has ended move as others do: the other direction goes on."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest

from sessiond.core.outcomes import Departed
from sessiond.rebind import linux as lx
from tests.netns.repair_support import (
    OTHER,
    Ends,
    Net,
    addresses,
    eventually,
    needs_root,
    noise,
    receive,
    target,
)

pytestmark = needs_root


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    net = Net()
    yield net
    net.close()


class HalfClosed:
    """A connection whose ``closer`` has shut down sending; the other end's application has read
    what was sent, and the end of the stream."""

    def __init__(self, net: Net, version: int, closer: str) -> None:
        self.ends = Ends(net, *net.pair(version, port=0))
        self.version = version
        self.closer, self.talker = closer, OTHER[closer]
        self.reader, self.writer = (self.ends.socks[one] for one in (self.closer, self.talker))
        self.sent = b""
        self.reader.sendall(b"the end")
        self.reader.shutdown(socket.SHUT_WR)
        assert receive(self.writer, 7) == b"the end"
        assert self.writer.recv(1) == b""
        eventually(lambda: lx.info(self.reader).state == lx.TCP_FIN_WAIT2)

    def say(self, length: int) -> None:
        data = noise(length, len(self.sent))
        self.writer.sendall(data)
        self.sent += data

    def elsewhere(self, side: str, number: int) -> tuple[str, object]:
        here = self.ends.where(side)
        return side, target(here, local=addresses(self.version, number))

    def require_whole(self) -> None:
        """The end of the stream is still there, all that was said is, and both close in peace."""
        assert _readable(self.writer)
        assert self.writer.recv(1) == b""
        self.say(1000)
        assert receive(self.reader, len(self.sent)) == self.sent
        eventually(lambda: lx.info(self.reader).state == lx.TCP_FIN_WAIT2)
        assert lx.info(self.writer).state == lx.TCP_CLOSE_WAIT
        self.writer.close()
        assert self.reader.recv(1) == b""
        assert not self.reader.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self.reader.close()


def _readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("pending", [False, True], ids=["idle", "unacknowledged"])
@pytest.mark.parametrize("mover", ["left", "right"])
@pytest.mark.parametrize("closer", ["left", "right"])
def test_moves(net: Net, closer: str, mover: str, pending: bool, version: int) -> None:
    talk = HalfClosed(net, version, closer)
    before = talk.ends.counters()
    numbers = (3, 5, 1) if mover == "left" else (4, 6, 2)
    for number in numbers:
        talk.say(500)
        if pending:
            with talk.ends.losing():
                talk.say(30_000)
        side, there = talk.elsewhere(mover, number)
        talk.ends.move(side, there)  # type: ignore[arg-type]
        assert talk.writer.recv(1) == b""
    talk.require_whole()
    if not pending:
        after = talk.ends.counters()
        assert after == before


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("closer", ["left", "right"])
def test_a_retreat(net: Net, closer: str, version: int) -> None:
    """The peer never moved, so it does not send its FIN again."""
    talk = HalfClosed(net, version, closer)
    for _ in range(2):
        side, there = talk.elsewhere("left", 3)
        departed = talk.ends.do(side, "depart", there)
        assert isinstance(departed, Departed), departed
        assert talk.ends.do("left", "retreat") is None
        if closer == "right":
            assert talk.writer.recv(1) == b""
    talk.say(1000)
    assert receive(talk.reader, len(talk.sent)) == talk.sent
    talk.writer.close()
    assert talk.reader.recv(1) == b""


@pytest.mark.parametrize("version", [4, 6])
def test_a_fin_that_was_lost(net: Net, version: int) -> None:
    """Data and the FIN behind it had not arrived when the connection moved."""
    ends = Ends(net, *net.pair(version, port=0))
    left, right = ends.socks["left"], ends.socks["right"]
    with ends.losing():
        left.sendall(noise(20_000, 0))
        left.shutdown(socket.SHUT_WR)
    ends.move("left", target(ends.where("left"), local=addresses(version, 3)))
    assert receive(right, 20_000) == noise(20_000, 0)
    assert right.recv(1) == b""
    right.sendall(b"understood")
    assert receive(left, 10) == b"understood"


def test_receiving_that_the_application_has_ended(net: Net) -> None:
    ends = Ends(net, *net.pair(4, port=0))
    left = ends.socks["left"]
    left.shutdown(socket.SHUT_RD)
    ends.move("left", target(ends.where("left"), local=addresses(4, 3)))
    assert lx.info(left).state == lx.TCP_ESTABLISHED
    assert left.recv(1) == b""
    left.sendall(b"still")
    assert receive(ends.socks["right"], 5) == b"still"
