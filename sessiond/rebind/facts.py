"""What can be learnt of an application's socket without moving it: what it is, and why it stays."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket

from sessiond.core.tuples import FourTuple
from sessiond.rebind import diag
from sessiond.rebind import linux as lx
from sessiond.rebind.tcp_state import Unmovable, require_synchronized, tuple_of

_SIOCGSKNS = 0x894C
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def require_movable(sock: socket.socket) -> None:
    """Refuse what TCP_REPAIR can't take out of the kernel and put back.

    A socket in a BPF sockmap can't be told from others here; it is moved out of its map.

    Raises:
        Unmovable: the reason, one sentence.
        OSError: the kernel refused to answer.
    """
    if sock.family not in _FAMILIES or sock.type != socket.SOCK_STREAM:
        raise Unmovable("it is not a TCP socket")
    if sock.getsockopt(lx.SOL_SOCKET, socket.SO_PROTOCOL) != lx.IPPROTO_TCP:
        raise Unmovable("it is a multipath TCP socket (MPTCP moves by itself)")
    require_synchronized(lx.info(sock).state)
    upper = sock.getsockopt(lx.IPPROTO_TCP, lx.TCP_ULP, 16).rstrip(b"\0").decode()
    if upper:
        raise Unmovable(f"the kernel's {upper} works on top of it")
    if not _in_this_namespace(sock):
        raise Unmovable("it is in another network namespace than this daemon")
    where = tuple_of(sock)
    if ipaddress.ip_address(where.local.address).is_link_local:
        raise Unmovable(f"{where.local.address} is a link-local address")
    if _has_authentication_option(sock):
        raise Unmovable("its segments are signed with the TCP Authentication Option")
    if diag.has_md5_signatures(where, lx.cookie(sock)):
        raise Unmovable("its segments carry TCP MD5 signatures")


def require_version(sock: socket.socket, target: FourTuple) -> None:
    """Refuse an IP version that a socket's family can't have.

    Raises:
        Unmovable: the reason.
    """
    if sock.family == socket.AF_INET and target.remote.version == 6:
        raise Unmovable("an IPv4 socket can't change to IPv6 in place; an IPv6 one could")


def versions(sock: socket.socket) -> frozenset[int]:
    """IP versions a socket can be moved to."""
    if sock.family == socket.AF_INET:
        return frozenset((4,))
    if sock.getsockopt(lx.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        return frozenset((6,))
    return frozenset((4, 6))


def whereabouts(sock: socket.socket) -> FourTuple:
    """The tuple of any socket, as far as it has one."""
    if sock.family in _FAMILIES:
        with contextlib.suppress(OSError):
            return tuple_of(sock)
    return FourTuple(lx.NOWHERE, lx.NOWHERE)


def _in_this_namespace(sock: socket.socket) -> bool:
    theirs = fcntl.ioctl(sock.fileno(), _SIOCGSKNS)
    try:
        return os.path.samestat(os.fstat(theirs), os.stat("/proc/thread-self/ns/net"))
    finally:
        os.close(theirs)


def _has_authentication_option(sock: socket.socket) -> bool:
    try:
        sock.getsockopt(lx.IPPROTO_TCP, lx.TCP_AO_INFO, 48)
    except OSError:
        return False  # ENOENT: none; ENOPROTOOPT: the kernel knows none
    return True
