"""A public key as people read, compare and pin it: all of it, in thirteen groups of four.

A hash would be no shorter to compare in full; so the key is its own fingerprint.
"""

from __future__ import annotations

from base64 import b32decode, b32encode

from sessiond.seal.noise import KEY_BYTES

_GROUP = 4


def fingerprint(public: bytes) -> str:
    """``"mfrg-gzdf-…"``: base32 (RFC 4648 section 6) in small letters."""
    text = _letters(public).lower()
    return "-".join(text[at : at + _GROUP] for at in range(0, len(text), _GROUP))


def parse(text: str) -> bytes:
    """The public key of a fingerprint, however it is grouped and whatever the case.

    Raises:
        ValueError: it is none.
    """
    letters = text.replace("-", "").replace(" ", "").upper()
    try:
        public = b32decode(letters + "=" * (-len(letters) % 8))
    except ValueError:
        public = b""
    # The last letter has spare bits: a typing error there is found, too.
    if len(public) != KEY_BYTES or _letters(public) != letters:
        raise ValueError(f"{text[:80]!r} is no fingerprint: 13 groups of four of a-z and 2-7")
    return public


def _letters(public: bytes) -> str:
    return b32encode(public).decode().rstrip("=")
