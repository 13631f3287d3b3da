"""``python -m tests.bench [gap|batch|all] [--runs N]``: what docs/benchmarks.md shows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from tests.bench import batch, gap, report
from tests.support.lab import missing


@click.command()
@click.argument("what", type=click.Choice(["gap", "batch", "all"]), default="all")
@click.option("--runs", default=30, show_default=True, help="Of each contender in each case.")
@click.option("--rtt", "round_trips", multiple=True, type=float, help="Added, ms.  [0, 20, 100]")
@click.option("--only", multiple=True, type=click.Choice(gap.CONTENDERS), help="These contenders.")
@click.option("--stream", "kinds", multiple=True, type=click.Choice(["ticks", "bulk"]))
@click.option("--sessions", default=10_000, show_default=True, help="Of the batch.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write all numbers there.")
def main(
    what: str,
    runs: int,
    round_trips: tuple[float, ...],
    only: tuple[str, ...],
    kinds: tuple[str, ...],
    sessions: int,
    file: Path | None,
) -> None:
    """Measure the gaps of a handover beside its alternatives."""
    if why_not := missing():
        sys.exit(f"the benchmark can't run here: {why_not}")
    found: dict[str, Any] = {}
    if what in ("gap", "all"):
        streams = [one for one in gap.STREAMS if not kinds or one[0] in kinds]
        found["gap"] = []
        for results in gap.measure(
            runs, round_trips or gap.ROUND_TRIPS_MS, only or gap.CONTENDERS, streams
        ):
            print(*report.gap_table(results), sep="\n", flush=True)
            found["gap"] += [result.to_map() for result in results]
    if what in ("batch", "all"):
        moved = batch.measure(sessions)
        print(*report.batch_table(moved), sep="\n")
        found["batch"] = moved.to_map()
    if file:
        file.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
