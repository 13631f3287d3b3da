"""The thread behind ``libhsock.testing.FakeDaemon``: packets in, typed requests to one function."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any

from libhsock import wire
from libhsock.errors import HsockError, ProtocolError, UsageError

Answer = Callable[[wire.Call[Any], list[int]], wire.Map | None]
"""A request and its descriptors to the map replied, or None for no reply at all."""


class FakeServer:
    """Serves one path from a thread between ``start`` and ``stop``; can be started again."""

    def __init__(self, path: str, answer: Answer) -> None:
        self.path = path
        self._answer = answer
        self._lock = threading.RLock()
        self._monitors: dict[socket.socket, str | None] = {}

    def start(self) -> None:
        """Listen."""
        self._listener = wire.new_socket()
        self._listener.bind(self.path)
        self._listener.listen(128)
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for sock in (self._listener, self._woken):
            self._selector.register(sock, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="FakeDaemon", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Drop every client and the path, as a daemon that is killed does."""
        self._wake.send(b"x")
        self._thread.join()
        for key in [*self._selector.get_map().values()]:
            self._drop(key.fileobj)
        self._selector.close()
        self._wake.close()
        os.unlink(self.path)

    def tell(self, session: str, data: bytes) -> None:
        """Send a packet to whoever monitors the session. From any thread."""
        with self._lock:
            told = [sock for sock, of in self._monitors.items() if of in (None, session)]
            for sock in told:
                # A test that doesn't read its events has no use for them.
                with contextlib.suppress(OSError):
                    sock.send(data, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    return
                if key.fileobj is self._listener:
                    sock, _ = self._listener.accept()
                    self._selector.register(sock, selectors.EVENT_READ)
                else:
                    self._serve(key.fileobj)

    def _serve(self, sock: Any) -> None:
        try:
            received = wire.receive(sock)
            if not received.data:
                return self._drop(sock)
            try:
                self._reply(sock, received)
            finally:
                received.close()
        except ProtocolError as error:
            wire.send(sock, wire.failure(0, error))
            self._drop(sock)
        except ConnectionError:
            self._drop(sock)

    def _reply(self, sock: socket.socket, received: wire.Packet) -> None:
        request = wire.decode(received.data)
        if not isinstance(request, wire.Request):
            raise ProtocolError("not a request")
        with self._lock:
            try:
                if sock in self._monitors:
                    raise UsageError("this connection monitors and takes no further requests")
                call = wire.parse(request)
                result = self._answer(call, received.fds)
            except HsockError as error:
                wire.send(sock, wire.failure(request.id, error))
                return
            if result is None:
                return
            wire.send(sock, wire.reply(request.id, result))
            if isinstance(call, wire.Monitor):
                self._monitors[sock] = call.session

    def _drop(self, sock: Any) -> None:
        with self._lock:
            self._monitors.pop(sock, None)
        self._selector.unregister(sock)
        sock.close()
