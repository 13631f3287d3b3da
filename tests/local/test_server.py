"""The daemon's end: who may what, what clients can cost, and clients that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import grp
import logging
import os
import resource
import socket
import stat
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from libhsock import wire
from libhsock.client import Client
from libhsock.errors import (
    CouldNotConnect,
    DaemonUnavailable,
    NameNotResolved,
    NotFound,
    ProtocolError,
    Refused,
    UsageError,
)
from sessiond.edges.local import Limits, LocalServer
from sessiond.edges.local.listener import listen
from sessiond.edges.local.requests import flat
from tests.local.support import (
    MemoryBackend,
    Served,
    descriptors,
    eventually,
    greeted,
    in_child,
    raw,
    serving,
)

NOBODY = 65534
# The forks here are the test.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root to become other users")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    os.chmod(tmp_path, 0o755)
    for parent in list(tmp_path.parents)[:3]:
        if parent.stat().st_uid == os.getuid() and parent != Path("/tmp"):
            os.chmod(parent, 0o755)
    with serving(tmp_path) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.path) as client:
        yield client


@contextlib.contextmanager
def connection() -> Iterator[socket.socket]:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sock,
    ):
        yield sock


def hello(served: Served) -> wire.Welcome:
    with Client(served.path) as client:
        return client.hello()


def reply(sock: socket.socket) -> wire.Reply:
    message = wire.decode(sock.recv(wire.MAX_PACKET))
    assert isinstance(message, wire.Reply)
    return message


def ask(sock: socket.socket, call: wire.Call[Any], fds: list[int] | None = None) -> wire.Reply:
    wire.send(sock, wire.request(9, call), fds or [])
    return reply(sock)


# --- every method -------------------------------------------------------------------------------


def test_every_method_is_answered(served: Served, client: Client) -> None:
    hello = client.hello()
    assert (hello.version, hello.admin) == (wire.VERSION, os.getuid() == 0)
    resolution = client.resolve("server.test", "http", family=6)
    assert resolution.candidates[0] == ("2001:db8::1", 80)
    with connection() as sock:
        record = client.attach(sock.fileno(), "connect", "server.test", "http")
    assert (record.peer, record.pid, record.uid) == ("server.test", os.getpid(), os.getuid())
    assert client.show(record.session) == record
    assert list(client.sessions()) == [record]
    assert client.rebind(record.session).moves == 1
    assert client.network().addresses[0].interface == "eth0"
    assert client.stats() == {"sessions.established": 1, "malformed": 0}
    assert client.fingerprint() == "aaaa"
    client.pin("server.test", "bbbb")
    assert client.peers() == client.peers("server.test") == (PINNED,)
    client.forget("server.test")
    assert client.peers() == client.peers("other.test") == ()
    client.detach(record.session)
    assert list(client.sessions()) == []


PINNED = wire.PeerKey("server.test", "bbbb", "pinned")


@pytest.mark.parametrize("name", ["a..b", ".", "x" * 64 + ".test", "y." * 127 + "y"])
def test_what_cannot_be_a_host_name_is_nothing_to_resolve(tmp_path: Path, name: str) -> None:
    with serving(tmp_path) as served, Client(served.path) as client:
        with pytest.raises(UsageError, match="no host name"):
            client.resolve(name, 80)
        assert served.backend.resolving == 0
        client.resolve("server.test.", 80)


def test_errors_of_the_backend_arrive_as_they_were_raised(client: Client) -> None:
    with pytest.raises(NameNotResolved) as caught:
        client.resolve("unknown.test", 80)
    assert caught.value.tried == ("192.0.2.53: NXDOMAIN",)
    with pytest.raises(CouldNotConnect, match="tried: a, b"):
        client.resolve("far.test", 80)
    with pytest.raises(NotFound):
        client.show("ab")
    assert client.hello().version == wire.VERSION


def test_the_caller_is_who_the_kernel_says(served: Served, client: Client) -> None:
    with connection() as sock:
        client.attach(sock.fileno())
    (caller,) = served.backend.callers
    assert (caller.uid, caller.gid, caller.pid) == (os.getuid(), os.getgid(), os.getpid())
    info = Path(f"/proc/self/fdinfo/{caller.pidfd}").read_text()
    assert f"Pid:\t{os.getpid()}\n" in info


def test_pages_are_cut_to_fit_a_packet(served: Served, client: Client) -> None:
    ids = [served.backend.add(0, reason="r" * 1500) for _ in range(250)]
    page = client.page(limit=100)
    assert len(page.sessions) == 25
    assert [record.session for record in client.sessions()] == ids


def test_a_record_too_large_for_a_packet_is_one_error(served: Served, client: Client) -> None:
    served.backend.add(0, reason="r" * 70_000)
    with pytest.raises(UsageError, match="limit is 65536"):
        client.page()
    assert client.hello().version == wire.VERSION


def test_counters_within_counters_have_dotted_names() -> None:
    assert flat({"a": 1, "b": {"c": 2, "d": 3}}) == {"a": 1, "b.c": 2, "b.d": 3}


# --- events -------------------------------------------------------------------------------------


def test_events_arrive_in_order_and_end_with_the_session(served: Served, client: Client) -> None:
    mine, other = served.backend.add(0), served.backend.add(0)
    with client.events(mine, timeout=10) as one, client.events(timeout=10) as all_of_them:
        for session, kind in [(mine, "moving"), (other, "moved"), (mine, "closed")]:
            served.run(served.backend.emit, session, kind)
        assert [event.kind for event in one] == ["moving", "closed"]
        assert [next(all_of_them).kind for _ in range(3)] == ["moving", "moved", "closed"]
        with pytest.raises(TimeoutError, match="no event"):
            all_of_them.next(0.01)
    eventually(lambda: not served.backend.subscribers)


def test_a_client_that_does_not_read_its_events_is_told_so(tmp_path: Path) -> None:
    with serving(tmp_path, limits=Limits(queue=4)) as served, Client(served.path) as client:
        session = served.backend.add(0)
        lazy, prompt = client.events(timeout=10), client.events(timeout=10)
        sent = 0
        while served.run(lambda: served.server._clients and not _any_ending(served)):
            served.run(served.backend.emit, session, f"event-{sent}")
            sent += 1
            assert prompt.next().kind == f"event-{sent - 1}"
        kinds = [event.kind for event in lazy]
        assert kinds[:-1] == [f"event-{number}" for number in range(len(kinds) - 1)]
        assert kinds[-1] == "overflow"
        assert len(kinds) - 1 < sent
        with pytest.raises(StopIteration):
            lazy.next()
        prompt.close()
        eventually(lambda: not served.backend.subscribers)


def test_a_client_that_left_leaves_no_memory_to_collect(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        gc.disable()
        try:
            with greeted(served.path):
                (client,) = served.run(lambda: [*map(weakref.ref, served.server._clients)])
                assert client() is not None
            eventually(lambda: client() is None)
        finally:
            gc.enable()


def _any_ending(served: Served) -> bool:
    return any(client.ending for client in served.server._clients)


def test_a_monitoring_connection_takes_no_further_requests(served: Served) -> None:
    with greeted(served.path) as sock:
        assert ask(sock, wire.Monitor()).error is None
        with pytest.raises(UsageError, match="no further requests"):
            ask(sock, wire.GetStats()).unwrap()


# --- who may ------------------------------------------------------------------------------------


def as_user(uid: int, gid: int, groups: list[int], function: Callable[[], Any]) -> Any:
    def run() -> Any:
        os.setgroups(groups)
        os.setgid(gid)
        os.setuid(uid)
        return function()

    return in_child(run)


@needs_root
def test_users_see_nothing_of_each_other(served: Served) -> None:
    theirs, his = served.backend.add(0), served.backend.add(NOBODY)

    def look() -> str:
        with Client(served.path) as client:
            found = [record.session for record in client.sessions()]
            assert found == [his]
            told = []
            for ask in (client.show, client.rebind, client.detach, client.events):
                for session in (theirs, "0" * 32):
                    try:
                        ask(session)
                    except NotFound as error:
                        told.append(error.message.replace(session, "ID"))
            client.detach(his)
            return f"{client.hello().admin} {sorted(set(told))} {len(told)}"

    assert as_user(NOBODY, NOBODY, [], look) == "False ['there is no session ID'] 8"
    assert [*served.backend.sessions] == [theirs]


@needs_root
def test_a_user_hears_no_events_of_others(served: Served) -> None:
    theirs, his = served.backend.add(0), served.backend.add(NOBODY)
    read, write = os.pipe()

    def hear() -> str:
        with Client(served.path) as client, client.events(timeout=10) as events:
            os.write(write, b"x")
            return " ".join(next(events).session for _ in range(2))

    def emit() -> None:
        os.read(read, 1)
        for session in (theirs, his, theirs, his):
            served.run(served.backend.emit, session, "moved")

    thread = threading.Thread(target=emit)
    thread.start()
    assert as_user(NOBODY, NOBODY, [], hear) == f"{his} {his}"
    thread.join()
    os.close(read)
    os.close(write)


@needs_root
@pytest.mark.parametrize(
    ("primary", "groups", "admin"),
    [(False, True, "True"), (True, False, "True"), (False, False, "False")],
)
def test_the_group_administers(
    tmp_path_factory: pytest.TempPathFactory, primary: bool, groups: bool, admin: str
) -> None:
    group = next(g for g in grp.getgrall() if g.gr_gid not in (0, NOBODY))
    directory = Path("/tmp") / f"hsock-{os.getpid()}-{primary}-{groups}"
    directory.mkdir()
    try:
        with serving(directory, group=group.gr_name) as served:
            served.backend.add(0)

            def look() -> str:
                with Client(served.path) as client:
                    assert len([*client.sessions()]) == (admin == "True")
                    return str(client.hello().admin)

            gid = group.gr_gid if primary else NOBODY
            extra = [NOBODY, group.gr_gid] if groups else []
            assert as_user(NOBODY, gid, extra, look) == admin
    finally:
        directory.rmdir()


@needs_root
def test_one_user_has_so_many_connections(tmp_path: Path) -> None:
    directory = Path("/tmp") / f"hsock-{os.getpid()}-many"
    directory.mkdir()
    try:
        with serving(directory, clients_per_uid=3) as served:

            def crowd() -> str:
                kept = [greeted(served.path) for _ in range(3)]
                with pytest.raises(Refused) as refused:
                    hello(served)
                kept.pop().close()
                for _ in range(1000):
                    with contextlib.suppress(Refused):
                        hello(served)
                        return refused.value.message
                return "still refused"

            assert (
                as_user(NOBODY, NOBODY, [], crowd) == f"user {NOBODY} has 3 connections to sessiond"
            )
            assert hello(served).admin
            eventually(lambda: served.server._uids.keys() <= {0})
    finally:
        directory.rmdir()


# --- clients that misbehave ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        b"\x91" * 5000,
        msgpack.packb([1, 1, None, {}]),
        msgpack.packb([2, "event", {}]),
        msgpack.packb([0, 1, "hello", {1: 2}]),
    ],
)
def test_malformed_packets_are_answered_and_end_the_connection(
    served: Served, client: Client, data: bytes
) -> None:
    with raw(served.path) as sock:
        sock.send(data)
        last = reply(sock)
        assert last.id == 0
        assert isinstance(last.error, ProtocolError)
        assert sock.recv(10) == b""
    assert client.hello().version == wire.VERSION


def test_an_oversized_packet_is_refused(served: Served, client: Client) -> None:
    with greeted(served.path) as sock:
        sock.send(b"\xc0" * (wire.MAX_PACKET + 1))
        last = reply(sock)
        assert last.id == 0
        assert "larger than 65536" in str(last.error)
        assert sock.recv(10) == b""
    assert client.hello().version == wire.VERSION


def test_a_usage_error_leaves_the_connection_open(served: Served) -> None:
    with greeted(served.path) as sock:
        for data in (
            msgpack.packb([0, 5, "nonsense", {}]),
            msgpack.packb([0, 5, "show", {"session": "ab", "colour": 1}]),
        ):
            sock.send(data)
            answer = reply(sock)
            assert (answer.id, type(answer.error)) == (5, UsageError)
        assert ask(sock, wire.GetStats()).error is None


def test_hello_comes_first_and_names_a_version_both_speak(served: Served) -> None:
    with raw(served.path) as sock:
        with pytest.raises(UsageError, match="hello first"):
            ask(sock, wire.GetStats()).unwrap()
        with pytest.raises(UsageError, match="speaks version 1, not 2, 3"):
            ask(sock, wire.Hello("test", (2, 3))).unwrap()
        ask(sock, wire.Hello("test", (1, 2))).unwrap()
        ask(sock, wire.GetStats()).unwrap()


def test_many_descriptors_are_refused_and_closed(served: Served, client: Client) -> None:
    client.hello()
    null = os.open("/dev/null", os.O_RDONLY)
    before = descriptors()
    attach = wire.Attach(null, "connect")
    for count in (2, 3, 253):
        with greeted(served.path) as sock:
            answer = ask(sock, attach, [null] * count)
            assert answer.id == 0
            assert "descriptor" in str(answer.error)
            assert sock.recv(10) == b""
    with greeted(served.path) as sock:
        with pytest.raises(UsageError, match="attach came with 0 descriptors"):
            ask(sock, attach).unwrap()
        with pytest.raises(UsageError, match="stats came with 1 descriptors"):
            ask(sock, wire.GetStats(), [null]).unwrap()
        with pytest.raises(UsageError, match="no socket"):
            ask(sock, attach, [null]).unwrap()
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with udp, pytest.raises(Refused, match="not a TCP socket"):
            ask(sock, attach, [udp.fileno()]).unwrap()
    eventually(lambda: descriptors().keys() == before.keys())
    os.close(null)
    assert client.hello().version == wire.VERSION


def test_a_lingering_socket_does_not_hold_the_daemon_up(served: Served, client: Client) -> None:
    client.hello()
    with socket.create_server(("127.0.0.1", 0)) as server, greeted(served.path) as sock:
        lingering = socket.create_connection(server.getsockname())
        far, _ = server.accept()
        lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
        lingering.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                lingering.send(b"x" * 65536)
        request = wire.request(9, wire.Attach(lingering.fileno(), "connect"))
        busy = threading.Event()
        served.loop.call_soon_threadsafe(busy.wait, 10)
        wire.send(sock, request, [lingering.fileno()])
        os.close(lingering.detach())  # so that the daemon's descriptor is the last one
        busy.set()
        assert reply(sock).error is None
        assert client.hello().version == wire.VERSION
        far.close()  # unread bytes: a reset, which ends the lingering


def test_a_descriptor_is_closed_after_attach(served: Served, client: Client) -> None:
    client.hello()
    before = descriptors().keys()
    with connection() as sock:
        for _ in range(50):
            client.attach(sock.fileno())
    eventually(lambda: descriptors().keys() == before)


def test_a_client_that_does_not_greet_is_dropped(tmp_path: Path) -> None:
    with serving(tmp_path, limits=Limits(greeting=0.05)) as served, raw(served.path) as sock:
        last = reply(sock)
        assert (last.id, type(last.error)) == (0, DaemonUnavailable)
        assert sock.recv(10) == b""
        eventually(lambda: served.clients == 0)


def test_a_client_that_does_not_read_is_dropped(tmp_path: Path) -> None:
    with serving(tmp_path, limits=Limits(stall=0.1)) as served, greeted(served.path) as sock:
        served.backend.add(0, reason="r" * 30_000)
        sock.setblocking(False)
        for id in range(1, 10_000):
            try:
                wire.send(sock, wire.request(id, wire.List()))
            except BlockingIOError:
                break  # nothing further is read from it
            except BrokenPipeError:
                break
        eventually(lambda: served.clients == 0)
        with Client(served.path) as client:
            assert client.hello().version == wire.VERSION


def test_a_slow_reader_gets_everything_in_order(served: Served) -> None:
    served.backend.add(0, reason="r" * 30_000)
    with greeted(served.path) as sock:
        sent, got = 0, 0
        while sent < 300:
            with contextlib.suppress(BlockingIOError):
                sock.setblocking(False)
                sock.send(wire.request(sent + 1, wire.List()))
                sent += 1
                continue
            sock.settimeout(10)
            got += 1
            assert reply(sock).id == got
        sock.settimeout(10)
        while got < sent:
            got += 1
            assert reply(sock).id == got


def test_requests_under_way_are_limited_and_cancelled_with_their_client(served: Served) -> None:
    session = served.backend.add(0)
    served.run(served.backend.gate.clear)
    with greeted(served.path) as sock, greeted(served.path) as other:
        for id in range(1, 18):
            wire.send(sock, wire.request(id, wire.Rebind(session)))
        refusal = reply(sock)
        assert (refusal.id, type(refusal.error)) == (17, Refused)
        assert ask(other, wire.GetStats()).error is None
        tasks = served.run(lambda: len(asyncio.all_tasks()))
        sock.close()
        eventually(lambda: served.run(lambda: len(asyncio.all_tasks())) == tasks - 16)


def test_a_client_that_dies_amid_a_request_leaves_nothing(served: Served, client: Client) -> None:
    session = served.backend.add(0)
    client.hello()
    before = descriptors().keys()
    served.run(served.backend.gate.clear)
    for call in (wire.Rebind(session), wire.Resolve("server.test", "80"), wire.Monitor(session)):
        sock = greeted(served.path)
        wire.send(sock, wire.request(2, call))
        sock.close()
    eventually(lambda: served.clients == 1 and not served.backend.subscribers)
    eventually(lambda: descriptors().keys() == before)


def test_a_fault_of_the_daemon_costs_one_client(
    served: Served, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with connection() as sock, greeted(served.path) as victim:
        wire.send(victim, wire.request(2, wire.Attach(1, "connect", "fault.test")), [sock.fileno()])
        assert victim.recv(100) == b""
    assert client.hello().version == wire.VERSION
    assert "ZeroDivisionError" in caplog.text


def test_faults_of_clients_do_not_flood_the_log(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(200):
            with raw(served.path) as sock:
                sock.send(b"\xc1")
                reply(sock)
    assert 1 <= len(caplog.records) <= 5
    assert f"pid {os.getpid()}, uid {os.getuid()}" in caplog.text


def test_out_of_descriptors_the_server_waits_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path) as served:
        waiting = [wire.new_socket() for _ in range(3)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.close(limit := os.dup(0))
        with caplog.at_level(logging.WARNING):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            try:
                for sock in waiting:
                    sock.connect(served.path)
                    sock.settimeout(10)
                    wire.send(sock, wire.request(1, wire.Hello("test")))
                eventually(lambda: "no client can be accepted" in caplog.text)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for sock in waiting:
            assert reply(sock).error is None
            sock.close()


# --- the path -----------------------------------------------------------------------------------


def test_everybody_may_connect_and_the_path_goes_with_the_server(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        assert stat.S_IMODE(os.stat(served.path).st_mode) == 0o666
    assert [*tmp_path.iterdir()] == []


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "sessiond.sock"
    listen(str(path)).close()
    assert path.is_socket()
    with serving(tmp_path) as served:
        with pytest.raises(OSError, match="another daemon listens there"):
            listen(str(path))
        assert hello(served).version == wire.VERSION


def test_something_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "sessiond.sock"
    path.write_text("precious")
    with pytest.raises(OSError, match="no socket"):
        listen(str(path))
    assert path.read_text() == "precious"
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="no socket"):
        listen(str(path))


def test_a_socket_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "sessiond.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.bind(str(path))
        stream.listen()
        with pytest.raises(OSError, match="another daemon"):
            listen(str(path))


def test_a_path_taken_over_by_a_successor_is_not_removed(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        os.unlink(served.path)
        successor = listen(served.path)
    assert os.path.exists(served.path)
    successor.close()


def test_a_supervisors_socket_is_used_and_its_path_kept(tmp_path: Path) -> None:
    passed = listen(str(tmp_path / "sessiond.sock"))
    with serving(tmp_path, listener=passed) as served:
        assert hello(served).version == wire.VERSION
    assert (tmp_path / "sessiond.sock").is_socket()


async def test_a_supervisors_socket_of_another_kind_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        server = LocalServer(tmp_path / "x", MemoryBackend(), listener=stream)
        with pytest.raises(OSError, match="SOCK_SEQPACKET"):
            await server.start()


def test_a_killed_daemons_path_is_replaced_by_the_next(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from tests.local.support import MemoryBackend, LocalServer\n"
        "async def main():\n"
        "    await LocalServer(sys.argv[1], MemoryBackend()).start()\n"
        "    print('ready', flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    path = str(tmp_path / "sessiond.sock")
    command = [sys.executable, "-c", program, path]
    with Client(path) as client:
        for _ in range(2):
            with subprocess.Popen(command, stdout=subprocess.PIPE) as daemon:
                assert daemon.stdout is not None
                assert daemon.stdout.readline() == b"ready\n"
                assert client.hello().version == wire.VERSION
                daemon.kill()
            with pytest.raises(DaemonUnavailable, match="nobody listens"):
                client.hello()
