"""The delay element: a program of its own in the middle of a cable (see delay.c).

    net = two_hosts(lab, delays=("lan0",))
    net.delays["lan0"].set(delay_ms=10)               # one way, each way: 20 ms of round trip
    net.delays["lan0"].set("ab", loss=0.01, seed=7)   # from the host to the router
    net.delays["lan0"].drop(3, "ba")

The machine has no netem. Offloads are off along such a cable, so that frames have their size on the
wire and real checksums.
"""

from __future__ import annotations

import hashlib
import os
import select
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tests.support.host import Host
from tests.support.namespace import LabError

if TYPE_CHECKING:
    from tests.support.lab import Lab

Direction = Literal["ab", "ba", "both"]

_SOURCE = Path(__file__).with_suffix(".c")
_ANSWER_SECONDS = 5
_MILLION = 1_000_000


class Delay:
    """A cable from host ``a`` to host ``b`` with a delay element in it. ``Lab.delayed_link`` makes
    it; "ab" is the direction from the first host to the second."""

    def __init__(self, lab: Lab, a: Host, a_interface: str, b: Host, b_interface: str) -> None:
        box = lab.host(f"delay-{a.name}-{a_interface}")
        lab.link(a, a_interface, box, "a")
        lab.link(box, "b", b, b_interface)
        for end in ("a", "b"):
            box.sysctl(f"net/ipv6/conf/{end}/disable_ipv6", 1)
            box.ip(f"link set dev {end} arp off")
            _wire_sized(box, end)
        _wire_sized(a, a_interface)
        _wire_sized(b, b_interface)
        pipe = subprocess.PIPE
        self._process = box.popen(str(_program()), "a", "b", stdin=pipe, stdout=pipe, bufsize=1)
        self._expect("ready", self._answer())

    @property
    def pid(self) -> int:
        """The element's process, for its CPU time."""
        return self._process.pid

    def set(
        self,
        direction: Direction = "both",
        *,
        delay_ms: float | None = None,
        rate_mbit: float | None = None,
        limit: int | None = None,
        loss: float | None = None,
        duplicate: float | None = None,
        reorder: float | None = None,
        reorder_ms: float | None = None,
        seed: int | None = None,
    ) -> None:
        """Change what is given, for frames from now on; all is 0 at first. Raises LabError.

        Args:
            delay_ms: one way.
            rate_mbit: frames leave one after another at this rate; 0 is unlimited.
            limit: frames in the element before it drops, at most 8192, as at first.
            loss, duplicate, reorder: fractions of the frames, 0 to 1.
            reorder_ms: how much later a reordered frame leaves; at first 1.
            seed: of what is random.
        """
        given = {
            "delay_us": _scaled(delay_ms, 1000),
            "rate_kbit": _scaled(rate_mbit, 1000),
            "limit": limit,
            "loss_ppm": _scaled(loss, _MILLION),
            "duplicate_ppm": _scaled(duplicate, _MILLION),
            "reorder_ppm": _scaled(reorder, _MILLION),
            "reorder_us": _scaled(reorder_ms, 1000),
            "seed": seed,
        }
        for key, value in given.items():
            if value is not None:
                self._do(f"set {direction} {key} {value}")

    def drop(self, count: int, direction: Direction) -> None:
        """Lose the next ``count`` frames. Raises LabError."""
        self._do(f"set {direction} drop_next {count}")

    def stats(self, direction: Literal["ab", "ba"]) -> Mapping[str, int]:
        """Frames ``received``, ``sent``, ``lost`` (on purpose), ``overflowed``, ``doubled``,
        ``reordered``, ``failed``, ``queued`` now, ``bytes`` sent, and ``lateness_ns``, the sum
        of how much later than due frames left. Raises LabError."""
        words = self._ask(f"stats {direction}").split()
        return {name: int(number) for name, number in zip(words[::2], words[1::2], strict=True)}

    def _do(self, line: str) -> None:
        self._expect("ok", self._ask(line))

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        return self._answer()

    def _expect(self, wanted: str, answer: str) -> None:
        if answer != wanted:
            raise LabError(f"the delay element says {answer!r}")

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], _ANSWER_SECONDS)[0]:
            raise LabError(f"the delay element says nothing for {_ANSWER_SECONDS} s")
        return self._process.stdout.readline().rstrip("\n")


def _scaled(value: float | None, factor: int) -> int | None:
    return None if value is None else round(value * factor)


def _wire_sized(host: Host, interface: str) -> None:
    off = [word for what in ("tx", "tso", "gso", "gro") for word in (what, "off")]
    host.run("ethtool", "-K", interface, *off)


def _program() -> Path:
    """The compiled element, built if this source has not been yet. Raises LabError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sessiond-lab"
    program = cache / f"delay-{hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]}"
    if not program.exists():
        cache.mkdir(parents=True, exist_ok=True)
        fresh = cache / f".delay-{os.getpid()}"
        built = subprocess.run(
            ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(fresh), str(_SOURCE)],
            capture_output=True,
            text=True,
        )
        if built.returncode:
            raise LabError(f"gcc does not build {_SOURCE.name}:\n{built.stderr}")
        fresh.rename(program)
    return program
