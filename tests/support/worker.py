"""A Python function running as a process of its own on a host: an application under test.

    def echo(talk: Talk, port: int) -> int:
        with socket.create_server(("", port)) as listener:
            talk.tell("listening")
            ...
        return served

    worker = server.fork(echo, 7000)
    assert worker.hear() == "listening"
    ...
    assert worker.result() == 3

It is forked, not executed, so it starts in milliseconds with everything imported. It has the host's
network but not its resolv.conf; give nameservers explicitly.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn, Protocol

from tests.support import namespace as ns

_FORK = multiprocessing.get_context("fork")


class WorkerError(Exception):
    """The function raised (its traceback is the message), ended without a word, or kept silent."""


class Said(NamedTuple):
    """What a function told, or returned."""

    what: Any
    last: bool
    """It was returned."""


class HasFileno(Protocol):
    """What select takes."""

    def fileno(self) -> int: ...


class Talk:
    """The function's end of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def tell(self, what: object) -> None:
        """To ``Worker.hear``; anything that can be pickled."""
        self._pipe.send(("told", what))

    def hear(self, timeout: float | None = None) -> Any:
        """What ``Worker.tell`` said next. Raises TimeoutError, EOFError when the lab is gone."""
        if not self._pipe.poll(timeout):
            raise TimeoutError(f"nothing was said in {timeout} s")
        return self._pipe.recv()

    def fileno(self) -> int:
        """For select: readable when something was said."""
        return self._pipe.fileno()


class Worker:
    """The lab's end. ``pid`` is the process's."""

    def __init__(self, namespace: str, function: Callable[..., Any], *args: Any) -> None:
        self._pipe, theirs = _FORK.Pipe()
        self.name = function.__name__
        self._process = _FORK.Process(
            target=_run, args=(self._pipe, theirs, namespace, function, args), daemon=True
        )
        with warnings.catch_warnings():
            # Python 3.12 warns of forking a process that has threads; the child uses none of them.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()
        self.pid: int = self._process.pid or 0

    def tell(self, what: object) -> None:
        """To ``Talk.hear``."""
        self._pipe.send(what)

    def hear(self, timeout: float = 10) -> Any:
        """What the function told next. Raises WorkerError."""
        said = self.next(timeout)
        if said.last:
            raise WorkerError(f"{self.name} returned {said.what!r} instead of telling")
        return said.what

    def result(self, timeout: float = 10) -> Any:
        """What the function returned; what it told before is skipped. Raises WorkerError."""
        while not (said := self.next(timeout)).last:
            pass
        self._process.join()
        return said.what

    def next(self, timeout: float = 10) -> Said:
        """What the function told or returned next. Raises WorkerError."""
        kind, what = self._next(timeout)
        return Said(what, kind == "returned")

    def fileno(self) -> int:
        """For select: readable when there is something to hear, or the end."""
        return self._pipe.fileno()

    def stop(self) -> None:
        """Kill it if it still runs. Idempotent."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._pipe.close()

    def _next(self, timeout: float) -> tuple[str, Any]:
        try:
            if not self._pipe.poll(timeout):
                self._fail(f"said nothing for {timeout} s")
            kind, what = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            self._fail(f"ended without a word, exit code {self._process.exitcode}")
        if kind == "raised":
            self._fail(f"raised\n{what}")
        return kind, what

    def _fail(self, what: str) -> NoReturn:
        raise WorkerError(f"{self.name} {what}")


def _run(
    theirs: Connection,
    mine: Connection,
    namespace: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    theirs.close()
    ns.die_with_parent()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    try:
        ns.enter(namespace)
        said = ("returned", function(Talk(mine), *args))
    except BaseException:
        said = ("raised", traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):
        mine.send(said)
    mine.close()
    os._exit(0)
