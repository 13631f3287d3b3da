"""An application that sends and receives as much as it can, and keeps the sums of it."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
from typing import NamedTuple

from sessiond.rebind import linux as lx
from tests.support.worker import Talk

SO_MAX_PACING_RATE = 47
_BLOCK = 1 << 20
_PIECES = (1, 7, 1000, 1448, 16384, 65536, 300_000, _BLOCK)


class Traffic(NamedTuple):
    """How an application uses its connection."""

    name: str
    buffer: int = 0
    """Bytes given to SO_SNDBUF and SO_RCVBUF; 0: the kernel tunes them."""
    pause: float = 0.0
    """Seconds, at most, that the reader does something else after each piece."""
    rate: int = 0
    """Bytes a second, at most (SO_MAX_PACING_RATE), so that a test leaves its machine some time."""


TRAFFIC = (
    Traffic("small buffers", buffer=4096),
    Traffic("full buffers, slow readers", buffer=4 << 20, pause=0.02),
    Traffic("as the kernel tunes it", rate=30_000_000),
)


class Sums(NamedTuple):
    """What went through one end."""

    sent: str
    """SHA-256."""
    received: str
    sent_bytes: int
    received_bytes: int
    errors: tuple[str, ...]


class Stream:
    """One end's two directions, a thread each, until ``stop``."""

    def __init__(self, sock: socket.socket, traffic: Traffic, seed: int) -> None:
        self._sock = sock
        self._traffic = traffic
        self._random = random.Random(seed)
        self._stopping = threading.Event()
        self._errors: list[str] = []
        self._sent, self._received = hashlib.sha256(), hashlib.sha256()
        self._sent_bytes = self._received_bytes = 0
        if traffic.buffer:
            for option in (lx.SO_SNDBUFFORCE, lx.SO_RCVBUFFORCE):
                sock.setsockopt(socket.SOL_SOCKET, option, traffic.buffer)
        if traffic.rate:
            sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, traffic.rate)
        self._threads = [
            threading.Thread(target=self._guarded, args=(one,)) for one in (self._write, self._read)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> Sums:
        """End the sending, receive the rest, and add up."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        return Sums(
            self._sent.hexdigest(),
            self._received.hexdigest(),
            self._sent_bytes,
            self._received_bytes,
            tuple(self._errors),
        )

    def _guarded(self, direction: object) -> None:
        try:
            direction()  # type: ignore[operator]
        except OSError as error:
            self._errors.append(f"{error!r} after {self._sent_bytes}, {self._received_bytes} bytes")

    def _write(self) -> None:
        block = memoryview(self._random.randbytes(_BLOCK))
        while not self._stopping.is_set():
            length = self._random.choice(_PIECES)
            start = self._random.randrange(_BLOCK - length + 1)
            rest = block[start : start + length]
            while rest:
                count = self._sock.send(rest)
                self._sent.update(rest[:count])
                self._sent_bytes += count
                rest = rest[count:]
        self._sock.shutdown(socket.SHUT_WR)

    def _read(self) -> None:
        pauses = random.Random(self._sent_bytes)
        while data := self._sock.recv(65536):
            self._received.update(data)
            self._received_bytes += len(data)
            if self._traffic.pause and not self._stopping.is_set():
                self._stopping.wait(pauses.uniform(0, self._traffic.pause))


def run(talk: Talk, sock: socket.socket, traffic: Traffic, seed: int) -> Sums:
    """The whole application: until it is told to stop."""
    with sock:
        stream = Stream(sock, traffic, seed)
        talk.tell(sock.fileno())
        talk.hear()
        return stream.stop()


def serve(talk: Talk, port: int, traffic: Traffic, seed: int) -> Sums:
    """Plain TCP, one connection."""
    with socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        talk.tell("listening")
        sock, _ = listener.accept()
    return run(talk, sock, traffic, seed)


def connect(talk: Talk, address: str, port: int, traffic: Traffic, seed: int) -> Sums:
    """Plain TCP."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    sock.connect((address, port))
    return run(talk, sock, traffic, seed)


def differences(near: Sums, far: Sums) -> list[str]:
    """What is wrong with the two ends' sums; nothing, one hopes."""
    wrong = [
        f"{end}: {error}"
        for end, sums in (("client", near), ("server", far))
        for error in sums.errors
    ]
    for name, sender, receiver in (("to server", near, far), ("to client", far, near)):
        if (sender.sent, sender.sent_bytes) != (receiver.received, receiver.received_bytes):
            wrong.append(
                f"{name}: {sender.sent_bytes} bytes sent, {receiver.received_bytes} received, "
                f"SHA-256 {sender.sent[:12]} and {receiver.received[:12]}"
            )
    return wrong
