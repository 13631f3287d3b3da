"""The benchmark's tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.bench.batch import Batch
from tests.bench.gap import Result

_REFERENCE = "sessiond"


def gap_table(results: Sequence[Result]) -> Iterator[str]:
    """Lines: the contenders in one case, with their medians and ratios to sessiond."""
    case = results[0].case
    reference = next((one.median_ms for one in results if one.contender == _REFERENCE), None)
    direction = "download" if case.download else "upload"
    yield f"{case.kind} {direction}, {_MOVES[case.move]}, round trip + {case.rtt_ms:g} ms"
    yield f"  {'':14} {'median':>8} {'least':>8} {'most':>8}  ms  {'ratio':>6}  runs"
    for result in results:
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


def batch_table(found: Batch) -> Iterator[str]:
    """Lines."""
    yield f"{found.sessions} idle sessions between two programs, one address lost"
    rows = [
        ("opened, one after another", f"{found.opened_s:.1f} s"),
        ("all moved, both ends", f"{found.moved_s:.2f} s"),
        ("then a byte to and fro on each", f"{found.echoed_s:.2f} s"),
        ("memory a session, client", f"{found.bytes_per_session[0]:.0f} bytes"),
        ("memory a session, server", f"{found.bytes_per_session[1]:.0f} bytes"),
        ("after the move, client", f"{found.bytes_per_session_after[0]:.0f} bytes"),
        ("after the move, server", f"{found.bytes_per_session_after[1]:.0f} bytes"),
        ("processor time in 10 idle s", _seconds(found.idle_cpu_s)),
        ("processor time of the move", _seconds(found.move_cpu_s)),
        (f"sessionctl list ({found.listed} lines)", f"{found.list_s * 1000:.0f} ms"),
    ]
    for name, value in rows:
        yield f"  {name:38} {value}"


def _seconds(both: tuple[float, float]) -> str:
    return f"{both[0]:.2f} s client, {both[1]:.2f} s server"
