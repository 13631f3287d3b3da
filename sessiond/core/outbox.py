"""Collects what one event asks of the world, so that a thousand sessions make one batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sessiond.core import messages as m
from sessiond.core.effects import Effect, Run, Send, Step
from sessiond.core.tuples import Endpoint

_Entries = dict[tuple[Any, ...], list[Any]]
_Way = tuple[Endpoint, str, bytes | str]


class Outbox:
    """Filled by the transitions of one event, read once."""

    def __init__(self) -> None:
        self._messages: dict[_Way, list[m.Message]] = {}
        self._entries: dict[_Way, _Entries] = {}
        self._steps: dict[str, list[Step]] = {}
        self._others: list[Effect] = []

    def message(self, to: Endpoint, via: str, peer: bytes | str, message: m.Message) -> None:
        """Send a message that stands for itself; ``peer`` as in ``effects.Send``."""
        self._messages.setdefault((to, via, peer), []).append(message)

    def entry(
        self, to: Endpoint, via: str, peer: bytes, kind: Any, entry: Any, *common: Any
    ) -> None:
        """Send one session's entry of a batched message ``kind(*common, entries)``."""
        batch = self._entries.setdefault((to, via, peer), {})
        batch.setdefault((kind, *common), []).append(entry)

    def step(self, name: str, step: Step) -> None:
        """Have the engine take one step with one session."""
        self._steps.setdefault(name, []).append(step)

    def effect(self, effect: Effect) -> None:
        """Anything that is not batched."""
        self._others.append(effect)

    def effects(self) -> list[Effect]:
        """All of it, messages first: the peer can work while this host does."""
        effects: list[Effect] = list(self._sends())
        effects += [Run(name, batch) for name, batch in self._steps.items()]
        return effects + self._others

    def _sends(self) -> Iterator[Send]:
        for key in self._messages.keys() | self._entries.keys():
            messages = self._messages.get(key, [])
            for (kind, *common), entries in self._entries.get(key, {}).items():
                for start in range(0, len(entries), m.ENTRIES_PER_MESSAGE):
                    part = tuple(entries[start : start + m.ENTRIES_PER_MESSAGE])
                    messages.append(kind(*common, part))
            yield Send(*key, messages)
