"""A daemon on a host: started, awaited by sd_notify(3), its log kept, stopped by its pid."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import time
from types import TracebackType
from typing import Self

from tests.support.host import Host, stop
from tests.support.namespace import LabError


class Service:
    """A program that says READY=1. ``with`` returns when it has."""

    name = "service"
    ready_seconds = 10.0

    def __init__(self, host: Host) -> None:
        self.host = host
        self.directory = host.directory / self.name
        self.directory.mkdir(exist_ok=True)
        self._log = self.directory / "log"

    def argv(self) -> tuple[str, ...]:
        """The program and its arguments."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """The daemon's."""
        return self.process.pid

    @property
    def log(self) -> str:
        """What it has written so far to standard output and error, of all its lives."""
        return self._log.read_text(errors="replace")

    def start(self) -> None:
        """Start it and wait until it is ready. Raises LabError with its log."""
        path = self.directory / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self._log.open("a") as log:
            path.unlink(missing_ok=True)
            notify.bind(str(path))
            self.process = self.host.popen(
                *self.argv(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "NOTIFY_SOCKET": str(path), "PYTHONUNBUFFERED": "1"},
            )
            self._await_ready(notify)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL. Idempotent."""
        stop(self.process)

    def kill(self) -> None:
        """SIGKILL: no goodbye."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _await_ready(self, notify: socket.socket) -> None:
        deadline = time.monotonic() + self.ready_seconds
        end = os.pidfd_open(self.process.pid)
        try:
            while (left := deadline - time.monotonic()) > 0:
                readable, _, _ = select.select([notify.fileno(), end], [], [], left)
                if notify.fileno() in readable:
                    if b"READY=1" in notify.recv(4096).split(b"\n"):
                        return
                elif readable:
                    break
        finally:
            os.close(end)
        status = self.process.poll()
        what = "is not ready" if status is None else f"ended with status {status}"
        self.stop()
        raise LabError(f"{self.name} on {self.host.name} {what}; its log:\n{self.log}")
