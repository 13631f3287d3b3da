"""Two unprivileged users on one host: each sees and moves its own sessions only."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from libhsock.client import Client
from tests.netns import apps
from tests.netns.session_support import NAME, Conversation, World, addresses
from tests.support.lab import Lab
from tests.support.worker import Talk

ALICE, BOB = 61001, 61002


@pytest.fixture
def world(lab: Lab) -> World:
    world = World(lab)
    lab.directory.chmod(0o711)  # the daemon's socket is for everybody
    return world


def ctl(world: World, uid: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """sessionctl as a user. CAP_DAC_READ_SEARCH lets it read Python where that is in /root."""
    return world.client.run(
        *("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"),
        *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
        *(sys.executable, "-m", "sessiond.ctl", *arguments),
        check=False,
        env=world.near.environment,
    )


def user_talk(world: World, uid: int) -> Conversation:
    return world.talk(apps.threads, NAME, 0, uid)


def test_users_see_and_move_only_their_own(world: World) -> None:
    alice, bob = user_talk(world, ALICE), user_talk(world, BOB)
    assert alice.session
    assert bob.session
    for uid, own, other in ((ALICE, alice, bob), (BOB, bob, alice)):
        listed = json.loads(ctl(world, uid, "list", "--json").stdout)
        assert [(one["session"], one["uid"]) for one in listed] == [(own.session, uid)]
        for verb in (("show",), ("rebind",), ("monitor",)):
            refused = ctl(world, uid, *verb, other.session or "")
            unknown = ctl(world, uid, *verb, "0" * 32)
            assert (refused.returncode, unknown.returncode) == (4, 4), refused
            same = refused.stderr.replace(other.session or "", "0" * 32)
            assert same == unknown.stderr  # nothing tells that it exists
        moved = ctl(world, uid, "rebind", own.session or "", "--to", "eth")
        assert moved.returncode == 0, moved.stderr
    listed = json.loads(world.near.ctl("list", "--json").stdout)
    assert {one["session"]: one["moves"] for one in listed} == {alice.session: 1, bob.session: 1}
    world.client.lose("eth")
    world.moves.wait("moved", *addresses(world.client, "wifi"))
    world.moves.wait("moved", *addresses(world.client, "wifi"))
    world.finish(alice, bob)


def listen(talk: Talk, daemon: str, uid: int) -> set[str]:
    """Whose events a user hears until two moves were among them."""
    apps.as_user(uid)
    heard, moves = set(), 0
    with Client(daemon, name="test") as client, client.events(timeout=20) as events:
        talk.tell("listening")
        while moves < 2:
            event = events.next()
            heard.add(event.session)
            moves += event.kind == "moved"
    return heard


def test_users_hear_and_count_only_their_own(world: World) -> None:
    alice, bob = user_talk(world, ALICE), user_talk(world, BOB)
    listener = world.client.fork(listen, world.near.socket, ALICE)
    assert listener.hear() == "listening"
    for uplink in ("wifi", "eth"):
        world.client.lose(uplink)
        world.moves.wait("moved", session=alice.session)
        world.client.gain("wifi")
    assert listener.result() == {alice.session}
    assert {event.session for event in world.moves.seen} == {alice.session, bob.session}
    counted = json.loads(ctl(world, ALICE, "stats", "--json").stdout)
    assert sum(n for name, n in counted.items() if name.startswith("sessions.")) == 1
    assert not any(name.startswith("refused") or name == "peers" for name in counted)
    world.finish(alice, bob)
