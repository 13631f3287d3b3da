"""The local protocol between applications (or sessionctl) and sessiond, defined once.

An AF_UNIX SOCK_SEQPACKET socket, one msgpack value a packet, in the arrays of msgpack-RPC:
``[0, id, method, params]`` is a request, ``[1, id, error, result]`` its reply, and
``[2, method, params]`` a notification. docs/local-protocol.md is the manual for other languages.

Every request is a type that knows its method and what its reply holds, so that
``client.call(Show("…"))`` is typed and both ends check against the same definition. Requests are
read strictly, replies leniently: a newer daemon may say more, nobody may ask for more.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, NoReturn, TypeVar

import msgpack

from libhsock import errors, shape
from libhsock.errors import HsockError, ProtocolError, UsageError
from libhsock.packet import MAX_FDS as MAX_FDS
from libhsock.packet import MAX_PACKET as MAX_PACKET
from libhsock.packet import Packet as Packet
from libhsock.packet import new_socket as new_socket
from libhsock.packet import receive as receive
from libhsock.packet import send as send
from libhsock.records import Done as Done
from libhsock.records import Event as Event
from libhsock.records import HostKey as HostKey
from libhsock.records import Kind as Kind
from libhsock.records import Map as Map
from libhsock.records import Name, SessionId
from libhsock.records import NetworkAddress as NetworkAddress
from libhsock.records import NetworkRoute as NetworkRoute
from libhsock.records import NetworkView as NetworkView
from libhsock.records import Page as Page
from libhsock.records import PeerKey as PeerKey
from libhsock.records import PeerKeys as PeerKeys
from libhsock.records import Record as Record
from libhsock.records import Resolution as Resolution
from libhsock.records import State as State
from libhsock.records import Stats as Stats
from libhsock.records import Welcome as Welcome
from libhsock.shape import Shape

VERSION = 1
DEFAULT_PATH = "/run/sessiond/sessiond.sock"
MAX_DEPTH = 8
"""Arrays and maps inside each other; the deepest message of version 1 has five."""
MAX_PAGE = 100
"""Records of one ``list`` reply."""

R = TypeVar("R")

Text = Annotated[str, range(0, 1025)]
Role = Literal["connect", "accept", "attach"]
Family = Literal[0, 4, 6]


def socket_path() -> str:
    """Where the daemon listens: ``$SESSIOND_SOCKET``, else the default."""
    return os.environ.get("SESSIOND_SOCKET") or DEFAULT_PATH


# --- requests -----------------------------------------------------------------------------------


class Call(Shape, Generic[R]):
    """A request; ``R`` is what its reply holds."""

    method: ClassVar[str]
    reply: ClassVar[type[Any]]
    repeatable: ClassVar[bool] = True
    """Doing it twice is the same as doing it once, so a lost reply may be asked for again."""
    meets_network: ClassVar[bool] = False
    """The reply may have to wait for other hosts."""

    def parse(self, result: object) -> R:
        """The typed result. Raises ProtocolError."""
        parsed: R = self.reply.from_map(result)
        return parsed


class Hello(Call[Welcome]):
    """First on every connection."""

    method: ClassVar[str] = "hello"
    reply: ClassVar[type[Any]] = Welcome
    client: Text
    versions: Annotated[tuple[int, ...], range(1, 17)] = (VERSION,)


class Resolve(Call[Resolution]):
    """The addresses of a name, best first."""

    method: ClassVar[str] = "resolve"
    reply: ClassVar[type[Any]] = Resolution
    meets_network: ClassVar[bool] = True
    name: Name
    service: Name
    """A port number in digits, or a service's name."""
    family: Family = 0
    """0: both."""
    srv: bool = False
    """Ask for SRV records of the service first (RFC 2782)."""


class Attach(Call[Record]):
    """Make a session of the connected TCP socket that travels beside this packet.

    Asked again for the same connection, it tells of the session that is there.
    """

    method: ClassVar[str] = "attach"
    reply: ClassVar[type[Any]] = Record
    fd: Annotated[int, range(0, 2**31)]
    """The socket's number in the calling process."""
    role: Role
    name: Name | None = None
    """The peer's name, by which it is found again; None for accepted connections."""
    service: Name | None = None


class List(Call[Page]):
    """The caller's sessions, a page at a time; an administrator's are everybody's."""

    method: ClassVar[str] = "list"
    reply: ClassVar[type[Any]] = Page
    after: SessionId | None = None
    limit: Annotated[int, range(1, 2**31)] = MAX_PAGE
    """The daemon may give fewer."""


class Show(Call[Record]):
    """One session."""

    method: ClassVar[str] = "show"
    reply: ClassVar[type[Any]] = Record
    session: SessionId


class Rebind(Call[Record]):
    """Move a session now; the reply comes when it has moved."""

    method: ClassVar[str] = "rebind"
    reply: ClassVar[type[Any]] = Record
    repeatable: ClassVar[bool] = False
    meets_network: ClassVar[bool] = True
    session: SessionId
    to: Name | None = None
    """A local address or an interface; None: the best there is."""


class Detach(Call[Done]):
    """Forget a session: the connection goes on as plain TCP."""

    method: ClassVar[str] = "detach"
    reply: ClassVar[type[Any]] = Done
    session: SessionId


class Monitor(Call[Done]):
    """From the reply on, tell what happens on this connection, which takes no further requests."""

    method: ClassVar[str] = "monitor"
    reply: ClassVar[type[Any]] = Done
    session: SessionId | None = None
    """None: all the caller may see."""


class Network(Call[NetworkView]):
    """What the daemon sees of the host's network."""

    method: ClassVar[str] = "network"
    reply: ClassVar[type[Any]] = NetworkView


class Peers(Call[PeerKeys]):
    """The keys of peers that the daemon knows."""

    method: ClassVar[str] = "peers"
    reply: ClassVar[type[Any]] = PeerKeys


class Peer(Call[PeerKeys]):
    """The keys known under one name."""

    method: ClassVar[str] = "peer"
    reply: ClassVar[type[Any]] = PeerKeys
    name: Name


class Pin(Call[Done]):
    """Accept this key only under a name, besides those the configuration has."""

    method: ClassVar[str] = "pin"
    reply: ClassVar[type[Any]] = Done
    name: Name
    key: Name
    """A fingerprint."""


class Forget(Call[Done]):
    """Meet a name's peer again as if for the first time."""

    method: ClassVar[str] = "forget"
    reply: ClassVar[type[Any]] = Done
    repeatable: ClassVar[bool] = False
    name: Name


class Fingerprint(Call[HostKey]):
    """This host's own key, for others to pin."""

    method: ClassVar[str] = "fingerprint"
    reply: ClassVar[type[Any]] = HostKey


class GetStats(Call[Stats]):
    """The daemon's counters; those of one user's sessions for a user."""

    method: ClassVar[str] = "stats"
    reply: ClassVar[type[Any]] = Stats

    def parse(self, result: object) -> Stats:
        """The map of counters is the result itself, so that a new one needs no new field."""
        return Stats.from_map({"counters": result})


CALLS: dict[str, type[Call[Any]]] = {
    call.method: call
    for call in (
        Hello, Resolve, Attach, List, Show, Rebind, Detach, Monitor, Network, GetStats,
        Peers, Peer, Pin, Forget, Fingerprint
    )
}  # fmt: skip


# --- packets ------------------------------------------------------------------------------------


class Request(NamedTuple):
    """``[0, id, method, params]``"""

    id: int
    method: str
    params: Map


class Reply(NamedTuple):
    """``[1, id, error, result]``; id 0 ends the connection and says why."""

    id: int
    error: HsockError | None
    result: object

    def unwrap(self) -> object:
        """The result. Raises the error replied."""
        if self.error is not None:
            raise self.error
        return self.result


class Notification(NamedTuple):
    """``[2, method, params]``"""

    method: str
    params: Map


class _ErrorMap(Shape):
    code: str
    message: str
    tried: tuple[str, ...] = ()


def request(id: int, call: Call[Any]) -> bytes:
    """The packet of a request. Raises UsageError when it is larger than a packet may be."""
    return _pack([0, id, call.method, call.to_map()])


def reply(id: int, result: object) -> bytes:
    """The packet of a good reply; ``result`` is a map. Raises UsageError when it is too large."""
    return _pack([1, id, None, result])


def failure(id: int, error: HsockError) -> bytes:
    """The packet of a bad reply. A text too long for a packet is cut."""
    told = errors.to_map(error)
    told["message"] = told["message"][:4096]
    told["tried"] = [one[:512] for one in told["tried"][:32]]
    return _pack([1, id, told, None])


def notification(event: Map) -> bytes:
    """The packet of an event."""
    return _pack([2, "event", event])


def _pack(value: list[Any]) -> bytes:
    try:
        data: bytes = msgpack.packb(value, use_bin_type=True)
    except (OverflowError, ValueError, TypeError) as error:
        raise UsageError(f"can't be said on the local protocol: {error}") from None
    if len(data) > MAX_PACKET:
        raise UsageError(f"a message of {len(data)} bytes; the limit is {MAX_PACKET}")
    return data


def decode(data: bytes, *, trusted: bool = False) -> Request | Reply | Notification:
    """A packet's message, its outer shape checked. Raises ProtocolError, whatever the bytes.

    ``trusted``: from the daemon; what nobody reads of it is not searched for faults.
    """
    value = _unpack(data, trusted)
    if not isinstance(value, list) or not value or type(value[0]) is not int:
        _malformed("not an array that begins with a message type")
    match value:
        case [0, id, str(method), dict(params)] if _is_id(id) and id > 0:
            return Request(id, method, params)
        case [1, id, None, result] if _is_id(id):
            return Reply(id, None, result)
        case [1, id, error, None] if _is_id(id):
            return Reply(id, _error(error), None)
        case [2, str(method), dict(params)]:
            return Notification(method, params)
    _malformed("neither request, reply nor notification")


def reply_to(id: int, data: bytes) -> Reply:
    """What a packet replies to request ``id``. Raises ProtocolError."""
    message = decode(data, trusted=True)
    if not isinstance(message, Reply) or message.id not in (0, id):
        raise ProtocolError(f"not the reply to request {id}")
    return message


def event(data: bytes) -> Event | None:
    """The event a packet tells of; None for notifications of other kinds. Raises ProtocolError,
    or the error with which the daemon ends the connection."""
    message = decode(data, trusted=True)
    if isinstance(message, Reply) and message.error is not None:
        raise message.error
    if not isinstance(message, Notification):
        raise ProtocolError("not an event")
    return Event.from_map(message.params) if message.method == "event" else None


def ends(event: Event, session: str | None) -> bool:
    """Nothing comes after this event on a stream about ``session`` (None: about all)."""
    return event.kind == Kind.OVERFLOW or (session is not None and event.kind == Kind.CLOSED)


def parse(message: Request) -> Call[Any]:
    """The typed request. Raises UsageError: unknown method, unknown, missing or wrong field."""
    call = CALLS.get(message.method)
    if call is None:
        raise UsageError(f"unknown method {message.method[:64]!r}")
    try:
        return shape.read(call, message.params, strict=True)
    except shape.ShapeError as error:
        raise UsageError(f"{call.method}: {error}") from None


def check_host(name: str) -> None:
    """Raises UsageError for what can be no host's name (RFC 1035 section 2.3.4) nor address."""
    bare = name.removesuffix(".")
    if not 0 < len(bare) < 254:
        raise UsageError(f"{name[:64]!r} is no host name: it has {len(bare)} characters")
    if not all(0 < len(label) < 64 for label in bare.split(".")):
        raise UsageError(f"{name!r} is no host name: between its dots are 1 to 63 characters")


def _unpack(data: bytes, trusted: bool) -> object:
    if len(data) > MAX_PACKET:
        _malformed(f"{len(data)} bytes; the limit is {MAX_PACKET}")
    try:
        hook = None if trusted else _without_doubles
        value: object = msgpack.unpackb(data, raw=False, object_pairs_hook=hook)
    except (ValueError, TypeError) as error:
        # msgpack's own family and UnicodeDecodeError are ValueErrors; unhashable keys TypeErrors.
        _malformed(str(error) or type(error).__name__)
    if not trusted:
        _check(value, MAX_DEPTH)
    return value


def _without_doubles(pairs: list[tuple[Any, Any]]) -> Map:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice in one map")
    return found


def _check(value: object, depth: int) -> None:
    if depth == 0 and isinstance(value, (list, dict)):
        _malformed(f"more than {MAX_DEPTH} levels")
    if isinstance(value, list):
        for item in value:
            _check(item, depth - 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                _malformed("a key that is no string")
            _check(item, depth - 1)
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        _malformed(f"a value of type {type(value).__name__}")


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _error(value: object) -> HsockError:
    try:
        told = shape.read(_ErrorMap, value, strict=False)
    except shape.ShapeError as error:
        _malformed(f"error: {error}")
    return errors.from_map(told.code, told.message, told.tried)


def _malformed(why: str) -> NoReturn:
    raise ProtocolError(f"a malformed message on the local protocol: {why}")
