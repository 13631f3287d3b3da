"""From strangers to an association: three datagrams, and a cookie when many ask at once.

    initiator                                   responder
    INITIATION  e                   ─────────▶
                                    ◀─────────  COOKIE, if too many ask; INITIATION again, with it
                                    ◀─────────  RESPONSE  e, s, index and instance
    may this key be the peer's?
    CONFIRMATION  s, instance       ─────────▶  may this key be a peer's?
                                    ◀─────────  SEALED, empty

Each is repeated by its sender until the next one comes; the responder answers a repeated INITIATION
with the same RESPONSE. Nothing that is refused moves a handshake, and a response from a key that is
not trusted leaves the initiator waiting for the right one: a forger who listens can't end it.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from sessiond.seal.cookie import NO_COOKIE, Cookies, Source
from sessiond.seal.datagram import (
    COOKIE_BYTES,
    INDEX,
    SIZES,
    Reason,
    Refused,
    Type,
    expect,
    header,
)
from sessiond.seal.indices import Indices
from sessiond.seal.noise import KEY_BYTES, HandshakeState, NoiseError, public_key
from sessiond.seal.transport import Keypair

HANDSHAKE_SECONDS = 5.0
"""How long a responder waits for the confirmation, as WireGuard's REKEY_TIMEOUT."""
COOKIES_FROM = 16
"""Handshakes in this time whose sources have shown no cookie; from then on all must show one."""
MAX_HANDSHAKES = 256
"""In this time with sources that have; about 0.3 ms of a processor each."""
MAX_PER_PREFIX = 8
"""Of them with one IPv4 address or one IPv6 /64; counted only with a cookie, so that nobody can use
up what is another's by forging its address."""

_PROLOGUE = b"sessiond peer protocol\0"


class Peer(NamedTuple):
    """Who is at the other end: proven for the responder, and for the initiator once read."""

    static: bytes
    """Its public key; whether it may be the peer's is for ``trust`` to say."""
    instance: bytes
    """Of its daemon: another one than before means that it has started anew."""


class Accepted(NamedTuple):
    """A responder's finished handshake."""

    peer: Peer
    keypair: Keypair
    """For a transport, which then frees its index; who refuses the peer frees it."""


@dataclass(frozen=True, slots=True)
class Host:
    """This host, to its peers.

    Args:
        static: its key.
        instance: 16 random bytes, chosen when the daemon starts.
        indices: all of the host's.
        generate: makes ephemeral keys.
    """

    static: X25519PrivateKey
    instance: bytes
    indices: Indices[Any]
    generate: Callable[[], X25519PrivateKey] = X25519PrivateKey.generate

    def noise(self, initiator: bool, initiation_header: bytes) -> HandshakeState:
        """A handshake bound to protocol, version and the initiator's index."""
        prologue = _PROLOGUE + initiation_header
        return HandshakeState(initiator, self.static, prologue, self.generate)

    def not_ourselves(self, static: bytes) -> None:
        """Refuse a peer with this host's key: a reflection, or a copied key file."""
        if static == public_key(self.static):
            raise Refused(Reason.OURSELVES, "the peer has this host's own key")


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """What an initiator has read: somebody with this key has answered."""

    peer: Peer
    remote_index: int
    noise: HandshakeState


class Initiator:
    """One handshake that this host begins."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.index = host.indices.allocate(self)
        """Answers carry it; freed by ``close`` or, after ``confirm``, with the keypair."""
        self._header = header(Type.INITIATION, self.index)
        self._noise = host.noise(True, self._header)
        self._e = self._noise.write_message(b"")
        self._cookie = NO_COOKIE
        self._confirmed = False

    def initiation(self) -> bytes:
        """The datagram to send, and to repeat, until a response has come."""
        datagram = self._header + self._e + self._cookie
        return datagram.ljust(SIZES[Type.INITIATION], b"\0")

    def cookie(self, datagram: bytes) -> None:
        """Take the cookie to the next ``initiation``, which is due at once.

        Raises:
            Refused: MALFORMED, VERSION, UNKNOWN; or FORGED: not by a reader of the initiation.
        """
        body = self._addressed(Type.COOKIE, datagram)
        if not hmac.compare_digest(body[:KEY_BYTES], self._e):
            raise Refused(Reason.FORGED, "a cookie for another initiation")
        self._cookie = body[KEY_BYTES:]

    def response(self, datagram: bytes) -> Response:
        """Learn who answers; nothing has told it yet who asks.

        Raises:
            Refused: MALFORMED, VERSION, UNKNOWN, FORGED, OURSELVES; REPLAYED: one is confirmed.
        """
        body = self._addressed(Type.RESPONSE, datagram)
        if self._confirmed:
            raise Refused(Reason.REPLAYED, "a response after the confirmation")
        noise = self._noise.copy()
        payload = _read(noise, body)
        (remote_index,) = INDEX.unpack_from(payload)
        peer = Peer(noise.remote_static, payload[INDEX.size :])
        self._host.not_ourselves(peer.static)
        return Response(peer, remote_index, noise)

    def confirm(self, response: Response, now: float) -> tuple[bytes, Keypair]:
        """Tell a peer whose key is trusted who asks; once.

        Returns:
            The datagram, to repeat until something sealed comes, and the keys.
        """
        if self._confirmed:
            raise RuntimeError("a handshake is confirmed once")
        self._confirmed = True
        message = response.noise.write_message(self._host.instance)
        send, receive = response.noise.split()
        keypair = Keypair(True, send, receive, self.index, response.remote_index, now)
        return header(Type.CONFIRMATION, response.remote_index) + message, keypair

    def close(self) -> None:
        """Give up before ``confirm``."""
        self._host.indices.free(self.index)

    def _addressed(self, type_: Type, datagram: bytes) -> bytes:
        index, body = expect(type_, datagram)
        if index != self.index:
            raise Refused(Reason.UNKNOWN, f"no handshake of index {index}")
        return body


@dataclass(slots=True, eq=False)
class _Begun:
    """A handshake a responder has answered; kept when finished, for it has cost its time."""

    noise: HandshakeState
    initiation: bytes
    prefix: bytes | None
    """Of its source; None: that has shown no cookie."""
    remote_index: int
    response: bytes
    expires_at: float
    finished: bool = False


class Responder:
    """All handshakes that others begin, never more than ``COOKIES_FROM`` + ``MAX_HANDSHAKES``."""

    def __init__(self, host: Host, cookies: Cookies) -> None:
        self._host = host
        self._cookies = cookies
        self._begun: dict[int, _Begun] = {}
        """By this host's index, oldest first."""

    def initiation(self, datagram: bytes, source: Source, now: float) -> bytes:
        """Answer a datagram that asks for a handshake.

        Returns:
            A response, or a cookie; never longer than what was asked.

        Raises:
            Refused: MALFORMED, VERSION, FORGED; BUSY: the source may try again later.
        """
        remote_index, body = expect(Type.INITIATION, datagram)
        e, cookie, zeros = (
            body[:KEY_BYTES],
            body[KEY_BYTES : KEY_BYTES + COOKIE_BYTES],
            body[KEY_BYTES + COOKIE_BYTES :],
        )
        if any(zeros):
            raise Refused(Reason.MALFORMED, "an initiation not filled up with zeros")
        self.expire(now)
        initiation = header(Type.INITIATION, remote_index) + e
        for begun in self._begun.values():
            if begun.initiation == initiation:
                return begun.response
        prefixes = [begun.prefix for begun in self._begun.values()]
        if self._cookies.accepts(cookie, source, now):
            prefix = _prefix(source)
            if len(prefixes) - prefixes.count(None) >= MAX_HANDSHAKES:
                raise Refused(Reason.BUSY, "handshakes altogether")
            if prefixes.count(prefix) >= MAX_PER_PREFIX:
                raise Refused(Reason.BUSY, "handshakes with one network")
            return self._begin(initiation, remote_index, e, prefix, now)
        if prefixes.count(None) >= COOKIES_FROM:
            return header(Type.COOKIE, remote_index) + e + self._cookies.make(source, now)
        return self._begin(initiation, remote_index, e, None, now)

    def confirmation(self, datagram: bytes, now: float) -> Accepted:
        """Learn who asked, and that it has the keys.

        Raises:
            Refused: MALFORMED, VERSION, UNKNOWN, FORGED, OURSELVES; or REPLAYED: it was accepted
                before, and its sender may have missed that: seal an empty datagram for it.
        """
        index, body = expect(Type.CONFIRMATION, datagram)
        self.expire(now)
        begun = self._begun.get(index)
        if begun is None:
            raise Refused(Reason.UNKNOWN, f"no handshake of index {index}")
        if begun.finished:
            raise Refused(Reason.REPLAYED, "a second confirmation")
        instance = _read(begun.noise, body)
        begun.finished = True
        peer = Peer(begun.noise.remote_static, instance)
        send, receive = begun.noise.split()
        try:
            self._host.not_ourselves(peer.static)
        except Refused:
            self._host.indices.free(index)
            raise
        return Accepted(peer, Keypair(False, send, receive, index, begun.remote_index, now))

    def expire(self, now: float) -> None:
        """Forget handshakes that took too long."""
        for index, begun in list(self._begun.items()):
            if begun.expires_at > now:
                break
            del self._begun[index]
            if not begun.finished:
                self._host.indices.free(index)

    def _begin(
        self, initiation: bytes, remote_index: int, e: bytes, prefix: bytes | None, now: float
    ) -> bytes:
        index = self._host.indices.allocate(self)
        noise = self._host.noise(False, initiation[: -len(e)])
        _read(noise, e)
        try:
            message = noise.write_message(INDEX.pack(index) + self._host.instance)
        except NoiseError as error:
            self._host.indices.free(index)
            raise Refused(Reason.FORGED, str(error)) from error
        response = header(Type.RESPONSE, remote_index) + message
        self._begun[index] = _Begun(
            noise, initiation, prefix, remote_index, response, now + HANDSHAKE_SECONDS
        )
        return response


def _read(noise: HandshakeState, message: bytes) -> bytes:
    try:
        return noise.read_message(message)
    except NoiseError as error:
        raise Refused(Reason.FORGED, str(error)) from error


def _prefix(source: Source) -> bytes:
    """What one owner has for certain: an IPv4 address, an IPv6 /64."""
    packed = ip_address(source[0]).packed
    return packed if len(packed) == 4 else packed[:8]
