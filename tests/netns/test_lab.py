"""The laboratory itself: what other tests build on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support import namespace as ns
from tests.support.lab import Host, Lab, LabError, Uplink, missing
from tests.support.topology import LINKS, Topology, two_hosts
from tests.support.wait import until
from tests.support.worker import Talk, WorkerError

why_not = missing("ip", "setpriv")
pytestmark = pytest.mark.skipif(why_not is not None, reason=str(why_not))


@pytest.fixture(scope="module")
def net() -> Iterator[Topology]:
    with Lab() as lab:
        yield two_hosts(lab)


def connect(client: Host, source: str, server: Host, destination: str) -> tuple[str, str]:
    """Connect; what the two ends believe the client's address to be."""
    family = socket.AF_INET6 if ":" in destination else socket.AF_INET
    with server.entered():
        listener = socket.create_server((destination, 7000), family=family)
    with listener:
        listener.settimeout(3)
        with client.entered():
            near = socket.create_connection((destination, 7000), 3, (source, 0))
        far, _ = listener.accept()
        with near, far:
            return near.getsockname()[0], far.getpeername()[0]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("uplink", ["wifi", "eth"])
@pytest.mark.parametrize("lan", ["lan0", "lan1"])
def test_every_source_reaches_every_destination(
    net: Topology, version: int, uplink: str, lan: str
) -> None:
    source, destination = net.client.address(uplink, version), net.server.address(lan, version)
    assert connect(net.client, source, net.server, destination) == (source, source)


def chosen_source(host: Host, destination: str) -> str:
    family = socket.AF_INET6 if ":" in destination else socket.AF_INET
    with host.entered(), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((destination, 9))
        return str(probe.getsockname()[0])


@pytest.mark.parametrize("how", ["addresses", "link"])
def test_losing_an_uplink_leaves_the_other_and_gaining_brings_it_back(
    net: Topology, how: str
) -> None:
    for version in (4, 6):
        there = net.server.address("lan0", version)
        assert chosen_source(net.client, there) == net.client.address("wifi", version)
        net.client.lose("wifi", how)  # type: ignore[arg-type]
        assert chosen_source(net.client, there) == net.client.address("eth", version)
        net.client.gain("wifi")
        assert chosen_source(net.client, there) == net.client.address("wifi", version)


def test_losing_one_version_leaves_the_other(net: Topology) -> None:
    net.client.lose("wifi", version=4)
    try:
        assert chosen_source(net.client, "10.1.1.2") == "10.0.2.2"
        assert chosen_source(net.client, "2001:db8:11::2") == "2001:db8:1::2"
    finally:
        net.client.gain("wifi")


def test_an_uplink_can_get_other_addresses(net: Topology) -> None:
    net.client.lose("eth")
    net.client.gain("eth", ("10.0.2.77/24", "2001:db8:2::77/64"))
    try:
        assert net.client.address("eth") == "10.0.2.77"
        assert connect(net.client, "10.0.2.77", net.server, "10.1.1.2")[1] == "10.0.2.77"
    finally:
        net.client.lose("eth")
        net.client.gain("eth", LINKS["eth"].addresses(2))


def test_counters_tell_what_happened_between(net: Topology) -> None:
    before = net.client.counters()
    connect(net.client, "10.0.1.2", net.server, "10.1.1.2")
    happened = net.client.counters() - before
    assert happened["Tcp.ActiveOpens"] == happened["ActiveOpens"] == 1
    assert happened["RetransSegs"] == happened["TCPTimeouts"] == 0


def double(talk: Talk) -> int:
    talk.tell("ready")
    return 2 * int(talk.hear())


def fail(talk: Talk) -> None:
    raise ValueError("on purpose")


def vanish(talk: Talk) -> None:
    os._exit(7)


def test_a_worker_talks_and_returns(net: Topology) -> None:
    worker = net.client.fork(double)
    assert worker.hear() == "ready"
    worker.tell(21)
    assert worker.result() == 42


@pytest.mark.parametrize(("function", "told"), [(fail, "on purpose"), (vanish, "exit code 7")])
def test_a_worker_that_fails_says_so(net: Topology, function: object, told: str) -> None:
    with pytest.raises(WorkerError, match=told):
        net.client.fork(function).result()  # type: ignore[arg-type]


def test_programs_run_on_their_host(net: Topology) -> None:
    assert "10.0.1.2/24" in net.client.run("ip", "addr").stdout
    assert "nameserver 10.53.0.2" in net.client.run("cat", "/etc/resolv.conf").stdout
    process = net.client.popen("sleep", "60")
    until(lambda: process.pid in ns.pids(net.client.namespace), "the program in its namespace")


def test_a_wrong_command_is_an_error_that_names_it(net: Topology) -> None:
    with pytest.raises(LabError, match="nowhere"):
        net.client.ip("link set dev nowhere up")


def leftovers(pid: int) -> list[str]:
    return ns.names(f"lab-{pid}-")


SCRIPT = """
import sys
from tests.support.lab import Lab
with Lab() as lab:
    lab.host("one").popen("sleep", "60")
    print("built", flush=True)
    sys.stdin.read()
"""


def start_lab() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "built\n"
    assert leftovers(process.pid)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_lab_ended_by_a_signal_cleans_up(number: signal.Signals) -> None:
    with start_lab() as process:
        process.send_signal(number)
        process.wait(10)
        assert leftovers(process.pid) == []


def test_the_next_lab_removes_what_a_killed_one_left() -> None:
    with start_lab() as process:
        process.kill()
        process.wait(10)
        assert leftovers(process.pid)
        with Lab() as lab:
            lab.host("two")
            assert leftovers(process.pid) == []
            assert leftovers(os.getpid())


def test_a_lab_removes_processes_and_namespaces_after_an_error() -> None:
    class Mishap(Exception):
        pass

    def use() -> tuple[Host, subprocess.Popen[str], int]:
        host = lab.host("one")
        host.configure(Uplink("lo", ("10.9.9.9/32",)))
        return host, host.popen("sleep", "60"), host.fork(double).pid

    try:
        with Lab() as lab:
            host, process, worker = use()
            raise Mishap
    except Mishap:
        assert process.poll() is not None
        assert not os.path.exists(f"/proc/{worker}")
        assert host.namespace not in ns.names("lab-")
    else:
        pytest.fail("the lab swallowed the error")
