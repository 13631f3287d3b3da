"""Indices: one owner each, and random ones."""

from __future__ import annotations

import pytest

from sessiond.seal.indices import Indices


def test_an_index_in_use_is_not_given_again() -> None:
    draws = iter([5, 5, 5, 6, 5])
    indices = Indices[str](lambda: next(draws))
    assert indices.allocate("first") == 5
    assert indices.allocate("second") == 6
    indices.free(5)
    assert indices.allocate("third") == 5
    assert [indices.owner(index) for index in (5, 6, 7)] == ["third", "second", None]
    assert len(indices) == 2


def test_an_index_can_be_handed_over() -> None:
    indices = Indices[str]()
    index = indices.allocate("handshake")
    indices.assign(index, "association")
    assert indices.owner(index) == "association"
    indices.free(index)
    with pytest.raises(AssertionError):
        indices.assign(index, "too late")


def test_indices_have_32_bits_and_no_order() -> None:
    indices = Indices[None]()
    drawn = [indices.allocate(None) for _ in range(200)]
    assert all(0 <= index < 2**32 for index in drawn)
    assert drawn != sorted(drawn)
    assert max(drawn) >= 2**31
