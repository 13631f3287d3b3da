"""Shapes: in use frozen dataclasses, on the wire maps."""

from __future__ import annotations

import pickle
from typing import Annotated, Any, ClassVar, Literal

import pytest

from libhsock import shape
from libhsock.errors import ProtocolError
from libhsock.shape import Shape, ShapeError


class Point(Shape):
    kind: ClassVar[str] = "point"
    x: int
    y: int = 0


class Everything(Shape, kw_only=True):
    text: str | None = None
    ratio: float
    short: Annotated[str, range(1, 4)] = "abc"
    way: Literal[0, 4, 6] = 0
    points: tuple[Point, ...] = ()
    pair: tuple[str, int] | None = None
    counts: dict[str, float] | None = None


def test_fields_are_given_by_position_by_name_or_by_default() -> None:
    assert (Point(1).x, Point(1).y) == (1, 0)
    assert Point(1, 2) == Point(y=2, x=1) == Point(1, y=2)
    assert Point(1, 2) != Point(1, 3)
    assert Point(1).kind == "point"
    assert repr(Point(1, 2)) == "Point(x=1, y=2)"
    assert list(Point(y=2, x=1).to_map()) == ["x", "y"]


@pytest.mark.parametrize(
    ("values", "named"),
    [((), {}), ((), {"y": 1}), ((1, 2, 3), {}), ((1,), {"x": 1}), ((1,), {"z": 1})],
)
def test_a_field_missing_unknown_or_given_twice_is_a_type_error(
    values: tuple[int, ...], named: dict[str, int]
) -> None:
    with pytest.raises(TypeError, match="Point has the fields x, y"):
        Point(*values, **named)


def test_values_are_frozen_can_be_keys_and_travel_to_other_processes() -> None:
    point = Point(1, 2)
    with pytest.raises(AttributeError, match="frozen"):
        point.x = 3  # type: ignore[misc]
    with pytest.raises(AttributeError, match="frozen"):
        del point.x
    assert {point: "here"}[Point(1, 2)] == "here"
    assert pickle.loads(pickle.dumps(point)) == point
    assert shape.replace(point, y=5) == Point(1, 5)
    assert point == Point(1, 2)
    with pytest.raises(TypeError):
        shape.replace(point, z=5)


def test_a_shape_of_another_class_is_not_equal() -> None:
    class Other(Shape):
        x: int
        y: int = 0

    assert Point(1, 2) != Other(1, 2)


def test_maps_and_back() -> None:
    told = Everything(
        ratio=1, points=(Point(1), Point(2, 3)), pair=("a", 1), counts={"n": 1, "m": 0.5}
    )
    there = told.to_map()
    assert there["points"] == [{"x": 1, "y": 0}, {"x": 2, "y": 3}]
    assert there["pair"] == ["a", 1]
    assert Everything.from_map(there) == told
    assert Everything.from_map({"ratio": 0.5}) == Everything(ratio=0.5)
    assert Everything.from_map({"ratio": 0.5, "newer": [{}]}) == Everything(ratio=0.5)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({}, "field 'ratio' is missing"),
        ({"ratio": None}, "ratio: nil instead of float"),
        ({"ratio": True}, "ratio: bool instead of float"),
        ({"ratio": 1, "text": 1}, "text: int instead of str"),
        ({"ratio": 1, "short": ""}, r"short: 0 is not in 1\.\.3"),
        ({"ratio": 1, "way": 5}, "way: not one of 0, 4, 6"),
        ({"ratio": 1, "way": False}, "way: not one of 0, 4, 6"),
        ({"ratio": 1, "points": {}}, "points: dict instead of an array"),
        ({"ratio": 1, "points": [{"y": 1}]}, "points: field 'x' is missing"),
        ({"ratio": 1, "points": [{"x": 1.0}]}, "points: x: float instead of int"),
        ({"ratio": 1, "pair": ["a"]}, "pair: 1 elements instead of 2"),
        ({"ratio": 1, "counts": {"n": "1"}}, "counts: str instead of float"),
        ([], "list instead of a map"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(told: Any, why: str) -> None:
    with pytest.raises(ShapeError, match=why):
        shape.read(Everything, told, strict=True)
    with pytest.raises(ProtocolError, match=f"a malformed everything: {why}"):
        Everything.from_map(told)


def test_what_was_asked_beyond_the_fields_is_refused() -> None:
    with pytest.raises(ShapeError, match="unknown field 'newer'"):
        shape.read(Everything, {"ratio": 1, "newer": 1}, strict=True)
