"""The daemon's end of the local protocol: a Unix socket, many untrusted clients, one backend.

Who may: the uid that SO_PEERCRED gives owns its sessions; root and the members of one group
administer all. Nobody can tell another user's session from one that doesn't exist.

What a client can cost is bounded: connections a user, requests under way, packets waiting for a
client that doesn't read, and the time for a greeting or for taking what waits. A client that breaks
the protocol is told so and dropped; other clients notice nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import grp
import logging
import os
import socket
import stat
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from libhsock import wire
from libhsock.errors import DaemonUnavailable, HsockError, ProtocolError, Refused, UsageError
from libhsock.wire import Map

log = logging.getLogger(__name__)

SO_PEERGROUPS = 59
SO_PEERPIDFD = 77
_GROUPS_BYTES = 1024
"""What Python's getsockopt takes at most: 256 supplementary groups."""
COMPLAINT_INTERVAL = 1.0
"""Seconds between two lines of the log about clients' faults: anybody here can cause them."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may cost."""

    clients: int = 4096
    """Connections in all; two descriptors each."""
    pending: int = 16
    """Requests of one connection under way at a time."""
    queue: int = 256
    """Events waiting for one client, beside what its socket holds."""
    greeting: float = 5.0
    """Seconds from connecting to ``hello``."""
    stall: float = 10.0
    """Seconds for a client to take something of what waits for it."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as the kernel says; fixed when the process connected."""

    uid: int
    gid: int
    pid: int
    admin: bool
    pidfd: int
    """The process itself, where ``pid`` may be reused. Closed with the connection: dup to keep."""

    @property
    def scope(self) -> int | None:
        """The uid whose sessions the caller may see; None: all."""
        return None if self.admin else self.uid


class Resolution(Protocol):
    """What a name was resolved to."""

    @property
    def candidates(self) -> Sequence[tuple[str, int]]:
        """Numeric address and port, best first."""

    @property
    def source(self) -> str:
        """Where they come from, for people."""


class Backend(Protocol):
    """What the daemon does for its clients. Every method may raise an HsockError, which becomes
    the reply; ``uid`` None means everybody's sessions, and other users' are NotFound."""

    async def resolve(self, name: str, service: str, version: int, srv: bool) -> Resolution:
        """The addresses of a name; ``version`` is 4, 6, or 0 for both."""

    def attach(
        self,
        caller: Caller,
        sock: socket.socket,
        fd: int,
        role: str,
        name: str | None,
        service: str | None,
    ) -> Map:
        """The record of the session made of ``sock``, which is closed after the call; ``fd`` is
        what the caller says its number is in its process."""

    def records(
        self, uid: int | None, after: str | None, limit: int
    ) -> tuple[list[Map], str | None]:
        """At most ``limit`` records after session ``after``, and the id for the next page."""

    def record(self, uid: int | None, session: str) -> Map:
        """One record."""

    async def rebind(self, uid: int | None, session: str, to: str | None) -> Map:
        """Move the session; its record once it has moved."""

    def detach(self, uid: int | None, session: str) -> None:
        """Forget the session."""

    def network(self) -> Map:
        """``wire.NetworkView`` as a map."""

    def stats(self, uid: int | None) -> Map:
        """Counters by name; a map of counters becomes ``"name.key"``."""

    def subscribe(
        self, uid: int | None, session: str | None, deliver: Callable[[Map], None]
    ) -> Callable[[], None]:
        """Call ``deliver`` with each event, a map of ``wire.Event``, until the returned function
        is called. ``deliver`` doesn't block, doesn't raise, and never unsubscribes by itself."""


class LocalServer:
    """Listens between ``start`` and ``close``."""

    def __init__(
        self,
        path: str | Path,
        backend: Backend,
        group: str = "sessiond",
        *,
        clients_per_uid: int = 1000,
        listener: socket.socket | None = None,
        limits: Limits | None = None,
        daemon: str = "sessiond",
    ) -> None:
        """``listener`` is a listening socket that a supervisor passed: then ``path`` is neither
        created nor removed. ``daemon`` is what ``hello`` answers, for people. Root's connections
        are limited in all only."""
        self.path = str(path)
        self.backend = backend
        self.limits = limits or Limits()
        self.daemon = daemon
        self._group = group
        self._per_uid = clients_per_uid
        self._listener = listener
        self._bound: tuple[int, int] | None = None
        self._clients: set[_Client] = set()
        self._uids: Counter[int] = Counter()
        self._quiet_until = 0.0
        self._unsaid = 0

    async def start(self) -> None:
        """Listen. Raises OSError: EADDRINUSE when another daemon does."""
        self._loop = asyncio.get_running_loop()
        self._gid = _gid(self._group)
        if self._listener is None:
            self._listener = listen(self.path)
            self._bound = _identity(self.path)
        elif self._listener.type != socket.SOCK_SEQPACKET:
            raise OSError(errno.EPROTOTYPE, "the socket passed in is no SOCK_SEQPACKET", self.path)
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept, self._listener)

    async def close(self) -> None:
        """Drop the clients, stop listening, and remove the path if it is still this server's."""
        if self._listener is None:
            return
        self._loop.remove_reader(self._listener)
        self._listener.close()
        self._listener = None
        tasks = [task for client in self._clients for task in client.tasks]
        for client in [*self._clients]:
            client.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._bound is not None and _identity(self.path) == self._bound:
            os.unlink(self.path)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors or memory. The client stays in the backlog: look away for a while.
            self.complain("no client can be accepted: %s", error.strerror)
            self._loop.remove_reader(listener)
            self._loop.call_later(1.0, self._accept_again)
            return
        try:
            caller = caller_of(sock, self._gid)
        except OSError as error:
            sock.close()
            self.complain("a client was gone before it was looked at: %s", error.strerror)
            return
        self._admit(sock, caller)

    def _accept_again(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept, self._listener)

    def _admit(self, sock: socket.socket, caller: Caller) -> None:
        client = _Client(self, sock, caller)
        self._clients.add(client)
        self._uids[caller.uid] += 1
        if caller.uid != 0 and self._uids[caller.uid] > self._per_uid:
            client.end(Refused(f"user {caller.uid} has {self._per_uid} connections to sessiond"))
        elif len(self._clients) > self.limits.clients:
            client.end(Refused(f"sessiond has its limit of {self.limits.clients} clients"))

    def forget(self, client: _Client) -> None:
        """A client is closed."""
        self._clients.discard(client)
        self._uids[client.caller.uid] -= 1
        if not self._uids[client.caller.uid]:
            del self._uids[client.caller.uid]

    def complain(self, message: str, *args: object) -> None:
        """Log a client's fault, not more often than COMPLAINT_INTERVAL."""
        now = self._loop.time()
        if now < self._quiet_until:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} more complaints)" if self._unsaid else ""
        log.warning(message + more, *args)
        self._quiet_until, self._unsaid = now + COMPLAINT_INTERVAL, 0


class _Client:
    """One connection."""

    def __init__(self, server: LocalServer, sock: socket.socket, caller: Caller) -> None:
        self.caller = caller
        self.tasks: set[asyncio.Task[Map]] = set()
        self._server = server
        self._backend = server.backend
        self._limits = server.limits
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._greeted = False
        self._ending = False
        """Nothing more is read or said; what waits is still sent."""
        self._unsubscribe: Callable[[], None] | None = None
        self._waiting: deque[bytes] = deque()
        self._closed = False
        self._greeting = self._loop.call_later(self._limits.greeting, self._too_late, "greet")
        self._stall: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    def _readable(self) -> None:
        sound = False
        try:
            self._read()
            sound = True
        except BlockingIOError:
            sound = True
        except ProtocolError as error:
            self._server.complain("pid %d, uid %d: %s", self.caller.pid, self.caller.uid, error)
            self.end(error)
            sound = True
        except OSError:
            pass  # it has gone
        finally:
            # Whatever escapes is a fault of the daemon's; the loop logs it, one client pays.
            if not sound:
                self.close()

    def _read(self) -> None:
        received = wire.receive(self._sock, close_foreign)
        try:
            if not received.data:
                return self.close()
            request = wire.decode(received.data)
            if not isinstance(request, wire.Request):
                raise ProtocolError("a reply or notification from a client")
            try:
                result = self._answer(request, received.fds)
            except HsockError as error:
                return self._send(wire.failure(request.id, error))
            if result is not None:
                self._send(result)
        finally:
            received.close(close_foreign)

    def _answer(self, request: wire.Request, fds: list[int]) -> bytes | None:
        """The reply's packet, or None: a task will send it."""
        call = wire.parse(request)
        if len(fds) != isinstance(call, wire.Attach):
            raise UsageError(f"{call.method} came with {len(fds)} descriptors")
        if isinstance(call, wire.Hello):
            return wire.reply(request.id, self._greet(call).to_map())
        if not self._greeted:
            raise UsageError("say hello first")
        if self._unsubscribe is not None:
            raise UsageError("this connection monitors and takes no further requests")
        if len(self.tasks) >= self._limits.pending:
            raise Refused(f"{len(self.tasks)} requests of this connection are under way")
        scope = self.caller.scope
        match call:
            case wire.Attach():
                return wire.reply(request.id, self._attach(call, fds))
            case wire.List():
                return self._page(request.id, call.after, min(call.limit, wire.MAX_PAGE))
            case wire.Show():
                return wire.reply(request.id, self._backend.record(scope, call.session))
            case wire.Detach():
                self._backend.detach(scope, call.session)
                return wire.reply(request.id, {})
            case wire.Monitor():
                self._unsubscribe = self._backend.subscribe(scope, call.session, self._deliver)
                return wire.reply(request.id, {})
            case wire.Network():
                return wire.reply(request.id, self._backend.network())
            case wire.GetStats():
                return wire.reply(request.id, flat(self._backend.stats(scope)))
            case wire.Resolve():
                self._spawn(request.id, self._resolve(call))
            case wire.Rebind():
                self._spawn(request.id, self._backend.rebind(scope, call.session, call.to))
        return None

    def _greet(self, call: wire.Hello) -> wire.Welcome:
        if wire.VERSION not in call.versions:
            asked = ", ".join(map(str, call.versions))
            raise UsageError(f"this daemon speaks version {wire.VERSION}, not {asked}")
        if not self._greeted:
            self._greeted = True
            self._greeting.cancel()
        return wire.Welcome(wire.VERSION, self._server.daemon, self.caller.admin)

    def _attach(self, call: wire.Attach, fds: list[int]) -> Map:
        try:
            sock = socket.socket(fileno=fds[0])
        except OSError as error:
            raise UsageError(f"the descriptor is no socket: {error.strerror}") from None
        try:
            return self._backend.attach(
                self.caller, sock, call.fd, call.role, call.name, call.service
            )
        finally:
            sock.detach()  # it is closed with the packet

    async def _resolve(self, call: wire.Resolve) -> Map:
        found = await self._backend.resolve(call.name, call.service, call.family, call.srv)
        return {"candidates": [[*one] for one in found.candidates], "source": found.source}

    def _page(self, id: int, after: str | None, limit: int) -> bytes:
        """As many records as fit into a packet."""
        records, following = self._backend.records(self.caller.scope, after, limit)
        try:
            return wire.reply(id, {"sessions": records, "next": following})
        except UsageError:
            if limit == 1:
                raise
            return self._page(id, after, limit // 2)

    def _spawn(self, id: int, work: Coroutine[Any, Any, Map]) -> None:
        task = self._loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(functools.partial(self._finished, id))

    def _finished(self, id: int, task: asyncio.Task[Map]) -> None:
        self.tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if self._closed or self._ending:
            return
        if error is None:
            self._send(wire.reply(id, task.result()))
        elif isinstance(error, HsockError):
            self._send(wire.failure(id, error))
        else:
            context = {"message": "a request failed in an unforeseen way", "exception": error}
            self._loop.call_exception_handler(context)
            self.close()

    def _deliver(self, event: Map) -> None:
        if self._ending or self._closed:
            return
        if len(self._waiting) < self._limits.queue:
            return self._send(wire.notification(event))
        overflow = wire.Event(session="", kind=wire.Kind.OVERFLOW.value, time=time.time())
        self._waiting.clear()
        self._waiting.append(wire.notification(overflow.to_map()))
        self._ending = True

    def _send(self, data: bytes) -> None:
        if self._waiting:
            self._waiting.append(data)
            return
        try:
            wire.send(self._sock, data)
        except BlockingIOError:
            # Until it reads, nothing further is read from it.
            self._waiting.append(data)
            self._loop.remove_reader(self._sock)
            self._loop.add_writer(self._sock, self._writable)
            self._await_reader()
        except OSError:
            self._loop.call_soon(self.close)  # not now: the backend may be amid its subscribers

    def _writable(self) -> None:
        try:
            while self._waiting:
                wire.send(self._sock, self._waiting[0])
                self._waiting.popleft()
                self._await_reader()
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if self._stall is not None:
            self._stall.cancel()
        self._loop.remove_writer(self._sock)
        if self._ending:
            self.close()
        else:
            self._loop.add_reader(self._sock, self._readable)

    def _await_reader(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
        self._stall = self._loop.call_later(self._limits.stall, self._too_late, "read")

    def _too_late(self, what: str) -> None:
        who = self.caller
        self._server.complain("pid %d, uid %d did not %s in time", who.pid, who.uid, what)
        if what == "greet":
            self.end(DaemonUnavailable("sessiond waited for hello in vain"))
        else:
            self.close()

    def end(self, error: HsockError) -> None:
        """Say why, then close."""
        if self._closed or self._ending:
            return
        self._loop.remove_reader(self._sock)
        self._send(wire.failure(0, error))
        self._ending = True
        if not self._waiting:
            self._drain()
            self.close()

    def _drain(self) -> None:
        # Closing with packets unread gives the client ECONNRESET in place of the reason.
        with contextlib.suppress(OSError, ProtocolError):
            for _ in range(self._limits.pending):
                received = wire.receive(self._sock, close_foreign)
                received.close(close_foreign)
                if not received.data:
                    return

    def close(self) -> None:
        """Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._greeting.cancel()
        if self._stall is not None:
            self._stall.cancel()
        for task in self.tasks:
            task.cancel()
        if self._unsubscribe is not None:
            self._unsubscribe()
        self._sock.close()
        os.close(self.caller.pidfd)
        self._server.forget(self)


def caller_of(sock: socket.socket, admin_gid: int | None) -> Caller:
    """Who is at the other end, as the kernel noted it at connect(). Raises OSError."""
    pid, uid, gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    admin = uid == 0 or (admin_gid is not None and admin_gid in {gid, *_groups(sock)})
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        pidfd = os.pidfd_open(pid)  # before Linux 6.5
    return Caller(uid, gid, pid, admin, pidfd)


def _groups(sock: socket.socket) -> tuple[int, ...]:
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        log.warning("a client has more than %d groups: they don't count", _GROUPS_BYTES // 4)
        return ()
    return struct.unpack(f"{len(raw) // 4}I", raw)


def _gid(group: str) -> int | None:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        log.info("there is no group %r: only root administers all sessions", group)
        return None


def listen(path: str) -> socket.socket:
    """A listening socket at ``path`` that everybody may connect to; what a killed daemon left there
    is replaced. Raises OSError: EADDRINUSE where somebody listens or the path is something else."""
    os.makedirs(os.path.dirname(path) or ".", mode=0o755, exist_ok=True)
    _remove_stale(path)
    sock = wire.new_socket()
    try:
        sock.bind(path)
        os.chmod(path, 0o666)
        sock.listen(512)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EADDRINUSE, "there is something that is no socket", path)
    with wire.new_socket() as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise
    raise OSError(errno.EADDRINUSE, "another daemon listens there", path)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def close_foreign(fd: int) -> None:
    """Close a descriptor that a client sent, without ever blocking: closing the last descriptor of
    a lingering TCP socket waits for its peer, and of a FUSE file for the client's own server."""
    if _closes_at_once(fd):
        os.close(fd)
    else:
        threading.Thread(target=os.close, args=(fd,), name="close", daemon=True).start()


def _closes_at_once(fd: int) -> bool:
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        on, seconds = struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
        return not (on and seconds)
    finally:
        sock.detach()


def flat(counters: Map) -> Map:
    """Counters in maps of their own as ``"name.key"``."""
    found: Map = {}
    for name, value in counters.items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": count for key, count in value.items()}
        else:
            found[name] = value
    return found
