"""BINDING: what a host says that has no daemon, and whom it is believed of."""

from __future__ import annotations

import pytest

from sessiond.core import effects as ef
from sessiond.core import events as ev
from sessiond.core import messages as m
from sessiond.core.binding import REFUSAL_PAUSE
from sessiond.core.session import State
from sessiond.core.tuples import Endpoint

from .host import ETH, PEER, PORT, TUPLE, Host


def binds(host: Host) -> list[m.Bind]:
    """Those it has sent."""
    return [one for one in host.sent if isinstance(one, m.Bind)]


def refuse(host: Host, address: str = PEER) -> None:
    """A host says that nothing listens there."""
    host.post(ev.Unreachable(Endpoint(address, PORT), ETH))


def test_a_host_that_says_twice_that_nothing_listens_is_believed() -> None:
    host = Host()
    refuse(host)
    assert host.state() is State.BINDING
    host.wait()
    assert host.now == REFUSAL_PAUSE
    assert len(binds(host)) == 2
    refuse(host)
    assert host.state() is State.PLAIN
    assert host.session.reason == (
        "no sessiond at 198.51.100.7: the host answered that nothing listens on UDP port 2006 "
        "(ICMP port unreachable)"
    )
    assert [report.kind for report in host.reports] == ["failed"]
    assert host.core.deadline() is None


def test_what_it_says_of_binds_sent_before_the_pause_counts_once() -> None:
    host = Host()
    host.wait()  # the second Bind
    for _ in binds(host):
        refuse(host)
    host.wait()
    assert host.state() is State.BINDING
    assert len(binds(host)) == 3


def test_a_daemon_that_was_only_restarting_is_met() -> None:
    host = Host()
    refuse(host)
    host.wait()
    host.bound()
    assert host.state() is State.ESTABLISHED


def test_once_silent_again_the_peer_is_given_up_as_any_silent_one() -> None:
    host = Host()
    refuse(host)
    while host.state() is State.BINDING:
        host.wait()
    assert host.session.reason == "no sessiond answered at 198.51.100.7:2006"
    assert len(binds(host)) == 6


def test_nobody_is_believed_of_a_session_that_is_one() -> None:
    host = Host()
    host.bound()
    for host.now in (10.0, 20.0):
        refuse(host)
    assert host.state() is State.ESTABLISHED
    assert host.core.deadline() is None


def test_of_another_host_it_says_nothing() -> None:
    host = Host()
    refuse(host, "198.51.100.8")
    assert host.session.refused_at is None


@pytest.mark.parametrize("end", ["refused", "bound", "gone"])
def test_who_asks_no_more_is_forgotten(end: str) -> None:
    host = Host()
    assert host.core.table.asking
    match end:
        case "refused":
            refuse(host)
            host.wait()
            refuse(host)
        case "bound":
            host.bound()
        case "gone":
            host.post(ev.Ended(1, "closed"))
    assert not host.core.table.asking


def test_where_the_wrong_host_answers_it_stays_plain_and_says_what_to_do() -> None:
    host = Host()
    host.post(ev.Untrusted(PEER, "another.test", "another.test: refused"))
    host.post(ev.Untrusted("198.51.100.8", PEER, "198.51.100.8: refused"))
    assert host.state() is State.BINDING
    host.post(ev.Untrusted(PEER, PEER, "refused, its key has changed: do this"))
    assert host.state() is State.PLAIN
    assert host.session.reason == "refused, its key has changed: do this"
    assert not host.core.table.asking


def bind_of_the_other_end(dialled: bool, id_: bytes) -> m.Bind:
    ends = Endpoint(PEER, 7000), Endpoint(ETH, 40000)
    proof = m.proof("bind", id_, 22, 11)
    return m.Bind(id_, 9, *ends, proof, (4, 6), (PEER,), dialled)


@pytest.mark.parametrize("dialled", [True, False])
def test_who_dialled_takes_no_word_of_others_who_read_the_wire(dialled: bool) -> None:
    host = Host()
    host.hear(bind_of_the_other_end(dialled, b"z" * 16))
    assert host.state() is State.BINDING
    host.bound()
    assert host.state() is State.ESTABLISHED


@pytest.mark.parametrize(
    ("dialled", "id_", "stands"),
    [(True, b"a" * 16, True), (False, b"a" * 16, False), (False, b"z" * 16, True)],
)
def test_who_does_not_know_who_dialled_gives_way(dialled: bool, id_: bytes, stands: bool) -> None:
    host = Host(role="attach")
    host.hear(bind_of_the_other_end(dialled, id_))
    assert (host.state() is State.ESTABLISHED) == stands


def test_a_bound_session_is_not_bound_to_another_host() -> None:
    host = Host()
    host.bound()
    before = len(host.sent)
    bind = bind_of_the_other_end(True, host.session.id)
    host.post(ev.Received(b"x" * 32, Endpoint(PEER, PORT), ETH, 1, bind))
    assert len(host.sent) == before
    assert host.core.refused["foreign session"] == 1


@pytest.mark.parametrize("vouched", [True, False])
def test_a_key_is_judged_by_a_name_only_where_that_leads_to_the_address(vouched: bool) -> None:
    host = Host()
    there = TUPLE._replace(local=Endpoint(ETH, 40001))
    effects = host.core.handle(
        ev.Attached(2, there, 33, 44, frozenset((4,)), "connect", "server.test", vouched=vouched),
        host.now,
    )
    (send,) = (one for one in effects if isinstance(one, ef.Send))
    assert send.peer == ("server.test" if vouched else PEER)
    assert host.core.table.sessions[2].name == "server.test"
