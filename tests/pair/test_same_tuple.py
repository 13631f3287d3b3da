"""A path that is lost and back: the sockets meet on the tuple they were on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessiond.core.session import State

from .test_handover import ETH, LAN0, WIFI, assert_delivered, bound, write
from .test_liveness import hard
from .world import ENGINE_TIME, Host, World

RTT = 0.02


def in_flight(*hosts: Host) -> None:
    """Each writes, and what it transmits is lost on the way."""
    for host in hosts:
        write(host)
        (sock,) = host.sockets.values()
        sock.snd_nxt = sock.written


def writers(world: World, who: str, client: Host, server: Host) -> None:
    in_flight(*(host for host, name in ((client, "client"), (server, "server")) if name in who))


@pytest.mark.parametrize("who", ["", "client", "server", "client, server"])
@pytest.mark.parametrize("flaps", ["client", "server"])
@pytest.mark.parametrize("away", [0.0, ENGINE_TIME / 2, RTT / 2, 1.0, 3600.0])
def test_the_only_path_goes_and_comes_back(who: str, flaps: str, away: float) -> None:
    world, client, server = bound(rtt=RTT)
    before = client.session().tuple
    host, address = (client, WIFI) if flaps == "client" else (server, LAN0)
    host.have()
    assert host.session().state is State.WAITING
    writers(world, who, client, server)
    world.run(away)
    host.have(address)
    world.run(1)
    assert client.session().tuple == before
    assert host.session().generation == 1
    assert_delivered(client, server)


@pytest.mark.parametrize("who", ["", "client", "server", "client, server"])
@pytest.mark.parametrize("after", [0.0, ENGINE_TIME / 2, ENGINE_TIME * 2, RTT / 2, RTT])
def test_a_move_away_is_under_way_when_only_the_old_path_is_left(who: str, after: float) -> None:
    world, client, server = bound(rtt=RTT)
    client.have(WIFI, ETH)
    world.run(0.5)
    writers(world, who, client, server)
    client.have(ETH)
    world.run(after)
    client.have(WIFI)
    write(client)
    write(server)
    world.run(3)
    assert client.session().tuple.local.address == WIFI
    assert_delivered(client, server)


def test_a_lost_answer_is_asked_for_again() -> None:
    world, client, server = bound(rtt=RTT)
    client.have()
    in_flight(client, server)
    world.one_way.add((LAN0, WIFI))
    client.have(WIFI)
    world.run(0.2)
    assert server.session().state is State.FOLLOWING
    assert client.session().state is State.MOVING
    world.one_way.clear()
    world.run(1)
    assert_delivered(client, server)


def test_a_peer_that_never_answers_leaves_plain_tcp_on_it() -> None:
    """Its daemon is gone: the socket goes back to where it is, open."""
    world, client, server = bound(rtt=RTT)
    server.core.table.remove(server.session())
    client.have()
    client.have(WIFI)
    world.run(60)
    assert client.session().state is State.WAITING
    (sock,) = client.sockets.values()
    write(client)
    write(server)
    world.run(0.01)
    (other,) = server.sockets.values()
    assert (sock.rcv_nxt, other.rcv_nxt) == (other.written, sock.written)


@hard
@given(
    st.lists(
        st.tuples(
            st.sampled_from(("client", "server")),
            st.sampled_from(("lose", "gain", "write", "in flight")),
            st.sampled_from((0.0, ENGINE_TIME / 2, ENGINE_TIME, RTT / 2, RTT, 0.3, 2.0)),
        ),
        max_size=20,
    ),
    st.sampled_from((0.0, 0.3)),
    st.integers(0, 2**32),
)
def test_however_it_flaps_no_byte_is_lost_and_no_port_changes(
    script: list[tuple[str, str, float]], loss: float, seed: int
) -> None:
    world, client, server = bound(seed=seed, rtt=RTT)
    world.loss = loss
    before = client.session().tuple
    hosts = {"client": (client, WIFI), "server": (server, LAN0)}
    for who, what, pause in script:
        host, address = hosts[who]
        match what:
            case "lose":
                host.have()
            case "gain":
                host.have(address)
            case "write":
                write(host)
            case "in flight":
                in_flight(host)
        world.run(pause)
    world.loss = 0.0
    for host, address in hosts.values():
        host.have(address)
        write(host)
    world.run(65)
    assert client.session().tuple == before
    assert_delivered(client, server)
