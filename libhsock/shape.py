"""msgpack maps to typed values and back, checked against the class's own annotations.

Known annotations: ``int``, ``float`` (an int will do), ``str``, ``bool``, ``X | None``,
``Literal``, ``tuple[X, ...]``, ``tuple[X, Y]``, ``dict[str, X]``, another Shape, and
``Annotated[X, range(...)]``, which bounds an int's value or a text's length in characters.
A field without default must be there. The checks of a class are compiled at its first use.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    NoReturn,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from libhsock.errors import ProtocolError

Checker = Callable[[Any], Any]
S = TypeVar("S", bound="Shape")

_NOTHING: Any = object()


class ShapeError(ValueError):
    """A value that is not what the protocol says; the message says where and what."""


@dataclass_transform(frozen_default=True)
class Shape:
    """A value that travels as a map; the annotations of its class are the fields.

    In use a frozen dataclass. ``dataclass`` compiles six methods for each class, and for the two
    dozen of the protocol that is a tenth of the time in which sessionctl has to answer.
    """

    _fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, *, kw_only: bool = False, **more: Any) -> None:
        """``kw_only``, for type checkers: fields without default may follow others."""
        super().__init_subclass__(**more)
        own: dict[str, str] = cls.__annotations__
        cls._fields = tuple(name for name, hint in own.items() if not hint.startswith("ClassVar["))

    def __init__(self, *values: Any, **named: Any) -> None:
        given = dict(zip(self._fields, values, strict=False)) | named
        found = {name: given.get(name, _default(type(self), name)) for name in self._fields}
        known = given.keys() <= found.keys() and len(given) == len(values) + len(named)
        if not known or _NOTHING in found.values():
            raise TypeError(f"{type(self).__name__} has the fields {', '.join(self._fields)}")
        self.__dict__.update(found)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        told = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({told})"

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen")

    @classmethod
    def from_map(cls: type[S], value: object) -> S:
        """Read leniently. Raises ProtocolError."""
        try:
            return read(cls, value, strict=False)
        except ShapeError as error:
            raise ProtocolError(f"a malformed {cls.__name__.lower()}: {error}") from None

    def to_map(self) -> dict[str, Any]:
        """The map that ``from_map`` reads."""
        return {name: write(value) for name, value in vars(self).items()}


def replace(shape: S, **changes: Any) -> S:
    """A copy with other values in some fields."""
    return type(shape)(**vars(shape) | changes)


def read(cls: type[S], value: object, *, strict: bool) -> S:
    """A ``cls`` from a map.

    ``strict`` refuses fields that ``cls`` doesn't have (a request: the caller meant something we
    would not do); otherwise they are ignored (a reply from a newer daemon).
    Raises ShapeError.
    """
    if not isinstance(value, dict):
        raise ShapeError(f"{_what(value)} instead of a map")
    if strict and not value.keys() <= set(cls._fields):
        raise ShapeError(f"unknown field {sorted(value.keys() - set(cls._fields))[0]!r}")
    found = {}
    for name, exact, check, default in _compiled(cls):
        item = value.get(name, default)
        if type(item) not in exact and (item is not default or item is _NOTHING):
            if item is _NOTHING:
                raise ShapeError(f"field {name!r} is missing")
            try:
                item = check(item)
            except ShapeError as error:
                raise ShapeError(f"{name}: {error}") from None
        found[name] = item
    made = object.__new__(cls)
    made.__dict__.update(found)
    return made


def write(value: Any) -> Any:
    """Shapes to maps, tuples to arrays, in depth."""
    if isinstance(value, Shape):
        return value.to_map()
    if isinstance(value, (tuple, list)):
        return [write(item) for item in value]
    if isinstance(value, Mapping):
        return {key: write(item) for key, item in value.items()}
    return value


class _Field(NamedTuple):
    name: str
    exact: tuple[type, ...]
    """Of a value of one of these types nothing more has to be checked."""
    check: Checker
    default: Any


def _compiled(cls: type[Shape]) -> list[_Field]:
    if cls not in _COMPILED:
        hints = get_type_hints(cls, include_extras=True)
        _COMPILED[cls] = [
            _Field(name, _exact(hints[name]), _checker(hints[name]), _default(cls, name))
            for name in cls._fields
        ]
    return _COMPILED[cls]


_COMPILED: dict[type[Shape], list[_Field]] = {}


def _default(cls: type[Shape], name: str) -> Any:
    return getattr(cls, name, _NOTHING)


def _exact(hint: Any) -> tuple[type, ...]:
    if get_origin(hint) in (types.UnionType, Union):
        return tuple(kind for one in get_args(hint) for kind in _exact(one))
    if hint is float:
        return float, int
    return (hint,) if hint in (int, str, bool, types.NoneType) else ()


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
    if isinstance(hint, type) and issubclass(hint, Shape):
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
