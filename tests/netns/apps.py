"""Applications under test. Each runs as a process of its own on a host, forked by ``Host.fork``.

Clients stream records to an echo server until told to stop, then end the stream and read what is
still due; ``Traffic`` says whether every byte came back. Their moves happen meanwhile, and they
know nothing of it: whatever a handover lets through (an error, EINTR, an early end of file) is
raised, or shows as bytes that are missing.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import libhsock
from libhsock.hsocket import HSocket
from tests.support.worker import Talk

PORT = 7000
PACE = 0.001
"""Seconds between two records."""
SIZE = 1000
"""Of a record, bytes."""
CHUNK = 65536
Family = Literal[0, 4, 6]


@dataclass(frozen=True)
class Traffic:
    """What a client's connection has carried."""

    sent: int
    sent_hash: str
    received: int
    received_hash: str
    pause: float
    """The longest time without a byte received, seconds."""

    @property
    def intact(self) -> bool:
        """Something was sent and all of it came back, in order, once."""
        same = (self.sent, self.sent_hash) == (self.received, self.received_hash)
        return self.sent > 0 and same


@dataclass
class _Meter:
    sent: int = 0
    received: int = 0
    _out: Any = field(default_factory=hashlib.sha256)
    _in: Any = field(default_factory=hashlib.sha256)
    _last: float = field(default_factory=time.monotonic)
    _pause: float = 0.0

    def record(self) -> bytes:
        """The next record; counts as sent."""
        data = os.urandom(SIZE)
        self.sent += len(data)
        self._out.update(data)
        return data

    def arrived(self, data: bytes) -> None:
        now = time.monotonic()
        self._pause = max(self._pause, now - self._last)
        self._last = now
        self.received += len(data)
        self._in.update(data)

    def traffic(self) -> Traffic:
        hashes = self._out.hexdigest(), self._in.hexdigest()
        return Traffic(self.sent, hashes[0], self.received, hashes[1], self._pause)


def use(daemon: str | None) -> None:
    """Find this daemon, or none."""
    os.environ["SESSIOND_SOCKET"] = daemon or "/nonexistent/sessiond.sock"


def as_user(uid: int) -> None:
    """Be an unprivileged user from now on."""
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def connect(talk: Talk, name: str, family: Family = 0) -> HSocket:
    """Open the connection and tell its session's id, or None with the reason."""
    sock = libhsock.create_connection((name, PORT), timeout=10, family=family)
    sock.settimeout(None)
    _introduce(talk, sock.session)
    return sock


def _introduce(talk: Talk, session: libhsock.Session) -> None:
    session.wait_mobile(20)
    talk.tell((session.id, session.reason))


# Servers


def echo(talk: Talk, daemon: str | None, context: ssl.SSLContext | None = None) -> list[str]:
    """Send back what comes, on each connection in a thread; the errors they met, once told."""
    use(daemon)
    errors: list[str] = []
    listener = libhsock.create_server(("", PORT))
    threading.Thread(target=_accept, args=(listener, context, errors), daemon=True).start()
    talk.tell("listening")
    talk.hear()
    return errors


def _accept(listener: HSocket, context: ssl.SSLContext | None, errors: list[str]) -> None:
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=_echo, args=(sock, context, errors), daemon=True).start()


def _echo(sock: socket.socket, context: ssl.SSLContext | None, errors: list[str]) -> None:
    try:
        if context is not None:
            sock = context.wrap_socket(sock, server_side=True)
        with sock:
            while data := sock.recv(CHUNK):
                sock.sendall(data)
    except OSError as error:
        errors.append(repr(error))


def plain_echo(talk: Talk) -> list[str]:
    """An echo server that has never heard of sessions."""
    errors: list[str] = []
    listener = socket.create_server(("", PORT), family=socket.AF_INET6, dualstack_ipv6=True)

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=_echo, args=(sock, None, errors), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    talk.tell("listening")
    talk.hear()
    return errors


def slow_echo(talk: Talk, daemon: str | None) -> list[str]:
    """``echo`` that keeps one connection waiting until it is told to go on."""
    use(daemon)
    errors: list[str] = []
    listener = libhsock.create_server(("", PORT))
    talk.tell("listening")
    sock, _ = listener.accept()
    talk.hear()
    threading.Thread(target=_echo, args=(sock, None, errors), daemon=True).start()
    talk.hear()
    return errors


def streams_echo(talk: Talk, daemon: str | None) -> list[str]:
    """``echo`` with asyncio's streams."""
    use(daemon)
    errors: list[str] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(CHUNK):
                writer.write(data)
                await writer.drain()
            writer.close()
            await writer.wait_closed()
        except OSError as error:
            errors.append(repr(error))

    async def serve() -> None:
        server = await libhsock.start_server(connected, "", PORT)
        talk.tell("listening")
        await _told(talk)
        server.close()

    asyncio.run(serve())
    return errors


# Clients


def threads(talk: Talk, daemon: str | None, name: str, family: Family = 0, uid: int = 0) -> Traffic:
    """One thread blocked in recv(), another one sending."""
    use(daemon)
    as_user(uid)
    return _two_threads(talk, connect(talk, name, family))


def secure(talk: Talk, daemon: str | None, name: str, context: ssl.SSLContext) -> Traffic:
    """TLS over it. One thread: an SSLSocket can't be read and written at the same time."""
    use(daemon)
    meter = _Meter()
    with context.wrap_socket(connect(talk, name), server_hostname="server.test") as sock:
        while not _was_told(talk):
            record = meter.record()
            sock.sendall(record)
            while meter.received < meter.sent:
                data = sock.recv(CHUNK)
                assert data, "end of file amid the stream"
                meter.arrived(data)
    return meter.traffic()


def _two_threads(talk: Talk, sock: socket.socket) -> Traffic:
    meter, stop = _Meter(), threading.Event()
    failed: list[BaseException] = []

    def run(work: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except OSError as error:
                failed.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        return thread

    def send() -> None:
        while not stop.wait(PACE):
            sock.sendall(meter.record())
        sock.shutdown(socket.SHUT_WR)

    def receive() -> None:
        while data := sock.recv(CHUNK):
            meter.arrived(data)

    workers = [run(send), run(receive)]
    talk.hear()
    stop.set()
    for worker in workers:
        worker.join()
    if failed:
        raise failed[0]
    return meter.traffic()


def selecting(talk: Talk, daemon: str | None, name: str) -> Traffic:
    """select(2), level-triggered, one thread."""
    use(daemon)
    sock, meter = connect(talk, name), _Meter()
    sock.setblocking(False)
    due, waiting, open_ = b"", True, True
    while True:
        watched: list[Any] = [sock, talk] if waiting else [sock]
        writable = [sock] if due else []
        readable, ready, _ = select.select(watched, writable, [], PACE)
        if talk in readable:
            waiting = False
        if ready:
            due = due[sock.send(due) :]
        elif not due and waiting:
            due = meter.record()
        if not waiting and not due and open_:
            sock.shutdown(socket.SHUT_WR)
            open_ = False
        if sock in readable:
            data = sock.recv(CHUNK)
            if not data:
                return meter.traffic()
            meter.arrived(data)


def edge_triggered(talk: Talk, daemon: str | None, name: str) -> Traffic:
    """epoll(7) with EPOLLET: a wake-up that a handover swallows would be missed for ever."""
    use(daemon)
    sock, meter = connect(talk, name), _Meter()
    sock.setblocking(False)
    poll = select.epoll()
    poll.register(sock, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
    poll.register(talk, select.EPOLLIN)
    due, stopping, shut = meter.record(), False, False
    while True:
        events = dict(poll.poll(10))
        assert events, "no event in 10 s: an edge was lost"
        assert not events.get(sock.fileno(), 0) & select.EPOLLERR, "EPOLLERR"
        if talk.fileno() in events:
            talk.hear()
            poll.unregister(talk)
            stopping = True
        while True:
            try:
                data = sock.recv(CHUNK)
            except BlockingIOError:
                break
            if not data:
                return meter.traffic()
            meter.arrived(data)
        # One record under way at a time: the next is due when the last has come back.
        if not due and meter.received == meter.sent and not stopping:
            due = meter.record()
        while due:
            try:
                due = due[sock.send(due) :]
            except BlockingIOError:
                break
        if stopping and not due and not shut:
            sock.shutdown(socket.SHUT_WR)
            shut = True


def streams(
    talk: Talk, daemon: str | None, name: str, context: ssl.SSLContext | None = None
) -> Traffic:
    """asyncio's streams, one task reading, one writing."""
    use(daemon)
    return asyncio.run(_streams(talk, name, context))


async def _streams(talk: Talk, name: str, context: ssl.SSLContext | None) -> Traffic:
    reader, writer = await libhsock.open_connection(name, PORT, timeout=10, ssl=context)
    session = libhsock.session(writer)
    await session.await_mobile(10)
    talk.tell((session.record.session or None, session.record.reason))
    meter = _Meter()

    async def receive() -> None:
        while data := await reader.read(CHUNK):
            meter.arrived(data)

    receiving = asyncio.create_task(receive())
    told = asyncio.create_task(_told(talk))
    while not told.done():
        writer.write(meter.record())
        await writer.drain()
        await asyncio.sleep(PACE)
    if context is None:
        writer.write_eof()
        await receiving
    else:  # TLS can't end one direction
        async with asyncio.timeout(10):
            while meter.received < meter.sent:  # noqa: ASYNC110 - what else would tell
                await asyncio.sleep(PACE)
    receiving.cancel()
    writer.close()
    await writer.wait_closed()
    return meter.traffic()


def _was_told(talk: Talk) -> bool:
    return bool(select.select([talk], [], [], 0)[0])


async def _told(talk: Talk) -> None:
    """Until the test says something."""
    said = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(talk.fileno(), said.set)
    await said.wait()
    loop.remove_reader(talk.fileno())
    talk.hear()


def become(talk: Talk, daemon: str | None, name: str, program: str, output: str) -> None:
    """Connect, then execute a program whose arguments are the socket and 100."""
    use(daemon)
    sock = connect(talk, name)
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.set_inheritable(sock.fileno(), True)
    os.execv(program, [program, str(sock.fileno()), "100"])


def hold(talk: Talk, daemon: str | None, name: str, family: Family = 0, uid: int = 0) -> None:
    """Connect and do what the test says, one thing at a time: ``(method, *arguments)``."""
    use(daemon)
    as_user(uid)
    sock = connect(talk, name, family)
    commands: dict[str, Callable[..., Any]] = {
        "echo": lambda data: _round_trip(sock, data),
        "record": sock.session.refresh,
        "rebind": lambda to=None: sock.session.rebind(to),
        "wait_mobile": sock.session.wait_mobile,
        "names": lambda: (sock.getsockname(), sock.getpeername()),
        "filter": lambda: _filter_of(sock),
        "close": sock.close,
    }
    while (said := talk.hear()) is not None:
        command, *arguments = said
        try:
            talk.tell(commands[command](*arguments))
        except (libhsock.HsockError, OSError) as error:
            talk.tell(error)


def _round_trip(sock: socket.socket, data: bytes) -> bool:
    sock.sendall(data)
    got = b""
    while len(got) < len(data) and (more := sock.recv(CHUNK)):
        got += more
    return got == data


def _filter_of(sock: socket.socket) -> str | None:
    """Which socket filter is attached, if any (sk_get_filter() in net/core/filter.c)."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    length = ctypes.c_uint(0)
    so_get_filter = 26
    done = libc.getsockopt(
        sock.fileno(), socket.SOL_SOCKET, so_get_filter, None, ctypes.byref(length)
    )
    if done != 0:
        return "extended"  # EACCES: it has no classic form to tell
    return f"{length.value} instructions" if length.value else None
