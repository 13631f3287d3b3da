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
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeVar

from sessiond.core.outcomes import Arrived, Departed, Failed, Followed
from sessiond.core.tuples import Endpoint, FourTuple
from sessiond.rebind import facts, filters, tcp_state
from sessiond.rebind import linux as lx
from sessiond.rebind.engine import Connection, Facts
from sessiond.rebind.ports import InterfaceOf, Ports, Unbindable
from sessiond.rebind.process import CannotStop, Process, Shared, stopped
from sessiond.rebind.tcp_state import TcpState
from sessiond.rebind.tombstones import Tombstones

MOBILE_USER_TIMEOUT = 2**31 - 1
"""Milliseconds, 24 days: TCP_USER_TIMEOUT while a session is mobile, or tcp_retries2 ends it after
some 15 minutes without a path."""

Outcome = TypeVar("Outcome")


class Guard(Enum):
    """The filter a socket stands behind between two steps."""

    OWN = auto()
    """The application's, or none."""
    SHIELD = auto()
    LOCK = auto()


class _Later(Enum):
    LATER = auto()
    """Not without stopping the process."""


@dataclass(slots=True)
class Notes:
    """What the engine must remember of a connection between two steps of a handover."""

    own_filter: filters.Program
    """The application's, to be put back."""
    reuse: int
    """The application's SO_REUSEADDR."""
    origin: FourTuple | None = None
    """Where it was before, as first read."""
    guard: Guard = Guard.OWN
    moved: bool = False
    """It is not where it was, or its window is closed."""
    target: FourTuple | None = None
    """Case 2: where it goes once the peer has answered."""
    peer_window: int = 0
    """Bytes the peer can take, for opening a closed window."""
    tombstones: Tombstones = field(default_factory=Tombstones)
    reserved: FourTuple | None = None
    """In case 2 its target, which nobody else may take; held among the tombstones."""
    snd_nxt: int | None = None
    """Where transmission was before it was taken back: the peer may have received up to here."""
    followed: tuple[FourTuple, int, Followed] | None = None
    """The last ``follow``: where to, R_a, and what it gave, should it be asked for again."""

    def stay(self, sock: socket.socket, guard: Guard) -> None:
        """It is live where it was before, and nothing is under way."""
        self.attach(sock, guard)
        self.guard, self.moved = guard, False
        self.target = self.reserved = self.followed = None
        self.tombstones.clear()

    def attach(self, sock: socket.socket, guard: Guard) -> None:
        """Put the socket behind a filter."""
        if guard is Guard.LOCK:
            filters.lock(sock)
        elif guard is Guard.SHIELD:
            filters.shield(sock)
        else:
            filters.put_back(sock, self.own_filter)


class Repair:
    """Implements ``engine.Engine``.

    Args:
        interface_of: the interface that has a local address.
    """

    name = "repair"

    def __init__(self, interface_of: InterfaceOf = lambda address: None) -> None:
        self._interface_of = interface_of
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
        connection = Connection(process, fd, lx.cookie(sock), family=sock.family)
        try:
            facts.require_movable(sock)
            _take(connection).close()
            with _still([] if quiet else [connection]) as running:
                if running:
                    raise running[process]
                local_isn, remote_isn = tcp_state.isns(sock)
            where = tcp_state.tuple_of(sock)
        except (OSError, CannotStop, tcp_state.Unmovable) as error:
            return connection, Facts(facts.whereabouts(sock), 0, 0, frozenset(), _reason(error))
        return connection, Facts(where, local_isn, remote_isn, facts.versions(sock), None)

    def enroll(self, batch: Sequence[Connection]) -> list[Failed | None]:
        """The session is mobile from now on: let no silence end the connection."""

        def one(sock: socket.socket, connection: Connection) -> None:
            if connection.user_timeout is None:
                connection.user_timeout = lx.get_u32(sock, lx.TCP_USER_TIMEOUT)
            lx.set_u32(sock, lx.TCP_USER_TIMEOUT, MOBILE_USER_TIMEOUT)

        return self._each(batch, one)

    def release(self, batch: Sequence[Connection]) -> list[Failed | None]:
        """The session is plain TCP again, on the last tuple that both ends agreed on."""

        def one(sock: socket.socket, connection: Connection) -> None:
            if connection.notes is not None:
                self._go_back(sock, connection.notes, Guard.OWN)
            at_once(sock, connection)

        def at_once(sock: socket.socket, connection: Connection) -> _Later | None:
            if connection.notes is not None and connection.notes.moved:
                return _Later.LATER
            _end(sock, connection)
            timeout, connection.user_timeout = connection.user_timeout, None
            if timeout is not None:
                lx.set_u32(sock, lx.TCP_USER_TIMEOUT, timeout)
            return None

        return self._each_still(batch, one, at_once)

    def shield(self, batch: Sequence[Connection]) -> list[Failed | None]:
        """Drop inbound RSTs from now on (the answer to Prepare)."""

        def one(sock: socket.socket, connection: Connection) -> None:
            notes = _noted(sock, connection)
            if notes.guard is Guard.OWN:
                filters.shield(sock)
                notes.guard = Guard.SHIELD

        return self._each(batch, one)

    def depart(self, batch: Sequence[tuple[Connection, FourTuple]]) -> list[Departed | Failed]:
        """Mover, step 1: lock, read R_a; move at once if nothing transmitted is unacknowledged."""
        targets = {id(connection): target for connection, target in batch}

        def one(sock: socket.socket, connection: Connection) -> Departed:
            return self._depart(sock, _noted(sock, connection), targets[id(connection)])

        return self._each_still([connection for connection, _ in batch], one)

    def arrive(self, batch: Sequence[tuple[Connection, int, int]]) -> list[Arrived | Failed]:
        """Mover, step 3, with R_b and the peer's window from ``Moved``."""
        told = {id(connection): rest for connection, *rest in batch}

        def one(sock: socket.socket, connection: Connection) -> Arrived:
            return self._arrive(sock, connection, *told[id(connection)])

        def at_once(sock: socket.socket, connection: Connection) -> Arrived | _Later:
            return Arrived(0) if _end_if_open(sock, connection) else _Later.LATER

        return self._each_still([connection for connection, *_ in batch], one, at_once)

    def follow(
        self, batch: Sequence[tuple[Connection, FourTuple, int, int, bool]]
    ) -> list[Followed | Failed]:
        """The other end, step 2: move to the tuple, trimmed by R_a."""
        told = {id(entry[0]): entry for entry in batch}

        def one(sock: socket.socket, connection: Connection) -> Followed:
            _, target, rcv_nxt, window, hold = told[id(connection)]
            notes = _noted(sock, connection)
            return self._follow(sock, notes, target, rcv_nxt, window, hold)

        return self._each_still([connection for connection, *_ in batch], one)

    def settle(self, batch: Sequence[Connection]) -> list[Failed | None]:
        """The handover is over: window open, lock and shield off, the application's filter back."""

        def one(sock: socket.socket, connection: Connection) -> None:
            notes: Notes = connection.notes
            tcp_state.open_window(sock, notes.peer_window)
            _end(sock, connection)

        def at_once(sock: socket.socket, connection: Connection) -> _Later | None:
            return None if _end_if_open(sock, connection) else _Later.LATER

        return self._each_still(batch, one, at_once)

    def retreat(self, batch: Sequence[Connection]) -> list[Failed | None]:
        """Undo ``depart`` without the peer: live on the tuple it had before, its shield up: the
        peer may be about to leave that, or have left it."""

        def one(sock: socket.socket, connection: Connection) -> None:
            self._go_back(sock, _noted(sock, connection), Guard.SHIELD)

        def at_once(sock: socket.socket, connection: Connection) -> _Later | None:
            notes = _noted(sock, connection)
            if notes.moved:
                return _Later.LATER
            notes.stay(sock, Guard.SHIELD)
            return None

        return self._each_still(batch, one, at_once)

    def bury(self, batch: Sequence[Connection]) -> None:
        """What a step has left undone: tombstones where nothing is to arrive for now."""
        self._ports.refresh()
        with self._ports.batch():
            for connection in batch:
                if connection.notes is not None:
                    connection.notes.tombstones.bury_vacated(self._ports)

    # One connection, its process stopped

    def _depart(self, sock: socket.socket, notes: Notes, target: FourTuple) -> Departed:
        facts.require_version(sock, target)
        self._ports.require_path(target)
        state = _dump(sock, notes)
        peer_window = state.window.snd_wnd or notes.peer_window
        any_port = target.local.port == 0
        if any_port:
            target = target._replace(local=target.local._replace(port=state.tuple.local.port))
        pending = True
        if target == state.tuple:
            # The peer is on it too and perhaps knows of nothing: were the socket apart for an
            # instant, its segments would be answered with RST. So that R_a and R_b are final, this
            # end stays where it is, locked and, its window closed, silent.
            tcp_state.close_window(sock, state)
            notes.guard, notes.moved, notes.target = Guard.LOCK, True, target
        elif state.transmitted:
            tcp_state.leave(sock, state)
            target = self._reserve(notes, state, target, any_port)
            notes.guard, notes.target = Guard.LOCK, target
        else:
            target = self._move_or_spare(sock, notes, state, target, any_port)
            pending = False
        notes.peer_window = peer_window
        return Departed(state.rcv_nxt, state.receive_window, pending, target)

    def _arrive(
        self, sock: socket.socket, connection: Connection, rcv_nxt: int, window: int
    ) -> Arrived:
        notes: Notes = connection.notes
        resent = 0
        if notes.target is None:
            tcp_state.open_window(sock, window)
        else:
            state = _dump(sock, notes)
            trimmed = state.trimmed(rcv_nxt)
            resent = max(0, len(trimmed.send_queue) - state.unsent)
            self._move(sock, notes, state, trimmed.toward(notes.target, window), Guard.OWN)
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
        if notes.followed is not None and notes.followed[:2] == (target, rcv_nxt):
            return notes.followed[2]  # a Moved was lost; the mover may have received more since
        facts.require_version(sock, target)
        self._ports.require_path(target)
        state = _dump(sock, notes)
        trimmed = state.trimmed(rcv_nxt)
        new = trimmed.toward(target, 0 if hold else window)
        self._move(sock, notes, state, new, Guard.SHIELD, held=hold)
        # The mover may give this up, and go on where it was until it can tell.
        if state.tuple != target:
            notes.tombstones.vacated(state.tuple)
        notes.origin = target
        resent = max(0, len(trimmed.send_queue) - state.unsent)
        followed = Followed(state.rcv_nxt, state.receive_window, resent)
        notes.peer_window, notes.followed = window, (target, rcv_nxt, followed)
        return followed

    def _go_back(self, sock: socket.socket, notes: Notes, guard: Guard) -> None:
        assert notes.origin is not None  # it was dumped when it moved
        if tcp_state.tuple_of(sock) == notes.origin:
            tcp_state.open_window(sock, notes.peer_window)
        else:
            state = _dump(sock, notes)
            back = state.toward(notes.origin, state.window.snd_wnd or notes.peer_window)
            self._move(sock, notes, state, back, guard, foreign=True)
        notes.stay(sock, guard)

    def _move_or_spare(
        self, sock: socket.socket, notes: Notes, state: TcpState, target: FourTuple, any_port: bool
    ) -> FourTuple:
        """Move, window closed; to another port where this one is taken and need not be kept."""
        vacated = state.tuple
        notes.tombstones.bury_vacated(self._ports)
        notes.tombstones.bury(sock, vacated, self._ports, self._interface_of)
        try:
            self._move(sock, notes, state, state.toward(target, 0), Guard.SHIELD, held=True)
        except OSError as error:
            spare = self._ports.spare(target.local) if any_port and _taken(error) else None
            if spare is None:
                raise
            target = target._replace(local=spare)
            state = _dump(sock, notes)
            self._move(sock, notes, state, state.toward(target, 0), Guard.SHIELD, held=True)
        notes.tombstones.vacated(vacated)
        if self._interface_of(vacated.local.address):
            notes.tombstones.bury_vacated(self._ports)
        return target

    def _move(
        self,
        sock: socket.socket,
        notes: Notes,
        old: TcpState,
        new: TcpState,
        guard: Guard,
        *,
        held: bool = False,
        foreign: bool = False,
    ) -> None:
        """All or nothing: after an error the connection is where it was, behind what it was.

        Args:
            held: nothing leaves yet.
        """
        live = False
        try:
            with notes.tombstones.making_way(new.tuple, self._interface_of):
                tcp_state.install(sock, new, self._ports, old=old.tuple, foreign=foreign)
            live = True
            notes.attach(sock, guard)
            if not held:
                tcp_state.let_out(sock, new)
        except BaseException as error:
            self._put_back(sock, notes, old, new, live, error)
            raise
        if notes.reserved is not None:
            notes.tombstones.give_up(notes.reserved)  # taken, or the peer went elsewhere
        notes.guard, notes.moved, notes.followed = guard, True, None
        notes.target = notes.reserved = None
        notes.snd_nxt = old.snd_nxt

    def _put_back(
        self,
        sock: socket.socket,
        notes: Notes,
        old: TcpState,
        new: TcpState,
        live: bool,
        error: BaseException,
    ) -> None:
        """To the old tuple, though its address be gone. If no route leads there any more, to the
        new path after all, if need be beside what is taken there: the connection lives, and the
        next move finds it."""
        filters.lock(sock)
        if live:  # the peer may have sent something
            now = tcp_state.dump(sock).transmitted_to(old.snd_nxt)
            old = now.toward(old.tuple, old.window.snd_wnd)
        try:
            self._put(sock, notes, old)
        except OSError as second:
            for place, guard in self._refuges(old.tuple, new.tuple, notes.guard):
                notes.guard = guard
                with contextlib.suppress(OSError):
                    self._put(sock, notes, old.toward(place, 0))
                    notes.moved = True
                    notes.peer_window = notes.peer_window or old.window.snd_wnd
                    return
            why = f"{_reason(error)}; on {old.tuple} again: {_reason(second)}"
            raise _Lost(why) from error

    def _refuges(
        self, left: FourTuple, wanted: FourTuple, guard: Guard
    ) -> Iterator[tuple[FourTuple, Guard]]:
        yield wanted, guard
        with contextlib.suppress(OSError):
            spare = self._ports.spare(wanted.local)
            if spare is not None:
                yield wanted._replace(local=spare), guard
        for address in (f"127.{'.'.join(str(byte) for byte in os.urandom(3))}", "::1"):
            ours = Endpoint("127.0.0.1" if address != "::1" else address, left.local.port)
            yield FourTuple(ours, Endpoint(address, left.remote.port)), Guard.LOCK

    def _put(self, sock: socket.socket, notes: Notes, state: TcpState) -> None:
        sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR, lx.REPAIR_ON)
        with notes.tombstones.making_way(state.tuple, self._interface_of):
            tcp_state.install(sock, state, self._ports, foreign=True)
        notes.attach(sock, notes.guard)
        if state.window.snd_wnd:
            tcp_state.let_out(sock, state)

    def _reserve(
        self, notes: Notes, state: TcpState, target: FourTuple, any_port: bool
    ) -> FourTuple:
        """Case 2: see that the target can be had, and that nobody takes it meanwhile."""
        if target == state.tuple or target in notes.tombstones:
            return target
        if notes.reserved is not None:
            notes.tombstones.give_up(notes.reserved)
        try:
            notes.tombstones.hold(target, self._ports.hold(target))
        except OSError as error:
            spare = self._ports.spare(target.local) if any_port and _taken(error) else None
            if spare is None:
                raise
            target = target._replace(local=spare)
            notes.tombstones.hold(target, self._ports.hold(target))
        notes.reserved = target
        return target

    # Borrowing sockets

    def _each_still(
        self,
        batch: Sequence[Connection],
        one: Callable[[socket.socket, Connection], Outcome],
        at_once: Callable[[socket.socket, Connection], Outcome | _Later] | None = None,
    ) -> list[Outcome | Failed]:
        """Do one thing with each connection's socket while nobody else uses it.

        Args:
            at_once: does it without stopping the process, where that is enough.
        """
        outcomes: list[Outcome | Failed | _Later]
        if at_once is None:
            outcomes = [_Later.LATER] * len(batch)
        else:
            outcomes = [self._guarded(connection, at_once) for connection in batch]
        rest = [c for c, outcome in zip(batch, outcomes, strict=True) if outcome is _Later.LATER]
        with self._ports.batch(), _still(rest) as running:
            done = iter([self._guarded(connection, one, running) for connection in rest])
        return [next(done) if outcome is _Later.LATER else outcome for outcome in outcomes]

    def _each(
        self, batch: Sequence[Connection], one: Callable[[socket.socket, Connection], Outcome]
    ) -> list[Outcome | Failed]:
        return [self._guarded(connection, one) for connection in batch]

    def _guarded(
        self,
        connection: Connection,
        one: Callable[[socket.socket, Connection], Outcome],
        running: dict[Process, CannotStop] | None = None,
    ) -> Outcome | Failed:
        if running and connection.process in running:
            return Failed(str(running[connection.process]))
        try:
            sock = _take(connection)
        except OSError as error:
            gone = error.errno in (errno.ESRCH, errno.EBADF, errno.ENOTSOCK)
            what = "is gone" if gone else "can't be borrowed"
            return Failed(f"the application's socket {what}: {_reason(error)}", lost=gone)
        with sock:
            try:
                return one(sock, connection)
            except _Lost as error:
                with contextlib.suppress(OSError):
                    tcp_state.abort(sock)
                    _end(sock, connection)
                return Failed(f"the connection could not be put back: {error}", lost=True)
            except (OSError, ValueError, tcp_state.Unmovable, tcp_state.Unsteady) as error:
                if lx.info(sock).state == lx.TCP_CLOSE:
                    _end(sock, connection)
                    return Failed("TCP has given the connection up", lost=True)
                self._recover(sock, connection)
                return Failed(_reason(error))
            except BaseException:
                self._recover(sock, connection)
                raise

    @staticmethod
    def _recover(sock: socket.socket, connection: Connection) -> None:
        """After a failed step: out of repair mode, behind the filter it was behind before."""
        notes: Notes | None = connection.notes
        if notes is not None:
            if sock.getsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR):
                tcp_state.resume(sock, notes.reuse)
            notes.attach(sock, notes.guard)
            if notes.guard is Guard.OWN and not notes.moved:
                _end(sock, connection)


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
    sock = connection.process.take(connection.fd, connection.family)
    try:
        if lx.cookie(sock) != connection.cookie:
            raise OSError(errno.EBADF, f"descriptor {connection.fd} is another socket now")
    except BaseException:
        sock.close()
        raise
    return sock


def _noted(sock: socket.socket, connection: Connection) -> Notes:
    if connection.notes is None:
        reuse = sock.getsockopt(lx.SOL_SOCKET, socket.SO_REUSEADDR)
        connection.notes = Notes(filters.current(sock), reuse)
    notes: Notes = connection.notes
    return notes


def _dump(sock: socket.socket, notes: Notes) -> TcpState:
    """Lock a socket and read it."""
    filters.lock(sock)
    state = tcp_state.dump(sock, notes.reuse)
    if notes.origin is None:
        notes.origin = state.tuple
    return state if notes.snd_nxt is None else state.transmitted_to(notes.snd_nxt)


def _end(sock: socket.socket, connection: Connection) -> None:
    """Nothing of a handover is left on the socket."""
    notes: Notes | None = connection.notes
    if notes is not None:
        notes.tombstones.clear()
        if notes.guard is not Guard.OWN:
            notes.attach(sock, Guard.OWN)
        connection.notes = None


def _end_if_open(sock: socket.socket, connection: Connection) -> bool:
    """Nothing is left to do, or only what the application may be running for."""
    notes: Notes | None = connection.notes
    if notes is not None and (
        notes.target is not None or (notes.moved and not lx.info(sock).snd_wnd)
    ):
        return False
    _end(sock, connection)
    return True


def _taken(error: OSError) -> bool:
    return error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, Unbindable):
        return f"{error.strerror or error} ({errno.errorcode.get(error.errno or 0, '?')})"
    if isinstance(error, Unbindable):
        return str(error.strerror)
    return str(error)
