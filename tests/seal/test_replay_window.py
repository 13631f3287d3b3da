"""The window against a set that remembers everything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sessiond.seal.replay_window import WINDOW, ReplayWindow

from . import calm

edges = st.sampled_from([0, 1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW, 2**40])
steps = st.lists(st.one_of(st.integers(-5, 5), edges, edges.map(int.__neg__)), max_size=60)


@calm
@given(start=st.one_of(st.just(0), st.just(2**63)), steps=steps)
def test_it_agrees_with_a_set(start: int, steps: list[int]) -> None:
    window, seen, newest = ReplayWindow(), set[int](), -1
    for step in steps:
        counter = max(0, (start if newest < 0 else newest) + step)
        fresh = counter not in seen and counter > newest - WINDOW
        assert window.fresh(counter) is fresh
        if fresh:
            window.mark(counter)
            seen.add(counter)
            newest = max(newest, counter)
            assert window.newest == newest
            assert not window.fresh(counter)


@calm
@given(order=st.permutations(range(12)), spread=st.sampled_from([1, WINDOW // 12]))
def test_any_order_within_the_window_is_accepted_once(order: list[int], spread: int) -> None:
    window = ReplayWindow()
    for place in order:
        assert window.fresh(place * spread)
        window.mark(place * spread)
    assert not any(window.fresh(place * spread) for place in order)


def test_asking_marks_nothing() -> None:
    window = ReplayWindow()
    assert window.fresh(7)
    assert window.fresh(7)
    assert window.newest == -1


def test_it_does_not_grow() -> None:
    window = ReplayWindow()
    for counter in (0, WINDOW, 2**64 - 2):
        window.mark(counter)
        assert window._seen.bit_length() <= WINDOW
