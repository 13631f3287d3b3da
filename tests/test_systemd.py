"""Readiness, inherited sockets, and the units: valid, and with the privileges the work needs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sessiond.edges.systemd import (
    ActivationError,
    Supervisor,
    activated_socket,
    inherited_sockets,
)

UNITS = Path(__file__).parents[1] / "systemd"


# Readiness


@pytest.fixture(params=["path", "abstract"])
def notify_socket(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[str, socket.socket]]:
    name = f"@sessiond-test-{os.getpid()}-{os.urandom(4).hex()}"
    address = name if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0" + name[1:] if request.param == "abstract" else address)
        receiver.setblocking(False)
        yield address, receiver


def test_the_supervisor_hears_every_stage_of_life(notify_socket: tuple[str, socket.socket]) -> None:
    address, receiver = notify_socket
    supervisor = Supervisor({"NOTIFY_SOCKET": address})
    supervisor.ready("0 sessions")
    supervisor.status("2 sessions\nof 1 peer")
    supervisor.alive()
    supervisor.stopping()
    assert [receiver.recv(100) for _ in range(4)] == [
        b"READY=1\nSTATUS=0 sessions",
        b"STATUS=2 sessions of 1 peer",
        b"WATCHDOG=1",
        b"STOPPING=1",
    ]


def test_without_a_supervisor_nothing_is_said() -> None:
    Supervisor({}).ready("0 sessions")


def test_a_supervisor_that_has_gone_or_does_not_read_stops_nobody(tmp_path: Path) -> None:
    Supervisor({"NOTIFY_SOCKET": str(tmp_path / "gone")}).alive()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "deaf"))
        supervisor = Supervisor({"NOTIFY_SOCKET": str(tmp_path / "deaf")})
        for _ in range(10_000):
            supervisor.alive()


def test_the_environment_is_cleared_for_the_daemon_s_children() -> None:
    environ = {"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "HOME": "/"}
    Supervisor(environ)
    inherited_sockets(environ | {"LISTEN_FDS": "0"})
    assert environ == {"HOME": "/"}


@pytest.mark.parametrize(
    ("addressee", "watchdog_s"), [(None, 15.0), (os.getpid(), 15.0), (os.getpid() + 1, None)]
)
def test_the_watchdog_is_fed_at_half_its_time(
    addressee: int | None, watchdog_s: float | None
) -> None:
    environ = {"WATCHDOG_USEC": "30000000"}
    if addressee:
        environ["WATCHDOG_PID"] = str(addressee)
    assert Supervisor(environ).watchdog_s == watchdog_s


async def test_the_watchdog_is_fed_while_the_loop_turns(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.setblocking(False)
        supervisor = Supervisor(
            {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "20000"}
        )
        feeding = asyncio.create_task(supervisor.keep_alive())
        loop = asyncio.get_running_loop()
        assert [await loop.sock_recv(receiver, 100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        feeding.cancel()


async def test_without_a_watchdog_there_is_nothing_to_feed() -> None:
    await Supervisor({}).keep_alive()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("NOTIFY_SOCKET", "vsock:2:1"), ("WATCHDOG_USEC", "0"), ("WATCHDOG_USEC", "-1")],
)
def test_a_malformed_variable_is_named(variable: str, value: str) -> None:
    with pytest.raises(ActivationError, match=f"^{variable} is '?{value}"):
        Supervisor({variable: value})


# Inherited sockets


def handed_over(
    count: int | str = 1, pid: int | None = None, names: str = "local"
) -> dict[str, str]:
    pid = os.getpid() if pid is None else pid
    return {"LISTEN_FDS": str(count), "LISTEN_PID": str(pid), "LISTEN_FDNAMES": names}


def test_a_listening_socket_is_taken_over_with_its_name(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    fd = listener.detach()
    os.set_inheritable(fd, True)
    (taken,) = inherited_sockets(handed_over(), first_fd=fd)
    with taken.socket:
        assert (taken.name, taken.socket.fileno()) == ("local", fd)
        assert (taken.socket.family, taken.socket.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET)
        assert not os.get_inheritable(fd)


def test_the_daemon_takes_the_one_local_listener(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    taken = activated_socket(handed_over(), first_fd=listener.detach())
    assert taken is not None
    with taken:
        assert taken.getsockname() == str(tmp_path / "s")
    assert activated_socket({}) is None


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (socket.AF_UNIX, socket.SOCK_SEQPACKET),
        (socket.AF_UNIX, socket.SOCK_STREAM),
        (socket.AF_INET, socket.SOCK_DGRAM),
    ],
)
def test_a_socket_of_another_kind_is_refused_and_closed(
    family: socket.AddressFamily, kind: socket.SocketKind
) -> None:
    fd = socket.socket(family, kind).detach()
    with pytest.raises(ActivationError, match="one listening AF_UNIX SOCK_SEQPACKET socket"):
        activated_socket(handed_over(), first_fd=fd)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_another_process_s_sockets_are_left_alone() -> None:
    assert inherited_sockets(handed_over(pid=os.getpid() + 1)) == []
    assert inherited_sockets({}) == []


def test_a_descriptor_that_is_no_socket_is_named() -> None:
    read, write = os.pipe()
    try:
        with pytest.raises(ActivationError, match=rf"descriptor {read} .*non-socket"):
            inherited_sockets(handed_over(), first_fd=read)
    finally:
        os.close(read)
        os.close(write)
    with pytest.raises(ActivationError, match=f"descriptor {read} of LISTEN_FDS: Bad file"):
        inherited_sockets(handed_over(), first_fd=read)


def test_a_count_that_is_no_number_is_named() -> None:
    with pytest.raises(ActivationError, match=r"^LISTEN_FDS is 'two'"):
        inherited_sockets(handed_over("two"))


# Units


def unit_values(unit: str, key: str) -> list[str]:
    text = (UNITS / unit).read_text()
    return re.findall(rf"^{key}=(.*)$", text, re.MULTILINE)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units_without_a_warning(tmp_path: Path) -> None:
    for unit in ("sessiond.service", "sessiond.socket"):
        text = (UNITS / unit).read_text()
        (tmp_path / unit).write_text(text.replace("=/usr/bin/sessiond", "=/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "--man=no", "verify", *map(str, tmp_path.iterdir())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


CAPABILITIES = {
    "CAP_NET_ADMIN": ["TCP_REPAIR", "SO_SNDBUFFORCE"],
    "CAP_SYS_PTRACE": ["pidfd_getfd", "PTRACE_SEIZE"],
    "CAP_NET_BIND_SERVICE": ["bind"],
}

PROBE = """
import ctypes, json, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
target, refused = int(sys.argv[1]), []
def attempt(name, call):
    try:
        result = call()
        if isinstance(result, int) and result < 0:
            raise OSError(ctypes.get_errno(), name)
    except PermissionError:
        refused.append(name)
attempt("pidfd_getfd", lambda: libc.syscall(438, os.pidfd_open(target), 0, 0))
attempt("PTRACE_SEIZE", lambda: libc.ptrace(0x4206, target, None, None))
with socket.socket() as sock:
    attempt("TCP_REPAIR", lambda: sock.setsockopt(socket.IPPROTO_TCP, 19, 1))
    attempt("SO_SNDBUFFORCE", lambda: sock.setsockopt(socket.SOL_SOCKET, 32, 1 << 24))
    attempt("bind", lambda: sock.bind(("", 80)))
print(json.dumps(refused))
"""


SYSTEM_PYTHON = "/usr/bin/python3"
"""Not the virtualenv's, which may lie where nobody may not go."""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.skipif(not os.path.exists(SYSTEM_PYTHON), reason=f"{SYSTEM_PYTHON} is not installed")
@pytest.mark.parametrize("without", [None, *CAPABILITIES])
def test_each_capability_of_the_unit_is_needed_and_together_they_suffice(
    without: str | None,
) -> None:
    """As nobody with the unit's capabilities, on a process of another user, in a fresh network."""
    granted = unit_values("sessiond.service", "CapabilityBoundingSet")[0].split()
    assert set(granted) == set(CAPABILITIES)
    kept = "".join(f",+{name.removeprefix('CAP_').lower()}" for name in granted if name != without)
    daemon = f"--reuid=65534 --regid=65534 --clear-groups --inh-caps=-all{kept} "
    daemon += f"--ambient-caps=-all{kept} --bounding-set=-all{kept}"
    with socket.socket() as sock:
        target = subprocess.Popen(
            ["setpriv", "--reuid=1", "--regid=1", "--clear-groups", "sleep", "60"],
            stdin=sock.fileno(),
        )
    try:
        probe = ["unshare", "--net", "setpriv", *daemon.split(), SYSTEM_PYTHON, "-c", PROBE]
        done = subprocess.run(
            [*probe, str(target.pid), str(sock.fileno())],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        target.kill()
        target.wait()
    assert done.stderr == ""
    assert json.loads(done.stdout) == CAPABILITIES.get(without or "", [])
