"""The local server: listens, admits clients, and counts them."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections import Counter
from pathlib import Path

from libhsock.errors import Refused
from sessiond.edges.local.backend import Backend
from sessiond.edges.local.caller import Caller, caller_of, gid_of
from sessiond.edges.local.client import Client
from sessiond.edges.local.limits import Limits
from sessiond.edges.local.listener import identity, listen

log = logging.getLogger(__name__)

COMPLAINT_INTERVAL = 1.0
"""Seconds between two lines of the log about clients' faults: anybody here can cause them."""


class LocalServer:
    """Listens between ``start`` and ``close``."""

    def __init__(
        self,
        path: str | Path,
        backend: Backend,
        group: str = "sessiond",
        *,
        clients_per_uid: int = 1000,
        listener: socket.socket | None = None,
        limits: Limits | None = None,
        daemon: str = "sessiond",
    ) -> None:
        """``listener`` is a listening socket that a supervisor passed: then ``path`` is neither
        created nor removed. ``daemon`` is what ``hello`` answers, for people. Root's connections
        are limited in all only."""
        self.path = str(path)
        self.backend = backend
        self.limits = limits or Limits()
        self.daemon = daemon
        self._group = group
        self._per_uid = clients_per_uid
        self._listener = listener
        self._bound: tuple[int, int] | None = None
        self._clients: set[Client] = set()
        self._uids: Counter[int] = Counter()
        self._quiet_until = 0.0
        self._unsaid = 0

    async def start(self) -> None:
        """Listen. Raises OSError: EADDRINUSE when another daemon does."""
        self._loop = asyncio.get_running_loop()
        self._gid = gid_of(self._group)
        if self._listener is None:
            self._listener = listen(self.path)
            self._bound = identity(self.path)
        elif self._listener.type != socket.SOCK_SEQPACKET:
            raise OSError(errno.EPROTOTYPE, "the socket passed in is no SOCK_SEQPACKET", self.path)
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept, self._listener)

    async def close(self) -> None:
        """Drop the clients, stop listening, and remove the path if it is still this server's."""
        if self._listener is None:
            return
        self._loop.remove_reader(self._listener)
        self._listener.close()
        self._listener = None
        tasks = [task for client in self._clients for task in client.tasks]
        for client in [*self._clients]:
            client.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._bound is not None and identity(self.path) == self._bound:
            os.unlink(self.path)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors or memory. The client stays in the backlog: look away for a while.
            self.complain("no client can be accepted: %s", error.strerror)
            self._loop.remove_reader(listener)
            self._loop.call_later(1.0, self._accept_again)
            return
        try:
            caller = caller_of(sock, self._gid)
        except OSError as error:
            sock.close()
            self.complain("a client was gone before it was looked at: %s", error.strerror)
            return
        self._admit(sock, caller)

    def _accept_again(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept, self._listener)

    def _admit(self, sock: socket.socket, caller: Caller) -> None:
        client = Client(self, sock, caller)
        self._clients.add(client)
        self._uids[caller.uid] += 1
        if caller.uid != 0 and self._uids[caller.uid] > self._per_uid:
            client.refuse(Refused(f"user {caller.uid} has {self._per_uid} connections to sessiond"))
        elif len(self._clients) > self.limits.clients:
            client.refuse(Refused(f"sessiond has its limit of {self.limits.clients} clients"))

    def forget(self, client: Client) -> None:
        """A client is closed."""
        self._clients.discard(client)
        self._uids[client.caller.uid] -= 1
        if not self._uids[client.caller.uid]:
            del self._uids[client.caller.uid]

    def complain(self, message: str, *args: object) -> None:
        """Log a client's fault, not more often than COMPLAINT_INTERVAL."""
        now = self._loop.time()
        if now < self._quiet_until:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} more complaints)" if self._unsaid else ""
        log.warning(message + more, *args)
        self._quiet_until, self._unsaid = now + COMPLAINT_INTERVAL, 0
