"""Giving a socket the local address and port it needs, so that it can be given others later.

``bind(addr, port)`` locks the port for the socket's life (SOCK_BINDPORT_LOCK): it survives
``connect(AF_UNSPEC)`` and a second bind fails. Two binds don't lock:

- ``bind(addr, 0)`` with IP_LOCAL_PORT_RANGE [p, p] takes p where p is an ephemeral port
  (Linux 6.3, inet_sk_get_local_port_range());
- ``bind(any, p)`` locks the port alone: each ``connect`` then takes the source address its route
  gives. That serves a server's port, which stays while its address changes; the route is steered
  by SO_BINDTODEVICE to the interface that has the address.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sessiond.core.tuples import Endpoint, FourTuple
from sessiond.rebind import linux as lx

_RANGE = struct.Struct("=HH")  # one 32-bit number, its high half the upper bound
_ANY = {4: "0.0.0.0", 6: "::"}
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_NOWHERE = ("::ffff:255.255.255.255", 9)


class Unbindable(OSError):
    """The socket can't be given that address and port; the message says why."""


InterfaceOf = Callable[[str], str | None]
"""The interface that has a local address."""


class Ports:
    """What this host's ports and routes allow; asked once for a batch.

    Args:
        interface_of: the interface that has a local address.
    """

    def __init__(self, interface_of: InterfaceOf) -> None:
        self._interface_of = interface_of
        self._ephemeral = range(0)
        self._steerable: dict[tuple[str, str], bool] = {}
        self.refresh()

    def refresh(self) -> None:
        """Forget what may have changed since the last batch."""
        low, high = map(int, _PORT_RANGE.read_text().split())
        self._ephemeral = range(low, high + 1)
        self._steerable.clear()

    def connect(self, sock: socket.socket, target: FourTuple) -> None:
        """Bind and connect a disconnected socket in repair mode.

        Raises:
            Unbindable: the local endpoint can't be had.
            OSError: EADDRNOTAVAIL, ENETUNREACH, and what else connect(2) says.
        """
        local, remote = target
        if sock.family == socket.AF_INET6 and remote.version == 6:
            _to_native(sock)
        try:
            routed = self._bind(sock, target)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Unbindable(error.errno, f"{local} is taken on this host") from error
            if error.errno != errno.EINVAL:
                raise
            routed = self._keep_locked(sock, target)
        interface = self._interface_of(local.address) if routed else None
        with _steered(sock, interface):
            sock.connect(lx.sockaddr(sock.family, remote))

    def spare(self, local: Endpoint) -> Endpoint | None:
        """A free ephemeral port in place of a taken one; None where the port is a service's."""
        if local.port not in self._ephemeral:
            return None
        family = socket.AF_INET6 if local.version == 6 else socket.AF_INET
        with socket.socket(family) as helper:
            helper.bind((local.address, 0))
            return Endpoint(local.address, helper.getsockname()[1])

    def _bind(self, sock: socket.socket, target: FourTuple) -> bool:
        """Bind a socket that has no locked port; EINVAL says that it has one.

        Returns:
            Whether the source address is left to the route.
        """
        local = target.local
        if sock.family == socket.AF_INET6 and local.version == 4:
            # Set by an earlier bind to an IPv6 address (__inet6_bind()); EINVAL with a locked port.
            sock.setsockopt(lx.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if local.port in self._ephemeral:
            _bind_unlocked(sock, local)
        elif self._is_steerable(target):
            sock.bind((_ANY[6 if sock.family == socket.AF_INET6 else 4], local.port))
            return True
        else:
            sock.bind(lx.sockaddr(sock.family, local))
        return False

    def _keep_locked(self, sock: socket.socket, target: FourTuple) -> bool:
        """A locked port stays; the address can change where it is not locked too."""
        local, remote = target
        bound = lx.endpoint(sock.getsockname())
        if bound.port != local.port:
            why = f"its port {bound.port} was bound explicitly and can't become {local.port}"
        elif bound.address == local.address:
            return False
        elif bound.address not in _ANY.values():
            why = f"it was bound to {bound} explicitly and can't leave it"
        elif not self._is_steerable(target):
            why = f"no route to {remote.address} gives its bound port the source {local.address}"
        else:
            return True
        raise Unbindable(errno.EINVAL, why)

    def _is_steerable(self, target: FourTuple) -> bool:
        """Whether the route on the address's interface gives just this address as the source."""
        key = target.local.address, target.remote.address
        known = self._steerable.get(key)
        if known is None:
            known = self._steerable[key] = self._gives(target)
        return known

    def _gives(self, target: FourTuple) -> bool:
        family = socket.AF_INET6 if target.remote.version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                with _steered(probe, self._interface_of(target.local.address)):
                    probe.connect(target.remote)
            except OSError:
                return False
            return bool(probe.getsockname()[0] == target.local.address)


@contextmanager
def transparent(sock: socket.socket) -> Iterator[None]:
    """Let a socket have an address that is not this host's (any more); CAP_NET_ADMIN."""
    level, option = (
        (lx.IPPROTO_IPV6, lx.IPV6_TRANSPARENT)
        if sock.family == socket.AF_INET6
        else (lx.IPPROTO_IP, lx.IP_TRANSPARENT)
    )
    before = sock.getsockopt(level, option)
    sock.setsockopt(level, option, 1)
    try:
        yield
    finally:
        sock.setsockopt(level, option, before)


def _bind_unlocked(sock: socket.socket, local: Endpoint) -> None:
    both = _RANGE.pack(local.port, local.port)
    before = sock.getsockopt(lx.IPPROTO_IP, lx.IP_LOCAL_PORT_RANGE, _RANGE.size)
    sock.setsockopt(lx.IPPROTO_IP, lx.IP_LOCAL_PORT_RANGE, both)
    try:
        sock.bind(lx.sockaddr(sock.family, Endpoint(local.address, 0)))
    finally:
        sock.setsockopt(lx.IPPROTO_IP, lx.IP_LOCAL_PORT_RANGE, before)


@contextmanager
def _steered(sock: socket.socket, interface: str | None) -> Iterator[None]:
    if interface is None or sock.getsockopt(lx.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).strip(b"\0"):
        yield
        return
    sock.setsockopt(lx.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
    try:
        yield
    finally:
        sock.setsockopt(lx.SOL_SOCKET, socket.SO_BINDTODEVICE, b"\0")


def _to_native(sock: socket.socket) -> None:
    """Give a socket whose last peer was IPv4 the operations of IPv6 back.

    The error path of a mapped connect() does it (tcp_v6_connect() in net/ipv6/tcp_ipv6.c).
    """
    with contextlib.suppress(OSError):
        sock.connect(_NOWHERE)
