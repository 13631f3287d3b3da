"""The benchmark's tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from tests.bench.gap import Result

_REFERENCE = "sessiond"


def gap_tables(results: Iterable[Result]) -> Iterator[str]:
    """Lines: one table for each case, the contenders with their medians and ratios to sessiond."""
    for case, group in groupby(results, key=lambda result: result.case):
        found = list(group)
        reference = next((one.median_ms for one in found if one.contender == _REFERENCE), None)
        direction = "download" if case.download else "upload"
        yield f"{case.kind} {direction}, {_MOVES[case.move]}, round trip + {case.rtt_ms:g} ms"
        yield f"  {'':14} {'median':>8} {'least':>8} {'most':>8}  ms  {'ratio':>6}  runs"
        for result in found:
            yield "  " + _row(result, reference)
        yield ""


_MOVES = {"loss": "the address is lost", "request": "moved by request (make before break)"}


def _row(result: Result, reference: float | None) -> str:
    if not result.gaps:
        return f"{result.contender:14} no run succeeded: {result.errors[-1].splitlines()[-1]}"
    gaps = [gap.ms for gap in result.gaps]
    ratio = f"{result.median_ms / reference:6.1f}" if reference else "     -"
    note = f", {result.failed} not recovered" if result.failed else ""
    return (
        f"{result.contender:14} {result.median_ms:8.1f} {min(gaps):8.1f} {max(gaps):8.1f}      "
        f"{ratio}  {len(gaps)}{note}"
    )
