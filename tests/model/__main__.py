"""``make check-model``: Spin looks through every order of events of each run (docs/model.md).

``python -m tests.model NAME`` shows the shortest counterexample of one run, in words.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.model.trail import in_words

MODEL = Path(__file__).with_name("handover.pml")
MEGABYTES = 7000
SECONDS = 900
DEPTH = 400_000
COMPILE = ("gcc", "-O1", "-DSAFETY", "-DNOREDUCE", f"-DMEMLIM={MEGABYTES}")

PROPOSED = (
    *("OWN_RESULTS", "NEW_ORIGIN", "SHIELDED_RETREAT"),
    *("TOMBSTONE_AT_ORIGIN", "SHIELD_NOTED", "LEFT_BEFORE"),
)
SMALL, WIDE = ("ADDR1=1", "WRITES=0"), ("ADDR1=3", "WRITES=0")
ONE_FAILURE = (
    *("RST_IS_ERROR", "REQUESTS", "ADDRESSES", "FAILS", "ONE_FAILURE"),
    *("FUEL=3", "TICKS=1", *WIDE),
)


class Run(NamedTuple):
    """One exhaustive search."""

    name: str
    holds: bool
    """False: it must find a counterexample."""
    defines: tuple[str, ...]


def but(left_out: str) -> tuple[str, ...]:
    """All that is proposed but one: so that no other finding hides this one."""
    return tuple(name for name in PROPOSED if name != left_out)


HELD = (
    Run("clean", True, ("RST_IS_ERROR", "REQUESTS", "FUEL=2", "TICKS=0", "ADDR1=3")),
    Run("clean-early-timers", True, ("RST_IS_ERROR", "REQUESTS", "FUEL=2", "TICKS=2", *WIDE)),
    Run("twice", True, ("RST_IS_ERROR", "REQUESTS", "DUP", "FUEL=2", "TICKS=0", "ADDR1=1")),
    Run("loss", True, ("RST_IS_ERROR", "REQUESTS", "LOSS", "FUEL=1", "TICKS=1", "ADDR1=1")),
    Run("addresses", True, ("ADDRESSES", "FUEL=2", "TICKS=1", "ADDR1=1")),
    Run("addresses-both", True, ("ADDRESSES", "LOSS", "FUEL=3", "TICKS=1", *WIDE)),
    Run("steps-fail", True, ("REQUESTS", "ADDRESSES", "FAILS", "FUEL=2", "TICKS=0", *SMALL)),
    Run("crash", True, ("CRASH", "REQUESTS", "ADDRESSES", "LOSS", "FUEL=2", "TICKS=1", *SMALL)),
)
"""What the code does now."""

FOUND = (
    Run("retreat", False, ("RST_IS_ERROR", "ADDRESSES", "FUEL=2", "TICKS=1", *SMALL)),
    Run(
        "retreat-request", False, ("RST_IS_ERROR", "REQUESTS", "LOSS", "FUEL=1", "TICKS=3", *SMALL)
    ),
    Run("results", False, ("REQUESTS", "FAILS", "FUEL=3", "TICKS=0", *SMALL)),
    Run(
        "settle-fails", False, ("REQUESTS", "FAILS", "SETTLE_FAILS", "FUEL=2", "TICKS=0", "ADDR1=1")
    ),
    Run("detach", False, ("REQUESTS", "DETACH", "FUEL=2", "TICKS=0", *SMALL)),
    Run("close", False, ("REQUESTS", "LOSS", "CLOSE_COUNTS", "FUEL=1", "TICKS=4", "ADDR1=1")),
    Run(
        "origin",
        False,
        ("RST_IS_ERROR", "ADDRESSES", "FUEL=3", "TICKS=2", *WIDE, *but("NEW_ORIGIN")),
    ),
    Run(
        "tombstone",
        False,
        ("RST_IS_ERROR", "ADDRESSES", "FUEL=3", "TICKS=2", *WIDE, *but("TOMBSTONE_AT_ORIGIN")),
    ),
    Run(
        "forgotten-shield",
        False,
        ("REQUESTS", "FAILS", "FUEL=3", "TICKS=1", *SMALL, *but("SHIELD_NOTED")),
    ),
    Run("follow-fails", False, (*ONE_FAILURE, *but("LEFT_BEFORE"))),
    Run(
        "two-failures",
        False,
        ("RST_IS_ERROR", "REQUESTS", "FAILS", "FUEL=3", "TICKS=1", *WIDE, *PROPOSED),
    ),
    Run("overtaking", False, ("RST_IS_ERROR", "REQUESTS", "OVERTAKING", "FUEL=1", "ADDR1=1")),
)
"""What is wrong with it: docs/model.md tells each."""

WOULD_HOLD = (
    Run("proposed-clean", True, (*HELD[0].defines, "GAP", *PROPOSED)),
    Run(
        "proposed-requests",
        True,
        (
            "RST_IS_ERROR",
            "REQUESTS",
            "LOSS",
            "DUP",
            "BREAKS",
            "FUEL=2",
            "TICKS=2",
            *WIDE,
            *PROPOSED,
        ),
    ),
    Run(
        "proposed-addresses",
        True,
        ("RST_IS_ERROR", "ADDRESSES", "LOSS", "FUEL=3", "TICKS=2", *WIDE, *PROPOSED),
    ),
    Run(
        "proposed-bytes",
        True,
        ("RST_IS_ERROR", "ADDRESSES", "LOSS", "FUEL=2", "TICKS=1", "ADDR1=1", *PROPOSED),
    ),
    Run(
        "proposed-all",
        True,
        (
            *("RST_IS_ERROR", "ADDRESSES", "REQUESTS", "BREAKS", "LOSS", "DUP"),
            *("FUEL=3", "TICKS=2", *SMALL, *PROPOSED),
        ),
    ),
    Run("proposed-fails", True, (*ONE_FAILURE, *PROPOSED)),
)
"""The same with what is proposed."""

MUTATIONS = (
    Run("mutation-shield", False, (*HELD[0].defines, "GAP", *PROPOSED, "NO_SHIELD")),
    Run("mutation-settled", False, (*HELD[0].defines, "NO_SETTLED")),
    Run("mutation-generations", False, (*HELD[0].defines, "EQUAL_GENERATIONS")),
    Run(
        "mutation-tombstone", False, ("RST_IS_ERROR", "ADDRESSES", "FUEL=3", *WIDE, "NO_TOMBSTONE")
    ),
)
"""Broken on purpose."""

RUNS = (*HELD, *FOUND, *WOULD_HOLD, *MUTATIONS)


class Outcome(NamedTuple):
    """What Spin says of a run."""

    errors: int
    complete: bool
    states: int
    megabytes: float
    seconds: float


def search(run: Run, place: Path, *how: str) -> Outcome:
    """Let Spin look through everything.

    Args:
        place: an empty directory; a trail is left there.
        how: how pan.c is to be compiled, beyond what is always said.
    """
    options = [f"-D{name}" for name in run.defines]
    _call(place, "spin", "-a", *options, str(MODEL))
    _call(place, *COMPILE, *how, "-o", "pan", "pan.c")
    start = time.monotonic()
    said = _call(place, "./pan", f"-m{DEPTH}")
    seconds = time.monotonic() - start
    complete = "Search not completed" not in said and "max search depth too small" not in said
    return Outcome(
        int(_number(r"errors: (\d+)", said)),
        complete,
        int(_number(r"([\d.e+]+) states, stored", said)),
        _number(r"([\d.]+)\s+total actual memory", said),
        seconds,
    )


def show(run: Run, place: Path) -> None:
    """Print the shortest counterexample: a breadth-first search, which needs more memory."""
    search(run, place, "-DBFS")
    trail = place / f"{MODEL.name}.trail"
    if not trail.exists():
        print(f"{run.name}: there is none")
        return
    options = [f"-D{name}" for name in run.defines]
    print(*in_words(_call(place, "spin", "-T", "-k", str(trail), *options, str(MODEL))), sep="\n")


def main(names: Sequence[str]) -> int:
    missing = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]
    if missing:
        print(f"missing {' and '.join(missing)}: sudo apt-get install {' '.join(missing)}")
        return 1
    chosen = [run for run in RUNS if run.name in names]
    if len(chosen) != len(names):
        print(f"the runs are: {' '.join(run.name for run in RUNS)}")
        return 1
    for run in chosen:
        with tempfile.TemporaryDirectory() as place:
            show(run, Path(place))
    if chosen:
        return 0
    surprises = 0
    print(f"{'run':22} {'states':>10} {'MB':>6} {'s':>6}")
    for run in RUNS:
        with tempfile.TemporaryDirectory() as place:
            found = search(run, Path(place), "-DCOLLAPSE")
        expected = (found.errors == 0 and found.complete) if run.holds else found.errors > 0
        surprises += not expected
        verdict = "counterexample" if found.errors else "holds" if found.complete else "cut short"
        if not expected:
            verdict += f"; unexpected: python -m tests.model {run.name}"
        figures = f"{found.states:10} {found.megabytes:6.0f} {found.seconds:6.1f}"
        print(f"{run.name:22} {figures} {verdict}", flush=True)
    return 1 if surprises else 0


def _call(place: Path, *command: str) -> str:
    done = subprocess.run(
        command, cwd=place, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    said = done.stdout + done.stderr
    if done.returncode and "errors:" not in said:
        raise RuntimeError(f"{command[0]} failed: {said}")
    return said


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"Spin did not say {pattern!r}: {text}")
    return float(found[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
