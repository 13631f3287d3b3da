"""A daemon for applications' own tests: the local protocol over sessions that exist in memory.

    with FakeDaemon() as fake:
        fake.names["server.test"] = ["127.0.0.1"]
        sock = libhsock.create_connection(("server.test", port))
        events = sock.session.events()
        fake.move(sock.session, local="192.0.2.7:40000", gap_ms=0.4)
        assert next(events).kind == "moving"

It listens on a temporary path, which ``$SESSIOND_SOCKET`` names inside the block, and serves from
a thread. Connections are real; only their mobility is make-believe.
"""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import threading
import time
import uuid
from types import TracebackType
from typing import Any, Protocol, Self

from libhsock import shape, wire
from libhsock.errors import HsockError, NameNotResolved, NotFound, Refused, UsageError
from libhsock.fake_server import FakeServer
from libhsock.wire import Event, Kind, Record, State

SO_COOKIE = 57


class HasRecord(Protocol):
    """A ``libhsock.Session``."""

    @property
    def record(self) -> Record:
        """What it heard last, without asking the daemon."""


SessionLike = str | Record | HasRecord


class FakeDaemon:
    """A context manager; every method may be called from the test's thread at any time.

    ``names``     host name to addresses, asked before getaddrinfo
    ``mobile``    what sessions attached from now on are, with ``reason`` and ``engine``
    ``network``   the reply to ``network``
    ``counters``  the reply to ``stats``
    ``peers``     the reply to ``peers``
    ``calls``     every request that came, typed, for assertions
    """

    def __init__(self, path: str | None = None) -> None:
        """``path`` None: a new one in a temporary directory."""
        self._directory = tempfile.TemporaryDirectory(prefix="hsock-")
        self.path = path or os.path.join(self._directory.name, "sessiond.sock")
        self.names: dict[str, list[str]] = {}
        self.mobile = True
        self.reason: str | None = None
        self.engine: str | None = "repair"
        self.admin = True
        self.network = wire.NetworkView()
        self.counters: dict[str, float] = {}
        self.peers: list[wire.PeerKey] = []
        self.calls: list[wire.Call[Any]] = []
        self._records: dict[str, Record] = {}
        self._by_cookie: dict[int, str] = {}
        self._refusals: dict[str, HsockError] = {}
        self._silent: set[str] = set()
        self._lock = threading.RLock()
        self._server = FakeServer(self.path, self._answer)
        self._running = False

    def start(self) -> None:
        """Listen, with the sessions there are."""
        self._server.start()
        self._running = True

    def stop(self, *, forget: bool = False) -> None:
        """Go away in the middle, as a killed daemon does; ``forget`` its sessions too."""
        self._server.stop()
        self._running = False
        if forget:
            self._records.clear()
            self._by_cookie.clear()

    def __enter__(self) -> Self:
        self._before = os.environ.get("SESSIOND_SOCKET")
        os.environ["SESSIOND_SOCKET"] = self.path
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is None:
            del os.environ["SESSIOND_SOCKET"]
        else:
            os.environ["SESSIOND_SOCKET"] = self._before
        if self._running:
            self.stop()
        self._directory.cleanup()

    # --- the test's side: what sessions there are and what happens to them ----------------------

    def add(self, count: int = 1, **fields: Any) -> list[str]:
        """Make sessions up, without connections; ``fields`` are those of ``Record``.

        Returns their ids, in the order in which ``list`` gives them.
        """
        with self._lock:
            return [self._add(number, fields) for number in range(count)]

    def _add(self, number: int, fields: dict[str, Any]) -> str:
        invented: dict[str, Any] = {
            "session": uuid.uuid4().hex,
            "state": State.ESTABLISHED.value,
            "mobile": True,
            "engine": "repair",
            "role": "connect",
            "peer": "server.test:7000",
            "local": f"192.0.2.1:{1024 + number % 64000}",
            "remote": "198.51.100.1:7000",
            "pid": os.getpid(),
            "uid": os.getuid(),
            "created": time.time(),
        }
        record = Record(**(invented | fields))
        self._records[record.session] = record
        return record.session

    def record(self, session: SessionLike) -> Record:
        """What the daemon would tell of a session now. Raises NotFound."""
        id = _id(session)
        with self._lock:
            if id not in self._records:
                raise NotFound(f"there is no session {id}")
            return self._records[id]

    def update(self, session: SessionLike, **fields: Any) -> Record:
        """Change what is told of a session, silently."""
        with self._lock:
            record = shape.replace(self.record(session), **fields)
            self._records[record.session] = record
            return record

    def bind(self, session: SessionLike) -> Record:
        """The peer's daemon answered: the session becomes mobile."""
        record = self.update(
            session, state=State.ESTABLISHED.value, mobile=True, reason=None, engine=self.engine
        )
        self.emit(record, Kind.BOUND)
        return record

    def start_move(self, session: SessionLike, reason: str | None = None) -> Record:
        """The first half of ``move``."""
        record = self.update(session, state=State.MOVING.value)
        self.emit(record, Kind.MOVING, reason=reason)
        return record

    def move(
        self,
        session: SessionLike,
        *,
        local: str | None = None,
        remote: str | None = None,
        gap_ms: float = 0.5,
    ) -> Record:
        """A whole move: ``moving``, then ``moved`` on the new tuple."""
        before = self.start_move(session)
        record = self.update(
            session,
            state=State.ESTABLISHED.value,
            local=local or before.local,
            remote=remote or before.remote,
            gap_ms=gap_ms,
            moves=before.moves + 1,
            generation=before.generation + 1,
        )
        self.emit(
            record,
            Kind.MOVED,
            engine=record.engine,
            gap_ms=gap_ms,
            generation=record.generation,
        )
        return record

    def wait(self, session: SessionLike, reason: str = "no usable address") -> Record:
        """The session waits for a path."""
        record = self.update(session, state=State.WAITING.value, reason=reason)
        self.emit(record, Kind.WAITING, reason=reason)
        return record

    def fail(self, session: SessionLike, reason: str = "the peer refused the move") -> Record:
        """A move failed, and the connection is on the tuple it had before."""
        record = self.update(session, state=State.ESTABLISHED.value)
        self.emit(record, Kind.FAILED, reason=reason)
        return record

    def lose(
        self, session: SessionLike, reason: str = "the connection could not be restored"
    ) -> None:
        """The connection is lost: ``lost``, then ``closed``."""
        self.emit(self.record(session), Kind.LOST, reason=reason)
        self.end(session)

    def end(self, session: SessionLike) -> None:
        """The application closed the socket."""
        with self._lock:
            record = self._records.pop(_id(session))
        self.emit(record, Kind.CLOSED)

    def emit(self, record: Record, kind: str, **fields: Any) -> None:
        """Tell everybody who monitors the session of an event."""
        told = Event(
            session=record.session,
            kind=str(kind),
            time=time.time(),
            local=record.local,
            remote=record.remote,
            **fields,
        )
        self._server.tell(record.session, wire.notification(told.to_map()))

    def refuse(self, method: str, error: HsockError | None) -> None:
        """Answer a method with an error from now on; None: no longer."""
        if error is None:
            self._refusals.pop(method, None)
        else:
            self._refusals[method] = error

    def silence(self, *methods: str) -> None:
        """Leave these methods without an answer, as a hanging daemon does; none: answer all."""
        self._silent = set(methods)

    # --- the daemon's side ----------------------------------------------------------------------

    def _answer(self, call: wire.Call[Any], fds: list[int]) -> wire.Map | None:
        self.calls.append(call)
        if call.method in self._refusals:
            raise self._refusals[call.method]
        if call.method in self._silent:
            return None
        with self._lock:
            return self._result(call, fds)

    def _result(self, call: wire.Call[Any], fds: list[int]) -> wire.Map:
        match call:
            case wire.Hello():
                return wire.Welcome(wire.VERSION, "FakeDaemon", self.admin).to_map()
            case wire.Resolve():
                return self._resolve(call).to_map()
            case wire.Attach():
                return self._attach(call, fds).to_map()
            case wire.List():
                return self._page(call).to_map()
            case wire.Show():
                return self.record(call.session).to_map()
            case wire.Rebind():
                return self._rebind(call).to_map()
            case wire.Detach():
                self.record(call.session)
                del self._records[call.session]
                return {}
            case wire.Monitor():
                if call.session is not None:
                    self.record(call.session)
                return {}
            case wire.Network():
                return self.network.to_map()
            case wire.GetStats():
                return dict(self.counters)
            case wire.Peers():
                return wire.PeerKeys(tuple(self.peers)).to_map()
            case wire.Peer():
                named = tuple(one for one in self.peers if one.name == call.name)
                return wire.PeerKeys(named).to_map()
            case wire.Pin():
                self.peers.append(wire.PeerKey(call.name, call.key, "pinned"))
                return {}
            case wire.Forget():
                self.peers = [one for one in self.peers if one.name != call.name]
                return {}
            case wire.Fingerprint():
                return wire.HostKey("-".join(["aaaa"] * 13)).to_map()
        raise UsageError(f"FakeDaemon has no {call.method}")

    def _resolve(self, call: wire.Resolve) -> wire.Resolution:
        wire.check_host(call.name)
        family = {0: socket.AF_UNSPEC, 4: socket.AF_INET, 6: socket.AF_INET6}[call.family]
        found: list[tuple[str, int]] = []
        tried: list[str] = []
        for host in self.names.get(call.name, [call.name]):
            try:
                answers = socket.getaddrinfo(host, call.service, family, socket.SOCK_STREAM)
                found += [(str(address[0]), int(address[1])) for *_, address in answers]
            except OSError as error:
                tried.append(f"{host}: {error.strerror}")
        if not found:
            raise NameNotResolved(f"{call.name} could not be resolved", tried)
        return wire.Resolution(tuple(found), "fake")

    def _attach(self, call: wire.Attach, fds: list[int]) -> Record:
        if len(fds) != 1:
            raise UsageError("attach needs the socket beside the packet")
        with socket.socket(fileno=os.dup(fds[0])) as sock:
            cookie = struct.unpack("Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0]
            try:
                local, remote = _text(sock.getsockname()), _text(sock.getpeername())
            except OSError as error:
                raise Refused(f"not a connected TCP socket: {error.strerror}") from error
        known = self._records.get(self._by_cookie.get(cookie, ""))
        if known is not None:
            return known
        (session,) = self.add(
            state=(State.ESTABLISHED if self.mobile else State.PLAIN).value,
            mobile=self.mobile,
            reason=self.reason or (None if self.mobile else "FakeDaemon.mobile is False"),
            engine=self.engine if self.mobile else None,
            role=call.role,
            peer=call.name,
            local=local,
            remote=remote,
            fd=call.fd,
        )
        self._by_cookie[cookie] = session
        return self._records[session]

    def _page(self, call: wire.List) -> wire.Page:
        ids = list(self._records)
        start = 0
        if call.after is not None:
            self.record(call.after)
            start = ids.index(call.after) + 1
        chosen = ids[start : start + min(call.limit, wire.MAX_PAGE)]
        more = start + len(chosen) < len(ids)
        return wire.Page(tuple(self._records[id] for id in chosen), chosen[-1] if more else None)

    def _rebind(self, call: wire.Rebind) -> Record:
        record = self.record(call.session)
        if not record.mobile:
            raise Refused(f"the session is not mobile: {record.reason}")
        port = record.local.rpartition(":")[2]
        to = call.to if call.to and (":" in call.to or "." in call.to) else None
        local = record.local if to is None else f"[{to}]:{port}" if ":" in to else f"{to}:{port}"
        return self.move(record, local=local)


def _id(session: SessionLike) -> str:
    if isinstance(session, str):
        return session
    record = session if isinstance(session, Record) else session.record
    if not record.session:
        raise NotFound(f"the socket has no session: {record.reason}")
    return record.session


def _text(address: tuple[str, int]) -> str:
    host = address[0].removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
