"""What the kernel says about addresses, links and routes, and what is made of it.

+-- one namespace -----------------------+
|  va 192.0.2.1/24  <--veth-->  vb       |
|     2001:db8::1/64                     |
|     default via 192.0.2.254            |
+----------------------------------------+
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_network
from typing import Any

import pytest
from pyroute2.iproute import AsyncIPRoute

from sessiond.core.network import Address, Network, Route
from sessiond.edges.rtnl import NetworkWatch
from tests.support.inside import batch, command, in_own_network

V4 = Address("192.0.2.1", 24, "va")
V6 = Address("2001:db8::1", 64, "va")
DEFAULT = Route("0.0.0.0/0", "va", 0)
NEVER = 3600.0
SECOND_LINK = ("link add vc type veth peer name vd", "link set vd up", "link set vc up")


class Changes(asyncio.Queue[tuple[Network, Network]]):
    """What was reported, in order; and when."""

    watch: NetworkWatch

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[float, Network, Network]] = []
        self.settled: list[tuple[float, Network]] = []

    def note(self, before: Network, after: Network) -> None:
        self.all.append((time.perf_counter(), before, after))
        if self.watch.settled:
            self.settled.append((time.perf_counter(), after))
        self.put_nowait((before, after))

    async def next(self) -> tuple[Network, Network]:
        return await asyncio.wait_for(self.get(), 5)


@asynccontextmanager
async def watching(**options: Any) -> AsyncIterator[tuple[NetworkWatch, Changes]]:
    changes = Changes()
    changes.watch = watch = NetworkWatch(changes.note, **options)
    try:
        await watch.start()
        yield watch, changes
    finally:
        watch.close()


def set_up() -> None:
    batch(
        [
            "link add va type veth peer name vb",
            "link set vb up",
            "link set va up",
            "addr add 192.0.2.1/24 dev va",
            "addr add 2001:db8::1/64 dev va nodad",
            "route add default via 192.0.2.254",
        ]
    )


LOSSES = {
    "an IPv4 address": ([], "ip addr del 192.0.2.1/24 dev va", {V4}, {DEFAULT}),
    "an IPv6 address": ([], "ip addr del 2001:db8::1/64 dev va", {V6}, set()),
    "the link": ([], "ip link set va down", {V4, V6}, {DEFAULT}),
    "the carrier": ([], "ip link set vb down", {V4, V6}, {DEFAULT}),
    "the interface": ([], "ip link del va", {V4, V6}, {DEFAULT}),
    "its name": ([], "ip link set va name vx", {V4, V6}, {DEFAULT}),
    "a family": ([], "sysctl -qw net.ipv6.conf.va.disable_ipv6=1", {V6}, set()),
    "preference, IPv6": (
        [],
        "ip addr change 2001:db8::1/64 dev va preferred_lft 0 valid_lft 1000",
        {V6},
        set(),
    ),
    "preference, IPv4": (
        [],
        "ip addr change 192.0.2.1/24 dev va preferred_lft 0 valid_lft 1000",
        {V4},
        set(),
    ),
    "the default route": ([], "ip route del default", set(), {DEFAULT}),
    "the default route, replaced": (
        [*SECOND_LINK, "addr add 198.51.100.1/24 dev vc"],
        "ip route replace default via 198.51.100.9",
        set(),
        {DEFAULT},
    ),
    "one of a route's ways": (
        [
            *(*SECOND_LINK, "addr add 198.51.100.1/24 dev vc"),
            "route add 203.0.113.0/24 nexthop via 192.0.2.9 nexthop via 198.51.100.9",
        ],
        "ip link set vc down",
        {Address("198.51.100.1", 24, "vc")},
        {Route("203.0.113.0/24", "vc", 0)},
    ),
    "one of a route's ways, IPv6": (
        [
            "route add 2001:db8:9::/48 metric 7 nexthop via 2001:db8::9 nexthop via 2001:db8::8",
            *(*SECOND_LINK, "addr add 2001:db8:2::1/64 dev vc nodad"),
            "route append 2001:db8:9::/48 metric 7 via 2001:db8:2::9",
        ],
        "ip -6 route del 2001:db8:9::/48 via 2001:db8:2::9",
        set(),
        {Route("2001:db8:9::/48", "vc", 7)},
    ),
    "a route with the address it prefers": (
        ["addr add 198.51.100.1/24 dev va", "route add 203.0.113.0/24 dev va src 198.51.100.1"],
        "ip addr del 198.51.100.1/24 dev va",
        {Address("198.51.100.1", 24, "va")},
        {Route("203.0.113.0/24", "va", 0)},
    ),
}


@pytest.mark.parametrize("what", LOSSES)
@in_own_network
async def test_a_loss_is_reported_without_waiting(what: str) -> None:
    prepare, action, addresses, routes = LOSSES[what]
    set_up()
    batch(prepare)
    # Gains and dumps never come here: what is reported was concluded from the messages alone.
    async with watching(gain_debounce=NEVER) as (watch, changes):
        assert set(watch.current.addresses) >= addresses
        assert set(watch.current.routes) >= routes
        command(action)
        lost: set[Any] = set()
        while not addresses | routes <= lost:
            before, after = await changes.next()
            lost |= {*before.addresses, *before.routes} - {*after.addresses, *after.routes}
        assert watch.dumps == 1
        remaining = await watch.snapshot()
        assert not watch.current.lost_in(remaining), "reported gone but still there"
        assert not addresses & set(remaining.addresses)
        assert not routes & set(remaining.routes)


@in_own_network
async def test_the_end_of_a_nexthop_object_takes_its_routes_away() -> None:
    set_up()
    batch(["nexthop add id 7 via 192.0.2.9 dev va", "route add 203.0.113.0/24 nhid 7"])
    async with watching(gain_debounce=0.02) as (watch, changes):
        assert Route("203.0.113.0/24", "va", 0) in watch.current.routes
        command("ip nexthop del id 7")
        _, after = await changes.next()
        assert Route("203.0.113.0/24", "va", 0) not in after.routes
        assert after == await watch.snapshot()


@in_own_network
async def test_gains_settle_together_when_quiet() -> None:
    async with watching(gain_debounce=0.15) as (watch, changes):
        set_up()
        started = time.perf_counter()
        while not changes.settled:
            before, after = await changes.next()
            assert not before.lost_in(after)
        assert after.addresses == (V4, V6)
        assert set(after.routes) == {
            DEFAULT,
            Route("192.0.2.0/24", "va", 0),
            Route("2001:db8::/64", "va", 256),
        }
        assert changes.settled[0][0] - started > 0.1
        assert after == await watch.snapshot()
        assert len(changes.settled) == 1


@in_own_network
async def test_a_gain_is_reported_at_once_and_not_settled() -> None:
    set_up()
    async with watching(gain_debounce=NEVER) as (watch, changes):
        command("ip addr add 192.0.2.7/24 dev va")
        _, after = await changes.next()
        assert Address("192.0.2.7", 24, "va") in after.addresses
        command("ip route add 203.0.113.0/24 via 192.0.2.254")
        _, after = await changes.next()
        assert Route("203.0.113.0/24", "va", 0) in after.routes
        assert not watch.settled


@in_own_network
async def test_what_comes_and_goes_has_to_settle() -> None:
    set_up()
    async with watching(gain_debounce=0.5) as (watch, changes):
        for there in (False, True, False, True):
            how = "add 2001:db8::1/64 dev va nodad" if there else "del 2001:db8::1/64 dev va"
            command(f"ip addr {how}")
            while there is not (V6 in watch.current.addresses):
                await changes.next()
        assert watch.settled


@in_own_network
async def test_gains_without_more_settle_as_they_are() -> None:
    set_up()
    async with watching(gain_debounce=0.05) as (watch, changes):
        command("ip addr add 192.0.2.7/24 dev va")
        _, gained = await changes.next()
        before, after = await changes.next()
        assert before == after == gained
        assert watch.settled


@in_own_network
async def test_gains_that_never_end_settle_all_the_same() -> None:
    set_up()
    async with watching(gain_debounce=0.3, gain_limit=0.4) as (_, changes):
        number = 0
        async with asyncio.timeout(5):
            while not changes.settled:
                number += 1
                command(f"ip addr add 10.0.{number // 250}.{1 + number % 250}/32 dev va")
                await asyncio.sleep(0.01)
        assert number > 1


@in_own_network
async def test_a_loss_brings_the_gains_that_wait_with_it() -> None:
    set_up()
    new = Address("192.0.2.7", 24, "va")
    async with watching(gain_debounce=NEVER) as (_, changes):
        batch(["addr add 192.0.2.7/24 dev va", "addr del 2001:db8::1/64 dev va"])
        _, after = await changes.next()
        assert new in after.addresses


@in_own_network
async def test_what_comes_back_before_it_was_missed_is_no_news() -> None:
    set_up()
    async with watching(gain_debounce=0.05) as (watch, changes):
        batch(["addr add 192.0.2.7/24 dev va", "addr del 192.0.2.7/24 dev va"])
        command("ip addr add 192.0.2.8/24 dev va")
        before, after = await changes.next()
        assert set(after.addresses) - set(before.addresses) == {Address("192.0.2.8", 24, "va")}
        await changes.next()
        assert len(changes.settled) == len(changes.all) - 1
        assert after == await watch.snapshot()


@in_own_network
async def test_a_flapping_address_is_no_flood_and_ends_right() -> None:
    set_up()
    async with watching(gain_debounce=0.1) as (watch, changes):
        started = time.perf_counter()
        flap = ("addr del 2001:db8::1/64 dev va", "addr add 2001:db8::1/64 dev va nodad")
        await asyncio.to_thread(batch, flap * 1000)
        lasted = time.perf_counter() - started
        while V6 not in watch.current.addresses:
            await changes.next()
        for (_, _, told), (_, before, _) in zip(changes.all, changes.all[1:], strict=False):
            assert told == before
        # A gain takes 0.1 s of quiet or 0.5 s, and there is no loss without a gain before it.
        assert len(changes.all) <= 3 + 3 * lasted / 0.1
        assert watch.current == await watch.snapshot()


@in_own_network
async def test_lost_messages_are_made_good_by_a_dump() -> None:
    set_up()
    async with watching(receive_buffer=1, gain_debounce=0.02) as (watch, changes):
        # While ip(8) runs the loop stands still, and the buffer holds three messages.
        batch(f"addr add 10.0.{n // 250}.{1 + n % 250}/32 dev va" for n in range(1000))
        command("ip addr del 192.0.2.1/24 dev va")
        while V4 in watch.current.addresses or len(watch.current.addresses) != 1001:
            await changes.next()
        assert watch.dumps > 1
        assert watch.current == await watch.snapshot()


@in_own_network
async def test_an_address_under_duplicate_detection_is_not_there_yet() -> None:
    set_up()
    async with watching(gain_debounce=0.02) as (watch, changes):
        command("ip addr add 2001:db8::2/64 dev va")
        assert "tentative" in command("ip -6 addr show dev va")
        while Address("2001:db8::2", 64, "va") not in watch.current.addresses:
            await changes.next()
            assert "2001:db8::2/64 scope global tentative" not in command("ip -6 addr show dev va")


@in_own_network
async def test_a_duplicate_address_is_never_used() -> None:
    set_up()
    batch(["addr add 2001:db8::2/64 dev vb nodad", "addr add 192.0.2.200/24 dev vb"])
    async with watching(gain_debounce=0.02) as (watch, changes):
        batch(["addr add 2001:db8::2/64 dev va", "addr add 2001:db8::3/64 dev va"])
        while Address("2001:db8::3", 64, "va") not in watch.current.addresses:
            await changes.next()
        assert "dadfailed" in command("ip -6 addr show dev va")
        assert Address("2001:db8::2", 64, "va") not in watch.current.addresses
        assert watch.current == await watch.snapshot()


@in_own_network
async def test_link_local_and_loopback_addresses_are_left_out() -> None:
    set_up()
    batch(["addr add 169.254.1.1/16 dev va", "addr add 203.0.113.1/32 dev lo"])
    async with watching() as (watch, _):
        assert watch.current.addresses == (V4, V6)
    async with watching(allow_loopback=True) as (watch, _):
        assert Address("127.0.0.1", 8, "lo") in watch.current.addresses
        assert Address("::1", 128, "lo") in watch.current.addresses
        assert Route("127.0.0.0/8", "lo", 0) in watch.current.routes


@in_own_network
async def test_very_many_routes_cost_no_more_than_the_cap() -> None:
    set_up()
    batch(f"route add 10.{n // 250}.{n % 250}.0/24 via 192.0.2.254" for n in range(5000))
    batch([*SECOND_LINK, "addr add 203.0.113.1/24 dev vc"])
    async with watching(max_routes=100) as (watch, changes):
        for _ in range(2):
            routes = watch.current.routes
            assert {DEFAULT, Route("203.0.113.0/24", "vc", 0)} <= set(routes)
            assert 100 <= len(routes) < 110
            command("ip addr del 2001:db8::1/64 dev va")
            await changes.next()
            command("ip addr add 2001:db8::1/64 dev va nodad")
            while V6 not in watch.current.addresses:
                await changes.next()


@in_own_network
async def test_a_snapshot_is_what_pyroute2_reads() -> None:
    set_up()
    batch(
        [
            "addr add 192.0.2.9/24 dev va",
            "addr add 198.51.100.1 peer 198.51.100.2/32 dev va",
            "addr add 2001:db8:5::1 peer 2001:db8:5::2/128 dev va nodad",
            "route add 203.0.113.0/24 metric 9 nexthop via 192.0.2.7 nexthop dev vb",
            "route add ::/0 via 2001:db8::99 metric 50",
            "route add unreachable 203.0.113.128/25",
            "route add 203.0.113.0/25 dev va table 7",
        ]
    )
    reader: Any = AsyncIPRoute()  # type: ignore[misc]
    async with watching() as (watch, _), reader as ipr:
        names = {m["index"]: m.get("ifname") async for m in await ipr.get_links()}
        addresses = {
            Address(m.get("local") or m.get("address"), m["prefixlen"], names[m["index"]])
            async for m in await ipr.get_addr()
            if m["scope"] == 0
        }
        routes = set()
        async for m in await ipr.get_routes(table=254, type=1):
            zero = "::" if m["family"] == 10 else "0.0.0.0"
            destination = ip_network(f"{m.get('dst') or zero}/{m['dst_len']}")
            hops = [hop["oif"] for hop in m.get("multipath") or ()] or [m.get("oif")]
            if not destination.is_link_local:
                metric = m.get("priority") or 0
                routes |= {Route(str(destination), names[hop], metric) for hop in hops}
        assert set(watch.current.addresses) == addresses
        assert set(watch.current.routes) == routes
        assert len(addresses) == 5
        assert len(routes) >= 7


REMOVER = """
import socket, struct, sys, time
sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
sock.bind((0, 0))
index, own = socket.if_nametoindex("va"), socket.inet_aton("192.0.2.77")
def ask(kind, flags):
    body = struct.pack("=BBBBi", 2, 24, 0, 0, index)
    body += struct.pack("=HH4sHH4s", 8, 2, own, 8, 1, own)
    sock.send(struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body)
    assert struct.unpack_from("=i", sock.recv(4096), 16) == (0,)
for _ in sys.stdin:
    ask(20, 0x605)
    print("added", flush=True)
    sys.stdin.readline()
    ask(21, 5)
    print(time.perf_counter(), flush=True)
"""
"""Adds and removes an address as asked; tells when the kernel had answered the removal."""


@in_own_network
async def test_a_lost_address_is_known_in_a_fraction_of_a_millisecond() -> None:
    set_up()
    pipe = asyncio.subprocess.PIPE
    remover = await asyncio.create_subprocess_exec(
        sys.executable, "-c", REMOVER, stdin=pipe, stdout=pipe
    )
    assert remover.stdin is not None
    assert remover.stdout is not None
    address = Address("192.0.2.77", 24, "va")
    taken = []
    async with watching(gain_debounce=0.01) as (watch, changes):
        for _ in range(30):
            remover.stdin.write(b"add\n")
            while address not in watch.current.addresses:
                await changes.next()
            remover.stdin.write(b"remove\n")
            while address in watch.current.addresses:
                await changes.next()
            await remover.stdout.readline()
            removed = float(await remover.stdout.readline())
            known = next(t for t, b, a in reversed(changes.all) if b.lost_in(a))
            taken.append((known - removed) * 1000)
    remover.stdin.close()
    assert await remover.wait() == 0
    print(f"removal answered to callback, ms: median {statistics.median(taken):.3f}")
    # The target is 0.3 on an idle machine; others work on this one.
    assert statistics.median(taken) < 3
