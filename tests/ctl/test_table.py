"""Columns and quantities, by values."""

from __future__ import annotations

import pytest

from sessiond.ctl.table import columns, duration, fields, milliseconds, number


def test_columns_are_as_wide_as_their_widest_cell_and_never_empty() -> None:
    rows = [("a", "1", "end"), ("longer than its title", "1000", "")]
    assert columns(("NAME", ">COUNT", "REST"), rows) == (
        "NAME                   COUNT  REST\n"
        "a                          1  end\n"
        "longer than its title   1000  -\n"
    )


def test_a_table_without_rows_is_its_titles() -> None:
    assert columns(("NAME", ">COUNT"), []) == "NAME  COUNT\n"


def test_a_brace_in_a_cell_is_a_brace() -> None:
    assert columns(("NAME",), [("{0}",)]) == "NAME\n{0}\n"


def test_fields_are_aligned() -> None:
    assert fields([("state", "plain"), ("local", "")]) == "state  plain\nlocal  -\n"
    assert fields([]) == ""


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-3, "0s"),
        (59.9, "59s"),
        (60, "1m00s"),
        (187, "3m07s"),
        (7500, "2h05m"),
        (86399, "23h59m"),
        (4 * 86400 + 3 * 3600, "4d03h"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0.0, "0.00ms"), (0.424, "0.42ms"), (1.94, "1.9ms"), (250.4, "250ms")],
)
def test_milliseconds(value: float | None, shown: str) -> None:
    assert milliseconds(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (1200, "1200"), (10.0, "10"), (0.125, "0.125"), (1 / 3, "0.333")]
)
def test_numbers(value: float, shown: str) -> None:
    assert number(value) == shown
