"""A connection whose host loses all of its network in the middle of a move is not lost."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from sessiond.core.outcomes import Departed, Failed, Followed
from sessiond.core.tuples import FourTuple
from sessiond.rebind import linux as lx
from sessiond.rebind import ports, tcp_state
from sessiond.rebind.process import Process
from tests.netns.moves_support import End, Moved, deliver, hand_over
from tests.netns.test_thesis import Conversation, Network, rebound
from tests.netns.thesis_support import thesis_network
from tests.support.lab import Lab, missing


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if why_not := missing("ip"):
        pytest.skip(why_not)
    with Lab() as lab:
        yield thesis_network(lab)


@pytest.mark.parametrize("hold_acks", [False, True], ids=["idle", "unacknowledged"])
@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
def test_network_gone_in_the_middle_of_a_step(
    network: Network, monkeypatch: pytest.MonkeyPatch, version: int, side: str, hold_acks: bool
) -> None:
    with Conversation(network, version, socket.AF_INET6, hold_acks=hold_acks) as conversation:
        mover, other = conversation.ends[side], conversation.ends[_other(side)]
        first = mover.tuple
        # A move that keeps the tuple: it locks a server's port, as an earlier move would have.
        assert isinstance(hand_over(mover, other, first), Moved)
        second = rebound(conversation.before, ("saddr", "daddr"), version)
        target = second if side == "client" else second.mirrored()

        with monkeypatch.context() as patch:
            install = tcp_state.install

            def without_network(*arguments: Any, **named: Any) -> None:
                patch.setattr(tcp_state, "install", install)
                mover.host.lose("eth0")
                install(*arguments, **named)

            patch.setattr(tcp_state, "install", without_network)
            departed = mover.depart(target)
        assert isinstance(departed, Failed)
        assert not departed.lost, departed.reason

        mover.host.gain("eth0")
        assert isinstance(hand_over(mover, other, target), Moved)
        assert mover.tuple == target
        conversation.finish()


@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
def test_route_changed_in_the_middle_of_a_step(
    network: Network, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """What was to be the route's source is not, by the time of the connect."""
    with Conversation(network, version, socket.AF_INET6) as conversation:
        client, server = conversation.ends["client"], conversation.ends["server"]
        home = server.tuple
        target = rebound(conversation.before, ("daddr",), version).mirrored()
        with monkeypatch.context() as patch:
            source = ports.Ports._source

            def as_it_was(self: ports.Ports, wanted: FourTuple) -> ports._Source:
                return ports._Source.ROUTED if wanted == target else source(self, wanted)

            patch.setattr(ports.Ports, "_source", as_it_was)
            departed = server.depart(target)
        assert isinstance(departed, Failed)
        assert not departed.lost, departed.reason
        assert server.tuple == home
        server.settle()
        assert isinstance(hand_over(server, client, target), Moved)
        conversation.finish()


def test_dead_connection_is_reported_as_lost(network: Network) -> None:
    with Conversation(network, 4, socket.AF_INET6) as conversation:
        client = conversation.ends["client"]
        with Process.of(conversation.client.pid).take(client.connection.fd) as sock:
            tcp_state.abort(sock)
        outcome = client.depart(rebound(conversation.before, ("saddr",), 4))
        assert isinstance(outcome, Failed)
        assert outcome.lost
        assert outcome.reason == "TCP has given the connection up"


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
def test_tombstone_stays_where_the_peer_still_is(network: Network, version: int, side: str) -> None:
    """The mover tries one path after the other; the peer knows of none and goes on sending."""
    with Conversation(network, version, socket.AF_INET6) as conversation:
        mover, other = conversation.ends[side], conversation.ends[_other(side)]
        home = mover.tuple
        for what in (("daddr",), ("saddr",), ("saddr", "daddr")):
            there = rebound(conversation.before, what, version)
            departed = mover.depart(there if side == "client" else there.mirrored())
            assert isinstance(departed, Departed), departed
            before = mover.host.counters()["Tcp.OutRsts"]
            _send_segment(other, home.mirrored())
            deliver(other, mover, home.mirrored())
            assert mover.host.counters()["Tcp.OutRsts"] == before, f"the peer was reset: {what}"
        mover.retreat()
        assert mover.tuple == home
        conversation.finish()


@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
def test_tombstone_comes_later_where_nothing_arrives(
    network: Network, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """The address was gone; it comes back before the peer has heard of the move."""
    with Conversation(network, version, socket.AF_INET6) as conversation:
        mover, other = conversation.ends["client"], conversation.ends["server"]
        home = mover.tuple
        monkeypatch.setattr(mover.engine, "_interface_of", lambda address: None)
        departed = mover.depart(rebound(conversation.before, ("saddr",), version))
        assert isinstance(departed, Departed), departed
        assert home not in mover.connection.notes.tombstones
        with mover.host.entered():
            mover.engine.bury([mover.connection])
        assert home in mover.connection.notes.tombstones
        before = mover.host.counters()["Tcp.OutRsts"]
        _send_segment(other, home.mirrored())
        deliver(other, mover, home.mirrored())
        assert mover.host.counters()["Tcp.OutRsts"] == before
        mover.retreat()
        with mover.host.entered():
            mover.engine.bury([mover.connection])  # it is at rest: nothing to do
        conversation.finish()


@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("side", ["client", "server"])
def test_a_mover_that_went_back_is_not_reset_by_a_peer_that_followed(
    network: Network, side: str, version: int
) -> None:
    """Moved was lost; the mover gave up and is live on the old tuple, the peer has left it."""
    with Conversation(network, version, socket.AF_INET6) as conversation:
        mover, other = conversation.ends[side], conversation.ends[_other(side)]
        home = mover.tuple
        there = rebound(conversation.before, ("saddr", "daddr"), version)
        departed = mover.depart(there if side == "client" else there.mirrored())
        assert isinstance(departed, Departed)
        assert isinstance(other.follow(departed), Followed)
        with other.host.entered():
            other.engine.bury([other.connection])
        mover.retreat()
        before = other.host.counters()["Tcp.OutRsts"]
        _send_segment(mover, home)
        deliver(mover, other, home)
        assert other.host.counters()["Tcp.OutRsts"] == before
        # It tries again, and now the answer arrives.
        departed = mover.depart(departed.tuple)
        assert isinstance(departed, Departed)
        followed = other.follow(departed)
        assert isinstance(followed, Followed)
        mover.arrive(followed)
        other.settle()
        conversation.finish()


def test_who_has_followed_goes_back_to_where_it_followed_to(network: Network) -> None:
    """Settled was lost; the other end moves in turn, and gives that up."""
    with Conversation(network, 4, socket.AF_INET6) as conversation:
        mover, other = conversation.ends["client"], conversation.ends["server"]
        departed = mover.depart(rebound(conversation.before, ("saddr",), 4))
        assert isinstance(departed, Departed)
        followed = other.follow(departed)
        assert isinstance(followed, Followed)
        mover.arrive(followed)
        agreed = other.tuple
        there = rebound(conversation.before, ("saddr", "daddr"), 4)
        assert isinstance(other.depart(there.mirrored()), Departed)
        other.retreat()
        assert other.tuple == agreed
        conversation.finish()


def _send_segment(end: End, where: FourTuple) -> None:
    """A duplicate of what the end sent last, as a late one would come, and wait until it did."""
    process = Process.of(end.connection.process.pid)
    with process.take(end.connection.fd) as sock, end.host.entered():
        # Leaving repair mode sends a window probe (tcp_send_window_probe()).
        reuse = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        assert tcp_state.tuple_of(sock) == where
        sock.setsockopt(socket.IPPROTO_TCP, lx.TCP_REPAIR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, lx.TCP_REPAIR, 0)
        if reuse:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def _other(side: str) -> str:
    return "server" if side == "client" else "client"
