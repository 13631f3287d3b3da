"""A session without a path does not wait for the network to settle."""

from __future__ import annotations

import pytest

from tests.netns import apps
from tests.netns.session_support import World
from tests.support.lab import Lab

NEVER_SETTLED = "[policy]\ngain_debounce_ms = 3600000\n"


@pytest.fixture
def world(lab: Lab) -> World:
    return World(lab, extra=NEVER_SETTLED)


def test_a_path_that_comes_back_is_taken_before_the_network_has_settled(world: World) -> None:
    talk = world.talk(apps.hold)
    world.client.lose("eth")
    world.client.lose("wifi")
    world.moves.wait("waiting")
    world.client.gain("eth")
    world.moves.wait("moved", world.client.address("eth", 6))
    assert talk.ask("echo", b"Hello Server 1!")
