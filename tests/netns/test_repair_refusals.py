"""What the repair engine does not move, each with its own reason; and what it takes for the end."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from sessiond.core.tuples import Endpoint, FourTuple
from sessiond.rebind import filters, tcp_state
from sessiond.rebind import linux as lx
from sessiond.rebind.engine import Facts
from sessiond.rebind.process import Process
from sessiond.rebind.repair import MOBILE_USER_TIMEOUT
from tests.netns.repair_support import (
    Ends,
    Host,
    Net,
    addresses,
    eventually,
    failed,
    needs_root,
    receive,
    target,
)

pytestmark = needs_root


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net()
    yield net
    net.close()


def inspected(host: Host, sock: socket.socket) -> Facts:
    with host.entered():
        _, facts = host.engine.inspect(sock, Process.of(os.getpid()), sock.fileno(), quiet=True)
    return facts


def refusal(host: Host, sock: socket.socket) -> str:
    reason = inspected(host, sock).refusal
    assert reason is not None
    return reason


def test_both_ends_know_the_same_initial_sequence_numbers(net: Net) -> None:
    client, server = net.pair(6)
    for sock in (client, server, client):
        sock.sendall(b"x" * 10_000)
        here, there = inspected(net.left, client), inspected(net.right, server)
        assert here.refusal is there.refusal is None
        assert (here.isn_local, here.isn_remote) == (there.isn_remote, there.isn_local)
        assert here.tuple == there.tuple.mirrored()


@pytest.mark.parametrize(
    ("family", "only", "version", "versions"),
    [
        (socket.AF_INET, False, 4, {4}),
        (socket.AF_INET6, False, 4, {4, 6}),
        (socket.AF_INET6, False, 6, {4, 6}),
        (socket.AF_INET6, True, 6, {6}),
    ],
)
def test_the_versions_a_socket_can_move_to(
    net: Net, family: int, only: bool, version: int, versions: set[int]
) -> None:
    def options(sock: socket.socket) -> None:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)

    client, _ = net.pair(version, family=family, options=options)
    assert inspected(net.left, client).versions == versions


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM), "not a TCP socket"),
        (lambda: socket.socket(socket.AF_UNIX), "not a TCP socket"),
        (lambda: socket.create_server(("127.0.0.1", 0)), "is a listening socket"),
        (lambda: socket.socket(), "is closed"),
        (lambda: _connecting(), "is still connecting"),
        (lambda: _mptcp(), "multipath TCP"),
    ],
    ids=["udp", "unix", "listen", "closed", "syn-sent", "mptcp"],
)
def test_what_is_no_established_tcp_connection(
    net: Net, make: Callable[[], socket.socket], reason: str
) -> None:
    with net.left.entered(), make() as sock:
        assert reason in refusal(net.left, sock)


def _connecting() -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    assert sock.connect_ex(("10.9.0.99", 9)) == errno.EINPROGRESS
    return sock


def _mptcp() -> socket.socket:
    try:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    except OSError as error:
        pytest.skip(f"no MPTCP in this kernel: {error}")


def test_kernel_tls(net: Net) -> None:
    client, _ = net.pair(4)
    try:
        client.setsockopt(socket.IPPROTO_TCP, lx.TCP_ULP, b"tls")
    except OSError as error:
        pytest.skip(f"no kTLS in this kernel: {error}")
    assert "tls works on top of it" in refusal(net.left, client)


TCP_MD5SIG = 14


def test_md5_signatures(net: Net) -> None:
    peer = socket.inet_aton("10.9.0.2")
    key = struct.pack("=HH4s120xBBHI80s", socket.AF_INET, 0, peer, 0, 0, 3, 0, b"key")

    theirs = key.replace(peer, socket.inet_aton("10.9.0.1"))
    client, _ = signed_pair(net, key, theirs)
    assert "MD5" in refusal(net.left, client)


def signed_pair(net: Net, key: bytes, theirs: bytes) -> tuple[socket.socket, socket.socket]:
    with net.right.entered():
        listener = socket.create_server(("10.9.0.2", 7002))
    with listener:
        with net.left.entered():
            client = net.undo.enter_context(socket.socket())
        try:
            client.setsockopt(socket.IPPROTO_TCP, TCP_MD5SIG, key)
            listener.setsockopt(socket.IPPROTO_TCP, TCP_MD5SIG, theirs)
        except OSError as error:
            pytest.skip(f"no TCP MD5 signatures in this kernel: {error}")
        client.connect(("10.9.0.2", 7002))
        return client, net.undo.enter_context(listener.accept()[0])


def test_another_network_namespace(net: Net) -> None:
    client, _ = net.pair(4)
    assert "another network namespace" in refusal(net.right, client)


def test_link_local_addresses(net: Net) -> None:
    scope = {}
    for host in (net.left, net.right):
        host.run(f"ip addr add fe80::{1 if host is net.left else 2}/64 dev veth nodad")
        with host.entered():
            scope[host] = socket.if_nametoindex("veth")
    with net.right.entered():
        listener = socket.create_server(("::", 7001), family=socket.AF_INET6)
    with net.left.entered(), listener, socket.socket(socket.AF_INET6) as client:
        client.connect(("fe80::2", 7001, 0, scope[net.left]))
        assert "link-local" in refusal(net.left, client)


def test_a_connection_that_both_ends_have_ended(net: Net) -> None:
    client, server = net.pair(4)
    ends = Ends(net, client, server)
    client.shutdown(socket.SHUT_WR)
    assert server.recv(1) == b""
    with ends.losing():
        server.shutdown(socket.SHUT_WR)
        eventually(lambda: lx.info(server).state == 9)
        there = target(ends.where("right"), remote="10.9.0.3")
        assert "is being closed" in failed(ends.do("right", "depart", there)).reason
        assert filters.current(server) == b""


def test_a_filter_that_cannot_be_read_back(net: Net) -> None:
    client, server = net.pair(4)
    ends = Ends(net, client, server)
    filters.shield(client)
    if filters._shield().option != lx.SO_ATTACH_BPF:
        pytest.skip("no CAP_BPF: filters are classic here, and can be read back")
    assert "filter" in failed(ends.do("left", "depart", ends.where("left"))).reason


def test_an_application_keeps_its_own_filter(net: Net) -> None:
    client, server = net.pair(4)
    own = filters._classic((0x06, 0, 0, 0xFFFF), (0x06, 0, 0, 0))
    filters.put_back(client, own)
    ends = Ends(net, client, server)
    ends.move("left", target(ends.where("left"), local="10.9.0.3"))
    assert filters.current(client) == own


def test_the_family_of_an_ipv4_socket(net: Net) -> None:
    ends = Ends(net, *net.pair(4, family=socket.AF_INET))
    new = FourTuple(Endpoint("fd00::1", 0), Endpoint("fd00::2", 7000))
    assert "IPv4 socket" in failed(ends.do("left", "depart", new)).reason
    _alive(ends)


def _alive(ends: Ends) -> None:
    for side, sock in ends.socks.items():
        sock.sendall(b"alive")
        assert receive(ends.socks["right" if side == "left" else "left"], 5) == b"alive"
        assert filters.current(sock) == b""
        assert not sock.getsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR)


def test_an_address_this_host_has_not(net: Net) -> None:
    ends = Ends(net, *net.pair(4))
    reason = failed(ends.do("left", "depart", target(ends.where("left"), local="10.9.0.77"))).reason
    assert "10.9.0.77 can't be used" in reason
    _alive(ends)


def test_an_address_without_a_way(net: Net) -> None:
    ends = Ends(net, *net.pair(4))
    reason = failed(ends.do("left", "depart", target(ends.where("left"), remote="10.1.1.1"))).reason
    assert "no way from 10.9.0.1 to 10.1.1.1" in reason
    _alive(ends)


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("port", [40500, 8500])
def test_a_taken_tuple(net: Net, port: int, pending: bool) -> None:
    """Another connection to the same server has the port already."""
    client, server = net.pair(4)
    with net.left.entered():
        other = socket.socket()
        other.bind(("10.9.0.3", port))
        other.connect(("10.9.0.2", 7000))
    ends = Ends(net, client, server)
    with other, ends.losing() if pending else contextlib.nullcontext():
        if pending:
            client.sendall(b"pending")
        new = target(ends.where("left"), local="10.9.0.3", lport=port)
        refused = failed(ends.do("left", "depart", new))
        assert not refused.lost
        assert "taken" in refused.reason or "EADDR" in refused.reason
        if not pending:
            origin = ends.where("left")
            # Port 0 lets the engine take another one.
            ends.move("left", target(origin, local="10.9.0.3", lport=0))
            assert ends.where("left").local == ("10.9.0.3", origin.local.port)
    if pending:
        assert receive(server, 7) == b"pending"
    _alive(ends)


def test_port_zero_takes_another_port_where_the_old_one_is_taken(net: Net) -> None:
    client, server = net.pair(4)
    port = client.getsockname()[1]
    with net.left.entered():
        other = socket.socket()
        other.setsockopt(socket.IPPROTO_IP, lx.IP_BIND_ADDRESS_NO_PORT, 1)
        other.setsockopt(socket.IPPROTO_IP, lx.IP_LOCAL_PORT_RANGE, struct.pack("=HH", port, port))
        other.bind(("10.9.0.3", 0))
        other.connect(("10.9.0.2", 7000))
        assert other.getsockname() == ("10.9.0.3", port)
    ends = Ends(net, client, server)
    with other:
        ends.move("left", target(ends.where("left"), local="10.9.0.3", lport=0))
        assert ends.where("left").local.port != port
    _alive(ends)


def test_a_port_bound_explicitly_stays(net: Net) -> None:
    def options(sock: socket.socket) -> None:
        sock.bind(("::", 9000))

    ends = Ends(net, *net.pair(4, options=options))
    new = target(ends.where("left"), lport=9001)
    assert "bound explicitly" in failed(ends.do("left", "depart", new)).reason
    _alive(ends)
    for number in (3, 5, 1):
        ends.move("left", target(ends.where("left"), local=addresses(4, number)))
        _alive(ends)


def test_an_address_bound_with_its_port_stays(net: Net) -> None:
    def options(sock: socket.socket) -> None:
        sock.bind(("::ffff:10.9.0.1", 9000))

    ends = Ends(net, *net.pair(4, options=options))
    reason = failed(ends.do("left", "depart", target(ends.where("left"), local="10.9.0.3"))).reason
    assert "bound to 10.9.0.1:9000 explicitly" in reason
    _alive(ends)
    ends.move("right", target(ends.where("right"), local="10.9.0.4"))
    _alive(ends)


def test_an_address_bound_without_a_port_does_not_stay(net: Net) -> None:
    def options(sock: socket.socket) -> None:
        sock.bind(("::ffff:10.9.0.1", 0))

    ends = Ends(net, *net.pair(4, options=options))
    for number in (3, 5, 1):
        ends.move("left", target(ends.where("left"), local=addresses(4, number)))
        _alive(ends)


def test_a_peer_that_claims_what_was_never_sent(net: Net) -> None:
    ends = Ends(net, *net.pair(4))
    state = ends.depart("right", target(ends.where("right"), local="10.9.0.4"))
    nonsense = state.tuple.mirrored(), (state.rcv_nxt + 5000) & 0xFFFFFFFF, 65536, False
    assert "never sent" in failed(ends.do("left", "follow", *nonsense)).reason
    assert ends.do("right", "retreat") is None
    ends.settle("right")
    _alive(ends)


def test_a_descriptor_that_is_another_socket_now(net: Net) -> None:
    client, server = net.pair(4)
    ends = Ends(net, client, server)
    where = ends.where("left")
    with socket.socket() as other:
        os.dup2(other.fileno(), client.fileno())
    gone = failed(ends.do("left", "depart", where))
    assert gone.lost
    assert "another socket now" in gone.reason


def test_the_end_of_a_connection_is_one_clean_error(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing works any more: neither the move nor any way back."""
    ends = Ends(net, *net.pair(4))

    def install(*_: object, **__: object) -> None:
        raise OSError(errno.ENOBUFS, "no buffers at all")

    monkeypatch.setattr(tcp_state, "install", install)
    client = ends.socks["left"]
    lost = failed(ends.do("left", "depart", target(ends.where("left"), local="10.9.0.3")))
    assert lost.lost
    assert "no buffers at all" in lost.reason
    with pytest.raises(ConnectionAbortedError):
        client.recv(1)
    with pytest.raises(OSError, match="not connected"):
        client.recv(1)
    assert not client.getsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR)
    assert filters.current(client) == b""


def test_a_mobile_session_outlives_silence(net: Net) -> None:
    ends = Ends(net, *net.pair(4))
    client = ends.socks["left"]
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 5000)
    for _ in range(2):
        assert ends.do("left", "enroll") is None
        timeout = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert timeout == MOBILE_USER_TIMEOUT
    for _ in range(2):
        assert ends.do("left", "release") is None
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 5000


def test_what_the_application_has_set_stays(net: Net) -> None:
    options = {
        (socket.SOL_SOCKET, socket.SO_REUSEADDR): 1,
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
        (socket.SOL_SOCKET, socket.SO_MARK): 7,
        (socket.SOL_SOCKET, lx.SO_PEEK_OFF): 3,
        (socket.IPPROTO_TCP, socket.TCP_NODELAY): 1,
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 77,
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): 12345,
        (socket.IPPROTO_IP, lx.IP_LOCAL_PORT_RANGE): 0,
        (socket.IPPROTO_IP, lx.IP_BIND_ADDRESS_NO_PORT): 0,
        (socket.IPPROTO_IPV6, lx.IPV6_TRANSPARENT): 0,
    }
    client, server = net.pair(4)
    for (level, option), value in options.items():
        client.setsockopt(level, option, value)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    ends = Ends(net, client, server)
    for number in (3, 1):
        server.sendall(b"unread")
        ends.move("left", target(ends.where("left"), local=addresses(4, number)))
    for (level, option), value in options.items():
        assert client.getsockopt(level, option) == value, (level, option)
    assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).startswith(b"reno")
