"""Fingerprints: the key itself, for people."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessiond.seal.fingerprint import fingerprint, parse

from . import calm

keys = st.binary(min_size=32, max_size=32)


@calm
@given(key=keys)
def test_it_is_the_whole_key_in_groups(key: bytes) -> None:
    assert re.fullmatch(r"([a-z2-7]{4}-){12}[a-z2-7]{4}", fingerprint(key))
    assert parse(fingerprint(key)) == key


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (bytes(32), "-".join(["aaaa"] * 13)),
        (b"\xff" * 32, "-".join([*["7777"] * 12, "777q"])),
        (bytes(range(32)), "aaaq-eaye-auda-ocaj-bifq-ydio-b4ib-ceqt-cqkr-mfyy-denb-wha5-dypq"),
    ],
)
def test_known_keys_are_written_as_ever(key: bytes, text: str) -> None:
    assert fingerprint(key) == text


def test_grouping_and_case_do_not_matter() -> None:
    text = fingerprint(bytes(range(32)))
    for other in (text.upper(), text.replace("-", ""), text.replace("-", " ")):
        assert parse(other) == bytes(range(32))


@calm
@given(
    key=keys, place=st.integers(0, 51), letter=st.sampled_from("abcdefghijklmnopqrstuvwxyz234567")
)
def test_another_letter_is_another_key_or_none(key: bytes, place: int, letter: str) -> None:
    text = fingerprint(key).replace("-", "")
    other = text[:place] + letter + text[place + 1 :]
    if other != text:
        try:
            assert parse(other) != key
        except ValueError:
            assert place == 51


@pytest.mark.parametrize(
    "text",
    [
        "",
        "aaaa",
        "-".join(["aaaa"] * 12),
        "-".join(["aaaa"] * 14),
        "-".join([*["aaaa"] * 12, "aaab"]),
        "-".join([*["aaaa"] * 12, "aaa1"]),
        "-".join([*["aaaa"] * 12, "aaaä"]),
        "SHA256:" + "a" * 43,
    ],
)
def test_anything_else_is_no_fingerprint(text: str) -> None:
    with pytest.raises(ValueError, match="is no fingerprint: 13 groups"):
        parse(text)
