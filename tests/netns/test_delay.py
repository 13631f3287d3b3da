"""The delay element: what it is told is what frames meet."""

from __future__ import annotations

import hashlib
import random
import socket
import statistics
import time
from collections.abc import Iterator

import pytest

from tests.support.capture import capture
from tests.support.delay import Delay
from tests.support.lab import Lab, LabError, missing
from tests.support.namespace import precise_timers
from tests.support.topology import Topology, two_hosts
from tests.support.wait import until
from tests.support.worker import Talk


@pytest.fixture(scope="module")
def net() -> Iterator[Topology]:
    if why_not := missing():
        pytest.skip(why_not)
    with Lab() as lab:
        yield two_hosts(lab, delays=("wifi",))


@pytest.fixture
def wifi(net: Topology) -> Iterator[Delay]:
    element = net.delays["wifi"]
    yield element
    element.set(
        delay_ms=0, rate_mbit=0, limit=8192, loss=0, duplicate=0, reorder=0, reorder_ms=1, seed=1
    )


@pytest.fixture
def pair(net: Topology) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A UDP socket on the client and one on the server that knows it."""
    with net.client.entered():
        near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with net.server.entered():
        far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with near, far:
        near.bind((net.client.address("wifi"), 0))
        far.bind((net.server.address("lan0"), 0))
        near.connect(far.getsockname())
        far.connect(near.getsockname())
        for sock in (near, far):
            sock.settimeout(3)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        near.send(b"neighbours know each other from here on")
        far.recv(100)
        yield near, far


Pair = tuple[socket.socket, socket.socket]


def one_way_ms(sender: socket.socket, receiver: socket.socket) -> float:
    sent = time.monotonic()
    sender.send(b"?")
    receiver.recv(100)
    return (time.monotonic() - sent) * 1000


@pytest.mark.parametrize("delay_ms", [1, 10, 50])
def test_each_direction_has_its_own_delay(wifi: Delay, pair: Pair, delay_ms: float) -> None:
    near, far = pair
    precise_timers()
    wifi.set("ab", delay_ms=delay_ms)
    there = statistics.median(one_way_ms(near, far) for _ in range(15))
    back = statistics.median(one_way_ms(far, near) for _ in range(15))
    assert delay_ms <= there < delay_ms + 0.5
    assert back < 0.5


def seen(pair: Pair, count: int) -> list[int]:
    """The numbers that arrive of ``count`` numbered datagrams."""
    near, far = pair
    for number in range(count):
        near.send(number.to_bytes(4, "big"))
    near.send(b"end")
    arrived: list[int] = []
    while (data := far.recv(100)) != b"end":
        arrived.append(int.from_bytes(data, "big"))
    return arrived


def test_loss_is_as_told_and_repeatable_by_its_seed(wifi: Delay, pair: Pair) -> None:
    before = wifi.stats("ab")["lost"]
    runs = []
    for _ in range(2):
        wifi.set("ab", loss=0.1, seed=42)
        runs.append(seen(pair, 5000))
        wifi.set("ab", loss=0)
    assert runs[0] == runs[1]
    assert 4400 < len(runs[0]) < 4600
    assert wifi.stats("ab")["lost"] - before == 2 * (5000 - len(runs[0]))


def test_the_next_frames_are_dropped(wifi: Delay, pair: Pair) -> None:
    wifi.drop(3, "ab")
    assert seen(pair, 10) == list(range(3, 10))


def test_frames_overtake_each_other(wifi: Delay, pair: Pair) -> None:
    wifi.set("ab", delay_ms=5, reorder=0.2, reorder_ms=2)
    near, _ = pair
    before = wifi.stats("ab")["reordered"]
    for number in range(500):
        near.send(number.to_bytes(4, "big"))
    arrived = [int.from_bytes(pair[1].recv(100), "big") for _ in range(500)]
    assert sorted(arrived) == list(range(500))
    assert arrived != sorted(arrived)
    assert 50 < wifi.stats("ab")["reordered"] - before < 150


def test_frames_are_doubled(wifi: Delay, pair: Pair) -> None:
    wifi.set("ab", duplicate=1)
    assert seen(pair, 3) == [0, 0, 1, 1, 2, 2]
    assert pair[1].recv(100) == b"end"


def test_a_rate_makes_frames_wait_for_each_other(wifi: Delay, pair: Pair) -> None:
    near, far = pair
    wifi.set("ab", rate_mbit=8)  # 1 byte a microsecond
    began = time.monotonic()
    for _ in range(20):
        near.send(bytes(1458))  # 1500 with UDP, IP and Ethernet
    for _ in range(20):
        far.recv(2000)
    assert 0.030 <= time.monotonic() - began < 0.036


def test_a_full_element_drops_and_counts(wifi: Delay, pair: Pair) -> None:
    near, far = pair
    wifi.set("ab", delay_ms=20, limit=5)
    before = wifi.stats("ab")["overflowed"]
    for _ in range(8):
        near.send(b"?")
    for _ in range(5):
        far.recv(100)
    assert wifi.stats("ab")["overflowed"] - before == 3


def test_a_wrong_setting_is_refused(wifi: Delay) -> None:
    with pytest.raises(LabError, match="no such direction or key"):
        wifi.set("up", delay_ms=1)  # type: ignore[arg-type]


def receive_all(talk: Talk, address: str) -> str:
    """The hash of what one connection brings."""
    found = hashlib.sha256()
    with socket.create_server((address, 7001)) as listener:
        talk.tell("listening")
        sock, _ = listener.accept()
    with sock:
        while data := sock.recv(1 << 18):
            found.update(data)
    return found.hexdigest()


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_a_fast_stream_passes_whole_and_wire_sized(net: Topology, wifi: Delay) -> None:
    size = 64 << 20
    data = random.Random(1).randbytes(size)
    address = net.server.address("lan0")
    worker = net.server.fork(receive_all, address)
    worker.hear()
    before, cpu = wifi.stats("ab"), cpu_seconds(wifi.pid)
    with net.client.entered():
        sock = socket.create_connection((address, 7001))
    began = time.monotonic()
    with sock:
        sock.sendall(data)
    assert worker.result() == hashlib.sha256(data).hexdigest()
    seconds = time.monotonic() - began
    rate = size * 8 / seconds / 1e6
    print(f"{rate:.0f} Mbit/s, {(cpu_seconds(wifi.pid) - cpu) / seconds:.0%} of a processor")
    after = wifi.stats("ab")
    assert after["failed"] == before["failed"]
    assert after["sent"] - before["sent"] > size / 1500
    assert rate > 100, "no element for measuring"


def test_checksums_on_the_wire_are_real(net: Topology, wifi: Delay, pair: Pair) -> None:
    near, far = pair
    with capture(net.router, "wifi", "udp") as wire:
        near.send(b"checksummed")
        far.recv(100)
        until(lambda: wire.path.stat().st_size > 24, "the frame")
    (packet,) = wire.packets()
    told = packet["UDP"].chksum
    del packet["UDP"].chksum
    assert type(packet)(bytes(packet))["UDP"].chksum == told != 0
