"""Datagrams: sizes, and whatever is none of them."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessiond.seal.datagram import (
    OVERHEAD,
    SIZES,
    VERSION,
    Reason,
    Refused,
    Type,
    expect,
    header,
    parse,
)

from . import calm


def reason(datagram: bytes) -> Reason:
    with pytest.raises(Refused) as caught:
        parse(datagram)
    return caught.value.reason


def test_no_answer_is_longer_than_its_question() -> None:
    for question, answer in [
        (Type.INITIATION, SIZES[Type.RESPONSE]),
        (Type.INITIATION, SIZES[Type.COOKIE]),
        (Type.RESPONSE, SIZES[Type.CONFIRMATION]),
        (Type.COOKIE, SIZES[Type.INITIATION] // 3),
        (Type.CONFIRMATION, OVERHEAD),
    ]:
        assert answer <= SIZES[question]


@calm
@given(datagram=st.binary(max_size=200))
def test_parsing_ends_in_parts_or_a_reason(datagram: bytes) -> None:
    with suppress(Refused):
        type_, index, body = parse(datagram)
        assert header(type_, index) + body == datagram


@pytest.mark.parametrize("type_", list(SIZES))
def test_a_type_of_one_size_has_that_size(type_: Type) -> None:
    for size in range(8, 200):
        datagram = header(type_, 1).ljust(size, b"\0")
        if size == SIZES[type_]:
            assert parse(datagram) == (type_, 1, bytes(size - 8))
        else:
            assert reason(datagram) is Reason.MALFORMED


def test_a_sealed_datagram_has_at_least_its_overhead() -> None:
    assert reason(header(Type.SEALED, 1).ljust(OVERHEAD - 1, b"\0")) is Reason.MALFORMED
    assert parse(header(Type.SEALED, 1).ljust(OVERHEAD, b"\0"))[0] is Type.SEALED


@pytest.mark.parametrize("number", [0, 6, 0x94, 255])
def test_an_unknown_type_is_refused(number: int) -> None:
    assert reason(bytes((number, VERSION, 0, 0)) + bytes(120)) is Reason.MALFORMED


@pytest.mark.parametrize("version", [0, VERSION + 1, 255])
def test_another_version_is_refused_with_that_reason(version: int) -> None:
    assert reason(bytes((1, version, 0, 0)) + bytes(120)) is Reason.VERSION


def test_another_type_than_expected_is_refused() -> None:
    with pytest.raises(Refused, match="SEALED where COOKIE is due"):
        expect(Type.COOKIE, header(Type.SEALED, 1) + bytes(100))
