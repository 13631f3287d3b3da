"""libhsock for asyncio: ordinary streams whose connections have sessions."""

from __future__ import annotations

import asyncio
import inspect
import socket
import ssl as tls
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

from libhsock import hsocket, names, wire
from libhsock.aclient import AsyncClient as AsyncClient
from libhsock.aclient import AsyncEventStream as AsyncEventStream
from libhsock.aclient import aclient as aclient
from libhsock.aclient import writable
from libhsock.client import default_client
from libhsock.errors import DaemonUnavailable, HsockError, UsageError
from libhsock.eyeballs import Candidate, Race
from libhsock.hsocket import HSocket
from libhsock.sessions import Session, plain_record

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]

LIMIT = 2**16
"""asyncio's own default for a reader's buffer, bytes."""


async def open_connection(
    name: str,
    service: str | int,
    *,
    timeout: float | None = None,  # noqa: ASYNC109 - its error says what was tried
    family: wire.Family = 0,
    srv: bool = False,
    ssl: tls.SSLContext | bool | None = None,
    server_hostname: str | None = None,
    limit: int = LIMIT,
) -> Streams:
    """``asyncio.open_connection`` to a service by name.

    ``libhsock.session(writer)`` is the connection's session. ``timeout`` in seconds bounds
    connecting and the TLS handshake; ``server_hostname`` is ``name`` by default; the rest and the
    errors are as in ``create_connection``.
    """
    target = names.target((name, service), family, srv)
    deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
    race: Race[HSocket] = Race(str(target), [], hsocket.stream_socket)
    sock = None
    try:
        async with asyncio.timeout_at(deadline):
            race.candidates(await _resolve(target, timeout))
            sock = await _run(race)
        session = await _attach(sock, "connect", target, deadline)
        hostname = (server_hostname or name) if ssl else None
        async with asyncio.timeout_at(deadline if ssl else None):
            streams = await asyncio.open_connection(
                sock=sock, limit=limit, ssl=ssl, server_hostname=hostname
            )
    except BaseException as error:
        if sock is not None:
            sock.close()
        if isinstance(error, TimeoutError) and not isinstance(error, HsockError):
            raise race.timed_out(timeout or 0.0) from error
        raise
    finally:
        race.close()
    _SESSIONS[streams[1]] = session
    return streams


async def start_server(
    connected: Connected,
    host: str = "",
    port: int = 0,
    *,
    backlog: int = 100,
    reuse_port: bool = False,
    ssl: tls.SSLContext | None = None,
    limit: int = LIMIT,
    **more: Any,
) -> asyncio.Server:
    """``asyncio.start_server`` whose connections have sessions when ``connected`` is called.

    Host ``""`` is every address of both IP versions. ``more`` goes to ``asyncio.start_server``.
    """

    async def attach_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            _SESSIONS[writer] = await _attach(writer.get_extra_info("socket"), "accept")
        except BaseException:
            writer.close()
            raise
        result = connected(reader, writer)
        if inspect.isawaitable(result):
            await result

    # A plain socket: HSocket.accept would ask the daemon in the middle of the loop.
    listener = hsocket.server_socket((host, port), backlog, reuse_port)
    plain = socket.socket(fileno=listener.detach())
    return await asyncio.start_server(
        attach_first, sock=plain, backlog=backlog, ssl=ssl, limit=limit, **more
    )


def session(of: Any) -> Session:
    """The session of a stream's writer, a transport, or a connected TCP socket of any class.

    A connection that has none yet gets one, which asks the daemon. Raises UsageError.
    """
    if isinstance(of, asyncio.StreamWriter) and of in _SESSIONS:
        return _SESSIONS[of]
    sock = of.get_extra_info("socket") if hasattr(of, "get_extra_info") else of
    if sock is None or not hasattr(sock, "fileno"):
        raise UsageError(f"a {type(of).__name__} has no socket")
    if isinstance(sock, HSocket):
        return sock.session
    hsocket.check_attachable(sock)
    return hsocket.attach_session(sock, "attach")


async def _attach(
    sock: Any,
    role: wire.Role,
    target: names.Target | None = None,
    deadline: float | None = None,
) -> Session:
    name, service = (target.name, target.service) if target else (None, None)
    until = deadline and max(deadline, asyncio.get_running_loop().time() + hsocket.LEAST)
    try:
        async with asyncio.timeout_at(until):
            record = await aclient().attach(sock.fileno(), role, name, service)
    except HsockError as error:
        record = plain_record(sock, role, name, f"plain TCP: {error}")
    except TimeoutError:
        record = plain_record(sock, role, name, "plain TCP: sessiond did not answer in time")
    return Session(default_client(), sock, record)


async def _resolve(target: names.Target, limit: float | None) -> list[Candidate]:
    if (known := target.literal()) is not None:
        return known
    try:
        # Half the time: a daemon that hangs must leave enough to do without it.
        async with asyncio.timeout(limit and limit / 2):
            return target.resolved(await aclient().call(target.call()))
    except (DaemonUnavailable, TimeoutError):
        pass  # the system's resolver does instead, and the session will say that there's no daemon
    name, service, family, kind = target.question()
    try:
        loop = asyncio.get_running_loop()
        return target.answered(await loop.getaddrinfo(name, service, family=family, type=kind))
    except (OSError, UnicodeError) as error:
        raise target.unanswered(error) from error


async def _run(race: Race[HSocket]) -> HSocket:
    loop = asyncio.get_running_loop()
    ready: list[HSocket] = []
    while (winner := race.step(loop.time(), ready)) is None:
        left = max(0.0, race.due - loop.time()) if race.more else None
        ready = await writable(race.pending, left)
    return winner


_SESSIONS: weakref.WeakKeyDictionary[asyncio.StreamWriter, Session] = weakref.WeakKeyDictionary()
