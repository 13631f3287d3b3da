"""The repair engine: moves a TCP socket in place on a stock kernel (handover.md sections 3 and 4).

Every step borrows the application's socket, *locks* it (a filter that drops all that comes in),
stops the processes that hold it for some 0.1 ms, and takes the connection out of the kernel and
puts it back on another tuple. On its new tuple a socket is *shielded* (its filter drops RSTs) until
both ends are there, and a *tombstone* holds the tuple it left (docs/decisions/0003).

Whatever fails in a step, the connection is put back where it was. Only if that fails too is it
lost, and then the application has one clean error.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from sessiond.core.outcomes import Arrived, Departed, Failed, Followed
from sessiond.core.tuples import FourTuple
from sessiond.rebind import filters, tcp_state
from sessiond.rebind import linux as lx
from sessiond.rebind.engine import Connection, Facts
from sessiond.rebind.ports import InterfaceOf, Ports, Unbindable, transparent
from sessiond.rebind.process import CannotStop, Process, Shared, stopped
from sessiond.rebind.tcp_state import TcpState

MOBILE_USER_TIMEOUT = 2**31 - 1
"""Milliseconds, 24 days: TCP_USER_TIMEOUT while a session is mobile, or tcp_retries2 ends it after
some 15 minutes without a path."""

Outcome = TypeVar("Outcome")


@dataclass(slots=True)
class Notes:
    """What the engine must remember of a connection between two steps of a handover."""

    origin: FourTuple
    """Where it was before."""
    own_filter: filters.Program
    """The application's, to be put back."""
    target: FourTuple | None = None
    """Case 2: where it goes once the peer has answered."""
    peer_window: int = 0
    """Bytes the peer can take, for opening a closed window."""
    tombstone: socket.socket | None = None


class Repair:
    """Implements ``engine.Engine``.

    Args:
        interface_of: the interface that has a local address.
    """

    name = "repair"

    def __init__(self, interface_of: InterfaceOf = lambda address: None) -> None:
        self._ports = Ports(interface_of)

    def inspect(
        self, sock: socket.socket, process: Process, fd: int, *, quiet: bool
    ) -> tuple[Connection, Facts]:
        """Learn what a new session's connection is.

        Args:
            sock: the socket, as the application handed it over; not kept.
            process: who has it under the number ``fd``.
            quiet: no other thread uses it yet, the process need not be stopped.
        """
        connection = Connection(process, fd, lx.cookie(sock))
        try:
            self._refuse(sock, connection)
            with _still([] if quiet else [connection]) as running:
                if running:
                    raise running[process]
                local_isn, remote_isn = tcp_state.isns(sock)
            where = tcp_state.tuple_of(sock)
        except (OSError, CannotStop, tcp_state.Unmovable) as error:
            nowhere = FourTuple(lx.NOWHERE, lx.NOWHERE)
            with contextlib.suppress(OSError):
                nowhere = tcp_state.tuple_of(sock)
            return connection, Facts(nowhere, 0, 0, frozenset(), _reason(error))
        return connection, Facts(where, local_isn, remote_isn, _versions(sock), None)

    def enroll(self, batch: Sequence[Connection]) -> list[Failed | None]:
        """The session is mobile from now on: let no silence end the connection."""

        def one(sock: socket.socket, connection: Connection) -> None:
            if connection.user_timeout is None:
                connection.user_timeout = lx.get_u32(sock, lx.TCP_USER_TIMEOUT)
            lx.set_u32(sock, lx.TCP_USER_TIMEOUT, MOBILE_USER_TIMEOUT)

        return self._each(batch, one)

    def release(self, batch: Sequence[Connection]) -> list[Failed | None]:
        """The session is plain TCP again."""

        def one(sock: socket.socket, connection: Connection) -> None:
            timeout, connection.user_timeout = connection.user_timeout, None
            if timeout is not None:
                lx.set_u32(sock, lx.TCP_USER_TIMEOUT, timeout)

        return self._each(batch, one)

    def shield(self, batch: Sequence[Connection]) -> list[Failed | None]:
        """Drop inbound RSTs from now on (the answer to Prepare)."""

        def one(sock: socket.socket, connection: Connection) -> None:
            _noted(sock, connection)
            filters.shield(sock)

        return self._each(batch, one)

    def depart(self, batch: Sequence[tuple[Connection, FourTuple]]) -> list[Departed | Failed]:
        """Mover, step 1: lock, read R_a; move at once if nothing transmitted is unacknowledged."""
        targets = {id(connection): target for connection, target in batch}

        def one(sock: socket.socket, connection: Connection) -> Departed:
            return self._depart(sock, _noted(sock, connection), targets[id(connection)])

        return self._each([connection for connection, _ in batch], one, still=True)

    def arrive(self, batch: Sequence[tuple[Connection, int, int]]) -> list[Arrived | Failed]:
        """Mover, step 3, with R_b and the peer's window from ``Moved``."""
        told = {id(connection): rest for connection, *rest in batch}

        def one(sock: socket.socket, connection: Connection) -> Arrived:
            return self._arrive(sock, connection, *told[id(connection)])

        return self._each([connection for connection, *_ in batch], one, still=True)

    def follow(
        self, batch: Sequence[tuple[Connection, FourTuple, int, int, bool]]
    ) -> list[Followed | Failed]:
        """The other end, step 2: move to the tuple, trimmed by R_a."""
        told = {id(entry[0]): entry for entry in batch}

        def one(sock: socket.socket, connection: Connection) -> Followed:
            _, target, rcv_nxt, window, hold = told[id(connection)]
            notes = _noted(sock, connection)
            return self._follow(sock, notes, target, rcv_nxt, window, hold)

        return self._each([connection for connection, *_ in batch], one, still=True)

    def settle(self, batch: Sequence[Connection]) -> list[Failed | None]:
        """The handover is over: window open, lock and shield off, the application's filter back."""

        def one(sock: socket.socket, connection: Connection) -> None:
            if connection.notes is not None:
                _open_window(sock, connection.notes.peer_window)
            _end(sock, connection)

        return self._each(batch, one, still=True)

    def retreat(self, batch: Sequence[Connection]) -> list[Failed | None]:
        """Undo ``depart`` without the peer: live on the tuple it had before."""

        def one(sock: socket.socket, connection: Connection) -> None:
            notes: Notes | None = connection.notes
            if notes is not None and notes.target is None:
                state = tcp_state.dump(sock)
                self._move(sock, state, state.toward(notes.origin, notes.peer_window))
            _end(sock, connection)

        return self._each(batch, one, still=True)

    # One connection, locked, its process stopped

    def _depart(self, sock: socket.socket, notes: Notes, target: FourTuple) -> Departed:
        filters.lock(sock)
        state = tcp_state.dump(sock)
        if target.local.port == 0:
            target = target._replace(local=target.local._replace(port=state.tuple.local.port))
        if state.transmitted:
            tcp_state.resume(sock, state.reuse)
            notes.target = target
            return Departed(state.rcv_nxt, state.receive_window, True, target)
        notes.target = None
        notes.peer_window = state.window.snd_wnd or notes.peer_window
        target = self._move_or_spare(sock, state, target)
        filters.shield(sock)
        if target != state.tuple and notes.tombstone is None:
            notes.tombstone = self._tombstone(sock.family, state.tuple)
        return Departed(state.rcv_nxt, state.receive_window, False, target)

    def _arrive(
        self, sock: socket.socket, connection: Connection, rcv_nxt: int, window: int
    ) -> Arrived:
        notes: Notes = connection.notes
        resent = 0
        if notes.target is None:
            _open_window(sock, window)
        else:
            state = tcp_state.dump(sock)
            trimmed = state.trimmed(rcv_nxt)
            resent = trimmed.transmitted
            self._move(sock, state, trimmed.toward(notes.target, window))
        _end(sock, connection)
        return Arrived(resent)

    def _follow(
        self,
        sock: socket.socket,
        notes: Notes,
        target: FourTuple,
        rcv_nxt: int,
        window: int,
        hold: bool,
    ) -> Followed:
        filters.lock(sock)
        state = tcp_state.dump(sock)
        trimmed = state.trimmed(rcv_nxt)
        notes.target = None
        notes.peer_window = window
        self._move(sock, state, trimmed.toward(target, 0 if hold else window))
        filters.shield(sock)
        return Followed(state.rcv_nxt, state.receive_window, trimmed.transmitted)

    def _move_or_spare(self, sock: socket.socket, state: TcpState, target: FourTuple) -> FourTuple:
        """Move, window closed; to another port where an ephemeral one is taken."""
        try:
            self._move(sock, state, state.toward(target, 0))
        except Unbindable as error:
            spare = self._ports.spare(target.local) if error.errno == errno.EADDRINUSE else None
            if spare is None:
                raise
            target = target._replace(local=spare)
            self._move(sock, tcp_state.dump(sock), state.toward(target, 0))
        return target

    def _move(self, sock: socket.socket, old: TcpState, new: TcpState) -> None:
        """All or nothing: on an error the connection is the old one again, still locked."""
        try:
            tcp_state.restore(sock, new, self._ports)
        except OSError as error:
            try:
                sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR, lx.REPAIR_ON)
                tcp_state.restore(sock, old, self._ports, foreign=True)
            except OSError as second:
                raise _Lost(f"{_reason(error)}; putting it back: {_reason(second)}") from error
            raise

    def _tombstone(self, family: int, vacated: FourTuple) -> socket.socket | None:
        """A silent socket on a tuple, so that the kernel does not answer for it with RSTs."""
        stone = socket.socket(family, socket.SOCK_STREAM)
        try:
            filters.lock(stone)
            stone.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR, lx.REPAIR_ON)
            with transparent(stone):
                stone.bind(lx.sockaddr(family, vacated.local))
                stone.connect(lx.sockaddr(family, vacated.remote))
        except OSError:
            stone.close()  # no route any more: nothing can arrive there either
            return None
        return stone

    # Borrowing sockets

    def _each(
        self,
        batch: Sequence[Connection],
        one: Callable[[socket.socket, Connection], Outcome],
        *,
        still: bool = False,
    ) -> list[Outcome | Failed]:
        """Do one thing with each connection's socket; ``still``: while nobody else uses it."""
        if still:
            self._ports.refresh()
        with _still(batch if still else []) as running:
            return [self._guarded(connection, one, running) for connection in batch]

    def _guarded(
        self,
        connection: Connection,
        one: Callable[[socket.socket, Connection], Outcome],
        running: dict[Process, CannotStop],
    ) -> Outcome | Failed:
        had_notes = connection.notes is not None
        if connection.process in running:
            return Failed(str(running[connection.process]))
        try:
            sock = _take(connection)
        except OSError as error:
            return Failed(f"the application's socket is gone: {_reason(error)}", lost=True)
        with sock:
            try:
                return one(sock, connection)
            except _Lost as error:
                with contextlib.suppress(OSError):
                    tcp_state.resume(sock, 0)
                    _end(sock, connection)
                return Failed(f"the connection could not be put back: {error}", lost=True)
            except (OSError, ValueError, tcp_state.Unmovable, tcp_state.Unsteady) as error:
                self._recover(sock, connection, had_notes)
                return Failed(_reason(error))

    def _recover(self, sock: socket.socket, connection: Connection, had_notes: bool) -> None:
        """After a failed step: out of repair mode, and as open to the world as before it."""
        with contextlib.suppress(OSError):
            if sock.getsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR):
                tcp_state.resume(sock, 0)
        with contextlib.suppress(OSError):
            if had_notes:
                filters.shield(sock)
            else:
                _end(sock, connection)

    @staticmethod
    def _refuse(sock: socket.socket, connection: Connection) -> None:
        """Raise ``Unmovable`` for what this engine does not move."""
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
            raise tcp_state.Unmovable("it is not a TCP socket")
        if sock.proto != lx.IPPROTO_TCP:
            raise tcp_state.Unmovable("it is a multipath TCP socket (MPTCP moves by itself)")
        with _take(connection):
            pass
        tcp_state.require_established(lx.info(sock).state)
        upper = sock.getsockopt(lx.IPPROTO_TCP, lx.TCP_ULP, 16).rstrip(b"\0").decode()
        if upper:
            raise tcp_state.Unmovable(f"the kernel's {upper} works on top of it")
        if not _in_this_namespace(sock):
            raise tcp_state.Unmovable("it is in another network namespace than this daemon")


class _Lost(Exception):
    """The connection could not be put back on its old tuple."""


@contextmanager
def _still(batch: Sequence[Connection]) -> Iterator[dict[Process, CannotStop]]:
    holders: dict[Process, list[Shared]] = defaultdict(list)
    for connection in batch:
        if connection.process.pid != os.getpid():
            holders[connection.process].append(Shared(connection.fd, connection.cookie))
    with stopped(holders) as running:
        yield running


def _take(connection: Connection) -> socket.socket:
    sock = connection.process.take(connection.fd)
    if lx.cookie(sock) != connection.cookie:
        sock.close()
        raise OSError(errno.EBADF, f"descriptor {connection.fd} is another socket now")
    return sock


def _noted(sock: socket.socket, connection: Connection) -> Notes:
    if connection.notes is None:
        connection.notes = Notes(tcp_state.tuple_of(sock), filters.current(sock))
    notes: Notes = connection.notes
    return notes


def _end(sock: socket.socket, connection: Connection) -> None:
    """Nothing of a handover is left on the socket."""
    notes: Notes | None = connection.notes
    connection.notes = None
    if notes is not None:
        if notes.tombstone is not None:
            notes.tombstone.close()  # silent: it is in repair mode
        filters.put_back(sock, notes.own_filter)


def _open_window(sock: socket.socket, peer_window: int) -> None:
    """Let out what waits behind a closed window, unless the peer has opened it."""
    if lx.info(sock).snd_wnd or not peer_window:
        return
    reuse = sock.getsockopt(lx.SOL_SOCKET, socket.SO_REUSEADDR)
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR, lx.REPAIR_ON)
    try:
        window = lx.window(sock)
        largest = max(window.max_window, peer_window)
        lx.set_window(sock, window._replace(snd_wnd=peer_window, max_window=largest))
    finally:
        tcp_state.resume(sock, reuse)
    if not sock.getsockopt(lx.IPPROTO_TCP, lx.TCP_CORK):
        sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_CORK, 1)
        sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_CORK, 0)  # pushes


def _versions(sock: socket.socket) -> frozenset[int]:
    if sock.family == socket.AF_INET:
        return frozenset((4,))
    if sock.getsockopt(lx.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        return frozenset((6,))
    return frozenset((4, 6))


SIOCGSKNS = 0x894C


def _in_this_namespace(sock: socket.socket) -> bool:
    theirs = fcntl.ioctl(sock.fileno(), SIOCGSKNS)
    try:
        return os.path.samestat(os.fstat(theirs), os.stat("/proc/thread-self/ns/net"))
    finally:
        os.close(theirs)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, Unbindable):
        return f"{error.strerror or error} ({errno.errorcode.get(error.errno or 0, '?')})"
    if isinstance(error, Unbindable):
        return str(error.strerror)
    return str(error)
