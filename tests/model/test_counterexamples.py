"""What the model has found (docs/model.md), with the real core."""

from __future__ import annotations

import pytest

from sessiond.core import effects as ef
from sessiond.core import events as ev
from sessiond.core.outcomes import Failed, Outcome
from sessiond.core.session import State
from tests.pair.test_handover import ETH, LAN0, LAN1, WIFI, bound, write
from tests.pair.world import Host, Socket, World


def with_two_addresses_each() -> tuple[World, Host, Host]:
    world, client, server = bound()
    client.have(WIFI, ETH)
    server.have(LAN0, LAN1)
    world.run(0.5)
    return world, client, server


def fail_once(monkeypatch: pytest.MonkeyPatch, host: Host, step: str) -> None:
    """Let one engine step fail, the first time it is asked for."""
    real = getattr(host, f"_{step}")
    left = [Failed("the process can't be stopped")]

    def one(*step: object) -> object:
        return left.pop() if left else real(*step)

    monkeypatch.setattr(host, f"_{step}", one)


def no_tombstone_when_following(monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    """As Repair.follow has it: only who departs leaves one."""
    real = host._follow

    def follow(sock: Socket, entry: ef.Step) -> Outcome:
        before = set(sock.tombstones)
        outcome = real(sock, entry)
        sock.tombstones &= before
        return outcome

    monkeypatch.setattr(host, "_follow", follow)


def test_a_mover_that_went_back_survives_the_rst_of_a_peer_that_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, client, server = with_two_addresses_each()
    no_tombstone_when_following(monkeypatch, server)
    client.post(ev.RebindAsked(1, ETH, None))
    world.run(0.025)  # Prepare and Prepared came; Move is on its way
    world.loss = 1.0  # of datagrams: nothing more is heard of the peer's daemon
    world.run(0.2)
    write(client)
    world.run(60)


def test_a_shield_that_fails_is_not_taken_for_the_departure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, client, server = bound()
    client.have(WIFI, ETH)
    world.run(0.5)
    fail_once(monkeypatch, client, "shield")
    server.post(ev.RebindAsked(1, None, None))
    world.run(0.0101)  # Prepare has come, the engine is at it
    client.have(ETH)
    world.run(5)


def test_a_shield_raised_while_departing_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    world, client, server = with_two_addresses_each()
    fail_once(monkeypatch, client, "depart")
    client.post(ev.RebindAsked(1, ETH, None))
    world.run(0.0102)
    server.post(ev.RebindAsked(1, LAN1, None))
    world.broken.add(LAN1)  # so that the server gives its own move up
    world.run(0.0102)
    world.run(60)
    (sock,) = client.sockets.values()
    assert not sock.shield


def test_a_settle_that_fails_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    world, client, server = with_two_addresses_each()
    fail_once(monkeypatch, server, "settle")
    client.have(ETH)
    world.run(60)
    (sock,) = server.sockets.values()
    assert not sock.shield


def test_an_end_that_has_left_does_not_rest_when_it_can_not_follow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, client, server = with_two_addresses_each()
    fail_once(monkeypatch, server, "follow")
    client.post(ev.RebindAsked(1, ETH, None))
    server.post(ev.RebindAsked(1, LAN1, None))
    for _ in range(600):
        world.run(0.0001)
        session = server.session()
        assert not (session.state is State.ESTABLISHED and session.departed)


def test_detaching_in_a_handover_frees_the_socket() -> None:
    world, client, server = with_two_addresses_each()
    client.post(ev.RebindAsked(1, ETH, None))
    world.run(0.012)
    (sock,) = server.sockets.values()
    assert sock.shield
    effects = server.core.handle(ev.Ended(1, "detached by its owner"), world.now)
    steps = {effect.step for effect in effects if isinstance(effect, ef.Run)}
    assert steps == {"release"}
    assert isinstance(effects[-1], ef.Forget)


def test_a_close_that_meets_a_departure_undoes_it() -> None:
    world, client, server = with_two_addresses_each()
    client.post(ev.RebindAsked(1, ETH, None))
    world.run(0.01035)  # Prepared is on its way
    server.post(ev.Ended(1, "detached by its owner"))
    world.run(60)
    (sock,) = client.sockets.values()
    assert client.session().state is State.PLAIN
    assert sock.window
    assert not sock.shield


def test_a_close_that_is_lost_is_told_again() -> None:
    world, client, server = with_two_addresses_each()
    client.post(ev.RebindAsked(1, ETH, None))
    world.run(0.035)
    assert server.session().state is State.FOLLOWING
    world.loss = 1.0  # Moved is on its way; Settled and Close are lost
    world.run(0.03)
    client.post(ev.Ended(1, "detached by its owner"))
    world.loss = 0.0
    world.run(5)
    assert server.session().state is State.PLAIN
    (sock,) = server.sockets.values()
    assert sock.window
    assert not sock.shield
