"""The keys of peers this host knows: pinned by configuration or by request, or met before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from sessiond import config
from sessiond.seal import fingerprint
from sessiond.seal.known_peers import KnownPeers
from sessiond.seal.trust import Level, Trust, Verdict, canonical

PINNED = "pinned_peers"
"""The file of pins made by request."""


class Known(NamedTuple):
    """A key and why it is accepted."""

    name: str
    key: bytes
    source: str
    """``"configuration"``, ``"pinned"`` or ``"first-use"``; the first of them decides."""


class Keyring:
    """Judges keys and remembers them. Writing is done in a thread: a disk must not delay a move.

    Args:
        trust: the configuration's part.
        state_directory: holds the rest.
        changed: called with each name that must be judged anew.

    Raises:
        PrivateFileError: a file can't be used.
    """

    def __init__(
        self, trust: config.Peers, state_directory: Path, changed: Callable[[str], None]
    ) -> None:
        self._level = Level(trust.trust)
        self._configured: dict[str, set[bytes]] = {}
        for pin in trust.pin:
            keys = self._configured.setdefault(canonical(pin.name), set())
            keys.add(fingerprint.parse(pin.key))
        self._pinned = KnownPeers(state_directory, PINNED)
        self._met = KnownPeers(state_directory)
        self._changed = changed
        self._writing = asyncio.Lock()
        self._trust = self._judge()

    def judge(self, key: bytes, name: str | None, address: str) -> Verdict:
        """As ``Trust.judge``."""
        return self._trust.judge(key, name, address)

    def known(self, name: str | None = None) -> Iterator[Known]:
        """The keys of all peers, or of the one with this name.

        Raises:
            ValueError: it is neither a DNS name nor an address.
        """
        only = None if name is None else canonical(name)
        found = [
            *(Known(n, k, "configuration") for n, ks in self._configured.items() for k in ks),
            *(Known(n, k, "pinned") for n, k in self._pinned.items()),
            *(Known(n, k, "first-use") for n, k in self._met.items()),
        ]
        return (one for one in sorted(found) if only in (None, one.name))

    async def remember(self, name: str, key: bytes) -> None:
        """Keep the key of a peer met for the first time.

        Raises:
            PrivateFileError: it can't be written.
        """
        async with self._writing:
            await asyncio.to_thread(self._met.remember, name, key)

    async def pin(self, name: str, key: bytes) -> None:
        """From now on only this key is this peer's, besides those of the configuration.

        Raises:
            ValueError: the name is neither a DNS name nor an address.
            PrivateFileError: it can't be written.
        """
        async with self._writing:
            await asyncio.to_thread(self._pinned.remember, name, key)
        self._judge_anew(canonical(name))

    async def forget(self, name: str) -> bool:
        """Drop what was pinned by request or met; False: there was nothing.

        Raises:
            ValueError: the name is neither a DNS name nor an address.
            PrivateFileError: it can't be written.
        """
        async with self._writing:
            dropped = [
                await asyncio.to_thread(file.forget, name) for file in (self._pinned, self._met)
            ]
        self._judge_anew(canonical(name))
        return any(dropped)

    def configured(self, name: str) -> bool:
        """Whether the configuration pins it."""
        return canonical(name) in self._configured

    def _judge_anew(self, name: str) -> None:
        self._trust = self._judge()
        self._changed(name)

    def _judge(self) -> Trust:
        pins = {name: set(keys) for name, keys in self._configured.items()}
        for name, key in self._pinned.items():
            pins.setdefault(name, set()).add(key)
        return Trust(self._level, pins, self._met)
