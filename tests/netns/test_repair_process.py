"""Applications in their own processes while their sockets move; and the stop itself."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sessiond.rebind import linux as lx
from sessiond.rebind.process import CannotStop, Process, Shared, stopped
from tests.netns.repair_support import (
    OTHER,
    App,
    Ends,
    Net,
    addresses,
    eventually,
    failed,
    needs_root,
    noise,
    receive,
    target,
)

pytestmark = needs_root


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net()
    yield net
    net.close()


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A program with a pipe at either end; killed at the end."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1) as program:
        try:
            yield program
        finally:
            program.kill()


def line_of(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    return program.stdout.readline().rstrip("\n")


def tell(program: subprocess.Popen[str], word: str) -> None:
    assert program.stdin is not None
    program.stdin.write(word)
    program.stdin.flush()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def tracer_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("TracerPid:")[2].split()[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "what",
    [
        ("echo",),
        ("threads",),
        ("polled", "select"),
        ("polled", "poll"),
        ("polled", "level"),
        ("polled", "edge"),
        ("forked",),
    ],
    ids="-".join,
)
def test_an_application_notices_nothing(net: Net, what: tuple[str, ...], side: str) -> None:
    """It waits in a system call all the time, and answers what it is sent between the moves."""
    client, server = net.pair(4)
    mine, theirs = (server, client) if side == "left" else (client, server)
    with App(theirs, *what) as app:
        ends = Ends(net, client, server, {side: app})
        total = 0
        for number in range(20):
            host = (3, 5, 7, 1) if side == "left" else (4, 6, 8, 2)
            version = 6 if number % 5 == 4 else 4
            new = target(ends.where(side), local=addresses(version, host[number % 4]))
            if version != ends.where(side).local.version:
                remote = addresses(version, 2 if side == "left" else 1)
                new = target(new, remote=remote)
            if number % 2:
                ends.move(side, new)
            else:
                ends.move(OTHER[side], new.mirrored())
            data = noise(2000, number)
            mine.sendall(data)
            assert receive(mine, len(data), 2) == data
            total += len(data)
        theirs.close()
        mine.shutdown(1)
        line = app.line()
        assert line.startswith(f"echoed {total}")
        assert app.process.wait(10) == 0


def test_threads_are_held_and_let_go(net: Net) -> None:
    client, _ = net.pair(4)
    with App(client, "threads") as app:
        pid = app.process.pid
        process = Process.of(pid)
        tids = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
        assert len(tids) == 9
        with stopped({process: []}) as refused:
            assert not refused
            assert {state_of(tid) for tid in tids} == {"t"}
        assert "t" not in {state_of(tid) for tid in tids}
        assert {tracer_of(tid) for tid in tids} == {0}


def test_one_process_has_one_object() -> None:
    with running("sleep", "60") as child:
        process = Process.of(child.pid)
        assert Process.of(child.pid) is process
        assert process.alive
        child.kill()
        child.wait()
        assert not process.alive
        with pytest.raises(ProcessLookupError):
            Process.of(child.pid)


def test_what_was_stopped_by_its_user_stays_so() -> None:
    with running("sleep", "60") as child:
        child.send_signal(signal.SIGSTOP)
        eventually(lambda: state_of(child.pid) == "T")
        with stopped({Process.of(child.pid): []}) as refused:
            assert not refused
        eventually(lambda: state_of(child.pid) == "T")
        child.send_signal(signal.SIGCONT)
        eventually(lambda: state_of(child.pid) == "S")
        child.kill()


def test_a_signal_that_comes_meanwhile_is_delivered() -> None:
    program = "import signal; signal.signal(10, lambda *_: print('heard', flush=True))\n"
    program += "print('ready', flush=True)\nwhile True: signal.pause()"
    with running(sys.executable, "-c", program) as app:
        assert line_of(app) == "ready"
        for _ in range(50):
            with stopped({Process.of(app.pid): []}) as refused:
                app.send_signal(signal.SIGUSR1)
                assert not refused
            assert line_of(app) == "heard"
        for _ in range(50):  # it is about to be delivered when the stop comes
            app.send_signal(signal.SIGUSR1)
            with stopped({Process.of(app.pid): []}) as refused:
                assert not refused
            assert line_of(app) == "heard"


def test_a_killed_tracer_stops_nobody(net: Net) -> None:
    """SIGKILL in the middle of a stop: the kernel detaches, and the application runs on."""
    client, server = net.pair(4)
    with App(client, "echo") as app:
        pid = app.process.pid
        program = f"""
            import sys, time
            sys.path.insert(0, {str(Path(__file__).parents[2])!r})
            from sessiond.rebind.process import Process, stopped
            with stopped({{Process.of({pid}): []}}) as refused:
                assert not refused
                print("holding", flush=True)
                time.sleep(1000)
        """
        with running(sys.executable, "-c", textwrap.dedent(program)) as tracer:
            assert line_of(tracer) == "holding"
            assert state_of(pid) == "t"
            assert tracer_of(pid) == tracer.pid
            tracer.kill()
            tracer.wait()
        eventually(lambda: tracer_of(pid) == 0)
        server.sendall(b"still there?")
        assert receive(server, 12) == b"still there?"


def test_a_process_under_a_debugger_is_refused_by_name(net: Net) -> None:
    client, server = net.pair(4)
    with App(client, "echo") as app:
        ends = Ends(net, client, server, {"left": app})
        with tracer_named("gdb", app.process.pid):
            new = target(ends.where("left"), local=addresses(4, 3))
            refusal = failed(ends.do("left", "depart", new))
            assert not refusal.lost
            assert "is being traced by gdb (process " in refusal.reason
        ends.move("left", new)
        server.sendall(b"after")
        assert receive(server, 5) == b"after"


@contextmanager
def tracer_named(name: str, pid: int) -> Iterator[None]:
    """Another process that traces one, under a name of our choice."""
    program = f"""
        import ctypes, time
        libc = ctypes.CDLL(None)
        libc.prctl(15, {name!r}.encode(), 0, 0, 0)
        assert libc.ptrace(0x4206, {pid}, None, None) == 0
        print("tracing", flush=True)
        time.sleep(1000)
    """
    with running(sys.executable, "-c", textwrap.dedent(program)) as tracer:
        assert line_of(tracer) == "tracing"
        yield


@pytest.mark.skipif(not shutil.which("gcc"), reason="not installed: gcc")
def test_a_thread_that_cannot_be_stopped_is_let_go_when_it_can(tmp_path: Path) -> None:
    """The parent of a vfork() waits uninterruptibly until the child is done."""
    source = """
        #include <unistd.h>
        #include <stdio.h>
        int main(void) {
            char c;
            puts("ready"); fflush(stdout);
            if (read(0, &c, 1) == 1 && vfork() == 0) {
                write(1, "child\\n", 6);
                read(0, &c, 1);
                _exit(0);
            }
            puts("after"); fflush(stdout);
            pause();
        }
    """
    program = tmp_path / "vfork"
    subprocess.run(
        ["gcc", "-x", "c", "-", "-o", program, "-w"], input=source, text=True, check=True
    )
    with running(str(program)) as app:
        assert line_of(app) == "ready"
        tell(app, "x")
        assert line_of(app) == "child"
        process = Process.of(app.pid)
        for _ in range(2):  # the second time the thread is ours already
            start = time.monotonic()
            with stopped({process: []}) as refused:
                assert "can't be interrupted" in str(refused[process])
            assert time.monotonic() - start < 0.5
        tell(app, "x")
        # A blocked read() would not do: a signal just before it runs no Python handler.
        eventually(lambda: tracer_of(app.pid) == 0)
        assert line_of(app) == "after"
        with stopped({process: []}) as refused:
            assert not refused
        eventually(lambda: state_of(app.pid) == "S")
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


def test_a_child_without_the_socket_runs_on(net: Net) -> None:
    client, _ = net.pair(4)
    with App(client, "forked") as app:
        pid = app.process.pid
        eventually(lambda: bool(children(pid)))
        (child,) = children(pid)
        cookie = lx.cookie(client)
        process = Process.of(pid)
        with stopped({process: [Shared(app.fd, cookie)]}) as refused:
            assert not refused
            assert (state_of(pid), state_of(child)) == ("t", "t")
        with stopped({process: [Shared(app.fd, cookie + 1)]}) as refused:
            assert not refused
            assert (state_of(pid), state_of(child)) == ("t", "S")
        os.kill(child, signal.SIGKILL)


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_process_that_has_ended_is_a_reason(net: Net) -> None:
    client, server = net.pair(4)
    with App(client, "echo") as app:
        ends = Ends(net, client, server, {"left": app})
        app.process.kill()
        app.process.wait()
        lost = failed(ends.do("left", "depart", target(ends.where("left"), local="10.9.0.3")))
        assert "has ended" in lost.reason or "gone" in lost.reason


def test_the_reasons_of_a_stop_are_typed() -> None:
    with running("sleep", "60") as child:
        process = Process.of(child.pid)
        child.kill()
        child.wait()
        with stopped({process: []}) as refused:
            assert isinstance(refused[process], CannotStop)


def test_it_takes_no_time_worth_mentioning() -> None:
    """A stop and a go of an idle process: the median of 200 is well below a millisecond."""
    with running("sleep", "60") as child:
        process = Process.of(child.pid)
        took = []
        for _ in range(200):
            start = time.perf_counter()
            with stopped({process: []}):
                pass
            took.append(time.perf_counter() - start)
        child.kill()
    took.sort()
    print(f"stop and go: median {took[100] * 1e6:.0f} us, 99% {took[198] * 1e6:.0f} us")
    assert took[100] < 0.001
