"""How long a stream stands still when the address under it goes: the contenders, one after another.

The element in the server's cable makes the round trip; both of the client's uplinks share it. One
run opens a connection from "wifi", lets the stream flow, deletes wifi's address (or, for a move by
request, asks for one), and takes the longest time between two receipts from then on. Contenders
alternate within each round of runs, so that what else this machine does meets all of them alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.bench.stream import Gap
from tests.bench.track import Case, Track
from tests.support.lab import Lab
from tests.support.worker import WorkerError

CONTENDERS = ("sessiond", "reconnect", "reconnect-tfo", "mptcp", "mptcp-helper")
STREAMS = (("ticks", True), ("ticks", False), ("bulk", True), ("bulk", False))
ROUND_TRIPS_MS = (0.0, 20.0, 100.0)


@dataclass
class Result:
    """A contender's runs of one case."""

    case: Case
    contender: str
    gaps: list[Gap] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Runs that ended in an error instead."""

    @property
    def median_ms(self) -> float:
        """NaN: there was no run without an error."""
        return statistics.median(gap.ms for gap in self.gaps) if self.gaps else float("nan")

    @property
    def failed(self) -> int:
        """Runs in which the stream did not come back."""
        return len(self.errors) + sum(not gap.recovered for gap in self.gaps)

    def to_map(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.case._asdict(),
            "contender": self.contender,
            "median_ms": self.median_ms,
            "gaps_ms": [gap.ms for gap in self.gaps],
            "failed": self.failed,
            "errors": self.errors,
        }


def measure(
    runs: int,
    round_trips_ms: Sequence[float] = ROUND_TRIPS_MS,
    contenders: Sequence[str] = CONTENDERS,
    streams: Sequence[tuple[str, bool]] = STREAMS,
) -> Iterator[list[Result]]:
    """All cases at all round trips, the results of one after another: of the loss of the address,
    and, where sessiond contends, of its move by request.

    Args:
        runs: of each contender in each case.
        round_trips_ms: added by the element.
    """
    for rtt_ms in round_trips_ms:
        with Lab() as lab:
            track = Track(lab, rtt_ms, contenders)
            for kind, download in streams:
                loss = Case(rtt_ms, kind, download, "loss")
                yield _alternate(track, loss, contenders, runs)
                if "sessiond" in contenders:
                    yield _alternate(track, loss._replace(move="request"), ["sessiond"], runs)


def _alternate(track: Track, case: Case, contenders: Sequence[str], runs: int) -> list[Result]:
    results = [Result(case, contender) for contender in contenders]
    for number in range(runs):
        first = number % len(results)
        for result in results[first:] + results[:first]:
            try:
                result.gaps.append(track.run(case, result.contender))
            except WorkerError as error:
                result.errors.append(str(error))
    return results
