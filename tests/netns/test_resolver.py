"""Names, asked of a real nameserver (knotd), and of one that lies as the test wants.

+-- one namespace --------------------------------------+
|  127.0.0.53:53 knotd, zone test.    127.0.0.66:53 liar |
+--------------------------------------------------------+
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import dns.asyncquery
import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import dns.update
import pytest

from sessiond.core.names import (
    BadName,
    NoAddress,
    NoAnswer,
    NoSuchName,
    ResolveError,
    ServersFailed,
)
from sessiond.core.network import Address, Network, Route
from sessiond.core.tuples import Endpoint
from sessiond.edges.resolver import Resolver
from tests.support.inside import command, in_own_network

KNOT = "127.0.0.53"
LIAR = "127.0.0.66"
SILENT = "127.0.0.67"

ZONE = """\
$ORIGIN test.
$TTL 300
@        SOA ns hostmaster 1 3600 600 86400 5
@        NS ns
ns       A 127.0.0.53
server   A 192.0.2.1
server   AAAA 2001:db8::1
v4only   A 192.0.2.4
v6only   AAAA 2001:db8::6
empty    TXT "no address"
alias    CNAME server
loop     CNAME pool
pool     CNAME loop
moving 1 A 192.0.2.8
zero   0 A 192.0.2.9
sub.deep A 192.0.2.10
_echo._tcp      SRV 20 0 7003 v4only
_echo._tcp      SRV 10 0 7001 server
_echo._tcp      SRV 15 0 7002 nowhere
_pair._tcp      SRV 10 1 7001 v4only
_pair._tcp      SRV 10 1 7002 v6only
_retired._tcp   SRV 0 0 0 .
_broken._tcp    SRV 0 0 7001 nowhere
"""
MANY = "".join(f"many A 198.51.{n // 200}.{1 + n % 200}\n" for n in range(200))
CONFIGURATION = """\
server:
    rundir: "{at}"
    listen: 127.0.0.53@53
log:
  - target: stdout
    any: info
acl:
  - id: local
    address: 127.0.0.0/8
    action: update
database:
    storage: "{at}"
zone:
  - domain: test.
    storage: "{at}"
    file: zone
    acl: local
"""


def configure(at: Path) -> Path:
    (at / "zone").write_text(ZONE + MANY)
    (at / "knot.conf").write_text(CONFIGURATION.format(at=at))
    return at / "knot.conf"


@asynccontextmanager
async def knot(at: Path) -> AsyncIterator[None]:
    """The real nameserver."""
    if shutil.which("knotd") is None:
        pytest.skip("no knotd: install Debian's package knot")
    server = await asyncio.create_subprocess_exec(
        "knotd", "-c", str(configure(at)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        assert server.stdout is not None
        said: list[str] = []
        async with asyncio.timeout(20):
            while "server started" not in "".join(said[-1:]):
                line = await server.stdout.readline()
                assert line, f"knotd ended: {said}"
                said.append(line.decode())
        yield
    finally:
        if server.returncode is None:
            server.terminate()
        await server.communicate()


Reply = Callable[[dns.message.Message], bytes | None]


class Liar(asyncio.DatagramProtocol):
    """A nameserver that answers as a function says; counts the questions."""

    def __init__(self, reply: Reply, delay: dict[str, float]) -> None:
        self.reply = reply
        self.delay = delay
        self.asked: Counter[str] = Counter()
        self.was_asked = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | object, int]) -> None:
        query = dns.message.from_wire(data)
        kind = query.question[0].rdtype.name
        self.asked[kind] += 1
        self.was_asked.set()
        answer = self.reply(query)
        if answer is not None:
            loop = asyncio.get_running_loop()
            loop.call_later(self.delay.get(kind, 0), self._send, answer, addr)

    def _send(self, answer: bytes, to: tuple[str | object, int]) -> None:
        if not self.transport.is_closing():
            self.transport.sendto(answer, to)


@asynccontextmanager
async def liar(reply: Reply, **delay: float) -> AsyncIterator[Liar]:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(
        lambda: Liar(reply, delay), local_addr=(LIAR, 53)
    )
    try:
        yield protocol
    finally:
        transport.close()


def addresses(ttl: int = 300, rcode: dns.rcode.Rcode = dns.rcode.NOERROR) -> Reply:
    """A reply of one address for every name."""

    def reply(query: dns.message.Message) -> bytes:
        response = dns.message.make_response(query)
        response.flags |= dns.flags.RA
        response.set_rcode(rcode)
        question = query.question[0]
        text = {"A": "192.0.2.1", "AAAA": "2001:db8::1"}.get(question.rdtype.name)
        if text and rcode == dns.rcode.NOERROR:
            known = dns.rrset.from_text(question.name, 0x5A5A, "IN", question.rdtype.name, text)
            response.answer.append(known)
        return response.to_wire().replace(b"\0\0\x5a\x5a", ttl.to_bytes(4, "big"))

    return reply


def resolver(*nameservers: str, **options: float) -> Resolver:
    return Resolver(
        nameservers=nameservers or (KNOT,),
        timeout=options.get("timeout", 3.0),
        cache_size=int(options.get("cache_size", 100)),
        resolv_conf="/nonexistent",
    )


@in_own_network
async def test_both_families_are_found_ipv6_first(tmp_path: Path) -> None:
    async with knot(tmp_path):
        found = await resolver().resolve("server.test", "7000")
        assert found.candidates == (Endpoint("2001:db8::1", 7000), Endpoint("192.0.2.1", 7000))
        assert found.source == "dns"
        assert 290 < found.expires - time.monotonic() <= 300
        for version, address in ((4, "192.0.2.1"), (6, "2001:db8::1")):
            found = await resolver().resolve("SERVER.test.", "http", version)
            assert found.candidates == (Endpoint(address, 80),)
        found = await resolver().resolve("alias.test", "7000", 4)
        assert found.candidates == (Endpoint("192.0.2.1", 7000),)


@in_own_network
async def test_what_this_host_cannot_reach_comes_last(tmp_path: Path) -> None:
    v4 = Network((Address("198.51.100.9", 24, "eth0"),), (Route("0.0.0.0/0", "eth0", 0),))
    async with knot(tmp_path):
        ordered = Resolver(nameservers=(KNOT,), resolv_conf="/none", network=lambda: v4)
        found = await ordered.resolve("server.test", "7000")
        assert [c.address for c in found.candidates] == ["192.0.2.1", "2001:db8::1"]


@in_own_network
async def test_an_answer_too_large_for_udp_is_complete(tmp_path: Path) -> None:
    async with knot(tmp_path):
        found = await resolver().resolve("many.test", "7000")
        assert len(set(found.candidates)) == 200


@pytest.mark.parametrize(
    ("name", "service", "version", "error", "says"),
    [
        ("nowhere.test", "7000", 0, NoSuchName, f"says {KNOT}; check its spelling"),
        ("empty.test", "7000", 0, NoAddress, "IPv6 or IPv4"),
        ("v4only.test", "7000", 6, NoAddress, "no IPv6 address"),
        ("loop.test", "7000", 0, ServersFailed, "alias"),
        ("server.elsewhere", "7000", 0, ServersFailed, "REFUSED"),
        ("a..b", "7000", 0, BadName, "a..b"),
        ("", "7000", 0, BadName, "not the name"),
        ("@", "7000", 0, BadName, "not the name"),
        ("x" * 64 + ".test", "7000", 0, BadName, "not a DNS name"),
        ("server.test", "no-such-service", 0, BadName, "port number"),
        ("server.test", "0", 0, BadName, "65535"),
        ("server.test", "65536", 0, BadName, "65535"),
        ("server.test", "", 0, BadName, "empty"),
        ("192.0.2.1", "7000", 6, NoAddress, "IPv6"),
        ("fe80::1%lo", "7000", 0, BadName, "link"),
    ],
)
@in_own_network
async def test_an_error_says_what_was_tried(
    tmp_path: Path, name: str, service: str, version: int, error: type[ResolveError], says: str
) -> None:
    async with knot(tmp_path):
        asked = resolver()
        for _ in range(2):
            with pytest.raises(error) as caught:
                await asked.resolve(name, service, version)
            assert type(caught.value) is error
            assert says in f"{caught.value} {caught.value.tried}"
            if error is not BadName and name != "192.0.2.1":
                assert any(name in line for line in caught.value.tried)


@in_own_network
async def test_literals_need_no_nameserver() -> None:
    asked = resolver("192.0.2.254")
    for text, address in (
        ("192.0.2.1", "192.0.2.1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
    ):
        found = await asked.resolve(text, "7000")
        assert found == ((Endpoint(address, 7000),), "literal", float("inf"))


@in_own_network
async def test_the_hosts_file_comes_before_the_dns_and_is_read_again(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("192.0.2.77 Server.test other # nothing.test\n2001:db8::77 server.test\n")
    command(f"mount --bind {hosts} /etc/hosts")
    async with knot(tmp_path):
        asked = resolver()
        found = await asked.resolve("server.test", "7000")
        assert {c.address for c in found.candidates} == {"192.0.2.77", "2001:db8::77"}
        assert found.source == "hosts"
        with pytest.raises(NoAddress):
            await asked.resolve("other", "7000", 6)
        with pytest.raises(NoSuchName):
            await asked.resolve("nothing.test", "7000")
        hosts.write_text("192.0.2.78 server.test\n")
        found = await asked.resolve("server.test", "7000")
        assert [c.address for c in found.candidates] == ["192.0.2.78"]
        hosts.write_text("# nothing\n")
        found = await asked.resolve("server.test", "7000", 4)
        assert (found.candidates[0].address, found.source) == ("192.0.2.1", "dns")


@in_own_network
async def test_resolv_conf_is_read_again_when_it_changes(tmp_path: Path) -> None:
    conf = tmp_path / "resolv.conf"
    asked = Resolver(resolv_conf=str(conf))
    with pytest.raises(NoAnswer, match=r"resolv\.conf"):
        await asked.resolve("server.test", "7000")
    async with knot(tmp_path), liar(addresses()):
        conf.write_text(f"nameserver {LIAR}\n")
        found = await asked.resolve("name.test", "7000", 4)
        assert found.candidates[0].address == "192.0.2.1"
        conf.write_text(f"nameserver {KNOT}\nsearch deep.test\n")
        found = await asked.resolve("sub", "7000", 4)
        assert found.candidates[0].address == "192.0.2.10"
        conf.write_text("nameserver not-an-address\n")
        with pytest.raises(NoAnswer, match=r"resolv\.conf"):
            await asked.resolve("other.test", "7000", 4)


@in_own_network
async def test_an_answer_is_kept_for_its_ttl_and_no_longer(tmp_path: Path) -> None:
    async with knot(tmp_path):
        asked = resolver()
        first = await asked.resolve("moving.test", "7000", 4)
        assert first.candidates[0].address == "192.0.2.8"
        update = dns.update.UpdateMessage("test.")
        update.replace("moving", 1, "A", "192.0.2.88")
        response = await dns.asyncquery.udp(update, KNOT, timeout=5)
        assert response.rcode() == dns.rcode.NOERROR
        assert (await asked.resolve("moving.test", "7000", 4)).candidates == first.candidates
        moved = (Endpoint("192.0.2.88", 7000),)
        assert (await asked.reresolve("moving.test", "7000", 4)).candidates == moved
        assert await asked.addresses("moving.test", "7000") == ("192.0.2.88",)
        update.replace("moving", 1, "A", "192.0.2.99")
        await dns.asyncquery.udp(update, KNOT, timeout=5)
        until = (await asked.resolve("moving.test", "7000", 4)).expires
        await asyncio.sleep(until - time.monotonic())
        last = await asked.resolve("moving.test", "7000", 4)
        assert last.candidates == (Endpoint("192.0.2.99", 7000),)


@pytest.mark.parametrize(
    ("ttl", "kept"), [(0, 1), (1, 1), (60, 60), (2**31 - 1, 86_400), (2**31, 1), (2**32 - 1, 1)]
)
@in_own_network
async def test_absurd_ttls_are_tamed(ttl: int, kept: int) -> None:
    async with liar(addresses(ttl)) as server:
        asked = resolver(LIAR)
        found = await asked.resolve("name.test", "7000", 4)
        assert found.expires - time.monotonic() == pytest.approx(kept, abs=0.5)
        assert await asked.resolve("name.test", "7000", 4) == found
        assert server.asked == {"A": 1}


@in_own_network
async def test_a_negative_answer_is_kept_for_a_moment() -> None:
    async with liar(addresses(rcode=dns.rcode.NXDOMAIN)) as server:
        asked = resolver(LIAR)
        for _ in range(3):
            with pytest.raises(NoSuchName):
                await asked.resolve("name.test", "7000", 4)
        assert server.asked == {"A": 1}
        with pytest.raises(NoSuchName):
            await asked.reresolve("name.test", "7000", 4)
        assert server.asked == {"A": 2}


@in_own_network
async def test_a_thousand_who_ask_at_once_are_one_query() -> None:
    async with liar(addresses(), A=0.05, AAAA=0.05) as server:
        asked = resolver(LIAR)
        found = await asyncio.gather(
            *(asked.reresolve("name.test", str(1 + n)) for n in range(1000))
        )
        assert server.asked == {"A": 1, "AAAA": 1}
        assert [f.candidates[0] for f in found] == [
            Endpoint("2001:db8::1", 1 + n) for n in range(1000)
        ]


@in_own_network
async def test_one_who_gives_up_does_not_end_it_for_others() -> None:
    async with liar(addresses(), A=0.1) as server:
        asked = resolver(LIAR)
        first = asyncio.create_task(asked.resolve("name.test", "7000", 4))
        second = asyncio.create_task(asked.resolve("name.test", "7001", 4))
        await server.was_asked.wait()
        first.cancel()
        assert (await second).candidates == (Endpoint("192.0.2.1", 7001),)
        assert first.cancelled()
        assert server.asked == {"A": 1}


@in_own_network
async def test_a_family_that_is_slow_is_not_waited_for() -> None:
    async with liar(addresses(), AAAA=2.5):
        asked = resolver(LIAR)
        started = time.monotonic()
        found = await asked.resolve("name.test", "7000")
        assert time.monotonic() - started < 1
        assert found.candidates == (Endpoint("192.0.2.1", 7000),)


@in_own_network
async def test_the_memory_is_bounded() -> None:
    async with liar(addresses()) as server:
        asked = resolver(LIAR, cache_size=10)
        for _ in range(2):
            for number in range(20):
                await asked.resolve(f"name{number}.test", "7000", 4)
        assert server.asked == {"A": 40}
        await asked.resolve("name19.test", "7000", 4)
        assert server.asked == {"A": 40}


@in_own_network
async def test_the_nameserver_that_denied_a_name_is_told(tmp_path: Path) -> None:
    conf = tmp_path / "resolv.conf"
    async with liar(addresses(rcode=dns.rcode.SERVFAIL)) as broken, knot(tmp_path):
        conf.write_text(f"nameserver {LIAR}\nnameserver {KNOT}\n")
        with pytest.raises(NoSuchName) as caught:
            await Resolver(resolv_conf=str(conf)).resolve("nowhere.test", "7000", 4)
        assert broken.asked
        assert f"says {KNOT};" in str(caught.value)
        assert LIAR not in str(caught.value)


@in_own_network
async def test_a_nameserver_that_is_silent_is_passed_over(tmp_path: Path) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as silent:
        silent.bind((SILENT, 53))
        async with knot(tmp_path):
            started = time.monotonic()
            found = await resolver(SILENT, KNOT).resolve("server.test", "7000", 4)
            assert found.candidates == (Endpoint("192.0.2.1", 7000),)
            assert time.monotonic() - started < 2.5
        with pytest.raises(NoAnswer, match="is there a network") as caught:
            await resolver(SILENT, timeout=0.3).resolve("server.test", "7000")
        assert any(SILENT in line for line in caught.value.tried)


@in_own_network
async def test_without_a_network_the_error_comes_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(NoAnswer) as caught:
        await resolver("192.0.2.254").resolve("server.test", "7000")
    assert time.monotonic() - started < 1
    assert any("192.0.2.254" in line for line in caught.value.tried)
    assert await resolver("192.0.2.254").addresses("server.test", "7000") == ()


@in_own_network
async def test_lame_and_broken_nameservers_are_passed_over(tmp_path: Path) -> None:
    async with knot(tmp_path), liar(addresses(rcode=dns.rcode.SERVFAIL)) as server:
        found = await resolver(LIAR, KNOT).resolve("server.test", "7000", 4)
        assert found.candidates == (Endpoint("192.0.2.1", 7000),)
        assert server.asked
        with pytest.raises(ServersFailed) as caught:
            await resolver(LIAR).resolve("server.test", "7000", 4)
        assert any("SERVFAIL" in line for line in caught.value.tried)


@in_own_network
async def test_srv_records_give_hosts_and_ports_by_priority(tmp_path: Path) -> None:
    async with knot(tmp_path):
        asked = resolver()
        found = await asked.resolve("test", "echo", srv=True)
        assert found.candidates == (
            Endpoint("2001:db8::1", 7001),
            Endpoint("192.0.2.1", 7001),
            Endpoint("192.0.2.4", 7003),
        )
        first = {(await asked.resolve("test", "pair", srv=True)).candidates[0] for _ in range(60)}
        assert first == {Endpoint("192.0.2.4", 7001), Endpoint("2001:db8::6", 7002)}
        found = await asked.resolve("server.test", "http", 4, srv=True)
        assert found.candidates == (Endpoint("192.0.2.1", 80),)


@pytest.mark.parametrize(
    ("name", "service", "error", "says"),
    [
        ("test", "retired", NoAddress, "does not offer"),
        ("test", "broken", NoSuchName, "nowhere.test"),
        ("test", "7000", BadName, "port number"),
        ("test", "unheard-of", BadName, "unheard-of"),
        ("nowhere.test", "http", NoSuchName, "nowhere.test"),
    ],
)
@in_own_network
async def test_srv_that_leads_nowhere(
    tmp_path: Path, name: str, service: str, error: type[ResolveError], says: str
) -> None:
    async with knot(tmp_path):
        with pytest.raises(error, match=says):
            await resolver().resolve(name, service, srv=True)
