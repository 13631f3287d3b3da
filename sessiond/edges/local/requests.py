"""One typed request to the backend, and its reply."""

from __future__ import annotations

import socket
from collections.abc import Coroutine
from typing import Any

from libhsock import wire
from libhsock.errors import Denied, UsageError
from libhsock.wire import Map
from sessiond.edges.local.backend import Backend
from sessiond.edges.local.caller import Caller

Work = Coroutine[Any, Any, Map]


class Requests:
    """Those of one caller."""

    def __init__(self, backend: Backend, caller: Caller) -> None:
        self._backend = backend
        self._caller = caller

    def answer(self, id: int, call: wire.Call[Any], fds: list[int]) -> bytes | Work:
        """The packet of a good reply, or what has to be awaited for its result; ``fds`` stay the
        caller's. Raises HsockError."""
        scope = self._caller.scope
        match call:
            case wire.Attach():
                return wire.reply(id, self._attach(call, fds))
            case wire.List():
                return self._page(id, call.after, min(call.limit, wire.MAX_PAGE))
            case wire.Show():
                return wire.reply(id, self._backend.record(scope, call.session))
            case wire.Detach():
                self._backend.detach(scope, call.session)
                return wire.reply(id, {})
            case wire.Network():
                return wire.reply(id, self._backend.network())
            case wire.GetStats():
                return wire.reply(id, flat(self._backend.stats(scope)))
            case wire.Peers():
                return wire.reply(id, self._backend.peers(None))
            case wire.Peer():
                return wire.reply(id, self._backend.peers(call.name))
            case wire.Pin() | wire.Forget():
                if not self._caller.admin:
                    raise Denied(f"user {self._caller.uid} may not change whose keys are accepted")
                return self._change(call)
            case wire.Fingerprint():
                return wire.reply(id, self._backend.fingerprint())
            case wire.Resolve():
                wire.check_host(call.name)
                return self._resolve(call)
            case wire.Rebind():
                return self._backend.rebind(scope, call.session, call.to)
        raise UsageError(f"{call.method} is no request to the daemon")

    async def _change(self, call: wire.Pin | wire.Forget) -> Map:
        if isinstance(call, wire.Pin):
            await self._backend.pin(call.name, call.key)
        else:
            await self._backend.forget(call.name)
        return {}

    def _attach(self, call: wire.Attach, fds: list[int]) -> Map:
        try:
            sock = socket.socket(fileno=fds[0])
        except OSError as error:
            raise UsageError(f"the descriptor is no socket: {error.strerror}") from None
        try:
            return self._backend.attach(
                self._caller, sock, call.fd, call.role, call.name, call.service
            )
        finally:
            sock.detach()  # it is closed with the packet

    async def _resolve(self, call: wire.Resolve) -> Map:
        found = await self._backend.resolve(call.name, call.service, call.family, call.srv)
        return {"candidates": [[*one] for one in found.candidates], "source": found.source}

    def _page(self, id: int, after: str | None, limit: int) -> bytes:
        """As many records as fit into a packet."""
        records, following = self._backend.records(self._caller.scope, after, limit)
        try:
            return wire.reply(id, {"sessions": records, "next": following})
        except UsageError:
            if limit == 1:
                raise
            return self._page(id, after, limit // 2)


def flat(counters: Map) -> Map:
    """Counters in maps of their own as ``"name.key"``."""
    found: Map = {}
    for name, value in counters.items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": count for key, count in value.items()}
        else:
            found[name] = value
    return found
