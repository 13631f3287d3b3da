"""What one client of either kind knows of its daemon: connections to it, and whether it answers."""

from __future__ import annotations

import contextlib
import errno
import os
import time
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar, Generic, TypeVar

from libhsock import wire
from libhsock.dialog import Dialog
from libhsock.errors import DaemonUnavailable, HsockError

TIMEOUT = 5.0
"""Seconds the daemon has for an answer it can give by itself."""
LONG_TIMEOUT = 35.0
"""Seconds for one that meets the network: a name to resolve, a session to move."""
HOLD_OFF = 5.0
"""Seconds in which a daemon that let a request time out isn't asked again, so that a program does
not pay TIMEOUT for each of its connections while the daemon hangs."""

D = TypeVar("D", bound=Dialog)


class Pool(Generic[D]):
    """One client's connections; none of them is used after a fork."""

    _late: ClassVar[type[OSError]] = TimeoutError
    """What I/O raises that takes too long."""

    def __init__(
        self, path: str | None = None, *, name: str = "libhsock", timeout: float = TIMEOUT
    ) -> None:
        """Nothing is opened before the first call.

        ``path`` None means ``$SESSIOND_SOCKET``, else the default; ``name`` is the program's, for
        the daemon's log; ``timeout`` is in seconds.
        """
        self.path = path or wire.socket_path()
        self._name = name
        self._timeout = timeout
        self._silent_until = 0.0
        self._forget()
        _POOLS.add(self)

    def _forget(self) -> None:
        self._idle: list[D] = []
        self._busy: set[D] = set()

    @contextlib.contextmanager
    def _asking(self, call: wire.Call[Any], timeout: float | None = None) -> Iterator[float]:
        """Around a request; gives the seconds it may take. Its OSErrors are DaemonUnavailable."""
        if time.monotonic() < self._silent_until:
            raise DaemonUnavailable(f"sessiond at {self.path} let a request time out just now")
        if timeout is None:
            timeout = LONG_TIMEOUT if call.meets_network else self._timeout
        try:
            yield timeout
        except HsockError:  # some are OSErrors too
            raise
        except self._late as error:
            if timeout >= self._timeout and not call.meets_network:
                self._silent_until = time.monotonic() + HOLD_OFF
            why = f"sessiond at {self.path} did not answer in {timeout:g} s"
            raise DaemonUnavailable(why) from error
        except OSError as error:
            raise unavailable(self.path, error) from error

    @contextlib.contextmanager
    def _using(self, connection: D, keep: bool = True) -> Iterator[None]:
        """Around a request on a connection; it is kept for the next one if it was answered."""
        self._busy.add(connection)
        try:
            with connection.closed_by_errors():
                yield
        finally:
            self._busy.discard(connection)
        if keep:
            self._idle.append(connection)
        else:
            connection.close()

    def _kept(self) -> D | None:
        try:
            return self._idle.pop()
        except IndexError:  # not asked before: another thread may take the last one
            return None

    def close(self) -> None:
        """Close what is open; the next call opens anew."""
        while (kept := self._kept()) is not None:
            kept.close()

    def _after_fork(self) -> None:
        # The parent goes on using its connections, and may have been inside a call.
        for connection in [*self._idle, *self._busy]:
            connection.close()
        self._forget()


def unavailable(path: str, error: OSError) -> DaemonUnavailable:
    """What an error of the local socket means, in words."""
    match error.errno:
        case errno.ENOENT:
            why = f"sessiond is not running: there is no {path}"
        case errno.ECONNREFUSED:
            why = f"sessiond is not running: nobody listens at {path}"
        case errno.EACCES | errno.EPERM:
            why = f"this user may not open {path}"
        case errno.EPIPE | errno.ECONNRESET | errno.ENOTCONN:
            why = f"sessiond at {path} went away in the middle of a request"
        case errno.EAGAIN:
            why = f"sessiond at {path} is too busy to take a connection"
        case _:
            why = f"the socket of sessiond at {path} failed: {error.strerror or error}"
    return DaemonUnavailable(why)


_POOLS: weakref.WeakSet[Pool[Any]] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in _POOLS:
        pool._after_fork()


os.register_at_fork(after_in_child=_after_fork)
