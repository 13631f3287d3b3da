"""Each host knows where the other can be reached, whatever gets lost on the way."""

from __future__ import annotations

from sessiond.core.session import State

from .test_handover import assert_delivered, write
from .world import Host, World

WIFI, WIFI6 = "10.1.0.2", "2001:db8:1::2"
LAN, LAN6 = "10.8.0.1", "2001:db8:8::1"


def bound(*server_addresses: str) -> tuple[World, Host, Host]:
    """A session over IPv4; the client has IPv4 only."""
    world = World()
    client, server = world.host(b"client", WIFI), world.host(b"server", *server_addresses)
    world.connect(client, server, name="server.test")
    world.run(0.5)
    return world, client, server


def known(host: Host) -> set[str]:
    """The peer's addresses, as a host knows them."""
    association = host.session().association
    assert association is not None
    return set(association.addresses)


def test_a_lost_announcement_is_repeated() -> None:
    world, client, server = bound(LAN, LAN6)
    world.loss = 1.0
    client.have(WIFI, WIFI6)
    world.run(0.1)
    world.loss = 0.0
    world.run(1)
    assert known(server) == {WIFI, WIFI6}


def test_a_confirmed_announcement_is_not_repeated() -> None:
    world, client, _ = bound(LAN, LAN6)
    before = world.datagrams
    client.have(WIFI, WIFI6)
    world.run(60)
    assert world.datagrams - before <= 4  # the server, heard of, tells the client too


def test_a_silent_peer_is_told_every_now_and_then_until_it_is_back() -> None:
    world, client, server = bound(LAN, LAN6)
    before = world.datagrams
    world.loss = 1.0
    client.have(WIFI, WIFI6)
    world.run(600)
    ways = 2
    assert world.datagrams - before <= 6 + ways * 600 / 30
    world.loss = 0.0
    world.run(31)
    assert known(server) == {WIFI, WIFI6}
    before = world.datagrams
    world.run(600)
    assert world.datagrams == before


def test_a_host_without_an_address_has_nothing_to_tell() -> None:
    world, client, _ = bound(LAN, LAN6)
    client.have()
    world.run(1)
    before = world.datagrams
    world.run(600)
    assert world.datagrams == before
    assert client.core.deadline() is None


def test_a_peer_heard_again_is_told_at_once() -> None:
    world, client, server = bound(LAN, LAN6)
    world.loss = 1.0
    client.have(WIFI, WIFI6)
    world.run(600)
    world.loss = 0.0
    server.have(LAN)
    world.run(0.1)
    assert known(server) == {WIFI, WIFI6}
    assert known(client) == {LAN}


def test_a_peer_that_only_its_name_can_find_is_found() -> None:
    """It is on IPv6 only now, and knows only this host's IPv4 address."""
    world, client, server = bound(LAN)
    world.loss = 1.0
    client.have(WIFI, WIFI6)
    server.have(LAN6)
    world.run(600)
    assert client.session().state is State.ESTABLISHED
    assert server.session().state is State.WAITING
    world.loss = 0.0
    world.names["server.test"] = (LAN6,)
    world.run(31)
    for host in (client, server):
        assert host.session().state is State.ESTABLISHED
    assert client.session().tuple.local.address == WIFI6


def test_a_host_that_lost_a_version_is_met_by_the_other() -> None:
    world, client, server = bound(LAN, LAN6)
    world.loss = 1.0
    client.have(WIFI, WIFI6)
    server.have(LAN6)
    world.run(0.1)
    assert server.session().state is State.WAITING
    world.loss = 0.0
    write(client)
    write(server)
    world.run(5)
    assert server.session().state is State.ESTABLISHED
    assert server.session().tuple.local.address == LAN6
    assert_delivered(client, server)
