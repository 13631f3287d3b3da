"""The UDP edge: what ICMP says of one peer costs another nothing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from sessiond.core.tuples import Endpoint
from sessiond.edges.peer_udp import PeerUdp
from tests.support.inside import in_own_network

PORT, NOBODY = 2006, 2007
LOOPBACKS = ["127.0.0.1", "::1"]
DATAGRAM = b"what is this"


class Edge:
    """A PeerUdp on both loopback addresses, and what it told."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[tuple[bytes, Endpoint, str]] = asyncio.Queue()
        self.refused: asyncio.Queue[tuple[bytes, Endpoint, str]] = asyncio.Queue()
        self.udp = PeerUdp(
            PORT,
            lambda *what: self.received.put_nowait(what),
            lambda *what: self.refused.put_nowait(what),
        )


@asynccontextmanager
async def edge() -> AsyncIterator[Edge]:
    made = Edge()
    assert await made.udp.listen(LOOPBACKS) == {}
    try:
        async with asyncio.timeout(10):
            yield made
    finally:
        made.udp.close()


@pytest.mark.parametrize("address", LOOPBACKS)
@in_own_network
async def test_where_nothing_listens_the_datagram_is_handed_back(address: str) -> None:
    async with edge() as made:
        for _ in range(3):
            made.udp.send(DATAGRAM, Endpoint(address, NOBODY), address)
            assert await made.refused.get() == (DATAGRAM, Endpoint(address, NOBODY), address)


@pytest.mark.parametrize("address", LOOPBACKS)
@in_own_network
async def test_an_error_about_one_peer_costs_another_no_datagram(address: str) -> None:
    async with edge() as made:
        for number in range(3):
            made.udp.send(DATAGRAM, Endpoint(address, NOBODY), address)
            # The kernel answers on the loopback interface at once: the socket has an error now.
            made.udp.send(bytes((number,)), Endpoint(address, PORT), address)
        for number in range(3):
            assert (await made.received.get())[0] == bytes((number,))
        assert made.udp.unsent == 0


@pytest.mark.parametrize("address", LOOPBACKS)
@in_own_network
async def test_after_an_error_it_still_listens(address: str) -> None:
    async with edge() as made:
        made.udp.send(DATAGRAM, Endpoint(address, NOBODY), address)
        await made.refused.get()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as other:
            for number in range(3):
                other.sendto(bytes((number,)), (address, PORT))
                assert (await made.received.get())[0] == bytes((number,))


@in_own_network
async def test_an_address_that_goes_and_comes_back_is_used_again() -> None:
    async with edge() as made:
        assert await made.udp.listen([]) == {}
        made.udp.send(DATAGRAM, Endpoint("::1", NOBODY), "::1")
        assert made.udp.unsent == 1
        assert await made.udp.listen(["::1"]) == {}
        made.udp.send(DATAGRAM, Endpoint("::1", NOBODY), "::1")
        assert (await made.refused.get())[0] == DATAGRAM
