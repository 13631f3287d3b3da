"""Moves at a user's or an application's wish, and what both are told of them."""

from __future__ import annotations

import asyncio
import itertools
import json
import select
import subprocess
import sys

import pytest

import libhsock
from libhsock.aclient import AsyncClient
from tests.netns import apps
from tests.netns.session_support import Conversation, World
from tests.support.host import stop
from tests.support.lab import Lab
from tests.support.worker import Talk


@pytest.fixture
def world(lab: Lab) -> World:
    return World(lab)


@pytest.fixture
def talk(world: World) -> Conversation:
    return world.talk()


def test_sessionctl_moves_it_to_an_interface_and_to_an_address(
    world: World, talk: Conversation
) -> None:
    assert talk.session
    before = world.client.counters(), world.server.counters()
    done = world.near.ctl("rebind", talk.session, "--to", "eth")
    assert "moved" in done.stdout
    assert world.settled(talk).local.startswith(f"[{world.client.address('eth', 6)}]")
    wifi = world.client.address("wifi", 4)
    shown = json.loads(world.near.ctl("rebind", talk.session[:8], "--to", wifi, "--json").stdout)
    assert shown["local"].startswith(f"{wifi}:")
    world.settled(talk)
    # Make before break: both tuples work, and nothing of the stream meets the wrong one.
    after = world.client.counters(), world.server.counters()
    for earlier, later in zip(before, after, strict=True):
        assert later["OutRsts"] == earlier["OutRsts"]
        assert later["TCPTimeouts"] == earlier["TCPTimeouts"]
    world.finish(talk)


def test_every_verb_answers_people_and_programs(world: World, talk: Conversation) -> None:
    assert talk.session
    assert talk.session[:8] in world.near.ctl("list").stdout
    assert "engine repair" in world.near.ctl("show", talk.session).stdout
    assert "wifi" in world.near.ctl("network").stdout
    assert "sessions.established" in world.near.ctl("stats").stdout
    (listed,) = json.loads(world.near.ctl("list", "--json").stdout)
    shown = json.loads(world.near.ctl("show", talk.session, "--json").stdout)
    assert listed["session"] == shown["session"] == talk.session
    network = json.loads(world.near.ctl("network", "--json").stdout)
    assert {"address": "10.0.1.2", "prefix": 24, "interface": "wifi"} in network["addresses"]
    assert {"destination": "0.0.0.0/0", "interface": "wifi", "metric": 100} in network["routes"]
    assert json.loads(world.near.ctl("stats", "--json").stdout)["sessions.established"] == 1
    world.finish(talk)


def test_the_accepting_end_can_be_moved_too(world: World, talk: Conversation) -> None:
    assert talk.session
    world.far.ctl("rebind", talk.session, "--to", "lan1")
    assert world.settled(talk).remote.startswith(f"[{world.server.address('lan1', 6)}]")
    world.finish(talk)


def test_a_destination_that_is_not_there_is_refused(world: World, talk: Conversation) -> None:
    assert talk.session
    for where in ("eth7", "192.0.2.1", "2001:db8:ffff::1", "lo"):
        done = world.near.ctl("rebind", talk.session, "--to", where, check=False)
        assert done.returncode == 1
        assert f"{where} is not usable for this session: see 'sessionctl network'" in done.stderr
    assert world.record(talk).moves == 0
    world.finish(talk)


def test_an_unknown_session_is_not_found(world: World, talk: Conversation) -> None:
    done = world.near.ctl("rebind", "0" * 32, check=False)
    assert done.returncode == 4
    assert "no session" in done.stderr
    world.finish(talk)


def test_a_dead_path_is_refused_and_the_old_one_keeps_working(
    world: World, talk: Conversation
) -> None:
    assert talk.session
    for family in ("-4", "-6"):
        world.net.router.run("ip", family, "rule", "add", "iif", "eth", "pref", "10", "blackhole")
    done = world.near.ctl("rebind", talk.session, "--to", "eth", check=False)
    assert done.returncode == 1
    assert "did not answer" in done.stderr
    record = world.settled(talk)
    assert (record.moves, record.state) == (0, "established")
    assert record.local.startswith(f"[{world.client.address('wifi', 6)}]")
    world.finish(talk)


def test_two_requests_at_once_have_one_winner_and_one_refusal(
    world: World, talk: Conversation
) -> None:
    assert talk.session

    async def both() -> list[object]:
        one, two = (AsyncClient(world.near.socket, name="test") for _ in "12")
        asked = (client.rebind(talk.session or "", "eth") for client in (one, two))
        answers: list[object] = [*await asyncio.gather(*asked, return_exceptions=True)]
        one.close()
        two.close()
        return answers

    answers = asyncio.run(both())
    assert sorted(type(one).__name__ for one in answers) == ["Record", "Refused"]
    world.settled(talk)
    world.finish(talk)


def test_an_application_moves_its_own_connection(world: World) -> None:
    world.serve()
    talk = world.talk(apps.hold)
    assert talk.ask("wait_mobile") is True
    assert talk.ask("echo", b"Hello Server 1!")
    record = talk.ask("rebind", "eth")
    assert (record.moves, record.state) in {(1, "established"), (1, "moving")}
    local, _ = talk.ask("names")
    assert local[0] == world.client.address("eth", 6)
    assert talk.ask("echo", b"Hello Server 2!")
    with pytest.raises(libhsock.Refused, match="eth7 is not usable"):
        talk.ask("rebind", "eth7")
    assert talk.ask("echo", b"Hello Server 3!")


def follow_events(talk: Talk, daemon: str, name: str) -> list[tuple[str, str | None]]:
    """What an application is told of its own connection, synchronously, up to ``closed``."""
    apps.use(daemon)
    sock = apps.connect(talk, name)
    with sock.session.events(timeout=20) as events:
        talk.tell("listening")
        heard = []
        for event in events:
            heard.append((event.kind, event.reason))
            if event.kind == "moved" and len(heard) > 3:
                sock.close()
    return heard


def follow_events_async(talk: Talk, daemon: str, name: str) -> list[tuple[str, str | None]]:
    """The same with asyncio."""
    apps.use(daemon)

    async def follow() -> list[tuple[str, str | None]]:
        _, writer = await libhsock.open_connection(name, apps.PORT)
        session = libhsock.session(writer)
        assert await session.await_mobile(10)
        talk.tell((session.record.session, None))
        heard = []
        async with session.aevents() as events:
            talk.tell("listening")
            async for event in events:
                heard.append((event.kind, event.reason))
                if event.kind == "moved" and len(heard) > 3:
                    writer.close()
        return heard

    return asyncio.run(follow())


@pytest.mark.parametrize("app", [follow_events, follow_events_async])
def test_an_application_is_told_what_happens(world: World, app: object) -> None:
    world.serve()
    talk = world.talk(app)  # type: ignore[arg-type]
    assert talk.worker.hear() == "listening"
    world.client.lose("wifi")
    world.moves.wait("moved")
    world.settled(talk)
    world.client.lose("eth")
    world.moves.wait("waiting")
    world.client.gain("wifi")
    heard = talk.worker.result(20)
    kinds = [kind for kind, _ in heard]
    assert kinds[:2] == ["moving", "moved"], heard
    assert "waiting" in kinds, heard
    assert kinds[-2:] == ["moved", "closed"], heard
    assert all(reason for kind, reason in heard if kind == "waiting"), heard


def test_monitor_prints_each_event_as_a_line_of_json(world: World, talk: Conversation) -> None:
    assert talk.session
    monitor = world.client.popen(
        *(sys.executable, "-m", "sessiond.ctl", "monitor", "--json"),
        stdout=subprocess.PIPE,
        env=world.near.environment,
    )
    assert monitor.stdout is not None
    for to in itertools.cycle(("eth", "wifi")):  # until it listens, of which it does not tell
        world.moves.client.rebind(talk.session, to)
        if select.select([monitor.stdout], [], [], 0.1)[0]:
            break
    events = map(json.loads, monitor.stdout)
    moved = next(one for one in events if one["kind"] == "moved")
    assert moved["session"] == talk.session
    assert moved["engine"] == "repair"
    assert moved["gap_ms"] > 0
    assert moved["local"].endswith(world.record(talk).local.rpartition(":")[2])
    stop(monitor)
    world.finish(talk)
