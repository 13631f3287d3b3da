"""Where a side has no sessiond, or loses it: plain TCP goes on, and says so."""

from __future__ import annotations

import signal
from typing import Literal

import pytest

from sessiond.core.binding import BIND_ATTEMPTS
from tests.netns import apps
from tests.netns.session_support import World, task_states
from tests.support.capture import capture
from tests.support.lab import Lab


@pytest.mark.parametrize("family", [4, 6])
def test_a_peer_without_sessiond_is_told_from_a_silent_one(lab: Lab, family: Literal[4, 6]) -> None:
    world = World(lab, server_daemon=False)
    world.echo = world.server.fork(apps.plain_echo)
    assert world.echo.hear() == "listening"
    peer = world.server.address("lan0", family)
    with capture(world.client, "wifi", "udp port 2006") as seen:
        talk = world.talk(apps.hold, peer)
        assert talk.ask("wait_mobile") is False
        record = talk.ask("record")
        assert (record.state, record.mobile) == ("plain", False)
        assert record.reason.startswith(f"no sessiond at {peer}: the host answered")
        assert talk.ask("echo", b"Hello Server 1!")
    packets = [one for one in seen.packets() if "ICMP" not in one.summary()]
    assert 2 <= len(packets) <= BIND_ATTEMPTS
    assert max(len(one) for one in packets) < 400


def test_without_a_daemon_it_is_plain_tcp_and_says_so(lab: Lab) -> None:
    world = World(lab, client_daemon=False)
    talk = world.talk(apps.hold, world.server.address("lan0", 6))
    assert talk.session is None
    record = talk.ask("record")
    assert (record.state, record.mobile, record.engine) == ("plain", False, None)
    assert "sessiond" in record.reason
    assert talk.ask("echo", b"Hello Server 1!")
    assert talk.ask("wait_mobile") is False


def test_the_peer_s_daemon_dies_and_tcp_goes_on(lab: Lab) -> None:
    world = World(lab)
    talk = world.talk()
    assert world.record(talk).mobile
    world.far.kill()
    done = world.near.ctl("rebind", talk.session or "", "--to", "eth", check=False)
    assert done.returncode == 1
    assert "did not answer" in done.stderr
    world.finish(talk)


@pytest.mark.parametrize("moving", [False, True])
def test_the_daemon_dies_and_the_application_never_notices(lab: Lab, moving: bool) -> None:
    world = World(lab)
    talk = world.talk(apps.hold)
    assert talk.ask("echo", b"Hello Server 1!")
    if moving:
        world.client.ip("link set dev eth down", "link set dev eth up")
        talk.ask("rebind", world.client.address("wifi", 4))
    world.near.kill()
    assert not task_states(talk.worker.pid) & {"T", "t"}
    assert talk.ask("filter") is None
    assert talk.ask("echo", b"Hello Server 2!" * 1000)
    record = talk.ask("record")
    assert (record.state, record.mobile) == ("plain", False)


def test_the_daemon_is_killed_in_the_middle_of_moves_and_nothing_stays_stopped(lab: Lab) -> None:
    world = World(lab)
    talks = [world.talk() for _ in range(4)]
    world.client.lose("wifi")
    world.moves.wait("moving")
    world.near.kill()
    for talk in talks:
        assert not task_states(talk.worker.pid) & {"T", "t"}


def test_sigterm_ends_it_cleanly_and_leaves_sockets_live(lab: Lab) -> None:
    world = World(lab)
    talk = world.talk(apps.hold)
    world.client.lose("wifi")
    world.moves.wait("moved")
    world.settled(talk)
    world.near.process.send_signal(signal.SIGTERM)
    assert world.near.process.wait(5) == 0
    assert "Traceback" not in world.near.log
    assert talk.ask("filter") is None
    assert talk.ask("echo", b"Hello Server 2!" * 1000)


def test_sigterm_amid_handovers_leaves_sockets_live(lab: Lab) -> None:
    world = World(lab)
    talks = [world.talk(apps.hold) for _ in range(3)]
    world.client.lose("wifi")
    world.moves.wait("moving")
    world.near.process.send_signal(signal.SIGTERM)
    assert world.near.process.wait(5) == 0
    for talk in talks:
        assert talk.ask("filter") is None
        assert talk.ask("echo", b"Hello Server 1!" * 1000)


def test_a_restarted_daemon_takes_new_connections(lab: Lab) -> None:
    world = World(lab)
    old = world.talk(apps.hold)
    world.near.kill()
    world.near.start()
    watch = world.watch(world.near)
    new = world.talk()
    assert new.session
    world.client.lose("wifi")
    watch.wait("moved", session=new.session)
    new.end()
    assert old.ask("record").state == "plain"
