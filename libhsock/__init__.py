"""TCP sockets that follow their hosts when addresses change. docs/libhsock.md is the guide.

    sock = libhsock.create_connection(("server.test", 7000))
    reader, writer = await libhsock.open_connection("server.test", 7000)

What comes back is a real ``socket.socket``, or asyncio's own streams.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from libhsock.errors import ConnectTimedOut as ConnectTimedOut
from libhsock.errors import CouldNotConnect as CouldNotConnect
from libhsock.errors import DaemonUnavailable as DaemonUnavailable
from libhsock.errors import Denied as Denied
from libhsock.errors import HsockError as HsockError
from libhsock.errors import NameNotResolved as NameNotResolved
from libhsock.errors import NoLocalAddress as NoLocalAddress
from libhsock.errors import NotFound as NotFound
from libhsock.errors import ProtocolError as ProtocolError
from libhsock.errors import Refused as Refused
from libhsock.errors import UsageError as UsageError

if TYPE_CHECKING:
    from libhsock.aio import open_connection as open_connection
    from libhsock.aio import session as session
    from libhsock.aio import start_server as start_server
    from libhsock.hsocket import HSocket as HSocket
    from libhsock.hsocket import attach as attach
    from libhsock.hsocket import create_connection as create_connection
    from libhsock.hsocket import create_server as create_server
    from libhsock.sessions import Session as Session
    from libhsock.wire import Event as Event
    from libhsock.wire import Kind as Kind
    from libhsock.wire import Record as Record
    from libhsock.wire import State as State

_HOMES = {
    **dict.fromkeys(("open_connection", "session", "start_server"), "aio"),
    **dict.fromkeys(("HSocket", "attach", "create_connection", "create_server"), "hsocket"),
    "Session": "sessions",
    **dict.fromkeys(("Event", "Kind", "Record", "State"), "wire"),
}


def __getattr__(name: str) -> Any:
    # At first use: sessionctl and blocking programs need not wait for asyncio and ssl to load.
    if name not in _HOMES:
        raise AttributeError(f"module 'libhsock' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"libhsock.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
