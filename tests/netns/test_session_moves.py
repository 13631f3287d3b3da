"""A connection opened by name follows its hosts: real daemons, every way an address can go.

The topology is drawn in tests/support/topology.py: the client has wifi and eth, the server lan0 and
lan1; each host's first uplink is preferred. A conversation streams records to an echo server all
the time; at its end every byte has come back and neither program has met an error.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.netns import apps
from tests.netns.session_support import NAME, World, addresses
from tests.support.lab import Lab


@pytest.fixture
def world(lab: Lab) -> World:
    return World(lab)


@pytest.mark.parametrize("how", ["addresses", "link", "device"])
@pytest.mark.parametrize(
    ("client", "server"), [(apps.threads, apps.echo), (apps.streams, apps.streams_echo)]
)
def test_the_client_loses_its_uplink(
    world: World, how: Any, client: Callable[..., Any], server: Callable[..., Any]
) -> None:
    world.serve(server)
    talk = world.talk(client)
    if how == "device":
        world.client.ip("link delete wifi")
    else:
        world.client.lose("wifi", how)
    moved = world.moves.wait("moved", *addresses(world.client, "eth"))
    assert (moved.session, moved.generation, moved.engine) == (talk.session, 1, "repair")
    world.settled(talk)
    world.finish(talk)


def test_the_server_loses_its_uplink(world: World) -> None:
    talk = world.talk()
    world.server.lose("lan0")
    moved = world.theirs.wait("moved", *addresses(world.server, "lan1"))
    assert moved.session == talk.session
    assert world.settled(talk).remote == moved.local
    world.finish(talk)


def test_ipv4_to_ipv6_and_back(world: World) -> None:
    talk = world.talk(apps.threads, NAME, 4)
    assert world.record(talk).local.startswith(world.client.address("wifi", 4))
    world.client.lose("eth")
    world.client.lose("wifi", version=4)
    world.moves.wait("moved", world.client.address("wifi", 6))
    world.settled(talk)
    world.client.lose("wifi", version=6)
    world.moves.wait("waiting")
    world.client.gain("wifi", ("10.0.1.77/24",))
    world.moves.wait("moved", "10.0.1.77")
    world.settled(talk)
    world.finish(talk)


def test_both_ends_move_in_turn(world: World) -> None:
    talk = world.talk()
    world.ten_moves()
    assert world.settled(talk).moves >= 10
    world.finish(talk)


def test_both_ends_move_at_once_knowing_each_other_s_addresses(world: World) -> None:
    talk = world.talk()
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                lambda move: move[0].lose(move[1]), ((world.client, "wifi"), (world.server, "lan0"))
            )
        )
    world.moves.wait("moved", *addresses(world.client, "eth"))
    world.theirs.wait("moved", *addresses(world.server, "lan1"))
    world.settled(talk)
    world.finish(talk)


def test_a_preferred_default_route_moves_it_while_all_addresses_stay(world: World) -> None:
    talk = world.talk()
    for router in ("10.0.1.1", "2001:db8:1::1"):
        world.client.ip(
            f"route add default via {router} dev wifi metric 300",
            f"route delete default via {router} dev wifi metric 100",
        )
    moved = world.moves.wait("moved", *addresses(world.client, "eth"))
    assert moved.session == talk.session
    world.settled(talk)
    world.finish(talk)


@pytest.mark.parametrize(("scope", "where"), [("wifi", ("eth", 6)), ("all", ("wifi", 4))])
def test_ipv6_is_disabled(world: World, scope: str, where: tuple[str, int]) -> None:
    talk = world.talk()
    world.client.sysctl(f"net/ipv6/conf/{scope}/disable_ipv6", 1)
    world.moves.wait("moved", world.client.address(*where))
    world.settled(talk)
    world.finish(talk)


def test_no_address_for_a_while(world: World) -> None:
    talk = world.talk()
    world.client.lose("eth")
    world.client.lose("wifi")
    waiting = world.moves.wait("waiting")
    assert waiting.reason == "no usable address on this host"
    assert world.record(talk).state == "waiting"
    world.client.gain("eth")
    world.moves.wait("moved", *addresses(world.client, "eth"))
    world.settled(talk)
    world.finish(talk)


def test_a_new_address_nobody_knew_of(world: World) -> None:
    talk = world.talk()
    world.client.lose("eth")
    world.client.lose("wifi")
    world.moves.wait("waiting")
    world.client.gain("wifi", ("10.0.1.99/24", "2001:db8:1::99/64"))
    world.moves.wait("moved", "2001:db8:1::99")
    world.settled(talk)
    world.finish(talk)


def test_an_address_flaps_fifty_times(world: World) -> None:
    talk = world.talk()
    own = next(one for one in world.client.uplinks["wifi"].addresses if ":" in one)
    default = "default via 2001:db8:1::1 dev wifi"
    for _ in range(50):
        world.client.ip(f"addr delete {own} dev wifi", f"addr add {own} dev wifi nodad")
    world.client.ip(f"route replace {default} metric 100")
    record = world.settled(talk)
    # Every loss is acted on; the way back, a mere preference, is taken once a second at most.
    assert record.moves <= 20, record
    world.finish(talk)


def timeouts_of_ten_moves(world: World) -> int:
    """Retransmission timeouts at both hosts."""
    talk = world.talk()
    hosts = world.client, world.server
    before = [host.counters()["TCPTimeouts"] for host in hosts]
    world.ten_moves()
    world.settled(talk)
    after = [host.counters()["TCPTimeouts"] for host in hosts]
    world.finish(talk)
    return sum(after) - sum(before)


def test_clean_handovers_cost_no_retransmission_timeout(world: World) -> None:
    """A machine that stands still for 200 ms costs one now and then; a bad handover does always."""
    spent = [timeouts_of_ten_moves(world)]
    while spent[-1] and len(spent) < 3:
        with Lab() as lab:
            spent.append(timeouts_of_ten_moves(World(lab)))
    assert not spent[-1], spent
