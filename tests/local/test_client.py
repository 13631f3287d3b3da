"""The blocking client against a daemon that restarts, hangs, refuses, or isn't there."""

from __future__ import annotations

import os
import select
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from libhsock import client as client_module
from libhsock import wire
from libhsock.client import Client, default_client
from libhsock.errors import DaemonUnavailable, NotFound, ProtocolError, Refused, UsageError
from libhsock.testing import FakeDaemon
from tests.local.support import descriptors, eventually, in_child, serving

# The forks here are the test.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def client(fake: FakeDaemon) -> Iterator[Client]:
    with Client() as client:
        yield client


def test_the_path_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SESSIOND_SOCKET", raising=False)
    assert Client().path == "/run/sessiond/sessiond.sock"
    with FakeDaemon() as fake:
        assert Client().path == fake.path == default_client().path
    assert "SESSIOND_SOCKET" not in os.environ


def test_without_a_daemon_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnavailable, match=r"not running: there is no .*/none"):
        Client(str(tmp_path / "none")).hello()


def test_requests_share_one_connection(fake: FakeDaemon, client: Client) -> None:
    for _ in range(5):
        client.network()
    assert [call.method for call in fake.calls] == ["hello", *["network"] * 5]


def test_pages_are_joined(fake: FakeDaemon, client: Client) -> None:
    ids = fake.add(250)
    assert [record.session for record in client.sessions()] == ids
    assert fake.calls[-2:] == [wire.List(ids[99]), wire.List(ids[199])]


def test_a_restarted_daemon_is_found_again(fake: FakeDaemon, client: Client) -> None:
    (session,) = fake.add()
    client.show(session)
    fake.stop()
    with pytest.raises(DaemonUnavailable, match="not running"):
        client.show(session)
    fake.start()
    assert client.show(session).session == session
    fake.stop()
    fake.start()
    assert client.show(session).session == session  # without an error between


def test_a_move_is_not_asked_for_twice(fake: FakeDaemon, client: Client) -> None:
    (session,) = fake.add()
    client.show(session)
    fake.silence("rebind")

    def stop_when_asked() -> None:
        eventually(lambda: any(call.method == "rebind" for call in fake.calls))
        fake.stop()

    stopper = threading.Thread(target=stop_when_asked)
    stopper.start()
    with pytest.raises(DaemonUnavailable, match="went away in the middle"):
        client.rebind(session)
    stopper.join()
    assert [call.method for call in fake.calls].count("rebind") == 1
    fake.start()


def test_a_hanging_daemon_costs_one_timeout(fake: FakeDaemon) -> None:
    fake.silence("show", "stats")
    with Client(timeout=0.5) as client:
        with pytest.raises(DaemonUnavailable, match=r"did not answer in 0\.5 s"):
            client.show("ab")
        began = time.monotonic()
        with pytest.raises(DaemonUnavailable, match="just now"):
            client.stats()
        assert time.monotonic() - began < 0.5


def test_events_of_a_hanging_daemon_cost_one_timeout(fake: FakeDaemon) -> None:
    fake.silence("monitor")
    before = descriptors().keys()
    with Client(timeout=0.2) as client:
        with pytest.raises(DaemonUnavailable, match=r"did not answer in 0\.2 s"):
            client.events()
        with pytest.raises(DaemonUnavailable, match="just now"):
            client.events()
    eventually(lambda: descriptors().keys() == before)


def test_the_daemons_refusals_leave_the_connection(fake: FakeDaemon, client: Client) -> None:
    fake.refuse("rebind", Refused("the app bound its own port", ["keep", "change"]))
    (session,) = fake.add()
    with pytest.raises(Refused) as caught:
        client.rebind(session)
    assert caught.value.tried == ("keep", "change")
    fake.refuse("rebind", None)
    assert client.rebind(session, "2001:db8::9").local == "[2001:db8::9]:1024"
    with pytest.raises(NotFound):
        client.show("ab")


def test_an_unspeakable_request_is_the_callers_fault(fake: FakeDaemon, client: Client) -> None:
    with pytest.raises(UsageError, match="the limit is 65536"):
        client.show("x" * wire.MAX_PACKET)
    with pytest.raises(UsageError, match=r"64"):
        client.show("x" * 65)
    assert client.stats() == {}


@pytest.mark.parametrize(
    "answer",
    [b"\xc1", wire.reply(77, {}), wire.notification({"session": "a"}), wire.reply(1, {"x": 1})],
)
def test_a_daemon_that_talks_nonsense_is_a_protocol_error(tmp_path: Path, answer: bytes) -> None:
    path = str(tmp_path / "nonsense.sock")
    with wire.new_socket() as listener:
        listener.bind(path)
        listener.listen()

        def answer_once() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(wire.MAX_PACKET)
                sock.send(answer)

        thread = threading.Thread(target=answer_once)
        thread.start()
        with pytest.raises(ProtocolError):
            Client(path).hello()
        thread.join()


def test_threads_share_a_client(fake: FakeDaemon, client: Client) -> None:
    ids = fake.add(64)
    wrong: list[str] = []

    def work(mine: list[str]) -> None:
        wrong.extend(one for one in mine * 10 if client.show(one).session != one)

    threads = [threading.Thread(target=work, args=(ids[n::16],)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [call.method for call in fake.calls].count("hello") <= client_module.PLACES


def test_a_long_move_holds_nobody_up(tmp_path: Path) -> None:
    with serving(tmp_path) as served, Client(served.path) as client:
        session = served.backend.add(os.getuid())
        served.run(served.backend.gate.clear)
        mover = threading.Thread(target=client.rebind, args=(session,))
        mover.start()
        for _ in range(20):
            assert client.show(session).moves == 0
        assert mover.is_alive()
        served.run(served.backend.gate.set)
        mover.join()


def test_a_child_has_a_connection_of_its_own(tmp_path: Path) -> None:
    with serving(tmp_path) as served, Client(served.path) as client:
        session = served.backend.add(os.getuid())
        client.show(session)
        inherited = {*descriptors().values()}

        def ask() -> str:
            assert client.show(session).session == session
            with (
                socket.create_server(("127.0.0.1", 0)) as server,
                socket.create_connection(server.getsockname()) as sock,
            ):
                return str(client.attach(sock.fileno()).pid == os.getpid())

        assert in_child(ask) == "True"
        assert client.show(session).session == session
        assert inherited == {*descriptors().values()}


def test_a_fork_amid_other_threads_calls_is_safe(fake: FakeDaemon, client: Client) -> None:
    (session,) = fake.add()
    stop = threading.Event()

    def hammer() -> None:
        while not stop.is_set():
            client.show(session)

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            # The child asks through the client whose locks other threads held when it was born.
            assert in_child(lambda: client.show(session).session) == session
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_events_can_be_selected(fake: FakeDaemon, client: Client) -> None:
    first, second = fake.add(2)
    with client.events(first) as events:
        assert select.select([events], [], [], 0)[0] == []
        fake.move(second)
        assert select.select([events], [], [], 0)[0] == []
        fake.move(first, gap_ms=0.25)
        assert select.select([events], [], [], 10)[0] == [events]
        assert [next(events).kind, next(events).kind] == ["moving", "moved"]
        fake.lose(first, "broken")
        assert [(event.kind, event.reason) for event in events] == [
            ("lost", "broken"),
            ("closed", None),
        ]
        assert events.fileno() == -1


def test_a_stream_of_events_notices_the_daemons_end(fake: FakeDaemon, client: Client) -> None:
    with client.events(timeout=10) as events:
        fake.stop()
        with pytest.raises(DaemonUnavailable, match="went away"):
            next(events)
    with pytest.raises(DaemonUnavailable, match="not running"):
        client.events()
    fake.start()


def test_events_of_a_session_that_is_not_there(fake: FakeDaemon, client: Client) -> None:
    before = descriptors().keys()
    with pytest.raises(NotFound):
        client.events("ab")
    eventually(lambda: descriptors().keys() == before)


def test_attach_costs_well_under_a_millisecond(tmp_path: Path) -> None:
    with (
        serving(tmp_path) as served,
        Client(served.path) as client,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sock,
    ):
        took = []
        for _ in range(300):
            began = time.perf_counter()
            client.attach(sock.fileno(), "connect", "server.test", "7000")
            took.append(time.perf_counter() - began)
    # Daemon and client share one interpreter here, and the machine is busy: about 0.25 ms.
    assert statistics.quantiles(took, n=10)[0] < 0.001


def test_defaults_of_the_program_do_not_reach_the_daemons_socket(fake: FakeDaemon) -> None:
    socket.setdefaulttimeout(0.0)
    try:
        with Client() as client:
            assert client.stats() == {}
    finally:
        socket.setdefaulttimeout(None)
