"""Two hosts in nameless network namespaces, a veth between them, and engines that move sockets.

    left  fd00::1, 10.9.0.1 ... |--------| ... 10.9.0.2, fd00::2  right

Addresses 1, 3, 5, 7 are the left host's, 2, 4, 6, 8 the right one's, in both versions. The
namespaces are entered by setns(2) in this process's main thread and vanish with their descriptor.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sessiond.core.outcomes import Arrived, Departed, Failed, Followed
from sessiond.core.tuples import Endpoint, FourTuple
from sessiond.rebind import linux as lx
from sessiond.rebind.engine import Connection
from sessiond.rebind.process import Process
from sessiond.rebind.repair import Repair

CLONE_NEWNET = 0x40000000

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def command(line: str) -> str:
    """Run a command in the namespace entered; what it printed."""
    done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return done.stdout


class Host:
    """A network namespace with an engine in it."""

    def __init__(self) -> None:
        with open("/proc/thread-self/ns/net") as before:
            _checked(_libc.unshare(CLONE_NEWNET))
            self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            command("ip link set lo up")
            _checked(_libc.setns(before.fileno(), CLONE_NEWNET))
        self.engine = Repair()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be this host: sockets made and commands run inside are its own."""
        with open("/proc/thread-self/ns/net") as before:
            _checked(_libc.setns(self.fd, CLONE_NEWNET))
            try:
                yield
            finally:
                _checked(_libc.setns(before.fileno(), CLONE_NEWNET))

    def run(self, line: str) -> str:
        with self.entered():
            return command(line)

    def deaf(self) -> None:
        """Lose every TCP segment that arrives, until ``hearing``."""
        self.run("nft add table inet loss")
        self.run("nft add chain inet loss in { type filter hook input priority 0 ; }")
        self.run("nft add rule inet loss in meta l4proto tcp drop")

    def hearing(self) -> None:
        self.run("nft delete table inet loss")

    def counters(self) -> dict[str, int]:
        """SNMP and extended TCP counters of this host."""
        counters: dict[str, int] = {}
        with self.entered():
            for file in ("/proc/thread-self/net/snmp", "/proc/thread-self/net/netstat"):
                lines = Path(file).read_text().splitlines()
                for names, values in zip(lines[::2], lines[1::2], strict=True):
                    prefix = names.split(":")[0]
                    pairs = zip(names.split()[1:], values.split()[1:], strict=True)
                    counters.update({f"{prefix}.{name}": int(value) for name, value in pairs})
        return counters

    def attach(self, sock: socket.socket, pid: int | None = None, fd: int = -1) -> Connection:
        """A connection as the daemon has it; its process is this one unless said otherwise."""
        process = Process.of(os.getpid() if pid is None else pid)
        number = sock.fileno() if pid is None else fd
        with self.entered():
            connection, facts = self.engine.inspect(sock, process, number, quiet=pid is None)
        assert facts.refusal is None, facts.refusal
        return connection

    def close(self) -> None:
        os.close(self.fd)


class Net:
    """The two hosts and the link."""

    def __init__(self) -> None:
        self.left, self.right = Host(), Host()
        theirs = f"/proc/{os.getpid()}/fd/{self.right.fd}"
        self.left.run(f"ip link add veth type veth peer name veth netns {theirs}")
        for host, numbers in ((self.left, (7, 5, 3, 1)), (self.right, (8, 6, 4, 2))):
            host.run("ip link set veth up")
            for number in numbers:
                host.run(f"ip addr add fd00::{number}/64 dev veth nodad")
            for number in reversed(numbers):
                host.run(f"ip addr add 10.9.0.{number}/24 dev veth")
        self.undo = ExitStack()

    def pair(
        self,
        version: int = 4,
        *,
        family: int = socket.AF_INET6,
        port: int = 7000,
        options: Callable[[socket.socket], None] = lambda sock: None,
    ) -> tuple[socket.socket, socket.socket]:
        """A connection from left to right; the listener stays."""
        here, there = addresses(version, 1), addresses(version, 2)
        del here
        with self.right.entered():
            listener = self.undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
            listener.listen(64)
            self.listener = listener
            port = listener.getsockname()[1]
        with self.left.entered():
            client = self.undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            options(client)
            client.connect(lx.sockaddr(family, Endpoint(there, port)))
        server = self.undo.enter_context(listener.accept()[0])
        return client, server

    def close(self) -> None:
        self.undo.close()
        self.left.close()
        self.right.close()


def addresses(version: int, number: int) -> str:
    return f"10.9.0.{number}" if version == 4 else f"fd00::{number}"


class App:
    """An application of ``repair_apps`` in a process of its own, with a socket of ours."""

    def __init__(self, sock: socket.socket, what: str, *more: str) -> None:
        self.fd = sock.fileno()
        program = [sys.executable, str(Path(__file__).with_name("repair_apps.py"))]
        self.process = subprocess.Popen(
            [*program, what, str(self.fd), *more],
            pass_fds=[self.fd],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def stop(self) -> None:
        """Ask it to end."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def result(self) -> str:
        """Its last line."""
        line = self.line()
        assert self.process.wait(30) == 0
        return line

    def __enter__(self) -> App:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


class Ends:
    """One connection with both its ends, moved as two daemons would.

    Args:
        apps: the processes that have the sockets, by side; else they are this one's.
    """

    def __init__(
        self,
        net: Net,
        client: socket.socket,
        server: socket.socket,
        apps: Mapping[str, App] | None = None,
    ) -> None:
        self.net = net
        self.socks = {"left": client, "right": server}
        self.hosts = {"left": net.left, "right": net.right}
        self.connections: dict[str, Connection] = {}
        for side, sock in self.socks.items():
            app = (apps or {}).get(side)
            pid, fd = (None, -1) if app is None else (app.process.pid, app.fd)
            self.connections[side] = self.hosts[side].attach(sock, pid, fd)

    def counters(self) -> dict[tuple[str, str], int]:
        """What a clean handover leaves as it was."""
        return {
            (side, name): host.counters()[name]
            for side, host in self.hosts.items()
            for name in ("Tcp.RetransSegs", "TcpExt.TCPTimeouts", "Tcp.OutRsts")
        }

    def where(self, side: str) -> FourTuple:
        sock = self.socks[side]
        return FourTuple(lx.endpoint(sock.getsockname()), lx.endpoint(sock.getpeername()))

    def do(self, side: str, step: str, *arguments: object) -> object:
        """One engine step at one end."""
        host, connection = self.hosts[side], self.connections[side]
        batch = [(connection, *arguments)] if arguments else [connection]
        with host.entered():
            (outcome,) = getattr(host.engine, step)(batch)
        return outcome

    @contextmanager
    def losing(self) -> Iterator[None]:
        """What is sent now is lost, in both directions."""
        self.net.left.deaf()
        self.net.right.deaf()
        yield
        self.net.left.hearing()
        self.net.right.hearing()

    def depart(self, side: str, target: FourTuple) -> Departed:
        outcome = self.do(side, "depart", target)
        assert isinstance(outcome, Departed), outcome
        return outcome

    def follow(self, side: str, departed: Departed) -> Followed:
        outcome = self.do(
            side,
            "follow",
            departed.tuple.mirrored(),
            departed.rcv_nxt,
            departed.window,
            departed.pending,
        )
        assert isinstance(outcome, Followed), outcome
        return outcome

    def arrive(self, side: str, followed: Followed) -> Arrived:
        outcome = self.do(side, "arrive", followed.rcv_nxt, followed.window)
        assert isinstance(outcome, Arrived), outcome
        return outcome

    def settle(self, side: str) -> None:
        assert self.do(side, "settle") is None

    def move(self, side: str, target: FourTuple) -> tuple[Departed, Followed, Arrived]:
        """A whole handover by request, the old path works; seen from the mover."""
        assert self.do(OTHER[side], "shield") is None
        return self.finish(side, self.depart(side, target))

    def finish(self, side: str, departed: Departed) -> tuple[Departed, Followed, Arrived]:
        """What comes after ``depart``."""
        other = OTHER[side]
        followed = self.follow(other, departed)
        arrived = self.arrive(side, followed)
        self.settle(other)
        assert self.where(side) == departed.tuple
        assert self.where(other) == departed.tuple.mirrored()
        return departed, followed, arrived


OTHER = {"left": "right", "right": "left"}
NUMBERS = {"left": (1, 3, 5, 7), "right": (2, 4, 6, 8)}
"""Of the addresses of each host."""


def target(
    now: FourTuple,
    *,
    local: str | None = None,
    remote: str | None = None,
    lport: int | None = None,
    rport: int | None = None,
) -> FourTuple:
    """A tuple with some of its elements changed."""
    return FourTuple(
        Endpoint(local or now.local.address, now.local.port if lport is None else lport),
        Endpoint(remote or now.remote.address, now.remote.port if rport is None else rport),
    )


def failed(outcome: object) -> Failed:
    assert isinstance(outcome, Failed), outcome
    return outcome


def eventually(condition: Callable[[], bool], seconds: float = 5.0, what: str = "") -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what or condition}"
        time.sleep(0.001)


def receive(sock: socket.socket, length: int, seconds: float = 10.0) -> bytes:
    """Exactly so many bytes."""
    sock.settimeout(seconds)
    data = bytearray()
    while len(data) < length:
        chunk = sock.recv(min(1 << 20, length - len(data)))
        assert chunk, f"end of file after {len(data)} of {length} bytes"
        data += chunk
    sock.settimeout(None)
    return bytes(data)


def fill(sock: socket.socket, data: bytes) -> bytes:
    """Write until the socket takes no more; what it took."""
    sock.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < len(data):
            sent += sock.send(memoryview(data)[sent : sent + 65536])
    sock.setblocking(True)
    return data[:sent]


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def in_threads(works: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """Start each in a thread; call the result to wait for all and have their first error."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()

    def join() -> None:
        for thread in threads:
            thread.join(50)
            assert not thread.is_alive(), "still at work"
        if errors:
            raise errors[0]

    return join
