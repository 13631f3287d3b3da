"""The one family of errors an application catches: ``except HsockError``.

Opening a connection fails in the thesis's three ways, each saying what was tried:

* ``NoLocalAddress``   this host has no usable address or route
* ``NameNotResolved``  the name has no address
* ``CouldNotConnect``  the name has addresses, none of them answered

They are also the ``OSError`` that existing code expects there, so ``except OSError``,
``except ConnectionError``, ``except TimeoutError`` and ``except socket.gaierror`` keep working.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from typing import Any, ClassVar


class HsockError(Exception):
    """Something libhsock or sessiond could not do.

    ``code`` names the kind on the local protocol, ``message`` is one sentence for people, and
    ``tried`` lists what was attempted, each with its own reason.
    """

    code: ClassVar[str] = "failed"

    def __init__(self, message: str, tried: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.tried = tuple(tried)

    def __str__(self) -> str:
        return f"{self.message}; tried: {', '.join(self.tried)}" if self.tried else self.message


class UsageError(HsockError):
    """The caller asked for something that can't be asked: a bug in the program that called."""

    code = "usage"


class Denied(HsockError):
    """The caller may not do this."""

    code = "denied"


class NotFound(HsockError):
    """No such session, or it is another user's: the two are not told apart."""

    code = "not-found"


class Refused(HsockError):
    """A well-formed request that can't be met now; the message says why."""

    code = "refused"


class DaemonUnavailable(HsockError):
    """sessiond is not running, went away, or did not answer in time."""

    code = "unavailable"


class ProtocolError(HsockError):
    """The other side of the local socket broke the protocol: a bug there, or another version."""

    code = "protocol"


class NoLocalAddress(HsockError, OSError):
    """This host has no usable address or route for any of the peer's addresses."""

    code = "no-local-address"

    def __init__(self, message: str, tried: Iterable[str] = ()) -> None:
        super().__init__(message, tried)
        self.errno = errno.ENETUNREACH


class NameNotResolved(HsockError, socket.gaierror):
    """The name or the service could not be resolved."""

    code = "name-not-resolved"

    def __init__(self, message: str, tried: Iterable[str] = ()) -> None:
        super().__init__(message, tried)
        self.errno = socket.EAI_NONAME


class CouldNotConnect(HsockError, ConnectionError):
    """The name was resolved and no address could be reached.

    ``errno`` is that of the best candidate's attempt, so that ECONNREFUSED can be told from
    EHOSTUNREACH as with a plain socket.
    """

    code = "could-not-connect"

    def __init__(self, message: str, tried: Iterable[str] = (), errno: int | None = None) -> None:
        super().__init__(message, tried)
        self.errno = errno


class ConnectTimedOut(CouldNotConnect, TimeoutError):
    """``CouldNotConnect`` because the caller's time was up."""

    def __init__(self, message: str, tried: Iterable[str] = ()) -> None:
        super().__init__(message, tried, errno.ETIMEDOUT)


BY_CODE: dict[str, type[HsockError]] = {
    kind.code: kind
    for kind in (
        HsockError,
        UsageError,
        Denied,
        NotFound,
        Refused,
        DaemonUnavailable,
        ProtocolError,
        NoLocalAddress,
        NameNotResolved,
        CouldNotConnect,
    )
}


def to_map(error: HsockError) -> dict[str, Any]:
    """The error as it travels on the local protocol."""
    return {"code": error.code, "message": error.message, "tried": list(error.tried)}


def from_map(code: str, message: str, tried: Iterable[str]) -> HsockError:
    """The error that ``to_map`` described; a code from a newer daemon becomes ``HsockError``."""
    return BY_CODE.get(code, HsockError)(message, tried)
