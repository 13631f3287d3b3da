"""A socket's session: what sessiond knows of its connection, and what one may ask of it."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from libhsock import shape, wire
from libhsock.client import Client, EventStream
from libhsock.errors import HsockError, NotFound, Refused
from libhsock.eyeballs import text
from libhsock.wire import Record, State

if TYPE_CHECKING:
    from libhsock.aio import AsyncClient, AsyncEventStream

_SO_COOKIE = 57

Pair = tuple[str, str]


class Session:
    """One connection's session, got as ``sock.session`` or ``libhsock.session(writer)``.

    Every property asks the daemon anew, which takes a fraction of a millisecond; ``refresh`` asks
    once for all of them. Under asyncio take the ``async`` methods where even that is too long.

    Without a daemon, or after it went away, the connection is plain TCP and the session says so:
    ``mobile`` is False and ``reason`` a sentence. None of the properties raises.
    """

    def __init__(self, client: Client, sock: socket.socket, record: Record) -> None:
        """Made by libhsock; ``record`` is the daemon's, or ``plain_record``."""
        self._client = client
        self._record = record
        self._over = False
        self._fd = sock.fileno()
        self._cookie = cookie(sock)

    def __repr__(self) -> str:
        r = self._record
        return f"<Session {r.session or 'none'} {r.local}>{r.remote} {r.state}>"

    @property
    def id(self) -> str | None:
        """What sessionctl calls it, hexadecimal; None: there is no session. Until both daemons have
        agreed on the session it may change, as the peer's choice can win."""
        return self.refresh().session or None

    @property
    def peer(self) -> str | None:
        """The peer's name as it was opened, or its address."""
        return self._record.peer

    @property
    def local(self) -> str:
        """This end now: ``"192.0.2.1:40000"`` or ``"[2001:db8::1]:40000"``."""
        return self.refresh().local

    @property
    def remote(self) -> str:
        """The other end now."""
        return self.refresh().remote

    @property
    def tuple(self) -> Pair:
        """``(local, remote)`` of one moment."""
        record = self.refresh()
        return record.local, record.remote

    @property
    def state(self) -> str:
        """One of ``libhsock.State``."""
        return self.refresh().state

    @property
    def engine(self) -> str | None:
        """What moves the connection; None: nothing does."""
        return self.refresh().engine

    @property
    def mobile(self) -> bool:
        """The connection follows its hosts when an address changes."""
        return self.refresh().mobile

    @property
    def reason(self) -> str | None:
        """Why it is not mobile, or what limits it: one sentence."""
        return self.refresh().reason

    @property
    def gap(self) -> float | None:
        """How long the last move held the stream up, seconds."""
        gap_ms = self.refresh().gap_ms
        return None if gap_ms is None else gap_ms / 1000

    @property
    def record(self) -> Record:
        """What the daemon said last, without asking."""
        return self._record

    def refresh(self) -> Record:
        """Ask the daemon for all of it at once. Doesn't raise."""
        if self._is_over():
            return self._record
        try:
            return self._learn(self._client.show(self._record.session))
        except HsockError as error:
            return self._unknown(error)

    async def arefresh(self) -> Record:
        """``refresh`` for asyncio."""
        if self._is_over():
            return self._record
        try:
            return self._learn(await self._aclient().show(self._record.session))
        except HsockError as error:
            return self._unknown(error)

    def rebind(self, to: str | None = None) -> Record:
        """Move the connection now, make before break; returns when it has moved.

        ``to`` is a local address or an interface, None the best there is. Raises Refused with the
        reason, NotFound, DaemonUnavailable.
        """
        return self._learn(self._client.rebind(self._known(), to))

    async def arebind(self, to: str | None = None) -> Record:
        """``rebind`` for asyncio."""
        return self._learn(await self._aclient().rebind(self._known(), to))

    def detach(self) -> None:
        """Make the connection plain TCP for good. Raises DaemonUnavailable."""
        if not self._is_over():
            self._client.detach(self._record.session)
            self._forget()

    async def adetach(self) -> None:
        """``detach`` for asyncio."""
        if not self._is_over():
            await self._aclient().call(wire.Detach(self._record.session))
            self._forget()

    def events(self, timeout: float | None = None) -> EventStream:
        """What happens to the session from now on, up to its ``closed``.

        The iterator raises TimeoutError when nothing happened for ``timeout`` seconds and goes on
        at its next call. Nothing ever happens to a connection without session, or to one that has
        ended: it ends at once. Raises DaemonUnavailable.
        """
        if not self._is_over():
            try:
                return self._client.events(self._record.session, timeout)
            except NotFound as error:
                self._unknown(error)
        return EventStream(None)

    def aevents(self) -> AsyncEventStream:
        """``events`` for asyncio: ``async for``, from the first step on, or from the entry of
        ``async with``."""
        return self._aclient().events(self._record.session, may_be_gone=True)

    def wait_mobile(self, timeout: float | None = None) -> bool:
        """Wait until both daemons have agreed on the session.

        Returns True: it is mobile; False: it won't be, or ``timeout`` seconds are over; ``reason``
        says which. Raises DaemonUnavailable when the daemon goes away meanwhile.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self.events() as events:
            while self.refresh().state == State.BINDING and not self._record.mobile:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    break
                with contextlib.suppress(TimeoutError, StopIteration):
                    events.next(left)
        return self._record.mobile

    async def await_mobile(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109
        """``wait_mobile`` for asyncio."""
        import asyncio

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout), self.aevents() as events:
                while (await self.arefresh()).state == State.BINDING and not self._record.mobile:
                    await anext(events, None)
        return self._record.mobile

    def through(self, sock: socket.socket) -> Session:
        """The same session of a duplicate of the socket."""
        return Session(self._client, sock, self._record)

    def _aclient(self) -> AsyncClient:
        from libhsock.aio import aclient  # asyncio is slow to import; most programs don't want it

        return aclient(self._client.path)

    def _is_over(self) -> bool:
        return self._over or not self._record.session

    def _known(self) -> str:
        if self._is_over():
            raise Refused(self._record.reason or "the session has ended")
        return self._record.session

    def _learn(self, record: Record) -> Record:
        self._record = record
        return record

    def _unknown(self, error: HsockError) -> Record:
        if not isinstance(error, NotFound):
            return self._as_plain(error.message)  # for now: the daemon may come back
        self._over = True
        record = self._as_plain("sessiond does not know the session any more")
        if not self._is_open():
            closed = State.CLOSED.value
            record = shape.replace(record, state=closed, reason="the connection has ended")
        return self._learn(record)

    def _forget(self) -> None:
        self._over = True
        self._record = self._as_plain("the application detached the session")

    def _as_plain(self, reason: str) -> Record:
        plain = State.PLAIN.value
        return shape.replace(
            self._record, state=plain, mobile=False, engine=None, reason=f"plain TCP: {reason}"
        )

    def _is_open(self) -> bool:
        """The descriptor is still this connection, in whatever object it lives now."""
        try:
            sock = socket.socket(fileno=self._fd)
        except OSError:
            return False
        try:
            return cookie(sock) == self._cookie
        finally:
            sock.detach()


def plain_record(sock: socket.socket, role: str, peer: str | None, reason: str) -> Record:
    """What there is to say of a connection that sessiond doesn't know."""
    return Record(
        session="",
        state=State.PLAIN.value,
        mobile=False,
        reason=reason,
        role=role,
        peer=peer,
        local=_endpoint(sock.getsockname),
        remote=_endpoint(sock.getpeername),
        pid=os.getpid(),
        fd=sock.fileno(),
        uid=os.getuid(),
        created=time.time(),
    )


def _endpoint(name: Callable[[], Any]) -> str:
    try:
        address = name()
    except OSError:  # the peer has reset the connection already
        return "unknown"
    return text((address[0].removeprefix("::ffff:"), address[1]))


def cookie(sock: socket.socket) -> int:
    """The kernel's name of a socket, never reused (SO_COOKIE)."""
    number: int = struct.unpack("Q", sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8))[0]
    return number
