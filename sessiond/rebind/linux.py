"""Socket options, ioctls and structures of Linux that the socket module does not name.

Numbers from include/uapi: linux/tcp.h, linux/sockios.h, linux/in.h, linux/in6.h and
asm-generic/{socket,ioctls}.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from sessiond.core.tuples import Endpoint

SOL_SOCKET = socket.SOL_SOCKET
IPPROTO_TCP = socket.IPPROTO_TCP
IPPROTO_IP = socket.IPPROTO_IP
IPPROTO_IPV6 = socket.IPPROTO_IPV6

SO_ATTACH_FILTER = SO_GET_FILTER = 26
SO_DETACH_FILTER = 27
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
SO_PEEK_OFF = 42
SO_ATTACH_BPF = 50
SO_COOKIE = 57
SO_BUF_LOCK = 72

TCP_MAXSEG = 2
TCP_CORK = 3
TCP_INFO = 11
TCP_USER_TIMEOUT = 18
TCP_REPAIR = 19
TCP_REPAIR_QUEUE = 20
TCP_QUEUE_SEQ = 21
TCP_REPAIR_OPTIONS = 22
TCP_TIMESTAMP = 24
TCP_REPAIR_WINDOW = 29
TCP_FASTOPEN_CONNECT = 30
TCP_AO_INFO = 40
TCP_ULP = 31

REPAIR_ON, REPAIR_OFF, REPAIR_OFF_NO_PROBE = 1, 0, -1
NO_QUEUE, RECV_QUEUE, SEND_QUEUE = 0, 1, 2

IP_TRANSPARENT = 19
IP_BIND_ADDRESS_NO_PORT = 24
IP_LOCAL_PORT_RANGE = 51
IPV6_TRANSPARENT = 75

SIOCINQ = 0x541B
SIOCOUTQ = 0x5411
SIOCOUTQNSD = 0x894B

IFNAMSIZ = 16

TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSE, TCP_CLOSE_WAIT = 1, 4, 5, 7, 8
TCPI_OPT_TIMESTAMPS, TCPI_OPT_SACK, TCPI_OPT_WSCALE = 1, 2, 4
TCPOPT_MSS, TCPOPT_WINDOW, TCPOPT_SACK_PERM, TCPOPT_TIMESTAMP = 2, 3, 4, 8

_libc = ctypes.CDLL(None, use_errno=True)
_UNSPECIFIED = bytes(16)
_INT = struct.Struct("=i")
_U32 = struct.Struct("=I")
_ZERO = _INT.pack(0)


def disconnect(sock: socket.socket, *, clear_error: bool = True) -> None:
    """``connect(AF_UNSPEC)``: in repair mode silent, it empties queues and stops timers.

    Args:
        clear_error: take the ECONNABORTED that it leaves for the application.

    Raises:
        OSError: what the kernel said.
    """
    if _libc.connect(sock.fileno(), _UNSPECIFIED, len(_UNSPECIFIED)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if clear_error:
        sock.getsockopt(SOL_SOCKET, socket.SO_ERROR)


@contextmanager
def beside(sock: socket.socket, interface: str) -> Iterator[None]:
    """Let another socket come onto the tuple of this one.

    Two may be there if this one is bound to a device and the other is not (inet_match()). Bound to
    the device that its segments come by, it takes them until the other one is there: what arrives
    finds the later one.
    """
    bound = sock.getsockopt(SOL_SOCKET, socket.SO_BINDTODEVICE, IFNAMSIZ).strip(b"\0")
    if not bound:
        sock.setsockopt(SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
    try:
        yield
    finally:
        if not bound:
            try:
                sock.setsockopt(SOL_SOCKET, socket.SO_BINDTODEVICE, b"\0")
            except OSError:
                # It must not stay there, whatever is to become of the step.
                sock.setsockopt(SOL_SOCKET, socket.SO_BINDTODEVICE, b"\0")
                raise


def push(sock: socket.socket) -> None:
    """Send what may be sent: taking the cork out does (__tcp_sock_set_cork())."""
    corked = sock.getsockopt(IPPROTO_TCP, TCP_CORK)
    sock.setsockopt(IPPROTO_TCP, TCP_CORK, 1)
    sock.setsockopt(IPPROTO_TCP, TCP_CORK, 0)
    if corked:
        sock.setsockopt(IPPROTO_TCP, TCP_CORK, 1)


def queue_length(sock: socket.socket, request: int) -> int:
    """Bytes by SIOCINQ, SIOCOUTQ or SIOCOUTQNSD."""
    length: int = _INT.unpack(fcntl.ioctl(sock.fileno(), request, _ZERO))[0]
    return length


def receiving_ended(sock: socket.socket) -> bool:
    """Whether it has RCV_SHUTDOWN: the peer's FIN has come, or the application wants no more."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def get_u32(sock: socket.socket, option: int) -> int:
    """A TCP option that is an unsigned number, such as a sequence number."""
    value: int = _U32.unpack(sock.getsockopt(IPPROTO_TCP, option, 4))[0]
    return value


def set_u32(sock: socket.socket, option: int, value: int) -> None:
    """The reverse of ``get_u32``."""
    sock.setsockopt(IPPROTO_TCP, option, _U32.pack(value & 0xFFFFFFFF))


class Info(NamedTuple):
    """What is used of struct tcp_info."""

    state: int
    options: int
    snd_wscale: int
    rcv_wscale: int
    bytes_received: int
    bytes_sent: int
    bytes_retrans: int
    snd_wnd: int


_INFO = struct.Struct("=B4xBB121xQ64xQQ12xI")  # up to tcpi_snd_wnd, Linux 5.4


def info(sock: socket.socket) -> Info:
    """Read TCP_INFO."""
    raw = sock.getsockopt(IPPROTO_TCP, TCP_INFO, _INFO.size)
    state, options, scales, *counts = _INFO.unpack(raw)
    return Info(state, options, scales & 15, scales >> 4, *counts)


class Window(NamedTuple):
    """struct tcp_repair_window."""

    snd_wl1: int
    snd_wnd: int
    max_window: int
    rcv_wnd: int
    rcv_wup: int


_WINDOW = struct.Struct("=5I")


def window(sock: socket.socket) -> Window:
    """Both windows; the socket is in repair mode."""
    return Window(*_WINDOW.unpack(sock.getsockopt(IPPROTO_TCP, TCP_REPAIR_WINDOW, _WINDOW.size)))


def set_window(sock: socket.socket, value: Window) -> None:
    """The reverse of ``window``."""
    sock.setsockopt(IPPROTO_TCP, TCP_REPAIR_WINDOW, _WINDOW.pack(*value))


def family(sock: socket.socket) -> int:
    """AF_INET or AF_INET6. The attribute of socket.socket makes an enum of it, each time anew."""
    number: int = socket.SocketType.family.__get__(sock)
    return number


NOWHERE = Endpoint("0.0.0.0", 0)
"""The endpoint of what is not connected."""


def sockaddr(family: int, endpoint: Endpoint) -> tuple[str, int]:
    """How a socket of a family names an endpoint (IPv4 on AF_INET6 is mapped)."""
    if family == socket.AF_INET6 and endpoint.version == 4:
        return f"::ffff:{endpoint.address}", endpoint.port
    return endpoint.address, endpoint.port


def endpoint(address: tuple[str, int] | tuple[str, int, int, int]) -> Endpoint:
    """The reverse of ``sockaddr``."""
    return Endpoint(address[0].removeprefix("::ffff:"), address[1])


def cookie(sock: socket.socket) -> int:
    """The kernel's name of a socket, never reused."""
    return int.from_bytes(sock.getsockopt(SOL_SOCKET, SO_COOKIE, 8), "little")
