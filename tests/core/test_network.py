"""Snapshots, and the rtnetlink messages they are made of."""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink import rtnl
from pyroute2.netlink.rtnl import ifaddrmsg, ifinfmsg

from sessiond.core import rtnetlink as nl
from sessiond.core.network import Address, Network, Route
from sessiond.core.rtnetlink import Doubt, Tables, messages

A = Address("192.0.2.1", 24, "eth0")
B = Address("192.0.2.2", 24, "eth1")
R = Route("0.0.0.0/0", "eth0", 100)
UP = nl.IFF_UP | nl.IFF_RUNNING | nl.IFF_LOWER_UP


def attribute(kind: int, value: bytes) -> bytes:
    return nl.ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def link(index: int, name: str, flags: int = UP, family: int = 0) -> bytes:
    return nl.LINK.pack(family, 1, index, flags, 0) + attribute(3, name.encode() + b"\0")


def address(index: int, text: str, prefix: int, flags: int = 0, scope: int = 0) -> bytes:
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    raw = socket.inet_pton(family, text)
    head = nl.ADDRESS.pack(family, prefix, flags & 0xFF, scope, index)
    return head + attribute(nl.IFA_ADDRESS, raw) + attribute(nl.IFA_FLAGS, nl.U32.pack(flags))


def tables(*links: bytes, allow_loopback: bool = False) -> Tables:
    made = Tables(allow_loopback=allow_loopback, max_routes=10)
    for one in links:
        made.apply(nl.RTM_NEWLINK, 0, one)
    return made


def test_a_snapshot_is_compared_by_what_it_holds() -> None:
    one, same = Network((A,), (R,)), Network((A,), (R,))
    assert one == same
    assert hash(one) == hash(same)
    assert one != Network((A,))
    assert replace(one, routes=()) == Network((A,))


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [
        (Network((A,), (R,)), Network((A,), (R,)), False),
        (Network((A,), (R,)), Network((B, A), (R,)), False),
        (Network((A, B), (R,)), Network((B, A), (R,)), False),
        (Network((A,), (R,)), Network((A,)), True),
        (Network((A,), (R,)), Network((B,), (R,)), True),
        (Network(), Network((A,)), False),
    ],
)
def test_losses_are_told_from_gains(before: Network, after: Network, lost: bool) -> None:
    assert before.lost_in(after) is lost


def test_an_address_is_found_on_its_interfaces() -> None:
    twice = Network((A, B, Address("192.0.2.1", 24, "eth2")))
    assert twice.interfaces_of("192.0.2.1") == ["eth0", "eth2"]
    assert twice.interfaces_of("192.0.2.9") == []


def test_the_constants_are_pyroute2s() -> None:
    names = [name for name in vars(nl) if name.startswith(("RTM_NEW", "RTM_DEL"))]
    assert len(names) >= 7
    for name in names:
        if hasattr(rtnl, name):
            assert getattr(rtnl, name) == getattr(nl, name), name
    for module, prefix in ((ifaddrmsg, "IFA_F_"), (ifinfmsg, "IFF_")):
        for name in (name for name in vars(nl) if name.startswith(prefix)):
            assert getattr(module, name) == getattr(nl, name), name


def test_a_temporary_address_comes_first_and_a_secondary_one_last() -> None:
    made = tables(link(2, "eth0"))
    for text, prefix, flags in (
        ("2001:db8::1", 64, 0),
        ("2001:db8::2", 64, nl.IFA_F_SECONDARY),
        ("192.0.2.1", 24, nl.IFA_F_SECONDARY),
        ("192.0.2.2", 24, 0),
    ):
        assert made.apply(nl.RTM_NEWADDR, 0, address(2, text, prefix, flags))
    found = [own.address for own in made.network().addresses]
    assert found == ["192.0.2.2", "192.0.2.1", "2001:db8::2", "2001:db8::1"]


@pytest.mark.parametrize("flag", [nl.IFA_F_TENTATIVE, nl.IFA_F_DADFAILED, nl.IFA_F_DEPRECATED])
def test_an_address_that_must_not_be_used_goes_and_comes_back(flag: int) -> None:
    made = tables(link(2, "eth0"))
    for flags, there in ((flag, False), (0, True), (flag, False), (0, True)):
        assert made.apply(nl.RTM_NEWADDR, 0, address(2, "2001:db8::1", 64, flags))
        assert bool(made.network().addresses) is there


@pytest.mark.parametrize("missing", [nl.IFF_UP, nl.IFF_RUNNING, nl.IFF_LOWER_UP])
def test_an_address_needs_its_link(missing: int) -> None:
    made = tables(link(2, "eth0"))
    made.apply(nl.RTM_NEWADDR, 0, address(2, "192.0.2.1", 24))
    assert made.apply(nl.RTM_NEWLINK, 0, link(2, "eth0", UP & ~missing))
    assert made.network() == Network()
    assert made.apply(nl.RTM_NEWLINK, 0, link(2, "eth0"))
    assert made.network().addresses == (A,)


def test_a_bridge_letting_a_port_go_deletes_no_link() -> None:
    made = tables(link(2, "eth0"))
    made.apply(nl.RTM_NEWADDR, 0, address(2, "192.0.2.1", 24))
    assert not made.apply(nl.RTM_DELLINK, 0, link(2, "eth0", family=socket.AF_BRIDGE))
    assert made.network().addresses == (A,)


def test_repeated_messages_change_nothing() -> None:
    made = tables(link(2, "eth0"))
    assert made.apply(nl.RTM_NEWADDR, 0, address(2, "192.0.2.1", 24))
    assert not made.apply(nl.RTM_NEWADDR, 0, address(2, "192.0.2.1", 24))
    assert not made.apply(nl.RTM_NEWLINK, 0, link(2, "eth0"))
    assert not made.apply(nl.RTM_DELADDR, 0, address(2, "192.0.2.7", 24))


def test_an_address_on_an_unknown_link_is_a_doubt() -> None:
    with pytest.raises(Doubt):
        tables().apply(nl.RTM_NEWADDR, 0, address(2, "192.0.2.1", 24))


KINDS = [nl.RTM_NEWLINK, nl.RTM_DELLINK, nl.RTM_NEWADDR, nl.RTM_DELADDR, nl.RTM_NEWROUTE]
GENUINE = [link(2, "eth0"), address(2, "192.0.2.1", 24), address(2, "2001:db8::1", 64)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(KINDS),
            st.sampled_from(GENUINE) | st.binary(max_size=80),
            st.integers(0, 79),
            st.integers(0, 255),
        ),
        max_size=8,
    )
)
def test_malformed_messages_are_doubts(sent: list[tuple[int, bytes, int, int]]) -> None:
    made = tables(link(2, "eth0"))
    for kind, data, at, flip in sent:
        bent = bytearray(data)
        if at < len(bent):
            bent[at] ^= flip
        try:
            made.apply(kind, 0, bytes(bent))
        except (Doubt, struct.error):
            continue
        made.network()


@given(st.binary(max_size=100))
def test_a_malformed_datagram_ends_in_a_doubt_or_in_messages(data: bytes) -> None:
    with contextlib.suppress(Doubt):
        assert sum(16 + len(body) for _, _, body in messages(data)) <= len(data)
