"""The contender without sessiond: an application that watches its addresses itself, and when its
own is deleted reconnects from the other one and resumes at the byte where the stream was cut.

It is as good as one can write it: it knows the other address beforehand, learns of the loss from
RTM_DELADDR on a raw socket, asks the old socket how many bytes the peer's kernel has confirmed
(SIOCOUTQ), and its first message on the new connection carries all that is needed to go on; where
so much is unconfirmed that sending it again would take longer, it asks instead. With TCP Fast Open
(RFC 7413, here without a cookie) that message travels in the SYN.
"""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import time
from dataclasses import dataclass

from tests.bench import rtnl
from tests.bench.stream import CHUNK, SILENCE, SOURCES, Gap, Log, Source, prepare
from tests.support.worker import HasFileno, Talk

_SIOCOUTQ = 0x5411
_OFFSET = struct.Struct("!Q")
_ASK = 2**64 - 1
"""In the place of an offset: where shall I go on?"""
_IN_SYN = 1200
_INITIAL_WINDOW = 14600
"""Bytes a new connection sends before it hears from its peer (RFC 6928)."""


@dataclass(frozen=True)
class Plan:
    """One run."""

    kind: str
    download: bool
    server: tuple[str, int]
    addresses: tuple[str, str]
    """The client's, the first is the one that goes."""
    window: float
    fast_open: bool = False


def client(talk: Talk, plan: Plan) -> Gap | None:
    """The mover."""
    prepare()
    watch = rtnl.watch()
    if plan.download:
        return _download(talk, plan, watch)
    _upload(talk, plan, watch)
    return None


def server(talk: Talk, plan: Plan) -> Gap | None:
    """The end that stays."""
    prepare()
    with socket.create_server(plan.server) as listener:
        if plan.fast_open:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
        talk.tell("listening")
        if plan.download:
            _serve_download(listener, plan)
            return None
        return _serve_upload(talk, listener, plan)


def _download(talk: Talk, plan: Plan, watch: socket.socket) -> Gap:
    log = Log(SOURCES[plan.kind](), plan.window)
    sock = _dial(plan, plan.addresses[0], _OFFSET.pack(0))
    talk.tell("connected")
    while not log.over():
        ready = _readable(sock, watch, talk)
        if watch in ready and plan.addresses[0] in rtnl.deleted(watch.recv(65536)):
            sock = _dial(plan, plan.addresses[1], _OFFSET.pack(log.offset))
        elif sock in ready:
            log.add(_received(sock))
        if talk in ready:
            log.event = talk.hear()
    return log.gap()


def _serve_download(listener: socket.socket, plan: Plan) -> None:
    source = SOURCES[plan.kind]()
    sock, offset = _accept(listener)
    while True:
        wanted = [sock] if source.data(offset) else []
        wait = None if wanted else max(0.0, source.due(offset) - time.monotonic())
        arrived, writable, _ = select.select([listener], wanted, [], wait)
        if arrived:
            sock, offset = _accept(listener)
        elif writable:
            try:
                offset += sock.send(source.data(offset), socket.MSG_DONTWAIT)
            except ConnectionError:
                return


def _upload(talk: Talk, plan: Plan, watch: socket.socket) -> None:
    source = SOURCES[plan.kind]()
    sock, offset = _dial(plan, plan.addresses[0], _OFFSET.pack(0)), 0
    talk.tell("connected")
    while True:
        wanted = [sock] if source.data(offset) else []
        wait = None if wanted else max(0.0, source.due(offset) - time.monotonic())
        arrived, writable, _ = select.select([watch], wanted, [], wait)
        if arrived and plan.addresses[0] in rtnl.deleted(watch.recv(65536)):
            sock, offset = _resume(plan, source, offset, _unconfirmed(sock))
        elif writable:
            try:
                offset += sock.send(source.data(offset), socket.MSG_DONTWAIT)
            except ConnectionError:
                return


def _resume(plan: Plan, source: Source, offset: int, unconfirmed: int) -> tuple[socket.socket, int]:
    """Go on from the other address: at once where little has to be sent again, else the server is
    asked first, which costs less than its slow start through a full window of what it has."""
    if unconfirmed > _INITIAL_WINDOW:
        sock = _dial(plan, plan.addresses[1], _OFFSET.pack(_ASK))
        (offset,) = _OFFSET.unpack(sock.recv(_OFFSET.size, socket.MSG_WAITALL))
        return sock, offset
    offset -= unconfirmed
    begin = source.data(offset)[:_IN_SYN]
    sock = _dial(plan, plan.addresses[1], _OFFSET.pack(offset) + begin)
    return sock, offset + len(begin)


def _serve_upload(talk: Talk, listener: socket.socket, plan: Plan) -> Gap:
    log = Log(SOURCES[plan.kind](), plan.window)
    sock, position = _accept(listener)
    while not log.over():
        ready = _readable(listener, sock, talk)
        if listener in ready:
            _drain(sock, log, position)
            sock, position = _accept(listener)
            if position == _ASK:
                sock.sendall(_OFFSET.pack(log.offset))
                position = log.offset
        elif sock in ready:
            position += _take(log, position, _received(sock))
        if talk in ready:
            log.event = talk.hear()
    return log.gap()


def _readable(*sources: HasFileno) -> list[HasFileno]:
    ready, _, _ = select.select(sources, [], [], SILENCE)
    return list(ready)


def _dial(plan: Plan, source: str, first: bytes) -> socket.socket:
    """Connect from an address, with the first message as early as it can be."""
    sock = socket.socket()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.bind((source, 0))
    sent = 0
    if plan.fast_open:
        sent = sock.sendto(first, socket.MSG_FASTOPEN, plan.server)
    else:
        sock.connect(plan.server)
    sock.sendall(first[sent:])
    return sock


def _accept(listener: socket.socket) -> tuple[socket.socket, int]:
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    (offset,) = _OFFSET.unpack(sock.recv(_OFFSET.size, socket.MSG_WAITALL))
    return sock, offset


def _received(sock: socket.socket) -> bytes:
    data = sock.recv(CHUNK)
    if not data:
        raise EOFError("the stream ended")
    return data


def _drain(sock: socket.socket, log: Log, position: int) -> None:
    """What the old connection still brought."""
    while True:
        try:
            data = sock.recv(CHUNK, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionError):
            return
        if not data:
            return
        position += _take(log, position, data)


def _take(log: Log, position: int, data: bytes) -> int:
    """Add what is new of the bytes at a position; how many they were."""
    new = data[max(0, log.offset - position) :]
    if new:
        log.add(new)
    return len(data)


def _unconfirmed(sock: socket.socket) -> int:
    answer = fcntl.ioctl(sock, _SIOCOUTQ, b"\0" * 4)
    return int(struct.unpack("=i", answer)[0])
