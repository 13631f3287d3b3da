"""Cookies: good for their source and their time, and for nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessiond.seal.cookie import NO_COOKIE, SECRET_SECONDS, Cookies, Source

from . import calm
from .hosts import SOURCE, flipped

times = st.lists(st.floats(0, 300, allow_nan=False), max_size=6)


@calm
@given(start=st.floats(0, 1e6), before=times, after=times)
def test_a_cookie_lives_for_at_least_one_secret_and_at_most_two(
    start: float, before: list[float], after: list[float]
) -> None:
    now = start
    cookies = Cookies(now)
    for step in before:
        now += step
        cookies.make(SOURCE, now)
    cookie, baked = cookies.make(SOURCE, now), now
    for step in after:
        now += step
        good = cookies.accepts(cookie, SOURCE, now)
        assert good or now - baked >= SECRET_SECONDS
        assert not good or now - baked <= 2 * SECRET_SECONDS


@pytest.mark.parametrize(
    "other",
    [
        ("192.0.2.1", 2007),
        ("192.0.2.2", 2006),
        ("::ffff:192.0.2.1", 2006),
        ("2001:db8::1", 2006),
    ],
    ids=str,
)
def test_a_cookie_is_of_no_use_to_another_source(other: Source) -> None:
    cookies = Cookies(0.0)
    cookie = cookies.make(SOURCE, 0.0)
    assert cookies.accepts(cookie, SOURCE, 0.0)
    assert not cookies.accepts(cookie, other, 0.0)
    assert cookies.make(other, 0.0) != cookie


def test_other_bytes_are_no_cookie() -> None:
    cookies = Cookies(0.0)
    cookie = cookies.make(SOURCE, 0.0)
    assert not any(cookies.accepts(wrong, SOURCE, 0.0) for _, wrong in flipped(cookie))
    assert not any(cookies.accepts(cookie[:size], SOURCE, 0.0) for size in range(len(cookie)))
    assert not cookies.accepts(NO_COOKIE, SOURCE, 0.0)


def test_each_daemon_has_its_own_secrets() -> None:
    assert not Cookies(0.0).accepts(Cookies(0.0).make(SOURCE, 0.0), SOURCE, 0.0)
