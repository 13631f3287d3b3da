"""An application's process: its sockets taken for a moment, its threads held for a moment.

Stopping is ptrace(2): SEIZE and INTERRUPT on every thread, DETACH after. Unlike SIGSTOP no shell
sees it, and a blocked system call simply restarts. PTRACE_O_EXITKILL is never set, so when the
tracer dies, however it dies, the kernel detaches and the process runs on (exit_ptrace() in
kernel/ptrace.c). Thread and process that trace are the caller's: stop and go from one thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import socket
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Final, NamedTuple

from sessiond.rebind.linux import cookie

_PIDFD_GETFD: Final = 438
_PTRACE_SEIZE: Final = 0x4206
_PTRACE_INTERRUPT: Final = 0x4207
_PTRACE_DETACH: Final = 17
_PTRACE_EVENT_STOP: Final = 128
_WALL: Final = 0x40000000

STOP_SECONDS: Final = 0.05
"""How long threads may take to stop: a running one needs microseconds; one that takes longer sits
in the kernel and can't be interrupted (vfork(2), a dead file server)."""
STARVED_SECONDS: Final = 1.0
"""How long threads may take that could run: on a busy machine they wait for a CPU."""
_SPIN_SECONDS: Final = 0.0005
_NAP_SECONDS: Final = 0.0002

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_uint]
_syscall.restype = ctypes.c_long
_ptrace = _libc.ptrace
_ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
_ptrace.restype = ctypes.c_long


class CannotStop(Exception):
    """A process whose threads can't all be held. ``args[0]`` is the reason."""


class Shared(NamedTuple):
    """A socket as its process knows it, and as the kernel does."""

    fd: int
    cookie: int


class Process:
    """A process that can't be confused with a later one of the same number.

    Args:
        pid: its process id.

    Raises:
        ProcessLookupError: there is no such process.
    """

    __slots__ = ("__weakref__", "_close", "pid", "pidfd")

    _known: ClassVar[weakref.WeakValueDictionary[int, Process]] = weakref.WeakValueDictionary()

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self._close = weakref.finalize(self, os.close, self.pidfd)

    @classmethod
    def of(cls, pid: int) -> Process:
        """The one object of this process, shared by all its connections."""
        known = cls._known.get(pid)
        if known is None or not known.alive:
            known = cls._known[pid] = cls(pid)
        return known

    def __repr__(self) -> str:
        return f"<process {self.pid}>"

    @property
    def alive(self) -> bool:
        """False once it has ended (a zombie has ended)."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def take(self, fd: int, family: int = -1) -> socket.socket:
        """A descriptor of our own for one of its sockets (pidfd_getfd(2)).

        Args:
            fd: its number there.
            family: AF_INET or AF_INET6 if known: saves asking the kernel what it is.

        Raises:
            OSError: ESRCH it has ended, EBADF no such descriptor, EPERM not allowed to, ENOTSOCK.
        """
        number = _syscall(_PIDFD_GETFD, self.pidfd, fd, 0)
        if number < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        if family >= 0:
            return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=number)
        try:
            return socket.socket(fileno=number)
        except OSError:
            os.close(number)
            raise

    def close(self) -> None:
        """Give the pidfd back. Happens by itself when the last reference goes."""
        self._close()


@contextlib.contextmanager
def stopped(
    batch: Mapping[Process, Sequence[Shared]],
) -> Iterator[dict[Process, CannotStop]]:
    """Hold processes, and descendants that have inherited one of the sockets, for a moment.

    Args:
        batch: the processes, and those of their sockets that are about to be changed.

    Yields:
        The processes that could not be held, with the reason; they run. All others are stopped
        until the block is left, however it is left.
    """
    stop = _Stop()
    refused: dict[Process, CannotStop] = {}
    try:
        for process, sockets in batch.items():
            try:
                stop.family(process, sockets)
            except CannotStop as reason:
                refused[process] = reason
        yield refused
    finally:
        stop.release()


class _Stop:
    """Threads held by this thread."""

    def __init__(self) -> None:
        self._held: dict[int, int] = {}
        """Thread id: the signal it was about to get when it stopped, or 0."""

    def family(self, process: Process, sockets: Sequence[Shared]) -> None:
        """Stop a process and what it has forked that shares a socket; all or nothing."""
        before = set(self._held)
        try:
            self._process(process.pid)
            for child in _heirs(process.pid, sockets):
                self._process(child)
        except CannotStop:
            self.release(set(self._held) - before)
            raise

    def release(self, tids: set[int] | None = None) -> None:
        for tid in list(self._held) if tids is None else tids:
            _ptrace(_PTRACE_DETACH, tid, None, self._held.pop(tid))

    def _process(self, pid: int) -> None:
        """Every thread, again until there is no new one: a running thread may have made some."""
        if pid == os.getpid():
            return
        seen: set[int] = set()
        while new := [tid for tid in _threads(pid) if tid not in seen]:
            seen.update(new)
            seized: set[int] = set()
            try:
                seized.update(tid for tid in new if _seize(pid, tid))
            finally:
                self._await(pid, seized)

    def _await(self, pid: int, waiting: set[int]) -> None:
        start = time.monotonic()
        while True:
            for tid in list(waiting):
                held = _reported(tid)
                if held is not None:
                    waiting.discard(tid)
                    self._held.update(held)
            elapsed = time.monotonic() - start
            if not waiting:
                return
            if elapsed > STARVED_SECONDS or (
                elapsed > STOP_SECONDS and not any(_runnable(pid, tid) for tid in waiting)
            ):
                _stragglers.adopt(waiting)
                raise CannotStop(
                    f"process {pid} does not stop: thread {min(waiting)} is in a system call "
                    "that can't be interrupted"
                )
            if elapsed > _SPIN_SECONDS:
                time.sleep(_NAP_SECONDS)
            else:
                os.sched_yield()


def _runnable(pid: int, tid: int) -> bool:
    return _status(pid, tid).get("State", "").startswith("R")


class _Stragglers:
    """Threads that did not stop in time. They are still ours, and stop later: SIGCHLD says when,
    and its handler, in the main thread, lets them go at that moment."""

    def __init__(self) -> None:
        self._tids: set[int] = set()
        self._before: signal._HANDLER = None

    def adopt(self, tids: set[int]) -> None:
        if signal.getsignal(signal.SIGCHLD) != self._on_sigchld:
            self._before = signal.signal(signal.SIGCHLD, self._on_sigchld)
        self._tids |= tids
        self._let_go()

    def reclaim(self, tid: int) -> bool:
        """Whether a thread is one of these; it is not any more, and about to stop."""
        ours = tid in self._tids
        self._tids.discard(tid)
        return ours

    def _on_sigchld(self, number: int, frame: object) -> None:
        self._let_go()
        if callable(self._before):
            self._before(number, None)

    def _let_go(self) -> None:
        for tid in list(self._tids):
            held = _reported(tid)
            if held is not None:
                self._tids.discard(tid)
                for number in held.values():
                    _ptrace(_PTRACE_DETACH, tid, None, number)
        if not self._tids:
            signal.signal(signal.SIGCHLD, self._before or signal.SIG_DFL)


_stragglers = _Stragglers()


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except FileNotFoundError:
        raise CannotStop(f"process {pid} has ended") from None


def _seize(pid: int, tid: int) -> bool:
    """False if the thread has just ended."""
    if _stragglers.reclaim(tid):
        return True
    if _ptrace(_PTRACE_SEIZE, tid, None, None) == 0:
        return bool(_ptrace(_PTRACE_INTERRUPT, tid, None, None) == 0)
    error = ctypes.get_errno()
    status = _status(pid, tid)
    if error == errno.ESRCH or status.get("State", "X")[0] in "XZ":
        return False
    tracer = int(status.get("TracerPid", "0"))
    if tracer:
        raise CannotStop(
            f"process {pid} is being traced by {_name(tracer)} (process {tracer}): detach it first"
        )
    if status.get("Name", "").startswith("iou-"):
        raise CannotStop(f"process {pid} has io_uring worker threads, which can't be stopped")
    raise CannotStop(f"process {pid} can't be stopped: ptrace: {os.strerror(error)}")


def _reported(tid: int) -> dict[int, int] | None:
    """A thread that has stopped, with the signal it must get on DETACH because it stopped to
    receive it; nothing if it ended instead; None if it still runs."""
    try:
        reported, status = os.waitpid(tid, _WALL | os.WNOHANG)
    except ChildProcessError:
        return {}
    if not reported:
        return None
    if not os.WIFSTOPPED(status):
        return {}
    return {tid: 0 if status >> 16 == _PTRACE_EVENT_STOP else os.WSTOPSIG(status)}


def _status(pid: int, tid: int) -> dict[str, str]:
    try:
        with open(f"/proc/{pid}/task/{tid}/status") as file:
            return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    except (FileNotFoundError, ProcessLookupError):
        return {}


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().rstrip("\n")
    except (FileNotFoundError, ProcessLookupError):
        return "a process that has ended"


def _heirs(pid: int, sockets: Sequence[Shared]) -> Iterator[int]:
    """Descendants that have one of the sockets under the same number; parents come first."""
    for child in _children(pid):
        try:
            process = Process(child)
        except ProcessLookupError:
            continue
        if any(_has(process, shared) for shared in sockets):
            yield child
        yield from _heirs(child, sockets)


def _children(pid: int) -> list[int]:
    children: list[int] = []
    for tid in _threads(pid):
        try:
            with open(f"/proc/{pid}/task/{tid}/children") as file:
                children += map(int, file.read().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return children


def _has(process: Process, shared: Shared) -> bool:
    try:
        with process.take(shared.fd) as sock:
            return cookie(sock) == shared.cookie
    except OSError:
        return False
