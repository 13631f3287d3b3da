"""The repair engine, both ends driven directly, no daemon: what a handover does to a connection."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.netns.repair_support import (
    Ends,
    Net,
    addresses,
    fill,
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
    departed, followed, arrived = ends.move(side, target(ends.tuple(side), local=new))
    assert not departed.pending
    assert followed.resent == arrived.resent == 0
    client, server = ends.socks.values()
    client.sendall(b"Hello Server!")
    assert receive(server, 13) == b"Hello Server!"
    server.sendall(b"Hello Client!")
    assert receive(client, 13) == b"Hello Client!"
