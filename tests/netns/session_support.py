"""Two hosts with real daemons, a name server, and conversations between them.

world.talk("server.test")          a client of tests.netns.apps, streaming to an echo server
world.client.lose("wifi")
world.moves.wait("moved")          what the client's daemon tells
talk.end()                         every byte came back, nobody saw an error
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from libhsock.client import Client
from libhsock.wire import Event, Record
from tests.netns import apps
from tests.support.dns import NameServer
from tests.support.lab import Host, Lab
from tests.support.sessiond import Sessiond
from tests.support.topology import NAMESERVERS, Topology, two_hosts
from tests.support.wait import until
from tests.support.worker import Worker

NAME = "server.test"


class Watch:
    """The events of one daemon from now on; what has been waited for is in ``seen``."""

    def __init__(self, daemon: Sessiond) -> None:
        self.client = Client(daemon.socket, name="test")
        self._events = self.client.events()
        self.seen: list[Event] = []

    def wait(
        self, kind: str, *where: str, session: str | None = None, timeout: float = 10
    ) -> Event:
        """The next event of a kind, of a session, on one of these local addresses.

        Raises:
            AssertionError: it did not come; says what came instead.
        """
        deadline = time.monotonic() + timeout
        passed: list[Event] = []
        while True:
            try:
                event = self._events.next(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                told = [(one.kind, one.local, one.remote, one.reason) for one in passed]
                raise AssertionError(f"no {kind} {where} in {timeout} s, but {told}") from None
            passed.append(event)
            self.seen.append(event)
            address = (event.local or "").rpartition(":")[0].strip("[]")
            here = not where or address in where
            if event.kind == kind and here and session in (None, event.session):
                return event

    def close(self) -> None:
        self._events.close()
        self.client.close()


class Conversation:
    """One client of ``apps`` and its connection."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.session: str | None
        self.session, self.reason = worker.hear(30)

    def end(self) -> apps.Traffic:
        """Stop it. Raises AssertionError if a byte was lost, WorkerError what it raised."""
        self.worker.tell("stop")
        traffic: apps.Traffic = self.worker.result(20)
        assert traffic.intact, traffic
        return traffic

    def ask(self, command: str, *arguments: Any, timeout: float = 20) -> Any:
        """Have ``apps.hold`` do something; an error it met is raised here."""
        self.worker.tell((command, *arguments))
        answer = self.worker.hear(timeout)
        if isinstance(answer, Exception):
            raise answer
        return answer


class World:
    """The usual laboratory with daemons. ``moves`` are the client's events, ``theirs`` the
    server's, from its first moment on."""

    def __init__(
        self,
        lab: Lab,
        *,
        client_daemon: bool = True,
        server_daemon: bool = True,
        extra: str = "",
    ) -> None:
        self.lab = lab
        self.net: Topology = two_hosts(lab)
        self.client, self.server = self.net.client, self.net.server
        self.dns = lab.enter(NameServer(self.net.dns))
        self.publish()
        self.near = Sessiond(self.client, extra, NAMESERVERS)
        self.far = Sessiond(self.server, extra, NAMESERVERS)
        self.echo: Worker | None = None
        if client_daemon:
            lab.enter(self.near)
            self.moves = self.watch(self.near)
        if server_daemon:
            lab.enter(self.far)
            self.theirs = self.watch(self.far)

    def watch(self, daemon: Sessiond) -> Watch:
        """Hear of another daemon's, or daemon's life's, events."""
        watch = Watch(daemon)
        self.lab.enter(_closing(watch.close))
        return watch

    def publish(self, *addresses: str) -> None:
        """What the server's name means; by default its addresses on lan0."""
        own = (self.server.address("lan0", 4), self.server.address("lan0", 6))
        self.dns.set("server", *(addresses or own))

    def serve(self, app: Callable[..., Any] = apps.echo, *arguments: Any) -> Worker:
        """The server program, listening."""
        self.echo = self.server.fork(app, self.far.socket, *arguments)
        assert self.echo.hear() == "listening"
        return self.echo

    def talk(
        self, app: Callable[..., Any] = apps.threads, name: str = NAME, *arguments: Any
    ) -> Conversation:
        """A client program with its connection open, and mobile if it can be."""
        if self.echo is None:
            self.serve()
        return Conversation(self.client.fork(app, self.near.socket, name, *arguments))

    def server_errors(self) -> list[str]:
        """End the server program: what its connections met."""
        assert self.echo is not None
        self.echo.tell("stop")
        errors: list[str] = self.echo.result()
        self.echo = None
        return errors

    def finish(self, *conversations: Conversation) -> None:
        """All conversations end well, at both ends."""
        for one in conversations:
            one.end()
        assert self.server_errors() == []

    def record(self, conversation: Conversation) -> Record:
        """What the client's daemon says of it."""
        assert conversation.session is not None
        return self.moves.client.show(conversation.session)

    def server_record(self, conversation: Conversation) -> Record:
        """What the server's daemon says of it."""
        assert conversation.session is not None
        return self.theirs.client.show(conversation.session)

    def settled(self, conversation: Conversation) -> Record:
        """Both ends are at rest on one tuple; the client's record."""

        def agree() -> Record | None:
            mine, its = self.record(conversation), self.server_record(conversation)
            at_rest = mine.state == its.state == "established"
            return (
                mine if at_rest and (mine.local, mine.remote) == (its.remote, its.local) else None
            )

        found = until(agree, "both ends at rest on one tuple")
        assert found is not None
        return found

    def ten_moves(self) -> None:
        """Each host in turn loses the uplink in use and gets its other one back, ten moves."""
        places = ("wifi", "eth", "lan0", "lan1")
        for turn in range(5):
            for host, watch, names in (
                (self.client, self.moves, places[:2]),
                (self.server, self.theirs, places[2:]),
            ):
                old, new = names if turn % 2 == 0 else names[::-1]
                if turn:
                    host.gain(new)
                host.lose(old)
                watch.wait("moved", *addresses(host, new))


def addresses(host: Host, interface: str) -> tuple[str, str]:
    """An uplink's IPv4 and IPv6 address. A host that loses both of another uplink loses one first,
    and which of these is then better depends on what it has lost so far."""
    return host.address(interface, 4), host.address(interface, 6)


class _closing:
    def __init__(self, close: Callable[[], None]) -> None:
        self._close = close

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._close()


def descriptors(pid: int) -> int:
    """How many a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident(pid: int) -> int:
    """Memory of a process, KiB (VmRSS)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def task_states(pid: int) -> set[str]:
    """The states of a process's threads: T and t are stopped and traced (proc_pid_stat(5))."""
    stats = [(one / "stat").read_text() for one in Path(f"/proc/{pid}/task").iterdir()]
    return {stat.rpartition(")")[2].split()[0] for stat in stats}


def certificate(directory: Path) -> tuple[Path, Path]:
    """A key and a certificate for server.test. Raises CalledProcessError."""
    key, cert = directory / "key.pem", directory / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=server.test"),
            *("-addext", "subjectAltName=DNS:server.test"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return key, cert
