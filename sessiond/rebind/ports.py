"""Giving a socket the local address and port it needs, so that it can be given others later.

``bind(addr, port)`` locks both for the socket's life (SOCK_BINDADDR_LOCK, SOCK_BINDPORT_LOCK): they
survive ``connect(AF_UNSPEC)``, and a second bind fails. So nothing is bound that need not be:

- the address is left to the route where the route gives just this one; else it is bound without a
  port (IP_BIND_ADDRESS_NO_PORT), which can be done anew each time;
- an ephemeral port is taken by the connect itself, IP_LOCAL_PORT_RANGE being [p, p] (Linux 6.3,
  inet_sk_get_local_port_range()), beside every other connection from that port;
- that does not do for a port that somebody has bound, which is a server's, and for one that is not
  ephemeral: those are locked, on the wildcard address, so that the address can still change, by
  the route again, which is steered where it gives another one (steering.py).
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from pathlib import Path

from sessiond.core.tuples import Endpoint, FourTuple
from sessiond.rebind import filters
from sessiond.rebind import linux as lx
from sessiond.rebind.steering import Steering, marked

_RANGE = struct.Struct("=HH")  # one 32-bit number, its high half the upper bound
_ANY = ("0.0.0.0", "::")
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_ONESELF = ("127.0.0.1", 9)
_NOWHERE = ("::ffff:255.255.255.255", 9)


class Unbindable(OSError):
    """The socket can't be given that address and port; the message says why."""


InterfaceOf = Callable[[str], str | None]
"""The interface that has a local address."""


class _Source(Enum):
    """How a connect gets its local address."""

    ROUTED = auto()
    """It is the one that the route to the peer gives."""
    BOUND = auto()


class Ports:
    """What this host's ports and routes allow; asked once for a batch.

    Args:
        interface_of: the interface that has a local address.
    """

    def __init__(self, interface_of: InterfaceOf) -> None:
        self._interface_of = interface_of
        self._ephemeral: range | None = None
        self._sources: dict[tuple[str, str], _Source | Unbindable] = {}
        self._sharable: dict[int, bool] = {}
        self._steering = Steering()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """The time for which what was learnt of the network holds."""
        try:
            yield
        finally:
            self._sources.clear()
            self._sharable.clear()
            self._steering.close()

    def refresh(self) -> None:
        """Learn anew what outlasts a batch; when nobody waits: it takes as long as many a move."""
        self._ephemeral = _ephemeral()

    def _is_ephemeral(self, port: int) -> bool:
        if self._ephemeral is None:
            self._ephemeral = _ephemeral()
        return port in self._ephemeral

    def require_path(self, target: FourTuple) -> None:
        """Find out what can be found out before a socket is touched.

        Raises:
            Unbindable: the local address is not this host's, or has no route to the remote one.
        """
        self._source(target)

    def connect(
        self, sock: socket.socket, target: FourTuple, old: FourTuple | None, foreign: bool = False
    ) -> None:
        """Bind and connect a disconnected socket in repair mode.

        Args:
            old: the tuple it had; None: unknown, or none.
            foreign: the local address need not be this host's.

        Raises:
            Unbindable: the local endpoint can't be had.
            OSError: EADDRNOTAVAIL, ENETUNREACH, and what else connect(2) says.
        """
        family = lx.family(sock)
        if family == socket.AF_INET6:
            _choose_version(sock, target.remote.version, old)
        try:
            source, here = self._source(target), True
        except Unbindable:
            if not foreign:
                raise
            source, here = _Source.BOUND, False
        with contextlib.nullcontext() if here else _transparent(sock):
            if self._connect_simply(sock, target, source, old):
                pass
            elif not _bind_address(sock, _any(sock)):
                self._connect_locked(sock, target, source)
            elif self._is_ephemeral(target.local.port) and self._is_sharable(target, source):
                self._connect_ephemeral(sock, target, source, old)
            else:
                self._connect_fixed(sock, target, source, old)
        if not _is_at(sock, target.local):
            local = lx.endpoint(sock.getsockname())
            why = f"the routes changed meanwhile: to {target.remote.address} they gave {local}"
            raise Unbindable(errno.ENETUNREACH, why)

    def spare(self, local: Endpoint) -> Endpoint | None:
        """A free ephemeral port in place of a taken one; None where the port is a service's."""
        if not self._is_ephemeral(local.port):
            return None
        family = socket.AF_INET6 if local.version == 6 else socket.AF_INET
        with socket.socket(family) as helper:
            helper.bind((local.address, 0))
            return Endpoint(local.address, helper.getsockname()[1])

    def hold(
        self, target: FourTuple, *, foreign: bool = False, beside: bool = False
    ) -> socket.socket:
        """A silent socket on a tuple: it keeps others off, and the kernel from answering for it.

        Closing it sends nothing: it stays in repair mode (tcp_close()).

        Args:
            foreign: the local address need not be this host's.
            beside: there is a connection on it still. If that alone has bound the port, the port
                must be free when it has left: this is refused, EADDRINUSE.

        Raises:
            OSError: EADDRNOTAVAIL the tuple is taken, EMFILE, and what else connect(2) says.
        """
        family = socket.AF_INET6 if target.remote.version == 6 else socket.AF_INET
        holder = socket.socket(family, socket.SOCK_STREAM)
        try:
            filters.lock(holder)
            holder.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR, lx.REPAIR_ON)
            ephemeral = self._is_ephemeral(target.local.port)
            if not (ephemeral and _occupy(holder, target, foreign)):
                if ephemeral and beside:
                    raise Unbindable(errno.EADDRINUSE, f"port {target.local.port} is bound")
                # As if it had been there: nothing of another IP version is left in it.
                self.connect(holder, target, target, foreign)
        except BaseException:
            holder.close()
            raise
        return holder

    def _connect_simply(
        self, sock: socket.socket, target: FourTuple, source: _Source, old: FourTuple | None
    ) -> bool:
        """The usual case, in few system calls: the route gives the address, and the port stays.
        False: it is not as usual, and nothing has changed."""
        port = target.local.port
        stays = old is not None and old.local.port == port
        # A disconnect leaves an address only where it is locked.
        if not stays or source is not _Source.ROUTED or sock.getsockname()[0] != _any(sock):
            return False
        try:
            if self._is_ephemeral(port):
                with _within(sock, port):
                    self._connect(sock, target)
            else:
                with contextlib.suppress(OSError):  # locked already
                    sock.bind((_any(sock), port))
                self._connect(sock, target)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return False
        return True

    def _connect_ephemeral(
        self, sock: socket.socket, target: FourTuple, source: _Source, old: FourTuple | None
    ) -> None:
        """Beside other connections from that port, locking nothing."""
        try:
            with _within(sock, target.local.port):
                if source is _Source.BOUND:
                    _bind_address(sock, target.local.address)
                self._connect(sock, target)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            self._connect_fixed(sock, target, source, old)

    def _is_sharable(self, target: FourTuple, source: _Source) -> bool:
        """Whether nobody has bound the port. Asked only where the address would be bound next,
        which locks it too: where the route gives it, the connect itself finds out."""
        port = target.local.port
        if source is _Source.ROUTED:
            return True
        known = self._sharable.get(port)
        if known is None:
            with socket.socket(socket.AF_INET) as helper:
                helper.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR, lx.REPAIR_ON)
                with _within(helper, port):
                    known = not helper.connect_ex(_ONESELF)
            self._sharable[port] = known
        return known

    def _require_free(self, target: FourTuple) -> None:
        """A locked port can't be given up again, so be sure that it is of use."""
        try:
            self.hold(target).close()
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            raise Unbindable(errno.EADDRINUSE, f"{target} is taken on this host") from error

    def _connect_fixed(
        self, sock: socket.socket, target: FourTuple, source: _Source, old: FourTuple | None
    ) -> None:
        """On a port that is the socket's from now on."""
        if old not in (None, target):
            self._require_free(target)
        if source is _Source.ROUTED or self._steer(target):
            sock.bind((_any(sock), target.local.port))
            self._connect_wildcard(sock, target, source)
        else:
            sock.bind(lx.sockaddr(lx.family(sock), target.local))
            self._connect(sock, target)

    def _connect_locked(self, sock: socket.socket, target: FourTuple, source: _Source) -> None:
        """A locked port stays; the address can change where it is not locked too."""
        local, bound = target.local, lx.endpoint(sock.getsockname())
        why = None
        if bound.port != local.port:
            why = f"its port {bound.port} was bound explicitly and can't become {local.port}"
        elif bound.address == local.address:
            self._connect(sock, target)
        elif bound.address not in _ANY:
            why = f"it was bound to {bound} explicitly and can't leave it"
        elif source is _Source.ROUTED or self._steer(target):
            self._connect_wildcard(sock, target, source)
        else:
            why = f"no route to {target.remote.address} gives its bound port {local} as the source"
        if why is not None:
            raise Unbindable(errno.EINVAL, why)

    def _connect_wildcard(self, sock: socket.socket, target: FourTuple, source: _Source) -> None:
        with contextlib.nullcontext() if source is _Source.ROUTED else marked(sock):
            self._connect(sock, target)

    @staticmethod
    def _connect(sock: socket.socket, target: FourTuple) -> None:
        sock.connect(lx.sockaddr(lx.family(sock), target.remote))

    def _steer(self, target: FourTuple) -> bool:
        """Have marked sockets get the source address from the route; False: it can't be done."""
        local, remote = target.local.address, target.remote.address
        try:
            self._steering.prefer(local, remote, self._interface_of(local))
        except OSError:
            return False
        return True

    def _source(self, target: FourTuple) -> _Source:
        key = target.local.address, target.remote.address
        known = self._sources.get(key)
        if known is None:
            known = self._sources[key] = self._find_source(target)
        if isinstance(known, Unbindable):
            raise known
        return known

    @staticmethod
    def _find_source(target: FourTuple) -> _Source | Unbindable:
        if _gives(target):
            return _Source.ROUTED
        local, remote = target.local.address, target.remote.address
        with _probe(target) as probe:
            try:
                probe.bind((local, 0))
            except OSError as error:
                return Unbindable(error.errno, f"{local} can't be used: {error.strerror}")
            try:
                probe.connect((remote, 9))
            except OSError as error:
                why = f"no way from {local} to {remote}: {error.strerror}"
                return Unbindable(error.errno, why)
        return _Source.BOUND


def _ephemeral() -> range:
    low, high = map(int, _PORT_RANGE.read_text().split())
    return range(low, high + 1)


def _probe(target: FourTuple) -> socket.socket:
    family = socket.AF_INET6 if target.remote.version == 6 else socket.AF_INET
    return socket.socket(family, socket.SOCK_DGRAM)


def _gives(target: FourTuple) -> bool:
    """Whether the route gives just this address as the source."""
    with _probe(target) as probe:
        try:
            probe.connect((target.remote.address, 9))
        except OSError:
            return False
        return bool(probe.getsockname()[0] == target.local.address)


def _transparency(sock: socket.socket) -> tuple[int, int]:
    if lx.family(sock) == socket.AF_INET6:
        return lx.IPPROTO_IPV6, lx.IPV6_TRANSPARENT
    return lx.IPPROTO_IP, lx.IP_TRANSPARENT


@contextmanager
def _transparent(sock: socket.socket) -> Iterator[None]:
    """Let a socket have an address that is not this host's (any more); CAP_NET_ADMIN."""
    level, option = _transparency(sock)
    before = sock.getsockopt(level, option)
    sock.setsockopt(level, option, 1)
    try:
        yield
    finally:
        sock.setsockopt(level, option, before)


@contextmanager
def _within(sock: socket.socket, port: int) -> Iterator[None]:
    before = sock.getsockopt(lx.IPPROTO_IP, lx.IP_LOCAL_PORT_RANGE, _RANGE.size)
    sock.setsockopt(lx.IPPROTO_IP, lx.IP_LOCAL_PORT_RANGE, _RANGE.pack(port, port))
    try:
        yield
    finally:
        sock.setsockopt(lx.IPPROTO_IP, lx.IP_LOCAL_PORT_RANGE, before)


def _bind_address(sock: socket.socket, address: str) -> bool:
    """Bind an address without a port; False: the socket has a locked port."""
    before = sock.getsockopt(lx.IPPROTO_IP, lx.IP_BIND_ADDRESS_NO_PORT)
    sock.setsockopt(lx.IPPROTO_IP, lx.IP_BIND_ADDRESS_NO_PORT, 1)
    try:
        sock.bind(lx.sockaddr(lx.family(sock), Endpoint(address, 0)))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        sock.setsockopt(lx.IPPROTO_IP, lx.IP_BIND_ADDRESS_NO_PORT, before)
    return True


def _occupy(holder: socket.socket, target: FourTuple, foreign: bool) -> bool:
    """``Ports.connect`` for a fresh socket that nobody else will ever use, in few system calls.

    Returns:
        False where it is not that easy; the socket is as it was then, or harmlessly bound.
    """
    local, remote = target
    holder.setsockopt(lx.IPPROTO_IP, lx.IP_BIND_ADDRESS_NO_PORT, 1)
    holder.setsockopt(lx.IPPROTO_IP, lx.IP_LOCAL_PORT_RANGE, _RANGE.pack(local.port, local.port))
    if foreign:
        holder.setsockopt(*_transparency(holder), 1)
    try:
        holder.bind((local.address, 0))
        holder.connect(remote)
    except OSError:
        return False
    return True


def _any(sock: socket.socket) -> str:
    return _ANY[lx.family(sock) == socket.AF_INET6]


def _is_at(sock: socket.socket, local: Endpoint) -> bool:
    return bool(sock.getsockname()[:2] == lx.sockaddr(lx.family(sock), local))


def _choose_version(sock: socket.socket, version: int, old: FourTuple | None) -> None:
    """Make an AF_INET6 socket ready for a peer of an IP version."""
    if version == 4:
        # An earlier bind to an IPv6 address has set it (__inet6_bind()).
        if sock.getsockopt(lx.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            try:
                sock.setsockopt(lx.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            except OSError as error:
                why = "it was bound to an IPv6 address explicitly and can't change to IPv4"
                raise Unbindable(error.errno, why) from error
    elif old is None or old.remote.version == 4:
        # The error path of a mapped connect() gives a socket whose last peer was IPv4 the
        # operations of IPv6 back (tcp_v6_connect() in net/ipv6/tcp_ipv6.c).
        with contextlib.suppress(OSError):
            sock.connect(_NOWHERE)
