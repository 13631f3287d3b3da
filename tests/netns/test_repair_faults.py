"""Every system call of every step of the repair engine fails once: the connection lives on.

The n-th call a step makes on the application's socket raises; n counts up until the step gets
through. After each failure the socket must be whole: on a tuple both ends agree on, out of repair
mode, without lock or closed window, and every byte must arrive.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sessiond.core.outcomes import Failed
from sessiond.rebind import filters
from sessiond.rebind import linux as lx
from sessiond.rebind.process import Process
from tests.netns.repair_support import (
    OTHER,
    Ends,
    Net,
    addresses,
    needs_root,
    noise,
    receive,
    target,
)

pytestmark = needs_root

CALLS = ("setsockopt", "getsockopt", "bind", "connect", "send", "recv", "getsockname")


class Faults:
    """Fails the n-th call on a borrowed socket, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.countdown = 0
        self.failed: str | None = None
        take = Process.take
        faults = self

        class Borrowed(socket.socket):
            pass

        for name in CALLS:
            setattr(Borrowed, name, self._wrapped(name, getattr(socket.socket, name)))

        def borrow(process: Process, fd: int, family: int = -1) -> socket.socket:
            with take(process, fd, family) as sock:
                return Borrowed(sock.family, sock.type, sock.proto, fileno=sock.detach())

        monkeypatch.setattr(Process, "take", borrow)
        for module, name in ((lx, "disconnect"), (lx, "queue_length"), (filters, "current")):
            monkeypatch.setattr(module, name, faults._wrapped(name, getattr(module, name)))

    def arm(self, n: int) -> None:
        self.countdown, self.failed = n, None

    def disarm(self) -> None:
        self.countdown = 0

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.countdown -= 1
            if self.countdown == 0:
                self.failed = f"{name}{arguments[1:]}"
                raise OSError(errno.ENOBUFS, "injected")
            return function(*arguments, **options)

        return wrapped


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    net = Net()
    yield net
    net.close()


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


class Story:
    """A connection in the middle of a conversation, about to take one step of a handover."""

    def __init__(self, net: Net, version: int, pending: bool) -> None:
        client, server = net.pair(version, port=0)
        self.ends = Ends(net, client, server)
        self.mover, self.other = client, server
        self.written = {"left": b"", "right": b""}
        self.say("right", 3000)  # lies unread in the mover's receive queue
        if pending:
            with self.ends.losing():
                self.say("left", 4000)
                self.say("right", 5000)
        self.departed: Any = None
        self.followed: Any = None
        self.before = self.ends.where("left")
        self.after = target(self.before, local=addresses(version, 3))

    def say(self, side: str, length: int) -> None:
        data = noise(length, len(self.written[side]))
        self.ends.socks[side].sendall(data)
        self.written[side] += data

    def require_whole(self) -> None:
        """Both sockets as an application wants them, and every byte once."""
        for sock in self.ends.socks.values():
            assert not sock.getsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR)
            assert filters.current(sock) == b""
            assert lx.info(sock).snd_wnd
            assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        assert self.ends.where("left") == self.ends.where("right").mirrored()
        self.say("left", 100)
        self.say("right", 100)
        for side, data in self.written.items():
            assert receive(self.ends.socks[OTHER[side]], len(data), 5) == data

    def close(self) -> None:
        self.mover.close()
        self.other.close()


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("step", ["depart", "follow", "arrive", "settle", "retreat"])
@pytest.mark.timeout(300)
def test_a_step_fails_at_every_call(
    net: Net, faults: Faults, step: str, pending: bool, version: int
) -> None:
    n = 0
    while True:
        n += 1
        story = Story(net, version, pending)
        outcome = through(story, step, faults, n)
        if faults.failed is None:
            if step == "retreat":
                story.ends.settle("left")  # its shield is up
            story.require_whole()
            story.close()
            break
        assert isinstance(outcome, Failed), (n, faults.failed, outcome)
        assert not outcome.lost, (n, faults.failed, outcome)
        assert "injected" in outcome.reason, (n, faults.failed, outcome)
        complete(story, step)
        try:
            story.require_whole()
        except AssertionError as error:
            raise AssertionError(f"call {n}: {faults.failed}") from error
        story.close()
    assert n > 2, "the step makes no calls"


def through(story: Story, step: str, faults: Faults, n: int) -> Any:
    """A handover up to the step; the step with a fault in it."""
    ends = story.ends

    def faulty(side: str, name: str, *arguments: object) -> Any:
        faults.arm(n)
        try:
            return ends.do(side, name, *arguments)
        finally:
            faults.disarm()

    if step == "depart":
        outcome = faulty("left", "depart", story.after)
        if faults.failed is None:
            finish_from(story, outcome)
        return outcome
    story.departed = departed = ends.depart("left", story.after)
    if step == "retreat":
        return faulty("left", "retreat")
    following = (departed.tuple.mirrored(), departed.rcv_nxt, departed.window, departed.pending)
    if step == "follow":
        outcome = faulty("right", "follow", *following)
        if faults.failed is None:
            ends.arrive("left", outcome)
            ends.settle("right")
        return outcome
    story.followed = followed = ends.follow("right", departed)
    if step == "arrive":
        outcome = faulty("left", "arrive", followed.rcv_nxt, followed.window)
        if faults.failed is None:
            ends.settle("right")
        return outcome
    ends.arrive("left", followed)
    return faulty("right", "settle")


def finish_from(story: Story, departed: Any) -> None:
    story.ends.arrive("left", story.ends.follow("right", departed))
    story.ends.settle("right")


def complete(story: Story, step: str) -> None:
    """What the daemons do after a step has failed, until nothing of the handover is left."""
    ends = story.ends
    if step == "depart":
        assert ends.where("left") == story.before
    elif step == "follow":
        assert ends.where("right") == story.before.mirrored()
        assert ends.do("left", "retreat") is None
        assert ends.where("left") == story.before
        ends.settle("left")
    elif step == "arrive":
        ends.arrive("left", story.followed)
        ends.settle("right")
    elif step == "settle":
        ends.settle("right")
    else:
        assert ends.do("left", "retreat") is None
        assert ends.where("left") == story.before
        ends.settle("left")
