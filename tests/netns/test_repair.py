"""The repair engine, both ends driven directly, no daemon: what a handover does to a connection."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from sessiond.rebind import linux as lx
from tests.netns.repair_support import (
    NUMBERS,
    OTHER,
    App,
    Ends,
    Net,
    addresses,
    eventually,
    fill,
    in_threads,
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


def test_the_window_opens_by_settle_when_the_mover_has_nothing_to_send(net: Net) -> None:
    """Case 2 where the peer had received all, only its acknowledgements were lost."""
    ends = Ends(net, *net.pair(4))
    client, server = ends.socks.values()
    net.left.deaf()
    client.sendall(b"x" * 4000)
    server.sendall(b"y" * 6000)
    departed = ends.depart("left", target(ends.where("left"), local=addresses(4, 3)))
    assert departed.pending
    net.left.hearing()
    followed = ends.follow("right", departed)
    arrived = ends.arrive("left", followed)
    assert (followed.resent, arrived.resent) == (6000, 0)
    ends.settle("right")
    assert receive(client, 6000, 0.5) == b"y" * 6000
    assert receive(server, 4000, 0.5) == b"x" * 4000


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("version", [4, 6])
def test_full_queues_of_megabytes_move(net: Net, side: str, version: int) -> None:
    """Both send queues and both receive queues are full; nothing is lost or late."""

    def large(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, lx.SO_SNDBUFFORCE, 6 << 20)

    ends = Ends(net, *net.pair(version, options=large))
    large(ends.socks["right"])
    written = {s: fill(sock, noise(16 << 20, i)) for i, (s, sock) in enumerate(ends.socks.items())}
    assert min(map(len, written.values())) > 4 << 20
    buffers = [_buffers(sock) for sock in ends.socks.values()]
    new = addresses(version, 3 if side == "left" else 4)
    ends.move(side, target(ends.where(side), local=new))
    assert [_buffers(sock) for sock in ends.socks.values()] == buffers
    heard: dict[str, bytes] = {}

    def hear(reader: str) -> None:
        heard[reader] = receive(ends.socks[reader], len(written[OTHER[reader]]))

    in_threads([lambda: hear("left"), lambda: hear("right")])()
    assert heard["left"] == written["right"]
    assert heard["right"] == written["left"]


def _buffers(sock: socket.socket) -> tuple[int, ...]:
    options = (lx.SO_BUF_LOCK, socket.SO_SNDBUF, socket.SO_RCVBUF)
    return tuple(sock.getsockopt(socket.SOL_SOCKET, option) for option in options)


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("mover", ["left", "right"])
@pytest.mark.parametrize("start", [4, 6])
def test_the_family_changes_there_and_back(net: Net, start: int, mover: str, pending: bool) -> None:
    ends = Ends(net, *net.pair(start))
    original = ends.where(mover)
    other_version = 10 - start
    here, there = (1, 2) if mover == "left" else (2, 1)
    for version in (other_version, start, other_version, start):
        new = target(
            ends.where(mover), local=addresses(version, here), remote=addresses(version, there)
        )
        with ends.losing() if pending else contextlib.nullcontext():
            ends.socks["left"].sendall(b"ping" * 500)
            ends.socks["right"].sendall(b"pong" * 500)
            if not pending:
                eventually(lambda: not _in_flight(ends), what="everything is acknowledged")
            departed = ends.depart(mover, new)
        assert departed.pending == pending
        ends.finish(mover, departed)
        assert receive(ends.socks["right"], 2000) == b"ping" * 500
        assert receive(ends.socks["left"], 2000) == b"pong" * 500
        eventually(lambda: not _in_flight(ends), what="everything is acknowledged")
    assert ends.where(mover) == original


def _in_flight(ends: Ends) -> int:
    return sum(lx.queue_length(sock, lx.SIOCOUTQ) for sock in ends.socks.values())


@pytest.mark.parametrize(
    ("mover", "changes"),
    [
        ("left", {"local": "10.9.0.3"}),
        ("left", {"remote": "10.9.0.4"}),
        ("left", {"local": "10.9.0.3", "remote": "10.9.0.4"}),
        ("left", {"lport": 40001}),
        ("left", {"local": "10.9.0.3", "lport": 40002}),
        ("left", {"rport": 40003}),
        ("left", {"rport": 8000}),
        ("left", {"local": "10.9.0.5", "lport": 40004, "remote": "10.9.0.6", "rport": 40005}),
        ("right", {"local": "10.9.0.4"}),
        ("right", {"local": "10.9.0.4", "lport": 40006}),
        ("right", {"local": "10.9.0.4", "lport": 8001}),
        ("right", {"remote": "10.9.0.3", "rport": 40007}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value,
)
def test_any_element_of_the_tuple_changes(net: Net, mover: str, changes: dict[str, Any]) -> None:
    ends = Ends(net, *net.pair(4))
    ends.move(mover, target(ends.where(mover), **changes))
    _talk(ends)


def _talk(ends: Ends, length: int = 3000) -> None:
    for side, sock in ends.socks.items():
        sock.sendall(noise(length, length))
        assert receive(ends.socks[OTHER[side]], length) == noise(length, length)


@pytest.mark.parametrize("port", [7000, 40100])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("lost", [False, True])
def test_a_server_changes_its_address_again_and_again(
    net: Net, version: int, port: int, lost: bool
) -> None:
    """Its port is its listener's, inside or outside the ephemeral range; old addresses may go."""
    ends = Ends(net, *net.pair(version, port=port))
    net.right.run("sysctl -qw net.ipv4.conf.veth.promote_secondaries=1")
    length = 24 if version == 4 else 64
    for number in (4, 6, 8, 4, 2):
        before = ends.where("right").local.address
        if lost:
            net.right.run(f"ip addr del {before}/{length} dev veth")
        ends.move("right", target(ends.where("right"), local=addresses(version, number)))
        _talk(ends)
        if lost:
            net.right.run(f"ip addr add {before}/{length} dev veth nodad")
    assert "20060" not in net.right.run("ip rule") + net.right.run("ip -6 rule")
    assert net.right.run("ip route show table all").count("20060") == 0


@pytest.mark.parametrize("pending", [False, True])
def test_departing_again_goes_on_from_where_it_is(net: Net, pending: bool) -> None:
    """The first target did not work out: another, then the old tuple, then a third one."""
    ends = Ends(net, *net.pair(4))
    origin = ends.where("left")
    with ends.losing():
        if pending:
            ends.socks["left"].sendall(b"a" * 3000)
            ends.socks["right"].sendall(b"b" * 2000)
        for number in (3, 5, 1, 7):
            ends.depart("left", target(origin, local=addresses(4, number)))
        back = ends.depart("left", origin)
        assert back.pending == pending
    ends.finish("left", back)
    assert ends.where("left") == origin
    if pending:
        assert receive(ends.socks["left"], 2000) == b"b" * 2000
        assert receive(ends.socks["right"], 3000) == b"a" * 3000
    _talk(ends)


@pytest.mark.parametrize("pending", [False, True])
def test_a_mover_follows_when_both_ends_have_moved(net: Net, pending: bool) -> None:
    """Each has departed to an address of its own; the left one, initiator, wins."""
    ends = Ends(net, *net.pair(4))
    with ends.losing():
        if pending:
            ends.socks["left"].sendall(b"a" * 3000)
            ends.socks["right"].sendall(b"b" * 2000)
        ends.depart("left", target(ends.where("left"), local=addresses(4, 3)))
        ends.depart("right", target(ends.where("right"), local=addresses(4, 4)))
        new = target(ends.where("left"), local=addresses(4, 3), remote=addresses(4, 4))
        departed = ends.depart("left", new)
    ends.finish("left", departed)
    if pending:
        assert receive(ends.socks["left"], 2000) == b"b" * 2000
        assert receive(ends.socks["right"], 3000) == b"a" * 3000
    _talk(ends)


@pytest.mark.parametrize("pending", [False, True])
def test_repeated_messages_do_no_harm(net: Net, pending: bool) -> None:
    ends = Ends(net, *net.pair(4))
    with ends.losing() if pending else contextlib.nullcontext():
        ends.socks["left"].sendall(b"a" * 3000)
        ends.socks["right"].sendall(b"b" * 2000)
        if not pending:
            eventually(lambda: not _in_flight(ends), what="everything is acknowledged")
        new = target(ends.where("left"), local=addresses(4, 3))
        ends.depart("left", new)
        departed = ends.depart("left", new)
    followed = [ends.follow("right", departed) for _ in range(3)]
    assert len({f.rcv_nxt for f in followed}) == 1
    for _ in range(3):
        ends.arrive("left", followed[-1])
    for _ in range(3):
        ends.settle("right")
        ends.settle("left")
    assert receive(ends.socks["left"], 2000) == b"b" * 2000
    assert receive(ends.socks["right"], 3000) == b"a" * 3000
    _talk(ends)


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("gone", [False, True])
def test_a_retreat_needs_no_peer(net: Net, pending: bool, gone: bool) -> None:
    """Also where the address went meanwhile: it may come back."""
    ends = Ends(net, *net.pair(4))
    origin = ends.where("left")
    with ends.losing():
        if pending:
            ends.socks["left"].sendall(b"a" * 3000)
        departed = ends.depart("left", target(origin, local=addresses(4, 3)))
        assert departed.pending == pending
        if not pending:
            ends.socks["left"].sendall(b"a" * 3000)
        if gone:
            net.left.run("sysctl -qw net.ipv4.conf.veth.promote_secondaries=1")
            net.left.run("ip addr del 10.9.0.1/24 dev veth")
        assert ends.do("left", "retreat") is None
        assert ends.where("left") == origin
        if gone:
            net.left.run("ip addr add 10.9.0.1/24 dev veth")
    assert receive(ends.socks["right"], 3000) == b"a" * 3000
    _talk(ends)


def _hear_more(ends: Ends) -> None:
    """A megabyte in both directions."""

    def heard() -> list[int]:
        return [lx.info(sock).bytes_received for sock in ends.socks.values()]

    before = heard()
    eventually(lambda: all(now - then > 1 << 20 for now, then in zip(heard(), before, strict=True)))


@pytest.mark.parametrize("version", [4, 6])
def test_thirty_moves_under_bulk_traffic_in_both_directions(net: Net, version: int) -> None:
    """Either end, addresses and families, an application in its own process at each."""
    client, server = net.pair(version)
    with App(client, "bulk") as left, App(server, "bulk") as right:
        ends = Ends(net, client, server, {"left": left, "right": right})
        rng = random.Random(2006)
        before = ends.counters()
        for _ in range(30):
            side = rng.choice(["left", "right"])
            to = rng.choice((4, 6))
            here, there = rng.choice(NUMBERS[side]), rng.choice(NUMBERS[OTHER[side]])
            remote = addresses(to, there) if to != ends.where(side).local.version else None
            ends.move(side, target(ends.where(side), local=addresses(to, here), remote=remote))
            _hear_more(ends)
        after = ends.counters()
        left.stop()
        right.stop()
        left_wrote, left_read, *left_blocks = left.result().split()
        right_wrote, right_read, *right_blocks = right.result().split()
    assert (left_wrote, left_read) == (right_read, right_wrote)
    assert left_blocks == right_blocks[::-1]
    timeouts = [
        key for key in after if key[1] == "TcpExt.TCPTimeouts" and after[key] != before[key]
    ]
    assert not timeouts
