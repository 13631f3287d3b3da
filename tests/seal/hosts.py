"""Hosts of the tests, and associations between them without a network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from sessiond.seal.cookie import Cookies, Source
from sessiond.seal.handshake import Host, Initiator, Peer, Responder
from sessiond.seal.indices import Indices
from sessiond.seal.noise import public_key
from sessiond.seal.transport import Keypair, Transport

SOURCE: Source = ("192.0.2.1", 2006)


def host(letter: str, indices: Indices[Any] | None = None) -> Host:
    """A host whose key and instance say in a failed test who it is."""
    static = X25519PrivateKey.from_private_bytes(letter.encode() * 32)
    return Host(static, letter.encode() * 16, Indices() if indices is None else indices)


def peer(of: Host) -> Peer:
    """What others learn about a host."""
    return Peer(public_key(of.static), of.instance)


class Handshake(NamedTuple):
    """One that went well: its parts, datagrams, and what it gave."""

    initiator: Initiator
    responder: Responder
    initiation: bytes
    response: bytes
    confirmation: bytes
    initiators: Keypair
    responders: Keypair


def shake(one: Host, other: Host, now: float = 0.0) -> Handshake:
    """A handshake begun by the one."""
    initiator, responder = Initiator(one), Responder(other, Cookies(now))
    initiation = initiator.initiation()
    response = responder.initiation(initiation, SOURCE, now)
    confirmation, initiators = initiator.confirm(initiator.response(response), now)
    accepted = responder.confirmation(confirmation, now)
    assert accepted.peer == peer(one)
    return Handshake(
        initiator, responder, initiation, response, confirmation, initiators, accepted.keypair
    )


def associate(one: Host, other: Host, now: float = 0.0) -> tuple[Transport, Transport]:
    """Both ends of an association, confirmed; no counter but the other's first is used."""
    done = shake(one, other, now)
    ends = Transport(one.indices), Transport(other.indices)
    ends[0].install(done.initiators)
    ends[1].install(done.responders)
    ends[0].open(ends[1].seal(b"", now), now)
    return ends


def flipped(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    """Each of its bits wrong: the byte's place and the datagram."""
    for bit in range(8 * len(datagram)):
        wrong = bytearray(datagram)
        wrong[bit // 8] ^= 1 << bit % 8
        yield bit // 8, bytes(wrong)
