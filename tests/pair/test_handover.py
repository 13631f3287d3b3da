"""Handovers between two cores: the orders of handover.md section 4, and what breaks naive ones."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sessiond.core import events as ev
from sessiond.core.paths import Policy
from sessiond.core.session import State

from .world import Host, World

WIFI, ETH, ETH6 = "10.1.0.2", "10.2.0.2", "2001:db8:2::2"
LAN0, LAN1, LAN6 = "10.8.0.1", "10.9.0.1", "2001:db8:8::1"


def bound(**options: object) -> tuple[World, Host, Host]:
    """A client and a server with one session between them."""
    world = World(**options)  # type: ignore[arg-type]
    client = world.host(b"client", WIFI)
    server = world.host(b"server", LAN0)
    world.connect(client, server, name="server.test")
    world.run(3.0 if world.loss else 0.5)
    assert client.session().state is State.ESTABLISHED
    assert server.session().state is State.ESTABLISHED
    return world, client, server


def write(host: Host, count: int = 1000) -> None:
    """The application writes."""
    for sock in host.sockets.values():
        sock.written += count


def assert_delivered(client: Host, server: Host) -> None:
    """All that either application wrote has arrived, once, at the other."""
    (a,), (b,) = client.sockets.values(), server.sockets.values()
    assert a.tuple == b.tuple.mirrored()
    assert a.rcv_nxt == b.written
    assert b.rcv_nxt == a.written
    for sock in (a, b):
        assert not sock.locked
        assert not sock.shield
        assert sock.window


def kinds(host: Host) -> list[str]:
    """What the host's applications were told, in order."""
    return [report.kind for report in host.reports]


def test_both_ends_agree_on_a_session() -> None:
    _, client, server = bound()
    assert client.session().id == server.session().id
    assert client.session().initiator
    assert not server.session().initiator


def test_a_session_is_found_by_the_id_it_was_attached_with_too() -> None:
    _, client, server = bound()
    session = server.session()
    assert session.first_id != session.id == client.session().id
    assert server.core.table.by_id[session.first_id] is session
    server.post(ev.Ended(1, "closed"))
    assert not server.core.table.by_id


def test_a_silent_peer_leaves_plain_tcp_after_a_handful_of_datagrams() -> None:
    world = World()
    client, server = world.host(b"client", WIFI), world.host(b"server", LAN0)
    world.connect(client, server)
    server.core.table.remove(server.session())
    world.run(60)
    session = client.session()
    assert session.state is State.PLAIN
    assert session.reason == "no sessiond answered at 10.8.0.1:2006"
    assert world.datagrams <= 6


@pytest.mark.parametrize("writer", ["nobody", "client", "server", "both"])
def test_a_lost_address_costs_one_round_trip(writer: str) -> None:
    world, client, server = bound(rtt=0.1)
    client.have(WIFI, ETH)
    world.run(0.5)
    client.have(ETH)
    for host, name in ((client, "client"), (server, "server")):
        if writer in (name, "both"):
            write(host)
    world.run(0.11)
    assert client.session().tuple.local.address == ETH
    assert client.session().gap == pytest.approx(0.1, abs=0.002)
    world.run(0.2)
    assert_delivered(client, server)
    assert kinds(client) == ["bound", "moving", "moved"]
    assert kinds(server) == ["bound", "moved"]


def test_bytes_in_flight_when_the_address_goes_are_sent_again_as_new() -> None:
    world, client, server = bound()
    client.have(WIFI, ETH)
    world.run(0.5)
    write(client)
    write(server)
    for host in (client, server):  # transmitted, and lost on the way
        (sock,) = host.sockets.values()
        sock.snd_nxt = sock.written
    client.have(ETH)
    world.run(0.5)
    assert_delivered(client, server)


def test_the_server_moves_too() -> None:
    world, client, server = bound()
    server.have(LAN1)
    write(client)
    write(server)
    world.run(1)
    assert server.session().tuple.local.address == LAN1
    assert_delivered(client, server)


def test_no_address_waits_and_moves_when_one_comes() -> None:
    world, client, server = bound()
    client.have()
    write(client)
    world.run(3600)
    assert client.session().state is State.WAITING
    client.have(ETH6, ETH)
    world.run(1)
    assert client.session().state is State.ESTABLISHED
    assert_delivered(client, server)


def test_both_ends_move_at_once() -> None:
    world, client, server = bound()
    client.have(WIFI, ETH)
    server.have(LAN0, LAN1)
    world.run(0.5)
    write(client)
    write(server)
    client.have(ETH)
    server.have(LAN1)
    world.run(5)
    assert_delivered(client, server)
    assert client.session().tuple.local.address == ETH
    assert client.session().tuple.remote.address == LAN1


def test_both_ends_meet_again_through_the_name() -> None:
    world, client, server = bound()
    client.have(ETH)
    server.have(LAN1)
    world.names["server.test"] = (LAN1,)
    world.run(30)
    write(client)
    write(server)
    world.run(1)
    assert_delivered(client, server)


def test_a_move_by_request_asks_first_and_answers() -> None:
    world, client, server = bound()
    client.have(WIFI, ETH)
    world.run(0.5)
    client.post(ev.RebindAsked(1, ETH, "ticket"))
    write(server)
    world.run(1)
    assert [(a.ticket, a.error) for a in client.answers] == [("ticket", None)]
    assert client.session().tuple.local.address == ETH
    assert_delivered(client, server)


def test_a_move_to_a_dead_path_is_given_up_and_the_old_one_kept() -> None:
    world, client, server = bound()
    client.have(WIFI, ETH)
    world.run(0.5)
    world.broken.add(ETH)
    client.post(ev.RebindAsked(1, ETH, "ticket"))
    write(client)
    world.run(10)
    ((error),) = [a.error for a in client.answers]
    assert error is not None
    assert "did not answer" in error
    assert client.session().tuple.local.address == WIFI
    assert_delivered(client, server)


def test_a_path_that_dies_between_prepared_and_move_is_left_again() -> None:
    world, client, server = bound()
    client.have(WIFI, ETH)
    world.run(0.5)
    client.post(ev.RebindAsked(1, ETH, "ticket"))
    world.run(0.021)
    world.broken.add(ETH)
    write(client)
    write(server)
    world.run(30)
    assert client.session().tuple.local.address == WIFI
    assert_delivered(client, server)


def test_a_rebind_to_nowhere_says_so() -> None:
    _, client, _ = bound()
    client.post(ev.RebindAsked(1, "eth7", "ticket"))
    ((error),) = [a.error for a in client.answers]
    assert error is not None
    assert "eth7 is not usable" in error
    assert client.session().state is State.ESTABLISHED


def test_a_shield_nobody_needs_falls() -> None:
    world, client, server = bound()
    client.have(WIFI, ETH)
    world.run(0.5)
    client.post(ev.RebindAsked(1, ETH, "ticket"))
    world.run(0.012)
    (sock,) = server.sockets.values()
    assert sock.shield
    world.broken.update((ETH,))
    world.run(20)
    assert not sock.shield


def test_a_flapping_preferred_path_is_returned_to_less_and_less_often() -> None:
    world, client, _ = bound()
    client.core.policy = Policy(prefer=(f"if-{ETH}",))
    for _ in range(100):
        client.have(WIFI, ETH)
        world.run(2)
        client.have(WIFI)
        world.run(2)
    # Every return to the preferred path is a loss of it later: two moves a flap.
    assert client.session().flaps == 6
    assert client.session().moves <= 20


def test_a_path_a_user_chose_is_kept() -> None:
    world, client, _ = bound()
    client.core.policy = Policy(prefer=(f"if-{WIFI}",))
    client.have(WIFI, ETH)
    world.run(1)
    client.post(ev.RebindAsked(1, ETH, None))
    world.run(1)
    client.have(WIFI, ETH, ETH6)
    world.run(60)
    assert client.session().tuple.local.address == ETH


def test_idle_sessions_cost_nothing() -> None:
    world, client, server = bound()
    before = world.datagrams
    world.run(3600)
    assert world.datagrams == before
    assert client.core.deadline() is None
    assert server.core.deadline() is None


def test_the_end_of_a_socket_ends_the_session_at_both_ends() -> None:
    world, client, server = bound()
    client.post(ev.Ended(1, "closed by the application"))
    world.run(1)
    assert not client.core.table.sessions
    assert server.session().state is State.PLAIN
    assert not client.core.table.associations
    assert not server.core.table.associations


moves = st.lists(
    st.tuples(
        st.sampled_from(["client", "server"]),
        st.sampled_from(["lose", "gain", "both", "none", "rebind", "write", "break"]),
        st.floats(0.0, 2.0),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(moves, st.integers(0, 2**32), st.sampled_from([0.0, 0.3]), st.sampled_from([0.0005, 0.1]))
def test_whatever_happens_every_byte_arrives_once(
    script: list[tuple[str, str, float]], seed: int, loss: float, rtt: float
) -> None:
    world, client, server = bound(seed=seed, rtt=rtt)
    world.loss = loss
    homes = {"client": (client, WIFI, ETH), "server": (server, LAN0, LAN1)}
    world.names["server.test"] = (LAN0, LAN1)
    for who, what, pause in script:
        host, first, second = homes[who]
        match what:
            case "lose":
                host.have(second)
            case "gain":
                host.have(first)
            case "both":
                host.have(first, second)
            case "none":
                host.have()
            case "rebind":
                host.post(ev.RebindAsked(1, None, None))
            case "write":
                write(host)
            case "break":
                world.broken ^= {second}
        world.run(pause)
    world.broken.clear()
    world.loss = 0
    client.have(WIFI, ETH)
    server.have(LAN0, LAN1)
    write(client)
    write(server)
    world.run(120)
    assert_delivered(client, server)
