"""Sealed datagrams under the keys of an association, after WireGuard (whitepaper, section 5.4.6).

Keys change without a datagram being lost: three keypairs live side by side.

    next      the initiator's new one, until a datagram sealed under it proves the peer has it too
    current   seals; the responder's new one is current at once, for the confirmation proves it
    previous  still opens what was on its way

Unlike WireGuard's, a counter belongs to the association and not to a keypair: it goes on when the
keys change. So one window knows all replays, and one comparison says which datagram is the newest,
whatever keys sealed it. Counters start anew only with the peer's daemon, and with it the transport.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from sessiond.seal.datagram import Reason, Refused, Type, expect, sealed_body, sealed_header
from sessiond.seal.indices import Indices
from sessiond.seal.noise import MAX_NONCE, CipherState, NoiseError
from sessiond.seal.replay_window import ReplayWindow

REKEY_AFTER_SECONDS = 3600.0
"""As SSH (RFC 4253 section 9); WireGuard's 120 s would wake idle hosts 30 times as often."""
REKEY_SLACK_SECONDS = 60.0
"""The responder waits this much longer, so that the two do not start at once."""
REJECT_AFTER_SECONDS = 2 * REKEY_AFTER_SECONDS
"""An hour to reach the peer before its association needs a handshake again."""
REKEY_AFTER_MESSAGES = 2**32
REJECT_AFTER_MESSAGES = 2**36
"""Far below what ChaCha20-Poly1305 allows (RFC 9001 section 6.6)."""


class NoKeys(Exception):
    """Nothing can be sealed before a handshake: no keys, or they are too old or used up."""


@dataclass(slots=True, eq=False)
class Keypair:
    """What one handshake has given: a key for each direction, and how both ends name them."""

    initiator: bool
    """Whether this host began the handshake."""
    send: CipherState
    receive: CipherState
    local_index: int
    remote_index: int
    born: float
    """When this host had it, in seconds of any clock that does not jump."""
    sent: int = 0

    def expired(self, now: float) -> bool:
        """Whether it may neither seal nor open any more."""
        return now - self.born >= REJECT_AFTER_SECONDS


class Opened(NamedTuple):
    """What an authentic datagram said."""

    payload: bytes
    newest: bool
    """The peer sent none later of those that came: only its source may become the endpoint."""
    counter: int
    """Of the datagram; rises with each that the peer seals."""


class Transport:
    """Seals and opens the datagrams between this daemon and one instance of a peer's.

    Args:
        indices: of this host; those of keypairs taken in are given to the transport and freed.
        counter: of the first datagram.
    """

    def __init__(self, indices: Indices[Any], counter: int = 0) -> None:
        self._indices = indices
        self._counter = counter
        self._window = ReplayWindow()
        self._next: Keypair | None = None
        self._current: Keypair | None = None
        self._previous: Keypair | None = None

    @property
    def confirmed(self) -> bool:
        """Whether the peer is known to have the newest keys: it need not be told again."""
        return self._next is None and self._current is not None

    @property
    def rekey_at(self) -> float:
        """From when on a handshake is due; ``-inf``: now."""
        keypair = self._current or self._next
        if keypair is None or keypair.sent >= REKEY_AFTER_MESSAGES:
            return float("-inf")
        slack = 0 if keypair.initiator else REKEY_SLACK_SECONDS
        return keypair.born + REKEY_AFTER_SECONDS + slack

    @property
    def expires_at(self) -> float:
        """When the first of the keypairs must be forgotten (``expire``); ``inf``: there is none."""
        return min(
            (keypair.born + REJECT_AFTER_SECONDS for keypair in self._keypairs()),
            default=float("inf"),
        )

    def install(self, keypair: Keypair) -> None:
        """Take in what a handshake has given."""
        self._indices.assign(keypair.local_index, self)
        if keypair.initiator:
            self._drop(self._next)
            self._next = keypair
        else:
            self._become_current(keypair)

    def seal(self, payload: bytes, now: float) -> bytes:
        """A datagram for the peer; an empty payload says only that this host has the keys.

        Raises:
            NoKeys: begin a handshake.
        """
        keypair = self._sealing(now)
        header = sealed_header(keypair.remote_index, self._counter)
        keypair.send.set_nonce(self._counter)
        ciphertext = keypair.send.encrypt_with_ad(_bound(keypair.initiator, header), payload)
        self._counter += 1
        keypair.sent += 1
        return header + ciphertext

    def open(self, datagram: bytes, now: float) -> Opened:
        """Read a datagram of the peer.

        Raises:
            Refused: MALFORMED, VERSION, UNKNOWN, EXPIRED, REPLAYED or FORGED.
        """
        index, body = expect(Type.SEALED, datagram)
        counter, ciphertext = sealed_body(body)
        keypair = next((own for own in self._keypairs() if own.local_index == index), None)
        if keypair is None:
            raise Refused(Reason.UNKNOWN, f"no keys have index {index}")
        if keypair.expired(now):
            raise Refused(Reason.EXPIRED, f"the keys are {now - keypair.born:.0f} s old")
        if counter >= MAX_NONCE:
            raise Refused(Reason.MALFORMED, "a counter nobody can have used")
        if not self._window.fresh(counter):
            raise Refused(Reason.REPLAYED, f"counter {counter}")
        header = datagram[: len(datagram) - len(ciphertext)]
        keypair.receive.set_nonce(counter)
        try:
            payload = keypair.receive.decrypt_with_ad(
                _bound(not keypair.initiator, header), ciphertext
            )
        except NoiseError as error:
            raise Refused(Reason.FORGED, str(error)) from error
        newest = counter > self._window.newest
        self._window.mark(counter)
        if keypair is self._next:
            self._next = None
            self._become_current(keypair)
        return Opened(payload, newest, counter)

    def expire(self, now: float) -> None:
        """Forget keys that are too old; what was recorded can't be read with them any more."""
        self._next = self._kept(self._next, now)
        self._current = self._kept(self._current, now)
        self._previous = self._kept(self._previous, now)

    def close(self) -> None:
        """Forget all keys."""
        for keypair in self._keypairs():
            self._drop(keypair)
        self._next = self._current = self._previous = None

    def _keypairs(self) -> Iterator[Keypair]:
        return (own for own in (self._current, self._previous, self._next) if own is not None)

    def _sealing(self, now: float) -> Keypair:
        """The current one; at first contact the next, since there is nothing to lose."""
        for keypair in (self._current, self._next):
            if (
                keypair is not None
                and not keypair.expired(now)
                and keypair.sent < REJECT_AFTER_MESSAGES
                and self._counter < MAX_NONCE
            ):
                return keypair
        raise NoKeys("no keys that may still seal: a handshake with the peer is due")

    def _become_current(self, keypair: Keypair) -> None:
        self._drop(self._previous)
        self._previous, self._current = self._current, keypair

    def _kept(self, keypair: Keypair | None, now: float) -> Keypair | None:
        if keypair is None or not keypair.expired(now):
            return keypair
        self._drop(keypair)
        return None

    def _drop(self, keypair: Keypair | None) -> None:
        if keypair is not None:
            self._indices.free(keypair.local_index)


def _bound(from_initiator: bool, header: bytes) -> bytes:
    """The associated data: 1 from the handshake's initiator, else 0; then all that is in clear."""
    return bytes((from_initiator,)) + header
