"""Whatever two hosts lose, and however long they are apart: they meet again where they can."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sessiond.core import events as ev
from sessiond.core.session import State

from .test_handover import write
from .world import Host, World

CLIENT = ("10.1.0.2", "10.2.0.2", "2001:db8:1::2", "2001:db8:2::2")
SERVER = ("10.8.0.1", "10.9.0.1", "2001:db8:8::1", "2001:db8:9::1")
LONG_ENOUGH = 120.0
"""Seconds; the longest pause between two attempts is 30."""

Addresses = tuple[str, ...]
Script = list[tuple[tuple[str, Any], float]]


def some(addresses: Addresses) -> st.SearchStrategy[Addresses]:
    """Any of them, or none."""
    return st.lists(st.sampled_from(addresses), unique=True).map(tuple)


pauses = st.sampled_from((0.0, 0.001, 0.05, 0.3, 1.0, 5.0, 40.0, 700.0))
who = st.sampled_from(("client", "server"))
pairs = st.tuples(st.sampled_from(CLIENT), st.sampled_from(SERVER))
client_has = st.tuples(st.just("client"), some(CLIENT))
server_has = st.tuples(st.just("server"), some(SERVER))
others = st.one_of(
    st.tuples(st.sampled_from(("to", "from")), pairs),
    st.tuples(st.sampled_from(("write", "rebind")), who),
    st.tuples(st.just("loss"), st.sampled_from((0.0, 0.3, 1.0))),
)
dialled = st.lists(who, min_size=1, max_size=3)
seeds = st.integers(0, 2**32)
hard = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def bound(seed: int, dialled: list[str], names: bool) -> tuple[World, Host, Host]:
    """Two hosts with sessions between them, each dialled by one of the two."""
    world = World(seed=seed)
    client, server = world.host(b"client", CLIENT[0]), world.host(b"server", SERVER[0])
    for dialler in dialled:
        ends = (client, server) if dialler == "client" else (server, client)
        name = f"{ends[1].name.decode()}.test"
        world.connect(*ends, name=name if names else None)
    world.run(0.5)
    return world, client, server


def play(world: World, client: Host, server: Host, script: Script) -> None:
    """Have it happen. Names follow their hosts' addresses."""
    hosts = {"client": client, "server": server}
    for (what, which), seconds in script:
        match what:
            case "client" | "server":
                world.names[f"{what}.test"] = which
                hosts[what].come_to_have(*which)
            case "to":
                world.one_way ^= {which}
            case "from":
                world.one_way ^= {which[::-1]}
            case "write":
                write(hosts[which])
            case "rebind":
                for handle in list(hosts[which].sockets):
                    hosts[which].post(ev.RebindAsked(handle, None, None))
            case "loss":
                world.loss = which
        world.run(seconds)


def assert_they_meet(world: World, client: Host, server: Host) -> None:
    """Nothing hinders them any more: in the end all sessions are at rest at both ends, on one path
    that works, and all bytes arrive."""
    world.loss = 0.0
    world.one_way.clear()
    world.run(LONG_ENOUGH)
    write(client)
    write(server)
    world.run(1)
    for host in (client, server):
        for handle, session in host.core.table.sessions.items():
            sock = host.sockets[handle]
            assert session.state is State.ESTABLISHED, (host.name, session)
            assert not session.busy, (host.name, session)
            assert not session.in_handover, (host.name, session)
            assert sock.tuple == session.tuple
            assert not sock.locked
            assert not sock.shield
            assert sock.window
            assert sock.tuple.local.address in host.addresses
    others = {sock.tuple: sock for sock in server.sockets.values()}
    for sock in client.sockets.values():
        other = others[sock.tuple.mirrored()]
        assert (sock.rcv_nxt, other.rcv_nxt) == (other.written, sock.written)


@hard
@given(
    st.lists(st.tuples(client_has | server_has | others, pauses), max_size=16),
    some(CLIENT),
    some(SERVER),
    st.sampled_from((0.0, 1.0)),
    st.tuples(pauses, pauses),
    dialled,
    seeds,
)
def test_with_names_they_meet_where_they_can(
    script: Script,
    at_last: Addresses,
    its: Addresses,
    loss: float,
    apart: tuple[float, float],
    dialled: list[str],
    seed: int,
) -> None:
    if not {":" in one for one in at_last} & {":" in one for one in its}:
        at_last, its = CLIENT[2:], SERVER[1:3]
    world, client, server = bound(seed, dialled, names=True)
    last: Script = [(("client", at_last), apart[0]), (("server", its), apart[1])]
    play(world, client, server, [*script, (("loss", loss), 0.0), *last])
    assert_they_meet(world, client, server)


@hard
@given(
    st.lists(st.tuples(client_has | others, pauses), max_size=16),
    some(CLIENT),
    st.sampled_from((0.0, 1.0)),
    pauses,
    dialled,
    seeds,
)
def test_a_host_that_stays_is_found_without_names(
    script: Script,
    at_last: Addresses,
    loss: float,
    apart: float,
    dialled: list[str],
    seed: int,
) -> None:
    at_last = at_last or CLIENT[1:2]
    world, client, server = bound(seed, dialled, names=False)
    server.have(*SERVER)
    world.run(1)
    last: Script = [(("loss", loss), 0.0), (("client", at_last), apart)]
    play(world, client, server, [*script, *last])
    assert_they_meet(world, client, server)
