"""msgpack maps to frozen dataclasses and back, checked against the class's own annotations.

Known annotations: ``int``, ``float`` (an int will do), ``str``, ``bool``, ``X | None``,
``Literal``, ``tuple[X, ...]``, ``tuple[X, Y]``, ``dict[str, X]``, another dataclass, and
``Annotated[X, range(...)]``, which bounds an int's value or a text's length in characters.
A field without default must be there. The checks of a class are compiled at its first use.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Checker = Callable[[Any], Any]
D = TypeVar("D")

_COMPILED: dict[type[Any], tuple[dict[str, Checker], frozenset[str]]] = {}


class ShapeError(ValueError):
    """A value that is not what the protocol says; the message says where and what."""


def read(cls: type[D], value: object, *, strict: bool) -> D:
    """A ``cls`` from a map.

    ``strict`` refuses fields that ``cls`` doesn't have (a request: the caller meant something we
    would not do); otherwise they are ignored (a reply from a newer daemon).
    Raises ShapeError.
    """
    if not isinstance(value, dict):
        raise ShapeError(f"{_what(value)} instead of a map")
    fields, required = _compiled(cls)
    if strict and not value.keys() <= fields.keys():
        raise ShapeError(f"unknown field {sorted(value.keys() - fields.keys())[0]!r}")
    found = {}
    for name, check in fields.items():
        if name in value:
            try:
                found[name] = check(value[name])
            except ShapeError as error:
                raise ShapeError(f"{name}: {error}") from None
        elif name in required:
            raise ShapeError(f"field {name!r} is missing")
    return cls(**found)


def write(value: Any) -> Any:
    """The inverse of ``read``: dataclasses to maps, tuples to arrays, in depth."""
    if dataclasses.is_dataclass(value):
        return {f.name: write(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [write(item) for item in value]
    if isinstance(value, Mapping):
        return {key: write(item) for key, item in value.items()}
    return value


def _compiled(cls: type[Any]) -> tuple[dict[str, Checker], frozenset[str]]:
    if cls not in _COMPILED:
        _COMPILED[cls] = _compile(cls)
    return _COMPILED[cls]


def _compile(cls: type[Any]) -> tuple[dict[str, Checker], frozenset[str]]:
    hints = get_type_hints(cls, include_extras=True)
    fields = [f for f in dataclasses.fields(cls) if f.init]
    required = frozenset(
        f.name
        for f in fields
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    return {f.name: _checker(hints[f.name]) for f in fields}, required


def _checker(hint: Any) -> Checker:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _bounded(_checker(args[0]), args[1])
    if origin is Literal:
        return functools.partial(_one_of, args)
    if origin in (types.UnionType, Union):
        inner = _checker(next(a for a in args if a is not types.NoneType))
        return lambda value: None if value is None else inner(value)
    if origin is tuple:
        return _array([_checker(a) for a in args if a is not ...], endless=args[-1] is ...)
    if origin is dict:
        return _mapping(_checker(args[1]))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return functools.partial(read, hint, strict=False)
    return functools.partial(_exactly, hint)


def _exactly(kind: type, value: object) -> object:
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return value
    raise ShapeError(f"{_what(value)} instead of {kind.__name__}")


def _one_of(allowed: tuple[object, ...], value: object) -> object:
    if any(value == one and type(value) is type(one) for one in allowed):
        return value
    raise ShapeError(f"not one of {', '.join(map(str, allowed))}")


def _bounded(inner: Checker, bounds: range) -> Checker:
    def check(value: Any) -> Any:
        found = inner(value)
        size = len(found) if isinstance(found, (str, tuple)) else found
        if size not in bounds:
            raise ShapeError(f"{size} is not in {bounds.start}..{bounds.stop - 1}")
        return found

    return check


def _array(inner: list[Checker], *, endless: bool) -> Checker:
    def check(value: object) -> object:
        if not isinstance(value, list):
            raise ShapeError(f"{_what(value)} instead of an array")
        if endless:
            return tuple(inner[0](item) for item in value)
        if len(value) != len(inner):
            raise ShapeError(f"{len(value)} elements instead of {len(inner)}")
        return tuple(one(item) for one, item in zip(inner, value, strict=True))

    return check


def _mapping(inner: Checker) -> Checker:
    def check(value: object) -> object:
        if not isinstance(value, dict):
            raise ShapeError(f"{_what(value)} instead of a map")
        return {key: inner(item) for key, item in value.items()}

    return check


def _what(value: object) -> str:
    return "nil" if value is None else type(value).__name__
