"""Random moves of sessions by real daemons under bulk traffic in both directions.

``make test`` makes a few dozen; the full number, or another seed:

    python -m tests.netns.test_moves_daemons --moves 1000 --seed 7

What fails prints its seed; the same seed makes the same decisions, though not the same timing.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable

import pytest

from tests.netns.moves_daemons import world
from tests.support.lab import missing
from tests.support.topology import Topology

SEED = int(os.environ.get("SEED", 0)) or random.randrange(1, 2**31)


def requested(seed: int, moves: int) -> Counter[str]:
    """Users of either host move sessions about while nothing changes."""
    with world(seed) as here:
        before = timeouts(here.net)
        for _ in range(moves):
            here.request()
        here.done["timeouts"] = timeouts(here.net) - before
        assert not (wrong := here.finish()), wrong
        return here.done


def lost(seed: int, moves: int) -> Counter[str]:
    """Both hosts lose and get addresses, and one frame in a hundred does not arrive."""
    delayed = ("wifi", "lan0")
    with world(seed, delayed) as here:
        for number, element in enumerate(here.net.delays.values()):
            element.set(loss=0.01, seed=seed + number)
        while here.moves < moves:
            here.event()
        for element in here.net.delays.values():
            here.done["frames lost"] += sum(element.stats(way)["lost"] for way in ("ab", "ba"))
            element.set(loss=0)
        here.done["timeouts"] = timeouts(here.net)
        assert not (wrong := here.finish()), wrong
        return here.done


def timeouts(net: Topology) -> int:
    """Retransmission timeouts of both hosts; counted, not judged, see test_random_moves.py."""
    return sum(host.counters()["TCPTimeouts"] for host in (net.client, net.server))


RUNS: dict[str, Callable[[int, int], Counter[str]]] = {"by request": requested, "by loss": lost}
SHORT = 60


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", RUNS)
def test_random_moves(name: str) -> None:
    if why_not := missing():
        pytest.skip(why_not)
    print(f"seed {SEED}")
    print(dict(RUNS[name](SEED, SHORT)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moves", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", choices=RUNS, help="one of the runs")
    arguments = parser.parse_args()
    failed = False
    for name, run in RUNS.items():
        if arguments.only not in (None, name):
            continue
        start = time.monotonic()
        try:
            what = str(dict(run(arguments.seed, arguments.moves)))
        except AssertionError as error:
            failed, what = True, f"FAILED: {error}"
        took = time.monotonic() - start
        print(f"seed {arguments.seed}, {name}, {took:.0f} s: {what}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
