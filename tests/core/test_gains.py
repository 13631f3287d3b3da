"""Who acts on new addresses before the network has settled: whoever has no path, nobody else."""

from __future__ import annotations

from sessiond.core.paths import Policy
from sessiond.core.session import State

from .host import ETH, ETH6, PEER, PEER6, WIFI, Host


def waiting(*peer_addresses: str) -> Host:
    """A host whose session has had its path for long, and lost it."""
    host = Host()
    host.bound(*peer_addresses)
    host.now = 100.0
    host.have()
    assert host.state() is State.WAITING
    return host


def test_a_waiting_session_takes_its_path_at_once() -> None:
    host = waiting()
    host.have(WIFI, settled=False)
    (target,) = host.departing()
    assert target is not None
    assert target.local.address == WIFI
    host.move()
    host.have(WIFI)
    assert host.state() is State.ESTABLISHED
    assert len(host.departing()) == 1


def test_an_address_that_leads_nowhere_yet_changes_nothing() -> None:
    host = waiting()
    host.have(ETH6, settled=False)
    assert host.state() is State.WAITING
    assert host.session.generation == 0
    assert host.core.deadline() is None


def test_it_waits_for_the_family_that_policy_prefers() -> None:
    host = waiting(PEER, PEER6)
    host.have(ETH, settled=False)
    assert not host.departing()
    host.have(ETH, ETH6, settled=False)
    (target,) = host.departing()
    assert target is not None
    assert target.local.address == ETH6


def test_no_longer_than_until_all_is_quiet() -> None:
    host = waiting(PEER, PEER6)
    host.have(ETH, settled=False)
    host.have(ETH)
    assert len(host.departing()) == 1


def test_a_path_that_flaps_has_to_settle() -> None:
    host = waiting()
    host.have(WIFI, settled=False)
    host.move()
    host.now += 1
    host.have()
    assert host.session.flaps == 1
    host.have(WIFI, settled=False)
    assert host.state() is State.WAITING
    host.have(WIFI)
    assert len(host.departing()) == 2


def test_a_session_with_a_path_waits_for_quiet() -> None:
    host = Host(Policy(prefer=("wifi",)))
    host.bound()
    host.now = 100.0
    host.have(ETH, WIFI, settled=False)
    assert host.state() is State.ESTABLISHED
    host.have(ETH, WIFI)
    assert host.state() is State.PREPARING


def test_peers_are_told_when_all_is_quiet() -> None:
    host = Host()
    host.bound()
    host.have(ETH, WIFI, settled=False)
    before = len(host.sent)
    host.have(ETH, WIFI)
    assert len(host.sent) == before + 1
