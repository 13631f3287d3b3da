"""Classic BPF on a socket: what a handover holds off without any firewall rule.

A TCP socket's filter sees the segment from its TCP header on (net/core/filter.c, sk_filter).
"""

from __future__ import annotations

import ctypes
import socket
import struct

from sessiond.rebind.linux import SO_ATTACH_FILTER, SO_DETACH_FILTER, SO_GET_FILTER, SOL_SOCKET

_INSTRUCTION = struct.Struct("=HBBI")
_FPROG = struct.Struct("=HxxxxxxQ")

Program = bytes


class _Attachable:
    """A program with the struct sock_fprog that points at it, kept alive together."""

    def __init__(self, program: Program) -> None:
        self._buffer = ctypes.create_string_buffer(program, len(program))
        count = len(program) // _INSTRUCTION.size
        self.fprog = _FPROG.pack(count, ctypes.addressof(self._buffer))


def _program(*instructions: tuple[int, int, int, int]) -> Program:
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in instructions)


_LOCK = _Attachable(_program((0x06, 0, 0, 0)))  # ret #0
_SHIELD = _Attachable(
    _program(
        (0x30, 0, 0, 13),  # ldb [13]: the flags
        (0x45, 0, 1, 0x04),  # jset #RST
        (0x06, 0, 0, 0),  # ret #0
        (0x06, 0, 0, 0xFFFFFFFF),  # ret #-1
    )
)


def lock(sock: socket.socket) -> None:
    """Drop every inbound segment, silently, from now on."""
    sock.setsockopt(SOL_SOCKET, SO_ATTACH_FILTER, _LOCK.fprog)


def shield(sock: socket.socket) -> None:
    """Drop inbound RSTs only."""
    sock.setsockopt(SOL_SOCKET, SO_ATTACH_FILTER, _SHIELD.fprog)


def current(sock: socket.socket) -> Program:
    """The application's own program, empty if it has none.

    Raises:
        OSError: EACCES where it is an eBPF program, which can't be read back.
    """
    # SO_GET_FILTER counts in instructions, not in bytes (sk_get_filter in net/core/filter.c);
    # getsockopt() of the socket module would cut its answer short.
    count = ctypes.c_uint(0)
    _getsockopt(sock, None, count)
    buffer = ctypes.create_string_buffer(count.value * _INSTRUCTION.size)
    if count.value:
        _getsockopt(sock, buffer, count)
    return buffer.raw


def put_back(sock: socket.socket, program: Program) -> None:
    """Leave the socket with the application's own program, or none."""
    if program:
        sock.setsockopt(SOL_SOCKET, SO_ATTACH_FILTER, _Attachable(program).fprog)
    else:
        sock.setsockopt(SOL_SOCKET, SO_DETACH_FILTER, 0)


_libc = ctypes.CDLL(None, use_errno=True)


def _getsockopt(sock: socket.socket, buffer: object, count: ctypes.c_uint) -> None:
    pointer = ctypes.byref(count)
    if _libc.getsockopt(sock.fileno(), SOL_SOCKET, SO_GET_FILTER, buffer, pointer):
        raise OSError(ctypes.get_errno(), "the socket's own filter can't be read")
