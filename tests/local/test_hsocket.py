"""Sockets as blocking applications use them, with a daemon, without one, and with a bad one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import libhsock
from libhsock import eyeballs, names, wire
from libhsock.client import TIMEOUT
from libhsock.errors import (
    ConnectTimedOut,
    CouldNotConnect,
    NameNotResolved,
    NoLocalAddress,
    Refused,
    UsageError,
)
from libhsock.hsocket import HSocket
from libhsock.testing import FakeDaemon
from tests.local.support import descriptors, eventually, in_child

CLONE_NEWNET = 0x40000000

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def server() -> Iterator[HSocket]:
    with libhsock.create_server(("", 0)) as server:
        server.settimeout(10)
        yield server


def port_of(server: socket.socket) -> int:
    return int(server.getsockname()[1])


@contextlib.contextmanager
def pair(server: HSocket, host: str = "server.test") -> Iterator[tuple[HSocket, HSocket]]:
    with libhsock.create_connection((host, port_of(server)), timeout=10) as near:
        far, _ = server.accept()
        with far:
            yield near, far


# --- with a daemon ------------------------------------------------------------------------------


def test_both_ends_have_sessions(fake: FakeDaemon, server: HSocket) -> None:
    with pair(server) as (near, far):
        near.sendall(b"ping")
        assert far.recv(10) == b"ping"
        near_record, far_record = near.session.refresh(), far.session.refresh()
        assert (near_record.role, near_record.peer) == ("connect", "server.test")
        assert (far_record.role, far_record.peer) == ("accept", None)
        assert near.session.tuple == far.session.tuple[::-1]
        assert near.session.local == f"[::1]:{near.getsockname()[1]}"
        assert near.session.remote == f"[::1]:{port_of(server)}"
        assert (near.session.state, near.session.mobile) == ("established", True)
        assert (near.session.engine, near.session.reason, near.session.gap) == (
            "repair",
            None,
            None,
        )
        attach = next(c for c in fake.calls if isinstance(c, wire.Attach))
        assert attach == wire.Attach(near.fileno(), "connect", "server.test", str(port_of(server)))


def test_what_comes_back_is_a_socket_ready_to_move(fake: FakeDaemon, server: HSocket) -> None:
    fake.names["server.test"] = ["127.0.0.1"]
    with pair(server) as (near, far):
        for sock in (near, far):
            assert isinstance(sock, socket.socket)
            assert sock.family == socket.AF_INET6
            assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0
        assert near.session.remote == f"127.0.0.1:{port_of(server)}"
        assert near.getpeername()[0] == "::ffff:127.0.0.1"
        assert near.gettimeout() == 10
        # Not bound explicitly: in repair mode the same socket could connect from another port.
        near_port = near.getsockname()[1]
        bound = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        with bound:
            bound.bind(("::", 0))
            assert bound.getsockname()[1] != near_port


def test_properties_follow_the_daemon(fake: FakeDaemon, server: HSocket) -> None:
    with pair(server) as (near, _):
        fake.move(near.session, local="192.0.2.7:41000", gap_ms=0.5)
        assert near.session.local == "192.0.2.7:41000"
        assert near.session.gap == 0.0005
        cached = near.session.record
        fake.wait(near.session, "no usable address")
        assert cached.state == "established"
        assert (near.session.state, near.session.reason) == ("waiting", "no usable address")
        assert near.session.rebind("2001:db8::7").moves == 2
        assert repr(near.session).endswith("established>")


def test_events_tell_what_happens(fake: FakeDaemon, server: HSocket) -> None:
    with pair(server) as (near, far):
        with near.session.events(timeout=10) as events:
            fake.move(far.session)
            fake.move(near.session)
            fake.lose(near.session)
            assert [event.kind for event in events] == ["moving", "moved", "lost", "closed"]
        assert [*near.session.events()] == []
        with far.session.events() as events, pytest.raises(TimeoutError, match=r"0\.01 s"):
            events.next(0.01)


def test_waiting_until_it_is_mobile(fake: FakeDaemon, server: HSocket) -> None:
    with pair(server) as (near, far):
        assert near.session.wait_mobile(0)
        for sock in (near, far):
            fake.update(sock.session, state="binding", mobile=False)
        assert not near.session.wait_mobile(0.01)
        binder = threading.Timer(0.05, fake.bind, (near.session,))
        binder.start()
        assert near.session.wait_mobile(10)
        refuser = threading.Timer(0.05, _stay_plain, (fake, far.session))
        refuser.start()
        assert not far.session.wait_mobile(10)
        assert far.session.reason == "no sessiond answered"
        binder.join()
        refuser.join()


def _stay_plain(fake: FakeDaemon, session: libhsock.Session) -> None:
    record = fake.update(session, state="plain", reason="no sessiond answered")
    fake.emit(record, "failed", reason="no sessiond answered")


def test_detaching_makes_it_plain_for_good(fake: FakeDaemon, server: HSocket) -> None:
    with pair(server) as (near, far):
        near.session.detach()
        near.session.detach()
        assert (near.session.state, near.session.mobile) == ("plain", False)
        assert near.session.reason == "plain TCP: the application detached the session"
        assert [*near.session.events()] == []
        with pytest.raises(Refused, match="detached"):
            near.session.rebind()
        near.sendall(b"still here")
        assert far.recv(20) == b"still here"


def test_a_closed_connection_says_so(fake: FakeDaemon, server: HSocket) -> None:
    with pair(server) as (near, _):
        session = near.session
    fake.end(session)
    assert (session.state, session.mobile) == ("closed", False)
    assert session.reason == "the connection has ended"
    assert not session.wait_mobile(1)


def test_dup_fork_select_and_makefile(fake: FakeDaemon, server: HSocket) -> None:
    with pair(server) as (near, far):
        copy = near.dup()
        assert isinstance(copy, HSocket)
        assert copy.session.id == near.session.id
        copy.close()
        assert select.select([far], [], [], 0)[0] == []
        with near.makefile("rw") as file:
            file.write("a line\n")
            file.flush()
            assert select.select([far], [], [], 10)[0] == [far]
            far.sendall(far.recv(100).upper())
            assert file.readline() == "A LINE\n"

        def child() -> str:
            near.sendall(b"from the child")
            return f"{near.session.state} {near.session.id}"

        assert in_child(child) == f"established {near.session.id}"
        assert far.recv(100) == b"from the child"


def test_tls_over_it(
    fake: FakeDaemon, server: HSocket, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    client_context, server_context = tls

    def serve() -> None:
        far, _ = server.accept()
        with server_context.wrap_socket(far, server_side=True) as secure:
            secure.sendall(secure.recv(100).upper())

    thread = threading.Thread(target=serve)
    thread.start()
    near = libhsock.create_connection(("server.test", port_of(server)), timeout=10)
    session = near.session
    with client_context.wrap_socket(near, server_hostname="server.test") as secure:
        secure.sendall(b"secret")
        assert secure.recv(100) == b"SECRET"
        assert session.mobile
        assert libhsock.session(secure).id == session.id
        fake.stop(forget=True)
        fake.start()
        assert (session.state, session.mobile) == ("plain", False)
    thread.join()
    assert session.state == "plain"


def test_a_thread_blocked_in_recv_gets_its_bytes(fake: FakeDaemon, server: HSocket) -> None:
    with pair(server) as (near, far):
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(near.recv(100)))
        reader.start()
        for _ in range(10):
            fake.move(near.session)
        far.sendall(b"there")
        reader.join()
        assert got == [b"there"]


def test_a_service_by_name_and_a_family(fake: FakeDaemon, server: HSocket) -> None:
    with pytest.raises(CouldNotConnect):
        libhsock.create_connection(("server.test", "discard"), timeout=10, family=4)
    resolve = next(c for c in fake.calls if isinstance(c, wire.Resolve))
    assert resolve == wire.Resolve("server.test", "discard", 4)


def test_numeric_addresses_need_no_question(fake: FakeDaemon, server: HSocket) -> None:
    for host in ("127.0.0.1", "::1"):
        with pair(server, host) as (near, _):
            assert near.session.peer == host
    assert not [call for call in fake.calls if isinstance(call, wire.Resolve)]


def test_a_server_on_one_address(fake: FakeDaemon) -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        listening = libhsock.create_server((host, 0), backlog=5, reuse_port=True)
        with listening as server, pair(server, host) as (near, far):
            far.sendall(b"x")
            assert near.recv(1) == b"x"
    with libhsock.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(OSError, match="while listening") as caught:
            libhsock.create_server(("127.0.0.1", port_of(server)))
        assert caught.value.errno == 98


def test_attaching_a_socket_from_elsewhere(fake: FakeDaemon, server: HSocket) -> None:
    plain = socket.create_connection(("127.0.0.1", port_of(server)), timeout=7)
    number = plain.fileno()
    with libhsock.attach(plain, peer="server.test") as sock:
        assert (sock.fileno(), plain.fileno(), sock.gettimeout()) == (number, -1, 7)
        assert (sock.session.peer, sock.session.refresh().role) == ("server.test", "attach")
        assert libhsock.attach(sock) is sock
        assert libhsock.session(sock) is sock.session
    server.accept()[0].close()


def test_what_can_not_be_attached(fake: FakeDaemon, server: HSocket) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        with pytest.raises(UsageError, match="only TCP"):
            libhsock.attach(udp)
        assert udp.fileno() > 0
    with socket.socket() as fresh, pytest.raises(UsageError, match="not connected"):
        libhsock.attach(fresh)
    with pytest.raises(UsageError, match="listening"):
        libhsock.attach(server)
    with pytest.raises(UsageError, match="only a connected socket"):
        _ = server.session

    class Special(socket.socket):
        pass

    with Special() as special, pytest.raises(UsageError, match=r"libhsock\.session"):
        libhsock.attach(special)
    with pytest.raises(UsageError, match="int has no socket"):
        libhsock.session(5)


def test_nothing_leaks(fake: FakeDaemon, server: HSocket) -> None:
    def once() -> None:
        with pair(server) as (near, far):
            with near.session.events() as events:
                fake.move(near.session)
                next(events)
            far.session.detach()
        for address in [("server.test", 1), ("unknown.invalid", 1)]:
            with pytest.raises(OSError, match="could not"):
                libhsock.create_connection(address, timeout=10)

    once()
    before = descriptors().keys()
    for _ in range(20):
        once()
    eventually(lambda: descriptors().keys() == before)


# --- without a daemon, or with one that doesn't help --------------------------------------------


def works_as_plain_tcp(server: HSocket, host: str = "localhost") -> str:
    with pair(server, host) as (near, far):
        near.sendall(b"ping")
        assert far.recv(10) == b"ping"
        for sock in (near, far):
            session = sock.session
            assert (session.id, session.mobile, session.state) == (None, False, "plain")
            assert (session.engine, session.gap) == (None, None)
            assert [*session.events()] == []
            assert not session.wait_mobile(5)
            session.detach()
        assert near.session.tuple == far.session.tuple[::-1]
        with pytest.raises(Refused, match="plain TCP"):
            near.session.rebind()
        return str(near.session.reason)


@pytest.mark.usefixtures("no_daemon")
def test_without_a_daemon(server: HSocket) -> None:
    assert works_as_plain_tcp(server).startswith("plain TCP: sessiond is not running")


def test_with_an_unwilling_daemon(fake: FakeDaemon, server: HSocket) -> None:
    fake.refuse("attach", Refused("this user has its limit of sessions"))
    reason = works_as_plain_tcp(server, "server.test")
    assert reason == "plain TCP: this user has its limit of sessions"


def test_with_a_daemon_of_another_version(fake: FakeDaemon, server: HSocket) -> None:
    fake.refuse("hello", UsageError("this daemon speaks version 2, not 1"))
    with pytest.raises(UsageError):
        libhsock.create_connection(("server.test", port_of(server)))
    assert "speaks version 2" in works_as_plain_tcp(server, "127.0.0.1")


def test_with_a_daemon_that_may_not_be_reached(
    server: HSocket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SESSIOND_SOCKET", str(tmp_path / "file" / "sock"))
    assert "failed: Not a directory" in works_as_plain_tcp(server)


def test_with_a_daemon_killed_between_calls(fake: FakeDaemon, server: HSocket) -> None:
    with pair(server) as (near, far):
        fake.stop()
        assert (near.session.mobile, near.session.state) == (False, "plain")
        assert "not running" in str(near.session.reason)
        near.sendall(b"on")
        assert far.recv(10) == b"on"
        fake.start()
        assert (near.session.mobile, near.session.state) == (True, "established")
        fake.stop(forget=True)
        fake.start()
        assert near.session.reason == "plain TCP: sessiond does not know the session any more"


def test_with_a_hanging_daemon_a_timeout_holds(fake: FakeDaemon, server: HSocket) -> None:
    fake.silence("resolve", "attach")
    began = time.monotonic()
    with libhsock.create_connection(("localhost", port_of(server)), timeout=1) as sock:
        assert "did not answer" in str(sock.session.record.reason)
    assert time.monotonic() - began < TIMEOUT


def test_a_peer_that_is_not_mobile(fake: FakeDaemon, server: HSocket) -> None:
    fake.mobile, fake.reason = False, "no sessiond answered at 192.0.2.2:2006"
    with pair(server) as (near, _):
        assert (near.session.mobile, near.session.state) == (False, "plain")
        assert near.session.reason == "no sessiond answered at 192.0.2.2:2006"


# --- the three ways to fail ---------------------------------------------------------------------


def test_name_not_resolved(fake: FakeDaemon) -> None:
    fake.refuse("resolve", NameNotResolved("no.test has no address", ["192.0.2.53: NXDOMAIN"]))
    with pytest.raises(socket.gaierror) as caught:
        libhsock.create_connection(("no.test", 80))
    assert str(caught.value) == "no.test has no address; tried: 192.0.2.53: NXDOMAIN"


@pytest.mark.usefixtures("no_daemon")
def test_name_not_resolved_without_a_daemon() -> None:
    with pytest.raises(NameNotResolved):
        libhsock.create_connection(("no.invalid", 80))


NO_NAMES = ["a..b", ".", ".test", "x" * 64 + ".test", "", "y." * 150]


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_cannot_be_a_name_is_the_callers_fault(fake: FakeDaemon, name: str) -> None:
    with pytest.raises(UsageError, match="no host name"):
        libhsock.create_connection((name, 80))
    assert fake.calls == []


@pytest.mark.usefixtures("no_daemon")
@pytest.mark.parametrize("name", [*NO_NAMES, "\ufffd.test"])
def test_what_cannot_be_a_name_without_a_daemon(name: str) -> None:
    with pytest.raises(UsageError, match="no host name"):
        libhsock.create_connection((name, 80))


@pytest.mark.parametrize("name", ["server.test", "server.test."])
def test_a_name_may_end_with_the_root(name: str) -> None:
    assert names.target((name, 80)).name == name


def test_could_not_connect(fake: FakeDaemon) -> None:
    with pytest.raises(ConnectionError) as caught:
        libhsock.create_connection(("server.test", 1))
    assert isinstance(caught.value, CouldNotConnect)
    assert caught.value.errno == 111
    assert caught.value.tried == (
        "[::1]:1: Connection refused",
        "127.0.0.1:1: Connection refused",
    )


def test_a_wrong_family_or_port(fake: FakeDaemon) -> None:
    with pytest.raises(NameNotResolved, match="no IPv4 address"):
        libhsock.create_connection(("::1", 1), family=4)
    with pytest.raises(UsageError, match="family"):
        libhsock.create_connection(("::1", 1), family=5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no port"):
        libhsock.create_connection(("::1", 65536))


def in_empty_network(function: Any) -> Any:
    def run() -> Any:
        # os.unshare() is there from Python 3.12 on.
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        return function()

    return in_child(run)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to make a network namespace")
@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "server.test"])
def test_no_local_address(fake: FakeDaemon, host: str) -> None:
    fake.names["server.test"] = ["2001:db8::1", "192.0.2.1"]

    def dial() -> str:
        with pytest.raises(NoLocalAddress) as caught:
            libhsock.create_connection((host, 80), timeout=10)
        return f"{caught.value.errno} {caught.value}"

    told = in_empty_network(dial)
    assert told.startswith("101 this host has no usable address or route to ")
    for address in fake.names.get(host, [host]):
        assert f"{eyeballs.text((address, 80))}: " in told


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to make a network namespace")
@pytest.mark.usefixtures("no_daemon")
def test_no_local_address_to_look_a_name_up_from() -> None:
    def dial() -> str:
        with pytest.raises(NoLocalAddress) as caught:
            libhsock.create_connection(("server.test", 80))
        return str(caught.value)

    assert "no interface of this host has an address" in in_empty_network(dial)


# --- happy eyeballs -----------------------------------------------------------------------------


def test_families_take_turns() -> None:
    six, four = [(f"2001:db8::{n}", 1) for n in range(3)], [("192.0.2.1", 1)]
    assert eyeballs.interleave(six + four) == [six[0], four[0], six[1], six[2]]
    assert eyeballs.interleave(four + six) == [four[0], *six]
    assert eyeballs.interleave([]) == []


def test_srv_priorities_go_before_turns() -> None:
    resolution = wire.Resolution((("::1", 1), ("::2", 2), ("127.0.0.1", 3)), "srv")
    ordered = names.target(("a.test", "x"), srv=True).resolved(resolution)
    assert ordered == [("::1", 1), ("::2", 2), ("127.0.0.1", 3)]


def hanging_address() -> tuple[str, socket.socket, list[socket.socket]]:
    """An address on which nobody answers: a listener with a full backlog."""
    listener = socket.socket(socket.AF_INET6)
    listener.bind(("::1", 0))
    listener.listen(0)
    fill = []
    for _ in range(4):
        sock = socket.socket(socket.AF_INET6)
        sock.setblocking(False)
        sock.connect_ex(listener.getsockname())
        fill.append(sock)
    return listener.getsockname()[1], listener, fill


def test_a_silent_address_holds_up_by_a_quarter_second(fake: FakeDaemon) -> None:
    port, listener, fill = hanging_address()
    with socket.create_server(("127.0.0.1", port)) as answering, listener:
        began = time.monotonic()
        with libhsock.create_connection(("server.test", port), timeout=10) as sock:
            took = time.monotonic() - began
            assert sock.session.remote == f"127.0.0.1:{port}"
        answering.accept()[0].close()
        assert eyeballs.DELAY <= took < eyeballs.DELAY + 2
        for one in fill:
            one.close()


def test_a_refusing_address_holds_up_by_nothing(
    fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eyeballs, "DELAY", 3600)
    with socket.create_server(("127.0.0.1", 0)) as answering:
        port = port_of(answering)
        with libhsock.create_connection(("server.test", port), timeout=10) as sock:
            assert sock.session.remote == f"127.0.0.1:{port}"
        answering.accept()[0].close()


def test_the_time_is_up(fake: FakeDaemon) -> None:
    port, listener, fill = hanging_address()
    with listener:
        with pytest.raises(TimeoutError) as caught:
            libhsock.create_connection(("server.test", port), timeout=0.05)
        assert isinstance(caught.value, ConnectTimedOut)
        assert str(caught.value) == (
            f"could not connect to server.test:{port} in 0.05 s; tried: [::1]:{port}: no answer"
        )
        for one in fill:
            one.close()


def test_where_the_kernel_has_no_ipv6(fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket.__init__

    def without_ipv6(self: socket.socket, family: int = -1, *more: Any, **kinds: Any) -> None:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        real(self, family, *more, **kinds)

    monkeypatch.setattr(socket.socket, "__init__", without_ipv6)
    with libhsock.create_server(("", 0)) as server, pair(server) as (near, far):
        assert (near.family, far.family) == (socket.AF_INET, socket.AF_INET)
        assert near.session.remote == f"127.0.0.1:{port_of(server)}"
    with pytest.raises(NoLocalAddress):
        libhsock.create_connection(("::1", 1))
