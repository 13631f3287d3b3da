"""The benchmark measures what it says: short runs of the contenders that need no sessiond."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.bench.stream import Bulk, Log, Ticks
from tests.bench.track import Case, Track
from tests.support.lab import Lab, missing

RTT_MS = 20.0


@pytest.fixture(scope="module")
def track() -> Iterator[Track]:
    if why_not := missing():
        pytest.skip(why_not)
    with Lab() as lab:
        yield Track(lab, RTT_MS, ["reconnect"])


@pytest.mark.parametrize("kind", ["ticks", "bulk"])
@pytest.mark.parametrize(
    ("contender", "download", "round_trips"),
    [("reconnect", True, 2), ("reconnect-tfo", True, 1), ("reconnect", False, 1)],
)
def test_reconnecting_costs_its_round_trips(
    track: Track, contender: str, kind: str, download: bool, round_trips: int
) -> None:
    gap = track.run(Case(RTT_MS, kind, download, "loss"), contender)
    assert gap.recovered
    assert gap.ms >= round_trips * RTT_MS - 1
    assert gap.received > 100


def test_multipath_tcp_recovers_sooner_with_a_helper(track: Track) -> None:
    case = Case(RTT_MS, "ticks", True, "loss")
    alone, helped = track.run(case, "mptcp"), track.run(case, "mptcp-helper")
    assert helped.recovered
    assert helped.ms < alone.ms


@pytest.mark.parametrize("source", [Ticks(), Bulk()])
def test_every_byte_is_a_function_of_its_offset(source: Ticks | Bulk) -> None:
    whole = source.expected(0, 4000)
    assert b"".join(source.expected(begin, 40) for begin in range(0, 4000, 40)) == whole
    assert source.expected(13, 100) == whole[13:113]


def test_a_log_refuses_a_stream_with_a_hole() -> None:
    log = Log(Ticks(), 0.1)
    log.add(log.source.expected(0, 32))
    with pytest.raises(ValueError, match="broken"):
        log.add(log.source.expected(48, 16))


def test_the_longest_gap_is_counted_from_the_last_receipt_before_the_event() -> None:
    now = time.monotonic()
    log = Log(Ticks(), 10, times=[now - 0.9, now - 0.5, now - 0.3, now], event=now - 0.4)
    gap = log.gap()
    assert gap.recovered
    assert gap.ms == pytest.approx(300, abs=1)


def test_a_stream_that_stays_away_is_not_recovered() -> None:
    now = time.monotonic()
    gap = Log(Ticks(), 0.1, times=[now - 1], event=now - 0.9).gap()
    assert not gap.recovered
    assert gap.ms >= 1000
