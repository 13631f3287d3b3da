"""What the benchmark's programs send and how they time what they receive.

Every byte is a function of its offset, so a sender can begin anywhere, as an application that
resumes has to, and a receiver can check all it gets.
"""

from __future__ import annotations

import gc
import itertools
import random
import select
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tests.support.namespace import precise_timers
from tests.support.worker import Talk

PERIOD = 0.001
RECORD = 16
CHUNK = 256 << 10
SILENCE = 0.02
"""A stream silent for longer is not yet back."""
GIVE_UP = 3.0
"""Seconds after the event when a contender that has not recovered is measured as it is."""


class Source(Protocol):
    """A stream that comes into being as time passes."""

    def data(self, offset: int) -> bytes:
        """What there is from the offset on; empty: nothing yet."""

    def due(self, offset: int) -> float:
        """When there is something, CLOCK_MONOTONIC in seconds."""

    def expected(self, offset: int, length: int) -> bytes:
        """What these bytes are."""


class Ticks:
    """A record of 16 bytes every millisecond: its number and the number's complement."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def data(self, offset: int) -> bytes:
        born = int((time.monotonic() - self._began) / PERIOD) * RECORD
        return self.expected(offset, born - offset) if born > offset else b""

    def due(self, offset: int) -> float:
        return self._began + (offset // RECORD + 1) * PERIOD

    def expected(self, offset: int, length: int) -> bytes:
        first, last = offset // RECORD, (offset + length - 1) // RECORD
        records = b"".join(struct.pack("!QQ", n, n ^ 2**64 - 1) for n in range(first, last + 1))
        return records[offset % RECORD :][:length]


class Bulk:
    """As much as the connection takes, of a repeating random block."""

    _block = random.Random(2006).randbytes(1 << 20)
    _twice = _block * 2

    def data(self, offset: int) -> bytes:
        return self.expected(offset, CHUNK)

    def due(self, offset: int) -> float:
        return 0.0

    def expected(self, offset: int, length: int) -> bytes:
        begin = offset % len(self._block)
        return self._twice[begin : begin + length]


SOURCES: dict[str, type[Ticks] | type[Bulk]] = {"ticks": Ticks, "bulk": Bulk}


class Gap(NamedTuple):
    """What one run found."""

    ms: float
    """The longest time between two receipts."""
    recovered: bool
    """False: nothing came any more; ``ms`` is how long was waited."""
    received: int
    """Bytes in all."""


@dataclass
class Log:
    """When bytes arrived, checked against what they should be."""

    source: Source
    window: float
    """Seconds after the event to look at."""
    offset: int = 0
    times: list[float] = field(default_factory=list)
    event: float = float("inf")

    def add(self, data: bytes) -> None:
        """Bytes that were received just now. Raises ValueError: they are not the stream's."""
        self.times.append(time.monotonic())
        if data != self.source.expected(self.offset, len(data)):
            raise ValueError(f"the stream is broken between {self.offset} and {len(data)} more")
        self.offset += len(data)

    def over(self) -> bool:
        """Whether enough was seen: the window is past and data flows, or it won't any more."""
        now = time.monotonic()
        flowing = bool(self.times) and now - self.times[-1] < SILENCE
        return now > self.event + (self.window if flowing else max(self.window, GIVE_UP))

    def gap(self) -> Gap:
        """The longest of all gaps from the event on."""
        before = [moment for moment in self.times if moment <= self.event][-1:]
        after = [moment for moment in self.times if moment > self.event]
        end = time.monotonic()
        recovered = bool(after) and end - after[-1] < SILENCE + self.window
        moments = before + after + ([] if recovered else [end])
        longest = max(
            (later - earlier for earlier, later in itertools.pairwise(moments)),
            default=end - self.event,
        )
        return Gap(longest * 1000, recovered, self.offset)


def prepare() -> None:
    """Make this process wake on time."""
    precise_timers()
    gc.disable()


def send(talk: Talk, sock: socket.socket, kind: str) -> None:
    """Send the stream on one socket until the receiver has gone."""
    source = SOURCES[kind]()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    offset = 0
    while True:
        data = source.data(offset)
        if not data:
            time.sleep(max(0.0, source.due(offset) - time.monotonic()))
            continue
        try:
            offset += sock.send(data)
        except ConnectionError:
            return


def receive(talk: Talk, sock: socket.socket, kind: str, window: float) -> Gap:
    """Time the stream on one socket; ``talk`` says when the event was."""
    log = Log(SOURCES[kind](), window)
    while not log.over():
        ready, _, _ = select.select([sock.fileno(), talk.fileno()], [], [], SILENCE)
        if sock.fileno() in ready:
            data = sock.recv(CHUNK)
            if not data:
                raise EOFError("the stream ended")
            log.add(data)
        if talk.fileno() in ready:
            log.event = talk.hear()
    return log.gap()
