"""The Noise Protocol Framework, revision 34, for one protocol: Noise_XX_25519_ChaChaPoly_BLAKE2s.

    -> e
    <- e, ee, s, es
    -> s, se

Classes, methods and one-letter names are those of the specification's section 5. Why XX:
docs/decisions/0007-noise.md. Python cannot promise that a dropped key leaves memory at once.
"""

from __future__ import annotations

import copy
import hmac
from collections.abc import Callable
from hashlib import blake2s

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

PROTOCOL_NAME = b"Noise_XX_25519_ChaChaPoly_BLAKE2s"
KEY_BYTES = 32
"""DHLEN, HASHLEN and the cipher's key, which are all the same here."""
TAG_BYTES = 16
MAX_MESSAGE = 65535
MAX_NONCE = 2**64 - 1
"""Reserved (section 5.1); a nonce is less."""

_XX = (("e",), ("e", "ee", "s", "es"), ("s", "se"))


class NoiseError(Exception):
    """What came is not what the other key's holder wrote for this place; nothing of it is used."""


class NonceExhausted(Exception):
    """The key has sealed all it may: a new handshake is needed."""


def public_key(private: X25519PrivateKey) -> bytes:
    """The 32 bytes that stand for a key pair on the wire and in files."""
    return private.public_key().public_bytes_raw()


class CipherState:
    """A key and the nonce of its next use (section 5.1).

    Args:
        key: 32 bytes; None: what should be sealed passes as it is.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._cipher = None if key is None else ChaCha20Poly1305(key)
        self._n = 0

    def set_nonce(self, nonce: int) -> None:
        """For datagrams, which are opened in any order; no nonce may seal twice."""
        self._n = nonce

    def encrypt_with_ad(self, ad: bytes, plaintext: bytes) -> bytes:
        """Seal, and bind to ``ad``.

        Raises:
            NonceExhausted: no nonce is left.
        """
        if self._cipher is None:
            return plaintext
        ciphertext = self._cipher.encrypt(self._nonce(), plaintext, ad)
        self._n += 1
        return ciphertext

    def decrypt_with_ad(self, ad: bytes, ciphertext: bytes) -> bytes:
        """Open; the nonce stays if that fails.

        Raises:
            NoiseError: not sealed under this key and nonce, or bound to something else.
            NonceExhausted: no nonce is left.
        """
        if self._cipher is None:
            return ciphertext
        try:
            plaintext = self._cipher.decrypt(self._nonce(), ciphertext, ad)
        except InvalidTag:
            raise NoiseError("the tag is wrong") from None
        self._n += 1
        return plaintext

    def _nonce(self) -> bytes:
        if self._n >= MAX_NONCE:
            raise NonceExhausted("the last nonce of the key is used")
        return bytes(4) + self._n.to_bytes(8, "little")


class SymmetricState:
    """The chaining key, the hash of all that was said, and the key they lead to (section 5.2)."""

    def __init__(self, prologue: bytes) -> None:
        self.h = self._ck = blake2s(PROTOCOL_NAME).digest()
        self._cipher = CipherState()
        self.mix_hash(prologue)

    def copy(self) -> SymmetricState:
        """Another one at this point of the handshake."""
        other = copy.copy(self)
        other._cipher = copy.copy(self._cipher)
        return other

    def mix_key(self, input_key_material: bytes) -> None:
        self._ck, key = _hkdf(self._ck, input_key_material)
        self._cipher = CipherState(key)

    def mix_hash(self, data: bytes) -> None:
        self.h = blake2s(self.h + data).digest()

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        ciphertext = self._cipher.encrypt_with_ad(self.h, plaintext)
        self.mix_hash(ciphertext)
        return ciphertext

    def decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        plaintext = self._cipher.decrypt_with_ad(self.h, ciphertext)
        self.mix_hash(ciphertext)
        return plaintext

    def split(self) -> tuple[CipherState, CipherState]:
        """The keys of the transport: the initiator's for sending, then the responder's."""
        first, second = _hkdf(self._ck, b"")
        return CipherState(first), CipherState(second)


class HandshakeState:
    """One side of one handshake (section 5.3).

    Args:
        initiator: whether this side writes the first message.
        s: this side's static key.
        prologue: what both sides must agree on beforehand.
        generate: makes the ephemeral key.
    """

    def __init__(
        self,
        initiator: bool,
        s: X25519PrivateKey,
        prologue: bytes,
        generate: Callable[[], X25519PrivateKey] = X25519PrivateKey.generate,
    ) -> None:
        self._initiator = initiator
        self._s = s
        self._generate = generate
        self._symmetric = SymmetricState(prologue)
        self._e: X25519PrivateKey | None = None
        self._re = b""
        self._rs = b""
        self._done = 0
        """Messages written and read."""

    def copy(self) -> HandshakeState:
        """Another one at this point, to read a message that may turn out to be the wrong one."""
        other = copy.copy(self)
        other._symmetric = self._symmetric.copy()
        return other

    @property
    def finished(self) -> bool:
        """Whether all three messages have passed."""
        return self._done == len(_XX)

    @property
    def remote_static(self) -> bytes:
        """The peer's public key; empty before the message that carries it."""
        return self._rs

    @property
    def handshake_hash(self) -> bytes:
        """Names the handshake: equal on both sides, and never twice (section 11.2)."""
        return self._symmetric.h

    def write_message(self, payload: bytes) -> bytes:
        """This side's next message.

        The payload of the first one is in clear, that of the second is for whoever sent the first.

        Raises:
            NoiseError: the peer's ephemeral key is of low order.
        """
        self._expect_turn(self._initiator)
        symmetric, message = self._symmetric, b""
        for token in _XX[self._done]:
            if token == "e":
                self._e = self._generate()
                e = public_key(self._e)
                symmetric.mix_hash(e)
                message += e
            elif token == "s":
                message += symmetric.encrypt_and_hash(public_key(self._s))
            else:
                symmetric.mix_key(self._dh(token))
        message += symmetric.encrypt_and_hash(payload)
        if len(message) > MAX_MESSAGE:
            raise ValueError(f"a Noise message has at most {MAX_MESSAGE} bytes")
        self._done += 1
        return message

    def read_message(self, message: bytes) -> bytes:
        """Read the peer's next message and return its payload.

        Raises:
            NoiseError: it is not that; the handshake is where it was and can read another.
        """
        self._expect_turn(not self._initiator)
        before = self._symmetric.copy(), self._re, self._rs
        try:
            payload = self._read(message)
        except NoiseError:
            self._symmetric, self._re, self._rs = before
            raise
        self._done += 1
        return payload

    def split(self) -> tuple[CipherState, CipherState]:
        """The keys of the transport: for sending, then for receiving."""
        if not self.finished:
            raise RuntimeError("split() before the handshake has finished")
        first, second = self._symmetric.split()
        return (first, second) if self._initiator else (second, first)

    def _read(self, message: bytes) -> bytes:
        symmetric = self._symmetric
        if len(message) > MAX_MESSAGE:
            raise NoiseError("the message is too long")
        for token in _XX[self._done]:
            if token == "e":
                self._re, message = _take(message, KEY_BYTES)
                symmetric.mix_hash(self._re)
            elif token == "s":
                sealed, message = _take(message, KEY_BYTES + TAG_BYTES)
                self._rs = symmetric.decrypt_and_hash(sealed)
            else:
                symmetric.mix_key(self._dh(token))
        return symmetric.decrypt_and_hash(message)

    def _dh(self, token: str) -> bytes:
        """The secret shared by the initiator's first-named key and the responder's second-named."""
        own, theirs = (token[0], token[1]) if self._initiator else (token[1], token[0])
        private = self._s if own == "s" else self._e
        assert private is not None, "the pattern has e before its first use"
        public = X25519PublicKey.from_public_bytes(self._rs if theirs == "s" else self._re)
        try:
            return private.exchange(public)
        except ValueError:
            # All zero (RFC 7748 section 6.1): the peer's key would not matter.
            raise NoiseError("the peer's public key is of low order") from None

    def _expect_turn(self, writers: bool) -> None:
        if self.finished or writers != (self._done % 2 == 0):
            raise RuntimeError("a handshake message out of turn")


def _take(message: bytes, size: int) -> tuple[bytes, bytes]:
    if len(message) < size:
        raise NoiseError("the message is too short")
    return message[:size], message[size:]


def _hkdf(chaining_key: bytes, input_key_material: bytes) -> tuple[bytes, bytes]:
    """HKDF of section 4.3 with two outputs."""
    temp_key = hmac.digest(chaining_key, input_key_material, "blake2s")
    first = hmac.digest(temp_key, b"\x01", "blake2s")
    return first, hmac.digest(temp_key, first + b"\x02", "blake2s")
