"""What local clients can ask of the daemon. Implements ``edges.local.Backend``."""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from libhsock.errors import NameNotResolved, NotFound, Refused, UsageError
from sessiond.config import Limits
from sessiond.core import events as ev
from sessiond.core.machine import Core
from sessiond.core.names import BadName
from sessiond.core.session import Session
from sessiond.edges.local import Caller
from sessiond.edges.resolver import Resolution, ResolveError, Resolver
from sessiond.peers import Peers
from sessiond.rebind.engine import Engine
from sessiond.rebind.process import Process
from sessiond.registry import Deliver, Owner, Registry, Subscription
from sessiond.seal.fingerprint import fingerprint, parse
from sessiond.seal.private_file import PrivateFileError

SO_NETNS_COOKIE = 71
VOUCHED = 4096
"""Names with an address they were found to lead to that are kept, the newest."""
REBIND_TIMEOUT = 30.0
"""Seconds until a rebind by request is answered at the latest: every path was tried by then."""


class Service:
    """The daemon, seen from a local client.

    Args:
        dispatch: handles an event at once, so that its result is there when it returns.
        watch: learn of the end of the socket with this cookie.
    """

    def __init__(
        self,
        core: Core,
        engine: Engine,
        registry: Registry,
        resolver: Resolver,
        peers: Peers,
        limits: Limits,
        dispatch: Callable[[ev.Event], None],
        watch: Callable[[int], None],
    ) -> None:
        self._core = core
        self._engine = engine
        self._registry = registry
        self._resolver = resolver
        self._peers = peers
        self._limits = limits
        self._dispatch = dispatch
        self._watch = watch
        self._vouched: OrderedDict[tuple[str | None, str], None] = OrderedDict()
        with socket.socket() as own:
            self._namespace = own.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)

    async def resolve(self, name: str, service: str, version: int, srv: bool) -> Resolution:
        """Look an endpoint up.

        Raises:
            NameNotResolved: with what was tried.
            UsageError: this is no name, or no service, that could be looked up.
        """
        try:
            found = await self._resolver.resolve(name, service, version, srv=srv)
            self._vouch(name, found)
            return found
        except BadName as error:
            raise UsageError(str(error)) from error
        except ResolveError as error:
            raise NameNotResolved(str(error), error.tried) from error

    def _vouch(self, name: str, found: Resolution) -> None:
        for endpoint in found.candidates:
            self._vouched[name, endpoint.address] = None
            self._vouched.move_to_end((name, endpoint.address))
        while len(self._vouched) > VOUCHED:
            self._vouched.popitem(last=False)

    def attach(
        self,
        caller: Caller,
        sock: socket.socket,
        fd: int,
        role: str,
        name: str | None,
        service: str | None,
    ) -> dict[str, Any]:
        """Make a session of a caller's connection.

        Raises:
            UsageError: it is no connected TCP socket of this network namespace.
            Refused: a limit is reached, or the descriptor is not the caller's ``fd``.
        """
        _check_connected(sock)
        if sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8) != self._namespace:
            raise UsageError("the socket is in another network namespace: ask the sessiond there")
        try:
            process = Process.of(caller.pid)
        except OSError as error:
            raise Refused(f"process {caller.pid} can't be reached: {error.strerror}") from error
        connection, facts = self._engine.inspect(sock, process, fd, quiet=role != "attach")
        handle = self._registry.by_cookie.get(connection.cookie)
        if handle is None:
            self._admit(caller.uid)
            handle = self._new_handle()
            owner = Owner(caller.uid, caller.pid, time.time())
            self._registry.add(handle, connection, owner)
            self._watch(connection.cookie)
            self._dispatch(
                ev.Attached(
                    handle,
                    facts.tuple,
                    facts.isn_local,
                    facts.isn_remote,
                    facts.versions,
                    role,
                    name,
                    service,
                    facts.refusal,
                    secrets.token_bytes(16),
                    caller.uid == 0 or (name, facts.tuple.remote.address) in self._vouched,
                )
            )
        return self._registry.record(self._core.table.sessions[handle])

    def records(
        self, uid: int | None, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], str | None]:
        """A page of sessions, in the order they were attached."""
        page: list[dict[str, Any]] = []
        skipping = after is not None
        for session in self._core.table.sessions.values():
            if skipping:
                skipping = session.id.hex() != after
                continue
            if uid is not None and self._registry.owners[session.handle].uid != uid:
                continue
            if len(page) == limit:
                return page, page[-1]["session"]
            page.append(self._registry.record(session))
        return page, None

    def record(self, uid: int | None, session: str) -> dict[str, Any]:
        """One session.

        Raises:
            NotFound: there is none with this id, or it is another user's.
        """
        return self._registry.record(self._find(uid, session))

    async def rebind(self, uid: int | None, session: str, to: str | None) -> dict[str, Any]:
        """Move a session though nothing changed.

        Raises:
            NotFound: there is none with this id.
            Refused: it stays where it is; the message says why.
        """
        found = self._find(uid, session)
        done: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

        def answer(error: str | None) -> None:
            if not done.done():
                done.set_result(error)

        self._dispatch(ev.RebindAsked(found.handle, to, answer))
        try:
            async with asyncio.timeout(REBIND_TIMEOUT):
                error = await done
        except TimeoutError:
            error = f"no answer within {REBIND_TIMEOUT:g} s; it is still {found.state.value}"
        if error is not None:
            raise Refused(error)
        return self._registry.record(found)

    def detach(self, uid: int | None, session: str) -> None:
        """Make a session plain TCP again."""
        found = self._find(uid, session)
        self._dispatch(ev.Ended(found.handle, "detached by its owner"))

    def network(self) -> dict[str, Any]:
        """The addresses and routes sessions are placed by."""
        network = self._core.network
        return {
            "addresses": [address._asdict() for address in network.addresses],
            "routes": [route._asdict() for route in network.routes],
        }

    def stats(self, uid: int | None) -> dict[str, Any]:
        """Counters; those of others' doings for administrators only."""
        sessions = self._core.table.sessions.values()
        states = Counter(s.state.value for s in sessions if self._visible(uid, s))
        result: dict[str, Any] = {"sessions": dict(states)}
        if uid is None:
            result["peers"] = len(self._core.table.associations)
            result["refused"] = dict(self._core.refused)
            result.update(self._peers.statistics())
        return result

    def peers(self, name: str | None) -> dict[str, Any]:
        """The keys known of all peers, or of one.

        Raises:
            UsageError: it is neither a DNS name nor an address.
            Refused: nothing is known of it.
        """
        with _usage():
            known = list(self._peers.keyring.known(name))
        if name is not None and not known:
            raise Refused(f"no key of {name} is known: see 'sessionctl peers list'")
        return {"peers": [{"name": n, "key": fingerprint(k), "source": why} for n, k, why in known]}

    async def pin(self, name: str, key: str) -> None:
        """Accept only this key under a name, besides those of the configuration.

        Raises:
            UsageError: it is no name, or no fingerprint.
            Refused: it can't be written.
        """
        with _usage():
            await self._peers.keyring.pin(name, parse(key))

    async def forget(self, name: str) -> None:
        """Drop what was pinned by request or remembered.

        Raises:
            UsageError: it is neither a DNS name nor an address.
            Refused: there is nothing to forget, or it can't be written.
        """
        with _usage():
            keyring = self._peers.keyring
            if not await keyring.forget(name):
                why = f"no key of {name} is known"
                if keyring.configured(name):
                    why = f"{name} is pinned by the configuration: delete it there"
                raise Refused(why)

    def fingerprint(self) -> dict[str, Any]:
        """This host's key."""
        return {"key": fingerprint(self._peers.key)}

    def subscribe(
        self, uid: int | None, session: str | None, deliver: Deliver
    ) -> Callable[[], None]:
        """Hear of what happens to sessions.

        Returns:
            Call it to hear no more.
        """
        wanted = None if session is None else self._find(uid, session).handle
        subscription = Subscription(uid, wanted, deliver)
        self._registry.subscriptions.add(subscription)
        return lambda: self._registry.subscriptions.discard(subscription)

    def _find(self, uid: int | None, text: str) -> Session:
        try:
            session = self._core.table.by_id.get(bytes.fromhex(text))
        except ValueError:
            session = None
        if session is None or not self._visible(uid, session):
            raise NotFound(f"no session {text}: see 'sessionctl list'")
        return session

    def _visible(self, uid: int | None, session: Session) -> bool:
        return uid is None or self._registry.owners[session.handle].uid == uid

    def _admit(self, uid: int) -> None:
        owners = self._registry.owners
        if len(owners) >= self._limits.sessions:
            raise Refused(
                f"this host has its limit of {self._limits.sessions} sessions: "
                "see [limits] sessions"
            )
        if self._registry.per_uid[uid] >= self._limits.sessions_per_uid:
            raise Refused(
                f"user {uid} has the limit of {self._limits.sessions_per_uid} sessions: "
                "see [limits] sessions_per_uid"
            )

    def _new_handle(self) -> int:
        while True:
            handle = secrets.randbits(32)
            if handle not in self._registry.owners:
                return handle


@contextmanager
def _usage() -> Iterator[None]:
    """What the caller has named wrongly is the caller's fault; a disk is nobody's."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error
    except PrivateFileError as error:
        raise Refused(str(error)) from error


def _check_connected(sock: socket.socket) -> None:
    """Of others the kernel would never tell the end, and nothing could be moved."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.proto != socket.IPPROTO_TCP:
        raise UsageError("the descriptor is no TCP socket: only those have sessions")
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise UsageError("a listening socket has no session: attach what it accepts")
    try:
        sock.getpeername()
    except OSError as error:
        raise UsageError(f"the TCP socket has no peer: {error.strerror}") from None
