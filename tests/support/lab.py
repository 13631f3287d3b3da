"""The laboratory: hosts as network namespaces of this machine, links between them, their undoing.

    with Lab() as lab:
        client, server = lab.host("client"), lab.host("server")
        lab.link(client, "wifi", server, "lan0")
        client.configure(Uplink("wifi", ("10.0.1.2/24",)))
        server.configure(Uplink("lan0", ("10.0.1.1/24",)))
        client.run("ping", "-c1", "10.0.1.1")

``tests.support.topology`` builds the usual one: two hosts with two uplinks each, a router and a
name server between them.

What a lab has made goes when it closes: at the end of ``with``, at exit, at SIGTERM or SIGHUP. A
lab that was killed leaves namespaces behind; their names say whose they were (``lab-PID-START-…``,
START being the process's start time, so that a reused PID is told apart), and the next lab removes
those whose owner is gone. Processes started by a lab die with it (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self, TypeVar

from tests.support import namespace as ns
from tests.support.delay import Delay
from tests.support.host import Host, Uplink
from tests.support.namespace import LabError

__all__ = ["Delay", "Host", "Lab", "LabError", "Uplink", "missing"]

T = TypeVar("T")

_PREFIX = "lab"
_PACKAGES = {
    "ip": "iproute2",
    "setpriv": "util-linux",
    "ethtool": "ethtool",
    "tcpdump": "tcpdump",
    "knotd": "knot",
    "gcc": "gcc",
}
"""Programs a lab runs, and the Debian packages they come in."""


def missing(*programs: str) -> str | None:
    """Why no lab can be built on this machine, in one sentence, or None.

    Args:
        programs: those that are wanted, of ``_PACKAGES``; none: all of them.
    """
    if os.geteuid() != 0:
        return "network namespaces need root: run it as root, or with sudo"
    packages = {_PACKAGES[one] for one in programs or _PACKAGES if not shutil.which(one)}
    if packages:
        names = " ".join(sorted(packages))
        return f"not installed: {names} (on Debian: apt-get install {names})"
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    if probe.returncode:
        return f"no network namespace can be made: {probe.stderr.strip()}"
    return None


class Lab:
    """Everything one test, benchmark or demo has on this machine.

    ``with`` raises LabError where no lab can be built.
    """

    def __init__(self) -> None:
        self._undo = ExitStack()
        self._owner = os.getpid()
        self._name = f"{_PREFIX}-{self._owner}-{_started(self._owner)}-{secrets.token_hex(3)}"
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> Self:
        why_not = missing("ip", "setpriv")
        if why_not:
            raise LabError(why_not)
        _remove_stale()
        atexit.register(self.close)
        self._undo.callback(atexit.unregister, self.close)
        _exit_on_signals(self._undo)
        self.directory = Path(self._undo.enter_context(tempfile.TemporaryDirectory(prefix="lab-")))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Undo everything, the latest first. Idempotent; does nothing in a forked child."""
        if os.getpid() == self._owner:
            self._undo.close()

    def enter(self, manager: AbstractContextManager[T]) -> T:
        """Enter a context manager that is left when the lab closes."""
        return self._undo.enter_context(manager)

    def host(self, name: str) -> Host:
        """A new host: its own interfaces, addresses, routes, ports, sysctls and resolv.conf."""
        namespace = f"{self._name}-{name}"
        self._undo.callback(ns.remove, namespace)
        ns.add(namespace)
        host = self.hosts[name] = Host(name, namespace, self.directory, self._undo)
        return host

    def link(self, a: Host, a_interface: str, b: Host, b_interface: str) -> None:
        """A cable between two hosts: both ends up, no addresses yet. MTU 1500."""
        ns.ip(
            f"link add name {a_interface} netns {a.namespace} type veth "
            f"peer name {b_interface} netns {b.namespace}"
        )
        a.ip(f"link set dev {a_interface} up")
        b.ip(f"link set dev {b_interface} up")

    def delayed_link(self, a: Host, a_interface: str, b: Host, b_interface: str) -> Delay:
        """The same cable with a delay element in it, in a namespace of its own."""
        return Delay(self, a, a_interface, b, b_interface)


def _started(pid: int) -> int:
    """When a process started, clock ticks after boot (proc_pid_stat(5), field 22)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19])


def _remove_stale() -> None:
    for name in ns.names(f"{_PREFIX}-"):
        pid, started = map(int, name.split("-")[1:3])
        try:
            alive = _started(pid) == started
        except FileNotFoundError:
            alive = False
        if not alive:
            ns.remove(name)


def _exit_on_signals(undo: ExitStack) -> None:
    """Leave by an exception, so that everything is undone, where a signal would just end us."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _exit)
            undo.callback(signal.signal, number, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
