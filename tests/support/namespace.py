"""Network namespaces by name: making, entering and removing them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

NETNS = Path("/run/netns")
RESOLV = Path("/etc/netns")
"""``ip netns exec NAME`` puts the files of RESOLV/NAME over those of /etc (ip-netns(8))."""
_TCP = {
    "tcp_congestion_control": "reno",  # the only one that every kernel allows in a namespace
    "tcp_rmem": "4096 131072 6291456",
    "tcp_wmem": "4096 16384 4194304",
}
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29
_libc = ctypes.CDLL(None, use_errno=True)


class LabError(Exception):
    """The laboratory can't be built here, or something in it did not come up. Says why."""


def ip(*commands: str, namespace: str | None = None, version: int = 4, force: bool = False) -> None:
    """Run commands of ip(8), all in one process.

    Args:
        commands: each without the leading ``ip``.
        namespace: where; None: here.
        version: 4 or 6, where a command can't tell from its addresses (``rule``).
        force: go on after a command that fails, and say nothing of it.

    Raises:
        LabError: a command failed.
    """
    argv = ["ip", *(["-n", namespace] if namespace else []), *(["-force"] if force else [])]
    argv += ["-6"] if version == 6 else []
    done = subprocess.run(
        [*argv, "-batch", "-"], input="\n".join(commands), capture_output=True, text=True
    )
    if done.returncode and not force:
        raise LabError(f"{' '.join(argv)}: {done.stderr.strip()} in:\n" + "\n".join(commands))


def add(namespace: str) -> None:
    """Make a namespace with its loopback up, addresses usable at once (no DAD, RFC 4862 section
    5.4), no router discovery, no filter against asymmetric paths, and with TCP as kernels have it
    where this machine is tuned."""
    ip(f"netns add {namespace}")
    with entered(namespace):
        for scope in ("all", "default"):
            for name in ("accept_dad", "dad_transmits", "accept_ra", "router_solicitations"):
                sysctl(f"net/ipv6/conf/{scope}/{name}", "0")
            sysctl(f"net/ipv4/conf/{scope}/rp_filter", "0")
        for name, value in _TCP.items():
            sysctl(f"net/ipv4/{name}", value)
    ip("link set lo up", namespace=namespace)


def remove(namespace: str) -> None:
    """End what still runs in a namespace and delete it. Harmless when it is gone."""
    for pid in pids(namespace):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    ip(f"netns delete {namespace}", force=True)
    shutil.rmtree(RESOLV / namespace, ignore_errors=True)


def pids(namespace: str) -> list[int]:
    """The processes whose main thread is in a namespace, without this one."""
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split() if int(pid) != os.getpid()]


def names(prefix: str) -> list[str]:
    """The namespaces whose names begin so."""
    return [name for name in os.listdir(NETNS) if name.startswith(prefix)] if NETNS.exists() else []


@contextlib.contextmanager
def entered(namespace: str) -> Iterator[None]:
    """The calling thread is in the namespace. Sockets keep the one they were made in."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(namespace)
        yield
    finally:
        _setns(before)
        os.close(before)


def enter(namespace: str) -> None:
    """Move the calling thread into the namespace for good. Raises OSError."""
    inside = os.open(NETNS / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(inside)
    finally:
        os.close(inside)


def sysctl(name: str, value: str) -> None:
    """Set a sysctl, written with slashes, of the namespace the thread is in. Raises OSError."""
    (Path("/proc/sys") / name).write_text(value)


def die_with_parent() -> None:
    """SIGKILL this process when the thread that forked it ends (prctl(2))."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def precise_timers() -> None:
    """Wake the calling thread on time: the default slack is 50 µs (PR_SET_TIMERSLACK)."""
    _prctl(_PR_SET_TIMERSLACK, 1)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
