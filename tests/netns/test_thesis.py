"""Chapter 4 of the thesis, on the wire: its seven rebinds, in its steps, at both ends.

The thesis has the server's endpoint change and names the rebind from each side: what is a
destination address to the client is a source address to the server. Here either end's may change,
named from the client's side, and either end begins: what one begins with as its source the other
follows as its destination. IPv4, IPv6, and from one to the other.

The thesis synchronised its two ends "manually in the test program by certain timer"; the engines
are driven in the order of handover.md section 4.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import pytest

from sessiond.core.tuples import Endpoint, FourTuple
from sessiond.rebind import filters
from sessiond.rebind import linux as lx
from sessiond.rebind.process import Process
from tests.netns import thesis_support as thesis
from tests.netns.moves_support import End, Moved, Refused, hand_over
from tests.support.capture import Capture, capture
from tests.support.lab import Host, Lab, missing
from tests.support.wait import until

Network = tuple[Host, Host]
Rebind = tuple[str, ...]

REBINDS: dict[str, Rebind] = {
    "4.1 destination address": ("daddr",),
    "4.2 source address": ("saddr",),
    "4.3 both addresses": ("saddr", "daddr"),
    "4.4 destination port": ("dport",),
    "4.5 source port": ("sport",),
    "4.6 both ports": ("sport", "dport"),
    "4.7 all four": ("saddr", "daddr", "sport", "dport"),
}

seven = pytest.mark.parametrize("rebind", REBINDS.values(), ids=REBINDS.keys())
either_mover = pytest.mark.parametrize("mover", ["client", "server"])
both_versions = pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if why_not := missing("ip", "tcpdump"):
        pytest.skip(why_not)
    with Lab() as lab:
        yield thesis.thesis_network(lab)


class Conversation:
    """The thesis's steps 1 and 2 are done; the ends can be rebound.

    ``with`` stops the two programs where a test fails.
    """

    def __init__(
        self,
        network: Network,
        version: int,
        family: int,
        *,
        bind: bool = False,
        hold_acks: bool = False,
    ) -> None:
        host, server_host = network
        self.server = server_host.fork(thesis.serve, family)
        assert self.server.hear() == "listening"
        address = Endpoint(thesis.SERVER[version], thesis.SERVER_PORT)
        own = Endpoint(thesis.CLIENT[version], thesis.NEW_CLIENT_PORT + 1) if bind else None
        self.client = host.fork(thesis.connect, family, address, own, hold_acks)
        fd, server_fd = self.client.hear(), self.server.hear()
        if hold_acks:
            _let_in(self.client.pid, fd)
        else:
            _await_acknowledged(self.client.pid, fd)
        self.ends = {
            "client": End(host, self.client.pid, fd),
            "server": End(server_host, self.server.pid, server_fd),
        }
        self.before = self.ends["client"].tuple
        assert self.before.local.address == thesis.CLIENT[version]
        assert self.before.remote == address
        near, far = (self.ends[name].facts for name in ("client", "server"))
        assert (near.isn_local, near.isn_remote) == (far.isn_remote, far.isn_local)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.client.stop()
        self.server.stop()

    def rebind(self, mover: str, target: FourTuple) -> Moved | Refused:
        """Step 3, at both ends. The target is as the client sees it."""
        if mover == "client":
            return hand_over(self.ends["client"], self.ends["server"], target)
        return hand_over(self.ends["server"], self.ends["client"], target.mirrored())

    def finish(self) -> None:
        """Steps 4 to 6."""
        self.client.tell("go on")
        assert self.client.result() == (thesis.THIRD, b"")
        assert self.server.result() == thesis.FIRST + thesis.SECOND


def _let_in(pid: int, fd: int) -> None:
    with Process.of(pid).take(fd) as sock:
        filters.put_back(sock, b"")


def _await_acknowledged(pid: int, fd: int) -> None:
    with Process.of(pid).take(fd) as sock:
        until(lambda: not lx.queue_length(sock, lx.SIOCOUTQ), "the first message's acknowledgement")


@contextmanager
def captured(network: Network) -> Iterator[Capture]:
    """All of it, as the server's interface sees it."""
    with capture(network[1], "eth0", "tcp") as wire:
        yield wire


def rebound(before: FourTuple, what: Rebind, version: int) -> FourTuple:
    """The client's tuple after a rebind."""
    (saddr, sport), (daddr, dport) = before
    return FourTuple(
        Endpoint(
            thesis.NEW_CLIENT[version] if "saddr" in what else saddr,
            thesis.NEW_CLIENT_PORT if "sport" in what else sport,
        ),
        Endpoint(
            thesis.NEW_SERVER[version] if "daddr" in what else daddr,
            thesis.NEW_SERVER_PORT if "dport" in what else dport,
        ),
    )


def check(wire: Capture, before: FourTuple, after: FourTuple) -> None:
    thesis.check_wire([thesis.dissect(one) for one in wire.segments()], before, after)


def family_of(version: int) -> int:
    return socket.AF_INET6 if version == 6 else socket.AF_INET


@seven
@either_mover
@both_versions
def test_rebind_keeps_the_connection(
    network: Network, version: int, mover: str, rebind: Rebind
) -> None:
    with (
        captured(network) as wire,
        Conversation(network, version, family_of(version)) as conversation,
    ):
        before = conversation.before
        after = rebound(before, rebind, version)
        assert conversation.rebind(mover, after) == Moved(pending=False, resent=0)
        assert conversation.ends["client"].tuple == after
        assert conversation.ends["server"].tuple == after.mirrored()
        conversation.finish()
    check(wire, before, after)


@pytest.mark.parametrize("ports", [(), ("sport", "dport")], ids=["addresses", "all four"])
@either_mover
@pytest.mark.parametrize(("version", "new"), [(4, 6), (6, 4)], ids=["4to6", "6to4"])
def test_family_switch_keeps_the_connection(
    network: Network, version: int, new: int, mover: str, ports: Rebind
) -> None:
    with (
        captured(network) as wire,
        Conversation(network, version, socket.AF_INET6) as conversation,
    ):
        before = conversation.before
        after = rebound(before, ("saddr", "daddr", *ports), new)
        assert conversation.rebind(mover, after) == Moved(pending=False, resent=0)
        conversation.finish()
    check(wire, before, after)


@seven
@either_mover
@both_versions
def test_rebind_with_the_first_message_unacknowledged(
    network: Network, version: int, mover: str, rebind: Rebind
) -> None:
    """Received, but its acknowledgement is not: the peers' counts settle it, nothing is resent."""
    with (
        captured(network) as wire,
        Conversation(network, version, family_of(version), hold_acks=True) as conversation,
    ):
        before = conversation.before
        after = rebound(before, rebind, version)
        assert conversation.rebind(mover, after) == Moved(pending=mover == "client", resent=0)
        conversation.finish()
    check(wire, before, after)


# What a stock kernel can't do in place (handover.md section 3, Ports) is refused, with the reason.


@either_mover
@both_versions
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (("sport",), "its port {bound.port} was bound explicitly and can't become {new.port}"),
        (("saddr",), "it was bound to {bound} explicitly and can't leave it"),
    ],
    ids=["port", "address"],
)
def test_client_that_bound_itself_is_not_moved(
    network: Network, version: int, mover: str, what: Rebind, reason: str
) -> None:
    def refused(conversation: Conversation) -> tuple[FourTuple, FourTuple]:
        before = conversation.before
        target = rebound(before, what, version)
        why = reason.format(bound=before.local, new=target.local)
        assert conversation.rebind(mover, target) == Refused(why)
        return before, before

    _still_talks(network, version, refused, bind=True)


@either_mover
@both_versions
def test_server_port_moves_only_once(network: Network, version: int, mover: str) -> None:
    def twice(conversation: Conversation) -> tuple[FourTuple, FourTuple]:
        before = conversation.before
        once = rebound(before, ("dport",), version)
        assert isinstance(conversation.rebind("client", once), Moved)
        again = once._replace(remote=once.remote._replace(port=thesis.NEWER_SERVER_PORT))
        outcome = conversation.rebind(mover, again)
        assert isinstance(outcome, Refused)
        assert outcome.reason == "its port 1234 was bound explicitly and can't become 4321"
        return before, once

    _still_talks(network, version, twice)


def _still_talks(
    network: Network,
    version: int,
    move: Callable[[Conversation], tuple[FourTuple, FourTuple]],
    *,
    bind: bool = False,
) -> None:
    """After a refusal: on the tuple before it, to the end."""
    with (
        captured(network) as wire,
        Conversation(network, version, family_of(version), bind=bind) as conversation,
    ):
        before, after = move(conversation)
        assert conversation.ends["client"].tuple == after
        assert conversation.ends["server"].tuple == after.mirrored()
        conversation.finish()
    check(wire, before, after)


def test_wire_check_sees_a_broken_conversation() -> None:
    """The check itself: what it must not let through."""
    a = FourTuple(Endpoint("10.0.0.1", 40000), Endpoint("10.0.0.2", 10000))
    b = FourTuple(Endpoint("10.0.0.1", 40000), Endpoint("10.0.0.3", 10000))
    segment = thesis.Segment
    good = [
        segment(a, "S", 100, 0, b""),
        segment(a.mirrored(), "SA", 900, 101, b""),
        segment(a, "A", 101, 901, b""),
        segment(a, "PA", 101, 901, thesis.FIRST),
        segment(a.mirrored(), "A", 901, 116, b""),
        segment(b, "PA", 116, 901, thesis.SECOND),
        segment(b.mirrored(), "PA", 901, 131, thesis.THIRD),
        segment(b, "A", 131, 916, b""),
        segment(b.mirrored(), "FA", 916, 131, b""),
        segment(b, "FA", 131, 917, b""),
        segment(b.mirrored(), "A", 917, 132, b""),
    ]
    thesis.check_wire(good, a, b)
    reset = segment(b.mirrored(), "R", 901, 0, b"")
    twice = [*good[:6], good[5], *good[6:]]
    skipped = [*good[:5], good[5]._replace(seq=117), *good[6:]]
    elsewhere = [*good[:5], good[5]._replace(tuple=a), *good[6:]]
    dialled = [*good[:5], segment(b, "S", 116, 0, b""), *good[5:]]
    for broken in ([*good[:6], reset, *good[6:]], twice, skipped, elsewhere, dialled, good[:-1]):
        with pytest.raises(AssertionError):
            thesis.check_wire(broken, a, b)
