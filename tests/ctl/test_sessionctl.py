"""sessionctl as a user runs it: a process of its own, against libhsock's FakeDaemon."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from libhsock import wire
from libhsock.errors import Denied, HsockError, Refused
from libhsock.testing import FakeDaemon

ROOT = Path(__file__).parents[2]
SESSIONCTL = [sys.executable, "-m", "sessiond.ctl"]
A, B, C = "aaaa1111" + "0" * 24, "aaaa2222" + "0" * 24, "cccc3333" + "0" * 24


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    with FakeDaemon() as fake:
        yield fake


def sessionctl(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SESSIONCTL, *arguments],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def output(*arguments: str) -> str:
    done = sessionctl(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# list


def test_list_shows_a_line_for_each_session(daemon: FakeDaemon) -> None:
    now = time.time()
    daemon.add(session=A, local="192.0.2.1:40000", moves=2, gap_ms=1.94, created=now - 3601)
    daemon.add(session=C, state="plain", peer=None, remote="[2001:db8::1]:7000", created=now - 7200)
    assert output("list") == (
        "SESSION   STATE        PEER              LOCAL            REMOTE              "
        "MOVES    GAP    AGE\n"
        "aaaa1111  established  server.test:7000  192.0.2.1:40000  198.51.100.1:7000   "
        "    2  1.9ms  1h00m\n"
        "cccc3333  plain        -                 192.0.2.1:1024   [2001:db8::1]:7000  "
        "    0      -  2h00m\n"
    )


def test_list_shows_ids_as_long_as_they_must_be(daemon: FakeDaemon) -> None:
    twin = A[:11] + "f" * 21
    daemon.add(session=A)
    daemon.add(session=twin)
    shown = [line.split()[0] for line in output("list").splitlines()[1:]]
    assert shown == [A[:12], twin[:12]]
    assert json.loads(output("show", shown[1], "--json"))["session"] == twin


def test_list_without_sessions_says_so_beside_the_output(daemon: FakeDaemon) -> None:
    done = sessionctl("list")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "no sessions\n")


def test_list_as_json_has_every_field_of_all_pages(daemon: FakeDaemon) -> None:
    ids = daemon.add(wire.MAX_PAGE + 5)
    told = json.loads(output("list", "--json"))
    assert told == [daemon.record(session).to_map() for session in ids]


def test_list_as_json_without_sessions_is_an_empty_array(daemon: FakeDaemon) -> None:
    assert json.loads(output("list", "--json")) == []


def test_list_of_a_thousand_sessions_needs_no_slow_import(daemon: FakeDaemon) -> None:
    """It must answer in 150 ms, which ``python -m tests.bench batch`` measures."""
    daemon.add(1000)
    timed = [sys.executable, "-X", "importtime", *SESSIONCTL[1:], "list"]
    done = subprocess.run(timed, capture_output=True, text=True, check=True, timeout=30)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert len(done.stdout.splitlines()) == 1001
    assert "libhsock.client" in imported
    assert not imported & {"asyncio", "dataclasses", "msgspec", "pyroute2", "dns", "ssl"}


# show


def test_show_tells_all_about_a_mobile_session(daemon: FakeDaemon) -> None:
    daemon.add(
        session=A,
        peer_daemon="198.51.100.1:2006",
        moves=3,
        generation=7,
        gap_ms=0.42,
        rtt_ms=20.1,
        pid=77,
        fd=5,
        uid=0,
        created=time.time() - 61.5,
    )
    assert output("show", "aaaa") == (
        f"session       {A}\n"
        "state         established\n"
        "mobile        yes, engine repair\n"
        "peer          server.test:7000\n"
        "its sessiond  198.51.100.1:2006\n"
        "local         192.0.2.1:1024\n"
        "remote        198.51.100.1:7000\n"
        "round trip    20ms\n"
        "moves         3, the last with a gap of 0.42ms\n"
        "generation    7\n"
        "opened by     connect, process 77, descriptor 5\n"
        "user          root (0)\n"
        "age           1m01s\n"
    )


def test_show_says_why_a_session_is_not_mobile(daemon: FakeDaemon) -> None:
    daemon.add(
        session=A, state="plain", mobile=False, engine=None, reason="no sessiond on 198.51.100.1"
    )
    assert "mobile        no: no sessiond on 198.51.100.1\n" in output("show", A)


def test_show_names_a_user_without_a_name_by_number(daemon: FakeDaemon) -> None:
    daemon.add(session=A, uid=54321)
    assert "user          54321\n" in output("show", A)


# rebind


def test_rebind_moves_and_says_from_where_to_where(daemon: FakeDaemon) -> None:
    daemon.add(session=A)
    assert output("rebind", "aaaa1", "--to", "192.0.2.9") == (
        f"{A} moved: 192.0.2.1:1024 > 198.51.100.1:7000 to "
        "192.0.2.9:1024 > 198.51.100.1:7000, repair, gap 0.50ms\n"
    )
    assert wire.Rebind(A, "192.0.2.9") in daemon.calls


def test_rebind_without_a_destination_leaves_the_choice_to_the_daemon(daemon: FakeDaemon) -> None:
    daemon.add(session=A)
    assert json.loads(output("rebind", A, "--json"))["moves"] == 1
    assert wire.Rebind(A, None) in daemon.calls


# What goes wrong: a sentence on stderr, nothing on stdout, an exit status


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            Refused("the session is not mobile: no sessiond there"),
            1,
            "the session is not mobile: no sessiond there",
        ),
        (
            HsockError("the move timed out", ["192.0.2.1", "192.0.2.9"]),
            1,
            "the move timed out; tried: 192.0.2.1, 192.0.2.9",
        ),
        (
            Denied("session is another user's"),
            5,
            "session is another user's; root and members of the group sessiond may do it",
        ),
    ],
)
def test_a_move_that_is_not_made_says_why(
    daemon: FakeDaemon, error: HsockError, status: int, said: str
) -> None:
    daemon.add(session=A)
    daemon.refuse("rebind", error)
    done = sessionctl("rebind", A)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", f"sessionctl: {said}\n")


@pytest.mark.parametrize("verb", ["show", "rebind", "monitor"])
def test_an_id_nobody_has_is_not_found(daemon: FakeDaemon, verb: str) -> None:
    daemon.add(session=A)
    for beginning in ("beef", C):
        done = sessionctl(verb, beginning)
        assert (done.returncode, done.stdout) == (4, "")
        assert re.fullmatch(
            rf"sessionctl: [^\n]*{beginning}; sessionctl list shows the sessions you may see\n",
            done.stderr,
        )


@pytest.mark.parametrize("verb", ["show", "rebind", "monitor"])
def test_a_beginning_that_sessions_share_is_refused(daemon: FakeDaemon, verb: str) -> None:
    daemon.add(session=A)
    daemon.add(session=B)
    done = sessionctl(verb, "AAAA")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"sessionctl: 2 sessions begin with aaaa, such as {A} and {B}; say more\n"


@pytest.mark.parametrize(
    "arguments", [["show"], ["explode"], ["rebind", A, "--two"], ["completion", "tcsh"]]
)
def test_wrong_usage_shows_the_right_one(daemon: FakeDaemon, arguments: list[str]) -> None:
    done = sessionctl(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: sessionctl")


@pytest.mark.parametrize(
    "verb",
    [["list"], ["show", A], ["rebind", A], ["monitor"], ["stats"], ["network"], ["peers", "list"]],
)
def test_without_a_daemon_every_verb_says_so(tmp_path: Path, verb: list[str]) -> None:
    path = tmp_path / "none.sock"
    done = sessionctl("--socket", str(path), *verb)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        f"sessionctl: sessiond is not running: there is no {path}; "
        "see systemctl status sessiond; --socket names another\n"
    )


def test_a_path_that_is_no_socket_is_no_daemon(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = sessionctl("list", SESSIOND_SOCKET=str(tmp_path / "file"))
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1)


# monitor


@contextmanager
def monitoring(daemon: FakeDaemon, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*SESSIONCTL, "monitor", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            until_subscribed(daemon, process, times=1)
            yield process
        finally:
            process.kill()


def until_subscribed(daemon: FakeDaemon, process: subprocess.Popen[str], times: int) -> None:
    deadline = time.monotonic() + 20
    while sum(isinstance(call, wire.Monitor) for call in daemon.calls) < times:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_monitor_tells_each_event_when_it_happens(daemon: FakeDaemon) -> None:
    daemon.add(session=A)
    with monitoring(daemon) as process:
        daemon.move(A, local="192.0.2.9:40000", gap_ms=0.4)
        clock = r"\d\d:\d\d:\d\d\.\d\d\d"
        assert re.fullmatch(
            rf"{clock}  aaaa1111  moving    192\.0\.2\.1:1024 > 198\.51\.100\.1:7000\n",
            next_line(process),
        )
        assert re.fullmatch(
            rf"{clock}  aaaa1111  moved     192\.0\.2\.9:40000 > 198\.51\.100\.1:7000, repair, "
            r"gap 0\.40ms\n",
            next_line(process),
        )
        daemon.wait(A, "eth0 is down")
        assert next_line(process).endswith("eth0 is down\n")


def test_monitor_as_json_tells_one_object_a_line(daemon: FakeDaemon) -> None:
    daemon.add(session=A)
    with monitoring(daemon, "--json") as process:
        daemon.move(A, gap_ms=0.4)
        told = [json.loads(next_line(process)) for _ in range(2)]
        assert [event["kind"] for event in told] == ["moving", "moved"]
        assert (told[1]["session"], told[1]["gap_ms"]) == (A, 0.4)


def test_monitor_of_one_session_tells_of_no_other_and_ends_with_it(daemon: FakeDaemon) -> None:
    daemon.add(session=A)
    daemon.add(session=C)
    with monitoring(daemon, "aaaa") as process:
        daemon.move(C)
        daemon.end(A)
        said, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")
        assert [line.split()[1:3] for line in said.splitlines()] == [["aaaa1111", "closed"]]


def test_monitor_goes_on_after_events_were_lost(daemon: FakeDaemon) -> None:
    daemon.add(session=A)
    with monitoring(daemon) as process:
        daemon.emit(daemon.record(A), wire.Kind.OVERFLOW, reason="40 events were lost")
        assert "overflow" in next_line(process)
        until_subscribed(daemon, process, times=2)
        daemon.end(A)
        assert "closed" in next_line(process)


def test_monitor_says_when_the_daemon_goes(daemon: FakeDaemon) -> None:
    with monitoring(daemon) as process:
        daemon.stop()
        said, errors = process.communicate(timeout=20)
        assert (process.returncode, said) == (3, "")
        assert errors.startswith("sessionctl: sessiond at ")
        assert len(errors.splitlines()) == 1


def test_an_interrupt_ends_monitor_without_a_word(daemon: FakeDaemon) -> None:
    with monitoring(daemon) as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("", "")
        assert process.returncode == -signal.SIGINT


def test_a_reader_that_has_seen_enough_ends_it_without_a_word(daemon: FakeDaemon) -> None:
    daemon.add(3)
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen(
        [*SESSIONCTL, "list"], stdout=write, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(write)
        assert process.communicate(timeout=20)[1] == ""
        assert process.returncode == -signal.SIGPIPE


# network, stats


def test_network_shows_what_sessions_can_use(daemon: FakeDaemon) -> None:
    daemon.network = wire.NetworkView(
        (wire.NetworkAddress("192.0.2.1", 24, "eth0"),), (wire.NetworkRoute("::/0", "wlan0", 600),)
    )
    assert output("network") == (
        "ADDRESS       INTERFACE\n"
        "192.0.2.1/24  eth0\n"
        "\n"
        "ROUTE  INTERFACE  METRIC\n"
        "::/0   wlan0         600\n"
    )
    assert json.loads(output("network", "--json")) == daemon.network.to_map()


def test_network_without_an_address_says_what_that_means(daemon: FakeDaemon) -> None:
    done = sessionctl("network")
    assert (done.returncode, done.stderr) == (
        0,
        "no usable address: sessions wait until one comes\n",
    )


def test_stats_shows_the_counters(daemon: FakeDaemon) -> None:
    daemon.counters = {"sessions": 3, "gap_ms_median": 1.25}
    assert output("stats") == "sessions       3\ngap_ms_median  1.25\n"
    assert json.loads(output("stats", "--json")) == daemon.counters


# peers


KEY = "-".join(["bbbb"] * 13)


def test_peers_are_pinned_shown_and_forgotten(daemon: FakeDaemon) -> None:
    daemon.peers = [wire.PeerKey("laptop.test", KEY, "first-use")]
    assert output("peers", "pin", "server.test", KEY) == "server.test is pinned\n"
    assert output("peers", "list") == (
        f"NAME         SOURCE     KEY\n"
        f"laptop.test  first-use  {KEY}\n"
        f"server.test  pinned     {KEY}\n"
    )
    shown = json.loads(output("peers", "show", "server.test", "--json"))
    assert shown == [{"name": "server.test", "key": KEY, "source": "pinned"}]
    assert completed("sessionctl peers show la") == ["laptop.test"]
    assert output("peers", "forget", "laptop.test") == "laptop.test is forgotten\n"
    assert [one["name"] for one in json.loads(output("peers", "list", "--json"))] == ["server.test"]


def test_without_peers_it_says_so_beside_the_output(daemon: FakeDaemon) -> None:
    done = sessionctl("peers", "list")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "no peer's key is known\n")


def test_the_host_s_own_key_is_one_line(daemon: FakeDaemon) -> None:
    key = output("peers", "fingerprint").strip()
    assert json.loads(output("peers", "fingerprint", "--json")) == {"key": key}
    assert len(key) == 64


def test_who_may_not_pin_is_told_who_may(daemon: FakeDaemon) -> None:
    daemon.refuse("pin", Denied("user 1000 may not change whose keys are accepted"))
    done = sessionctl("peers", "pin", "server.test", KEY)
    assert done.returncode == 5
    assert "root and members of the group sessiond" in done.stderr


# Completion


def completed(line: str) -> list[str]:
    """What bash offers after a line, by click's own protocol."""
    words = line.split(" ")
    done = sessionctl(
        _SESSIONCTL_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1)
    )
    assert done.stderr == ""
    return [offer.partition(",")[2] for offer in done.stdout.split()]


def test_completion_offers_verbs_ids_and_destinations(daemon: FakeDaemon) -> None:
    daemon.add(session=A)
    daemon.add(session=C)
    daemon.network = wire.NetworkView((wire.NetworkAddress("192.0.2.1", 24, "eth0"),))
    assert completed("sessionctl re") == ["rebind"]
    assert completed("sessionctl show ") == [A, C]
    assert completed("sessionctl monitor cc") == [C]
    assert completed("sessionctl rebind aaaa --to ") == ["eth0", "192.0.2.1"]
    assert completed("sessionctl rebind aaaa --to e") == ["eth0"]


def test_completion_offers_nothing_where_there_is_no_daemon(tmp_path: Path) -> None:
    assert completed(f"sessionctl --socket {tmp_path}/none show ") == []


@pytest.mark.parametrize(
    ("shell", "file"),
    [("bash", "sessionctl.bash"), ("zsh", "_sessionctl"), ("fish", "sessionctl.fish")],
)
def test_the_completion_files_are_what_the_verb_prints(shell: str, file: str) -> None:
    if shell == "bash" and not shutil.which("bash"):
        pytest.skip("bash is not installed")
    script = (ROOT / "completions" / file).read_text()
    assert sessionctl("completion", shell).stdout == script
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(ROOT / "completions" / file)], check=True)


# Documentation


def test_the_man_page_has_every_verb_and_no_other() -> None:
    page = (ROOT / "docs" / "man" / "sessionctl.1").read_text()
    described = re.findall(r"^\.It Cm (\w+)", page.split(".Sh STATES")[0], re.MULTILINE)
    verbs = sessionctl("--help").stdout.split("Commands:\n")[1]
    assert described == re.findall(r"^  (\w+)", verbs, re.MULTILINE)


def test_the_man_page_has_every_state() -> None:
    page = (ROOT / "docs" / "man" / "sessionctl.1").read_text().split(".Sh STATES")[1]
    described = re.findall(r"[a-z]+", " ".join(re.findall(r"^\.It Cm (.*)", page, re.MULTILINE)))
    assert sorted(described) == sorted(state.value for state in wire.State)
