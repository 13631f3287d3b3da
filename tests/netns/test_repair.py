"""The repair engine, both ends driven directly, no daemon: what a handover does to a connection."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from sessiond.rebind import linux as lx
from tests.netns.repair_support import (
    OTHER,
    Ends,
    Net,
    addresses,
    needs_root,
    noise,
    receive,
    target,
)

pytestmark = needs_root


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net()
    yield net
    net.close()


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_idle_connection_moves(net: Net, version: int, family: int, side: str) -> None:
    if family == socket.AF_INET and version == 6:
        pytest.skip("no such connection")
    ends = Ends(net, *net.pair(version, family=family))
    new = addresses(version, 3 if side == "left" else 4)
    departed, followed, arrived = ends.move(side, target(ends.where(side), local=new))
    assert not departed.pending
    assert followed.resent == arrived.resent == 0
    client, server = ends.socks.values()
    client.sendall(b"Hello Server!")
    assert receive(server, 13) == b"Hello Server!"
    server.sendall(b"Hello Client!")
    assert receive(client, 13) == b"Hello Client!"


@pytest.mark.parametrize("version", [4, 6])
def test_segments_stay_as_large_as_they_were(net: Net, version: int) -> None:
    ends = Ends(net, *net.pair(version))
    before = [sock.getsockopt(socket.IPPROTO_TCP, lx.TCP_MAXSEG) for sock in ends.socks.values()]
    ends.move("left", target(ends.where("left"), local=addresses(version, 3)))
    after = [sock.getsockopt(socket.IPPROTO_TCP, lx.TCP_MAXSEG) for sock in ends.socks.values()]
    assert after == before


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("side", ["left", "right"])
def test_bytes_lost_in_both_directions_arrive_at_once(net: Net, side: str, version: int) -> None:
    ends = Ends(net, *net.pair(version))
    mover, other = ends.socks[side], ends.socks[OTHER[side]]
    new = target(ends.where(side), local=addresses(version, 3 if side == "left" else 4))
    with ends.losing():
        mover.sendall(noise(5000, 1))
        other.sendall(noise(7000, 2))
        departed = ends.depart(side, new)
        assert departed.pending
        mover.sendall(noise(3000, 3))
    before = ends.counters()
    followed = ends.follow(OTHER[side], departed)
    arrived = ends.arrive(side, followed)
    ends.settle(OTHER[side])
    assert receive(other, 8000, 0.5) == noise(5000, 1) + noise(3000, 3)
    assert receive(mover, 7000, 0.5) == noise(7000, 2)
    assert followed.resent == 7000
    assert arrived.resent >= 5000
    assert ends.counters() == before
