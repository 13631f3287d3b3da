"""Whether a key may be that of the peer we meant.

A peer is meant by the *name* an application dialled, a DNS name or an address. One that came to us
has no such name: laptops change their addresses, and an address its laptop, so nothing but a pin is
held against an address it comes from. What a stranger can do is bounded elsewhere: only sessions of
its own association, only connections whose both initial sequence numbers it knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from ipaddress import IPv6Address, ip_address
from typing import NamedTuple

from sessiond.seal.fingerprint import fingerprint


class Level(StrEnum):
    """What is asked of a key that no pin speaks about."""

    PINNED = "pinned"
    """It is refused, unless its peer came to us and it is pinned under any name."""
    FIRST_USE = "first-use"
    """It is remembered with the name; another one under the same name is refused."""
    ANYONE = "anyone"
    """Nothing: protects against who only listens."""


class Outcome(StrEnum):
    """What becomes of the peer."""

    ACCEPTED = "accepted"
    NEW = "new"
    CHANGED = "changed"
    REFUSED = "refused"


class Verdict(NamedTuple):
    """The outcome, and one line that says why and what to do."""

    outcome: Outcome
    line: str

    @property
    def trusted(self) -> bool:
        """Whether to go on; a NEW key must be remembered then."""
        return self.outcome in (Outcome.ACCEPTED, Outcome.NEW)


def canonical(name: str) -> str:
    """A DNS name or address in the one form it is pinned and remembered in.

    Raises:
        ValueError: it is neither.
    """
    try:
        address = ip_address(name)
    except ValueError:
        text = name.removesuffix(".").lower()
        legal = _DNS_NAME.fullmatch(text)
    else:
        mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
        text = str(mapped or address)
        legal = _ADDRESS.fullmatch(text)
    if not legal:
        raise ValueError(f"{name[:80]!r} is neither a DNS name nor an address")
    return text


class Trust:
    """Judges keys; changes nothing.

    Args:
        level: for keys without a pin.
        pins: public keys by name, from the configuration.
        known: public keys by canonical name, as remembered; read at each verdict.
    """

    def __init__(
        self, level: Level, pins: Mapping[str, Iterable[bytes]], known: Mapping[str, bytes]
    ) -> None:
        self._level = level
        self._pins = {canonical(name): frozenset(keys) for name, keys in pins.items()}
        self._known = known

    def judge(self, key: bytes, name: str | None, address: str) -> Verdict:
        """Say whether a peer with this key may be what it should be.

        A pin of the name decides, else a pin of the address, else the level.

        Args:
            key: the peer's public key, proven by the handshake.
            name: as dialled; None: the peer came to us.
            address: where it is.

        Raises:
            ValueError: the name is none (``canonical``).
        """
        for pinned in (name, address):
            if pinned is not None and canonical(pinned) in self._pins:
                return self._by_pin(key, canonical(pinned))
        who = canonical(name or address)
        if self._level is Level.ANYONE:
            return Verdict(Outcome.ACCEPTED, f"{who}: accepted, as anyone is")
        if self._level is Level.PINNED:
            return self._by_any_pin(key, who, came=name is None)
        if name is None:
            return Verdict(Outcome.ACCEPTED, f"{who}: accepted, it came to us")
        return self._by_memory(key, who)

    def _by_pin(self, key: bytes, who: str) -> Verdict:
        if key in self._pins[who]:
            return Verdict(Outcome.ACCEPTED, f"{who}: has its pinned key")
        return Verdict(
            Outcome.REFUSED,
            f"{who}: refused, its key {fingerprint(key)} is not the one pinned: somebody is in "
            f"between, or the host has a new key, which must then be pinned in the configuration",
        )

    def _by_any_pin(self, key: bytes, who: str, *, came: bool) -> Verdict:
        if came and any(key in keys for keys in self._pins.values()):
            return Verdict(Outcome.ACCEPTED, f"{who}: has a pinned key")
        return Verdict(
            Outcome.REFUSED,
            f"{who}: refused, its key {fingerprint(key)} is not pinned and only pinned keys are "
            f"accepted; if it is the right one: sessionctl peers pin {who} {fingerprint(key)}",
        )

    def _by_memory(self, key: bytes, who: str) -> Verdict:
        known = self._known.get(who)
        if known is None:
            return Verdict(Outcome.NEW, f"{who}: met for the first time, key {fingerprint(key)}")
        if known == key:
            return Verdict(Outcome.ACCEPTED, f"{who}: has the key it had before")
        return Verdict(
            Outcome.CHANGED,
            f"{who}: refused, its key is {fingerprint(key)} and was {fingerprint(known)}: somebody "
            f"is in between, or the host has a new key; if it has: sessionctl peers forget {who}",
        )


_DNS_NAME = re.compile(r"(?=.{1,253}$)\w[\w-]{0,62}(\.[\w-]{1,63})*")
"""Letters of any alphabet: names may be internationalised; nothing that could break a line."""
_ADDRESS = re.compile(r"[\w.:]+(%[\w.-]+)?")
"""``ip_address`` takes anything for a zone."""
