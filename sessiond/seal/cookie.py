"""Cookies: proof that whoever asks for a handshake receives what is sent to its source.

A cookie is made from the source and a secret and kept nowhere, so that a flood from forged sources
costs this host neither memory nor a key agreement (RFC 7296 section 2.6; WireGuard's whitepaper,
section 5.4.7).
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from hashlib import blake2s
from ipaddress import ip_address

from sessiond.seal.datagram import COOKIE_BYTES

SECRET_SECONDS = 120.0
"""A cookie is good for at least this, and at most twice as long."""
NO_COOKIE = bytes(COOKIE_BYTES)

Source = tuple[str, int]
"""Address, canonical, and port."""


class Cookies:
    """Makes cookies and knows its own again.

    Args:
        now: seconds, of any clock that does not jump.
        draw: gives that many random bytes.
    """

    def __init__(self, now: float, draw: Callable[[int], bytes] = secrets.token_bytes) -> None:
        self._draw = draw
        self._since = now
        self._secret, self._previous = draw(32), draw(32)

    def make(self, source: Source, now: float) -> bytes:
        """The cookie of a source."""
        self._rotate(now)
        return _cookie(self._secret, source)

    def accepts(self, cookie: bytes, source: Source, now: float) -> bool:
        """Whether it was made for that source and not long ago."""
        self._rotate(now)
        return any(
            hmac.compare_digest(cookie, _cookie(secret, source))
            for secret in (self._secret, self._previous)
        )

    def _rotate(self, now: float) -> None:
        age = now - self._since
        if age >= 2 * SECRET_SECONDS:
            self._since = now
            self._secret, self._previous = self._draw(32), self._draw(32)
        elif age >= SECRET_SECONDS:
            self._since += SECRET_SECONDS
            self._secret, self._previous = self._draw(32), self._secret


def _cookie(secret: bytes, source: Source) -> bytes:
    address, port = source
    data = ip_address(address).packed + port.to_bytes(2, "big")
    return blake2s(data, key=secret, digest_size=COOKIE_BYTES).digest()
