"""A backend in memory and a LocalServer in a thread, for blocking clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libhsock import wire
from libhsock.errors import CouldNotConnect, NameNotResolved, NotFound, Refused
from libhsock.wire import Map
from sessiond.edges.local import Caller, LocalServer


class MemoryBackend:
    """Sessions by id with their owner; ``gate`` holds every rebind until it is set."""

    def __init__(self) -> None:
        self.sessions: dict[str, Map] = {}
        self.callers: list[Caller] = []
        self.cookies: list[int] = []
        self.subscribers: list[tuple[int | None, str | None, Callable[[Map], None]]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.resolving = 0
        self.keys: list[Map] = []

    def add(self, uid: int, **fields: Any) -> str:
        session = fields.pop("session", uuid.uuid4().hex)
        record = wire.Record(
            session=session,
            state="established",
            mobile=True,
            local="192.0.2.1:1",
            remote="192.0.2.2:2",
            uid=uid,
            **fields,
        )
        self.sessions[session] = record.to_map()
        return str(session)

    async def resolve(self, name: str, service: str, version: int, srv: bool) -> wire.Resolution:
        self.resolving += 1
        if name == "unknown.test":
            raise NameNotResolved(f"{name} has no address", ["192.0.2.53: NXDOMAIN"])
        if name == "far.test":
            raise CouldNotConnect("an error that is an OSError too", ["a", "b"])
        await self.gate.wait()
        return wire.Resolution((("2001:db8::1", 80), ("192.0.2.1", 80)), "dns")

    def attach(
        self,
        caller: Caller,
        sock: socket.socket,
        fd: int,
        role: str,
        name: str | None,
        service: str | None,
    ) -> Map:
        self.callers.append(caller)
        if sock.type != socket.SOCK_STREAM or sock.family == socket.AF_UNIX:
            raise Refused("not a TCP socket")
        if name == "fault.test":
            raise ZeroDivisionError("a fault of the daemon's")
        return self.sessions[self.add(caller.uid, peer=name, role=role, fd=fd, pid=caller.pid)]

    def records(
        self, uid: int | None, after: str | None, limit: int
    ) -> tuple[list[Map], str | None]:
        mine = [m for m in self.sessions.values() if uid is None or m["uid"] == uid]
        start = 1 + [m["session"] for m in mine].index(after) if after else 0
        page = mine[start : start + limit]
        return page, page[-1]["session"] if start + limit < len(mine) else None

    def record(self, uid: int | None, session: str) -> Map:
        record = self.sessions.get(session)
        if record is None or uid not in (None, record["uid"]):
            raise NotFound(f"there is no session {session}")
        return record

    async def rebind(self, uid: int | None, session: str, to: str | None) -> Map:
        record = self.record(uid, session)
        await self.gate.wait()
        return record | {"moves": 1}

    def detach(self, uid: int | None, session: str) -> None:
        self.record(uid, session)
        del self.sessions[session]

    def network(self) -> Map:
        return {"addresses": [{"address": "192.0.2.1", "prefix": 24, "interface": "eth0"}]}

    def stats(self, uid: int | None) -> Map:
        return {"sessions": {"established": len(self.sessions)}, "malformed": 0}

    def peers(self, name: str | None) -> Map:
        keys = [k for k in self.keys if name in (None, k["name"])]
        return {"peers": keys}

    async def pin(self, name: str, key: str) -> None:
        self.keys.append({"name": name, "key": key, "source": "pinned"})

    async def forget(self, name: str) -> None:
        self.keys = [k for k in self.keys if k["name"] != name]

    def fingerprint(self) -> Map:
        return {"key": "aaaa"}

    def subscribe(
        self, uid: int | None, session: str | None, deliver: Callable[[Map], None]
    ) -> Callable[[], None]:
        if session is not None:
            self.record(uid, session)
        entry = (uid, session, deliver)
        self.subscribers.append(entry)
        return lambda: self.subscribers.remove(entry)

    def emit(self, session: str, kind: str) -> None:
        owner = self.sessions[session]["uid"]
        event = wire.Event(session=session, kind=kind, time=time.time()).to_map()
        for uid, wanted, deliver in self.subscribers:
            if uid in (None, owner) and wanted in (None, session):
                deliver(event)


@dataclass
class Served:
    """A LocalServer in a thread of its own."""

    path: str
    backend: MemoryBackend
    server: LocalServer
    loop: asyncio.AbstractEventLoop

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in the server's thread."""

        async def call() -> Any:
            return function(*args)

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(10)

    @property
    def clients(self) -> int:
        return len(self.server._clients)


@contextlib.contextmanager
def serving(directory: Path | str, **options: Any) -> Iterator[Served]:
    """Serve ``directory/sessiond.sock`` from a thread."""
    path = os.path.join(directory, "sessiond.sock")
    started: list[Served] = []
    ready = threading.Event()

    async def main() -> None:
        backend = MemoryBackend()
        server = LocalServer(path, backend, **options)
        await server.start()
        stop = asyncio.Event()
        started.append(Served(path, backend, server, asyncio.get_running_loop()))
        stops.append(stop)
        ready.set()
        await stop.wait()
        await server.close()

    stops: list[asyncio.Event] = []
    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(10)
    try:
        yield started[0]
    finally:
        started[0].loop.call_soon_threadsafe(stops[0].set)
        thread.join(10)
        assert not thread.is_alive()


def eventually(condition: Callable[[], bool], within: float = 10.0) -> None:
    """Wait until something in another thread or process is true."""
    until = time.monotonic() + within
    while not condition():
        assert time.monotonic() < until, "it did not become true"
        time.sleep(0.001)


def descriptors() -> dict[str, str]:
    """This process's open files."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def raw(path: str) -> socket.socket:
    """A client that speaks for itself."""
    sock = wire.new_socket()
    sock.settimeout(10)
    sock.connect(path)
    return sock


def greeted(path: str) -> socket.socket:
    """A client that has said hello."""
    sock = raw(path)
    wire.send(sock, wire.request(1, wire.Hello("test")))
    wire.reply_to(1, sock.recv(wire.MAX_PACKET)).unwrap()
    return sock


def in_child(function: Callable[[], Any]) -> Any:
    """The result, as text, of a function in a forked child; an exception is its type and text."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            told = str(function())
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        os.write(write, told.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    return told
