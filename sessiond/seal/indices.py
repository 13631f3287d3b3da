"""Which handshake or association an index of this host belongs to."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Generic, TypeVar

INDEX_BITS = 32
Owner = TypeVar("Owner")


class Indices(Generic[Owner]):
    """Indices in use, each of one owner.

    Args:
        draw: gives 32 random bits: a stranger must not guess which indices are in use.
    """

    def __init__(self, draw: Callable[[], int] = lambda: secrets.randbits(INDEX_BITS)) -> None:
        self._draw = draw
        self._owners: dict[int, Owner] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def allocate(self, owner: Owner) -> int:
        """An index nobody has."""
        while (index := self._draw()) in self._owners:
            pass
        self._owners[index] = owner
        return index

    def assign(self, index: int, owner: Owner) -> None:
        """Hand an index in use over to another owner."""
        assert index in self._owners, "only an index in use has an owner"
        self._owners[index] = owner

    def owner(self, index: int) -> Owner | None:
        """Whose it is, or None."""
        return self._owners.get(index)

    def free(self, index: int) -> None:
        """Nobody's from now on."""
        del self._owners[index]
