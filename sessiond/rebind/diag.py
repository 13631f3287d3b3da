"""What only sock_diag(7) tells of a TCP socket: whether its segments carry MD5 signatures.

Layouts of include/uapi/linux/{inet_diag,sock_diag}.h.
"""

from __future__ import annotations

import socket
import struct

from sessiond.core.tuples import FourTuple

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_INET_DIAG_MD5SIG = 18
_ASK_FOR_INFO = 1 << (2 - 1)
"""INET_DIAG_INFO: what comes with it includes the keys (tcp_diag_get_aux())."""

_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI")
_PORTS = struct.Struct("!HH")
_COOKIE = struct.Struct("=IQ")
_MESSAGE_SIZE = 72
"""struct inet_diag_msg."""
_ATTRIBUTE = struct.Struct("=HH")


def has_md5_signatures(where: FourTuple, cookie: int) -> bool:
    """Whether a connection was given keys by TCP_MD5SIG (RFC 2385).

    Args:
        where: its tuple, in the network namespace of this thread.
        cookie: its SO_COOKIE.

    Raises:
        OSError: ENOENT there is no such connection.
    """
    family = socket.AF_INET6 if where.local.version == 6 else socket.AF_INET
    payload = _REQUEST.pack(family, socket.IPPROTO_TCP, _ASK_FOR_INFO, 0xFFFFFFFF)
    payload += _PORTS.pack(where.local.port, where.remote.port)
    payload += socket.inet_pton(family, where.local.address).ljust(16, b"\0")
    payload += socket.inet_pton(family, where.remote.address).ljust(16, b"\0")
    payload += _COOKIE.pack(0, cookie)
    size = _HEADER.size + len(payload)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diag:
        diag.send(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, 1, 1, 0) + payload)
        answer = diag.recv(65536)
    _, kind, *_ = _HEADER.unpack_from(answer)
    if kind != _SOCK_DIAG_BY_FAMILY:
        (error,) = struct.unpack_from("=i", answer, _HEADER.size)
        raise OSError(-error, "sock_diag does not know the connection")
    attributes = answer[_HEADER.size + _MESSAGE_SIZE :]
    while attributes:
        size, kind = _ATTRIBUTE.unpack_from(attributes)
        if kind == _INET_DIAG_MD5SIG:
            return True
        attributes = attributes[size + -size % 4 :]
    return False
