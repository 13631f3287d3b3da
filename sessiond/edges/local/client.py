"""One client's connection: its greeting, its requests, its subscription."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import time
from collections.abc import Callable
from typing import Protocol

from libhsock import wire
from libhsock.errors import DaemonUnavailable, HsockError, ProtocolError, Refused, UsageError
from libhsock.wire import Map
from sessiond.edges.local.backend import Backend
from sessiond.edges.local.caller import Caller
from sessiond.edges.local.channel import Channel
from sessiond.edges.local.descriptors import close_foreign
from sessiond.edges.local.limits import Limits
from sessiond.edges.local.requests import Requests, Work


class Server(Protocol):
    """What a client knows of the server that admitted it."""

    backend: Backend
    limits: Limits
    daemon: str

    def forget(self, client: Client) -> None:
        """A client is closed."""

    def complain(self, message: str, *args: object) -> None:
        """Log a client's fault."""


class Client(Channel):
    """One connection."""

    def __init__(self, server: Server, sock: socket.socket, caller: Caller) -> None:
        super().__init__(sock, server.limits)
        self.caller = caller
        self.tasks: set[asyncio.Task[Map]] = set()
        self._server = server
        self._requests = Requests(server.backend, caller)
        self._greeted = False
        self._unsubscribe: Callable[[], None] | None = None
        self._greeting = self._loop.call_later(server.limits.greeting, self._not_greeted)

    def refuse(self, error: HsockError) -> None:
        """Say why, then close."""
        self.end(wire.failure(0, error))

    def on_stall(self) -> None:
        self._late("read")

    def on_close(self) -> None:
        self._greeting.cancel()
        for task in self.tasks:
            task.cancel()
        if self._unsubscribe is not None:
            self._unsubscribe()
        os.close(self.caller.pidfd)
        self._server.forget(self)

    def on_readable(self) -> None:
        sound = False
        try:
            self._read()
            sound = True
        except BlockingIOError:
            sound = True
        except ProtocolError as error:
            who = self.caller
            self._server.complain("pid %d, uid %d: %s", who.pid, who.uid, error)
            self.refuse(error)
            sound = True
        except OSError:
            pass  # it has gone
        finally:
            # Whatever escapes is a fault of the daemon's; the loop logs it, one client pays.
            if not sound:
                self.close()

    def _read(self) -> None:
        received = self.receive()
        try:
            if not received.data:
                return self.close()
            request = wire.decode(received.data)
            if not isinstance(request, wire.Request):
                raise ProtocolError("a reply or notification from a client")
            try:
                answer = self._answer(request, received.fds)
            except HsockError as error:
                answer = wire.failure(request.id, error)
            if isinstance(answer, bytes):
                self.send(answer)
            else:
                self._spawn(request.id, answer)
        finally:
            received.close(close_foreign)

    def _answer(self, request: wire.Request, fds: list[int]) -> bytes | Work:
        call = wire.parse(request)
        if len(fds) != isinstance(call, wire.Attach):
            raise UsageError(f"{call.method} came with {len(fds)} descriptors")
        if isinstance(call, wire.Hello):
            return wire.reply(request.id, self._greet(call).to_map())
        if not self._greeted:
            raise UsageError("say hello first")
        if self._unsubscribe is not None:
            raise UsageError("this connection monitors and takes no further requests")
        if len(self.tasks) >= self._limits.pending:
            raise Refused(f"{len(self.tasks)} requests of this connection are under way")
        if isinstance(call, wire.Monitor):
            scope = self.caller.scope
            self._unsubscribe = self._server.backend.subscribe(scope, call.session, self._deliver)
            return wire.reply(request.id, {})
        return self._requests.answer(request.id, call, fds)

    def _greet(self, call: wire.Hello) -> wire.Welcome:
        if wire.VERSION not in call.versions:
            asked = ", ".join(map(str, call.versions))
            raise UsageError(f"this daemon speaks version {wire.VERSION}, not {asked}")
        if not self._greeted:
            self._greeted = True
            self._greeting.cancel()
        return wire.Welcome(wire.VERSION, self._server.daemon, self.caller.admin)

    def _spawn(self, id: int, work: Work) -> None:
        task = self._loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(functools.partial(self._finished, id))

    def _finished(self, id: int, task: asyncio.Task[Map]) -> None:
        self.tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if self.closed or self.ending:
            return
        if error is None:
            self.send(wire.reply(id, task.result()))
        elif isinstance(error, HsockError):
            self.send(wire.failure(id, error))
        else:
            context = {"message": "a request failed in an unforeseen way", "exception": error}
            self._loop.call_exception_handler(context)
            self.close()

    def _deliver(self, event: Map) -> None:
        if self.closed or self.ending:
            return
        if not self.full:
            self.send(wire.notification(event))
            return
        overflow = wire.Event(session="", kind=wire.Kind.OVERFLOW.value, time=time.time())
        self.give_up(wire.notification(overflow.to_map()))

    def _not_greeted(self) -> None:
        self._late("greet")
        self.refuse(DaemonUnavailable("sessiond waited for hello in vain"))

    def _late(self, what: str) -> None:
        who = self.caller
        self._server.complain("pid %d, uid %d did not %s in time", who.pid, who.uid, what)
