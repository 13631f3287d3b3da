"""A third host, mallory, against a session between two others.

mallory has a link to the router and reads what passes there; it sends from any address it likes.

    client ── wifi, eth ── router ── lan0, lan1 ── server
                             │ evil
                          mallory
"""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from sessiond.seal import fingerprint
from sessiond.seal.datagram import OVERHEAD, SIZES, Type, header
from tests.netns import apps
from tests.netns.session_support import NAME, Conversation, World, addresses
from tests.seal.hosts import flipped
from tests.support.capture import capture
from tests.support.lab import Host, Lab, Uplink
from tests.support.wait import until

PORT = 2006
OWN = "2001:db8:66::2"
RANDOM_SEED = 2006


class Mallory:
    """The third host."""

    def __init__(self, world: World) -> None:
        router = world.net.router
        self.host: Host = world.lab.host("mallory")
        world.lab.link(self.host, "evil", router, "evil")
        self.host.configure(Uplink("evil", (f"{OWN}/64",), ("2001:db8:66::1",)))
        router.configure(Uplink("evil", ("2001:db8:66::1/64",)))
        self.router_mac = router.run("cat", "/sys/class/net/evil/address").stdout.strip()

    def send(self, datagrams: Iterable[bytes], source: str, to: str) -> int:
        """Forge the source; how many were sent."""
        from scapy.layers.inet import UDP
        from scapy.layers.inet6 import IPv6
        from scapy.layers.l2 import Ether

        count = 0
        with self.host.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
            wire.bind(("evil", 0))
            for datagram in datagrams:
                packet = IPv6(src=source, dst=to) / UDP(sport=PORT, dport=PORT) / datagram
                wire.send(bytes(Ether(dst=self.router_mac, type=0x86DD) / packet))
                count += 1
        return count


def payloads(packets: list[Any]) -> list[tuple[str, str, bytes]]:
    """Source, destination and datagram of what two daemons said over IPv6."""
    from scapy.layers.inet import UDP
    from scapy.layers.inet6 import IPv6

    return [
        (one[IPv6].src, one[IPv6].dst, bytes(one[UDP].payload))
        for one in packets
        if UDP in one and IPv6 in one
    ]


def dropped(world: World, reason: str) -> int:
    """How often the client's daemon dropped a datagram for this reason."""
    stats = json.loads(world.near.ctl("stats", "--json").stdout)
    return int(stats.get(f"dropped.{reason}", 0))


@pytest.fixture
def world(lab: Lab) -> World:
    return World(lab)


@pytest.fixture
def mallory(world: World) -> Mallory:
    return Mallory(world)


def recorded(world: World) -> tuple[Conversation, list[tuple[str, str, bytes]]]:
    """A session that was opened and moved to and fro, and all that the daemons said meanwhile."""
    router = world.net.router
    daemons = f"udp port {PORT}"
    with capture(router, "wifi", daemons) as wifi, capture(router, "eth", daemons) as eth:
        talk = world.talk()
        assert talk.session
        for interface in ("eth", "wifi"):
            world.near.ctl("rebind", talk.session, "--to", interface)
            world.settled(talk)
    said = payloads(wifi.packets()) + payloads(eth.packets())
    assert {data[0] for _, _, data in said} == {
        Type.INITIATION, Type.RESPONSE, Type.CONFIRMATION, Type.SEALED
    }  # fmt: skip
    return talk, said


def untouched(world: World, talk: Conversation, before: Any) -> None:
    """The session is where it was, its bytes flow, and it still moves."""
    assert world.record(talk) == before
    moves = world.watch(world.near)  # earlier moves are none of this one
    world.client.lose("wifi")
    moves.wait("moved", *addresses(world.client, "eth"))
    world.settled(talk)
    world.finish(talk)
    assert "Traceback" not in world.near.log + world.far.log


def test_what_was_recorded_changes_nothing_however_it_is_sent_again(
    world: World, mallory: Mallory
) -> None:
    talk, said = recorded(world)
    before = world.record(talk)
    for source, to, data in said:
        mallory.send([data], source, to)  # replayed
        mallory.send([data], OWN, to)  # and from another address
        mallory.send([data], to, source)  # reflected
    until(lambda: dropped(world, "replayed"), "replays counted")
    until(lambda: dropped(world, "unknown index"), "reflections counted")
    untouched(world, talk, before)


def test_no_bit_of_a_datagram_can_be_changed_and_none_be_cut_off(
    world: World, mallory: Mallory
) -> None:
    talk, said = recorded(world)
    before = world.record(talk)
    client = world.client.address("wifi", 6)
    to_client = [one for one in said if one[1] == client]
    (longest,) = [max((d for *_, d in to_client if d[0] == Type.SEALED), key=len)]
    (response,) = {d for *_, d in to_client if d[0] == Type.RESPONSE}
    server = to_client[0][0]
    for data in (longest, response):
        mallory.send((wrong for _, wrong in flipped(data)), server, client)
        mallory.send((data[:length] for length in range(len(data))), server, client)
        mallory.send((data + bytes(extra) for extra in (1, 16, 100)), server, client)
    for reason in ("forged", "malformed", "other version", "unknown index"):
        until(lambda reason=reason: dropped(world, reason), f"{reason} counted")  # type: ignore[misc]
    untouched(world, talk, before)


def garbage(randomly: random.Random) -> Iterator[bytes]:
    """What has the right shape and no meaning, and what has none."""
    for kind in Type:
        for _ in range(50):
            size = SIZES.get(kind, OVERHEAD + randomly.randrange(1000))
            yield header(kind, randomly.getrandbits(32)) + randomly.randbytes(size - 8)
    for _ in range(200):
        yield randomly.randbytes(randomly.randrange(1400))
    nothing = header(Type.INITIATION, 7)
    yield nothing.ljust(SIZES[Type.INITIATION], b"\0")  # a key of low order


def test_garbage_is_counted_and_logged_a_little(world: World, mallory: Mallory) -> None:
    talk = world.talk()
    before = world.settled(talk)
    lines = world.near.log.count("\n")
    mallory.send(garbage(random.Random(RANDOM_SEED)), OWN, world.client.address("wifi", 6))
    for reason in ("malformed", "unknown index", "forged"):
        until(lambda reason=reason: dropped(world, reason), f"{reason} counted")  # type: ignore[misc]
    assert world.near.log.count("\n") - lines < 40
    untouched(world, talk, before)


def test_a_flood_of_handshakes_leaves_no_memory_and_the_session_moves(
    world: World, mallory: Mallory
) -> None:
    talk = world.talk()
    before = world.settled(talk)
    client = world.client.address("wifi", 6)

    def initiations(count: int) -> Iterator[bytes]:
        for _ in range(count):
            start = header(Type.INITIATION, random.getrandbits(32)) + os.urandom(32)
            yield start.ljust(SIZES[Type.INITIATION], b"\0")

    with capture(world.net.router, "evil", f"udp port {PORT}") as seen:
        sent = mallory.send(initiations(2000), OWN, client)
    answers = [data for source, _, data in payloads(seen.packets()) if source == client]
    assert len(answers) <= sent
    assert max(map(len, answers)) <= SIZES[Type.INITIATION]
    cookies = [data for data in answers if data[0] == Type.COOKIE]
    assert len(cookies) > len(answers) // 2
    assert json.loads(world.near.ctl("stats", "--json").stdout)["associations"] == 1
    mallory.send(initiations(500), OWN, client)
    untouched(world, talk, before)


def test_a_move_is_sealed_under_keys_that_exist(world: World) -> None:
    talk = world.talk()
    world.settled(talk)
    with capture(world.net.router, "eth", f"udp port {PORT}") as seen:
        world.client.lose("wifi")
        world.moves.wait("moved", *addresses(world.client, "eth"))
        world.settled(talk)
    said = payloads(seen.packets())
    assert {data[0] for *_, data in said} == {Type.SEALED}
    assert not any(b"2001:db8" in data for *_, data in said)
    world.finish(talk)


def reason_of(world: World, talk: Conversation) -> str:
    record = talk.ask("record")
    assert (record.state, record.mobile) == ("plain", False)
    assert talk.ask("echo", b"Hello Server 1!")
    return str(record.reason)


def test_another_key_than_the_pinned_one_is_refused(lab: Lab) -> None:
    wrong = fingerprint.fingerprint(b"w" * 32)
    world = World(lab, extra=f'[[peers.pin]]\nname = "{NAME}"\nkey = "{wrong}"\n')
    reason = reason_of(world, world.talk(apps.hold))
    assert reason.startswith(f"{NAME}: refused, its key ")
    assert "is not the one pinned" in reason


def test_only_who_is_pinned_may_come_where_that_is_asked_for(lab: Lab) -> None:
    world = World(lab)
    world.far.stop()
    (world.far.directory / "sessiond.toml.d" / "60-trust.toml").write_text(
        '[peers]\ntrust = "pinned"\n'
    )
    world.far.start()
    talk = world.talk(apps.hold)
    assert "no sessiond answered" in reason_of(world, talk)
    assert "only pinned keys are accepted" in world.far.log


def test_a_changed_key_is_refused_until_it_is_forgotten(world: World) -> None:
    first = world.talk()
    assert world.record(first).mobile
    world.far.stop()
    (world.far.directory / "host_key").unlink()
    world.far.start()
    reason = reason_of(world, world.talk(apps.hold))
    assert reason.startswith(f"{NAME}: refused, its key is ")
    assert reason.endswith(f"if it has: sessionctl peers forget {NAME}")
    assert reason in world.near.log
    world.near.ctl("peers", "forget", NAME)
    assert world.talk(apps.hold).ask("record").mobile


@pytest.mark.parametrize("end", ["near", "far"])
def test_after_a_restart_at_one_end_they_meet_again(world: World, end: str) -> None:
    old = world.talk(apps.hold)
    daemon = getattr(world, end)
    key = (daemon.directory / "host_key").read_bytes()
    daemon.kill()
    daemon.start()
    world.moves, world.theirs = world.watch(world.near), world.watch(world.far)
    new = world.talk()
    assert new.session
    assert old.ask("echo", b"Hello Server 1!")
    world.client.lose("wifi")
    world.moves.wait("moved", session=new.session)
    world.settled(new)
    new.end()
    assert (daemon.directory / "host_key").read_bytes() == key


def test_state_is_for_the_daemon_alone(world: World) -> None:
    world.talk()
    for name in ("host_key", "known_peers"):
        path = world.near.directory / name
        until(path.exists, f"{name} written")
        assert path.stat().st_mode & 0o777 == 0o600
