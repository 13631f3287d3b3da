"""What a socket drops on arrival: everything (lock), RSTs (shield), or what its owner chose.

A TCP socket's filter sees the segment from its TCP header on, before any other processing, and
nobody answers for what it drops (tcp_filter() in net/ipv4/tcp_ipv4.c). Attaching an eBPF program
that is loaded costs 1 us, a classic one, translated and compiled anew each time, 15 to 20 us: the
two are loaded once where the daemon may (CAP_BPF), and are classic where it may not.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
from functools import cache

from sessiond.rebind.linux import (
    SO_ATTACH_BPF,
    SO_ATTACH_FILTER,
    SO_DETACH_FILTER,
    SO_GET_FILTER,
    SOL_SOCKET,
)

_INSTRUCTION = struct.Struct("=HBBI")
_FPROG = struct.Struct("=HxxxxxxQ")
_EXTENDED = struct.Struct("=BBhi")

_SYS_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280}
_BPF_PROG_LOAD = 5
_BPF_PROG_TYPE_SOCKET_FILTER = 1

Program = bytes

_libc = ctypes.CDLL(None, use_errno=True)


class _Attachable:
    """A classic program with the struct sock_fprog that points at it, kept alive together."""

    option = SO_ATTACH_FILTER

    def __init__(self, program: Program) -> None:
        self._buffer = ctypes.create_string_buffer(program, len(program))
        count = len(program) // _INSTRUCTION.size
        self.value = _FPROG.pack(count, ctypes.addressof(self._buffer))


class _Loaded:
    """A program the kernel has already; the descriptor lives as long as this process."""

    option = SO_ATTACH_BPF

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self.value = struct.pack("=i", fd)


def _classic(*instructions: tuple[int, int, int, int]) -> Program:
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in instructions)


def _extended(*instructions: tuple[int, int, int, int]) -> Program:
    return b"".join(_EXTENDED.pack(*instruction) for instruction in instructions)


def _load(program: Program) -> _Loaded | None:
    """None where bpf(2) is not there or not allowed (kernel.unprivileged_bpf_disabled)."""
    number = _SYS_BPF.get(platform.machine())
    if number is None:
        return None
    code = ctypes.create_string_buffer(program, len(program))
    terms = ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "=IIQQ40x",
        _BPF_PROG_TYPE_SOCKET_FILTER,
        len(program) // _EXTENDED.size,
        ctypes.addressof(code),
        ctypes.addressof(terms),
    )
    fd = _libc.syscall(number, _BPF_PROG_LOAD, attributes, len(attributes))
    if fd >= 0:
        return _Loaded(fd)
    error = ctypes.get_errno()
    if error in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        return None
    raise OSError(error, f"bpf(BPF_PROG_LOAD): {os.strerror(error)}")


@cache
def _lock() -> _Loaded | _Attachable:
    loaded = _load(_extended((0xB7, 0, 0, 0), (0x95, 0, 0, 0)))  # r0 = 0; exit
    return loaded or _Attachable(_classic((0x06, 0, 0, 0)))  # ret #0


@cache
def _shield() -> _Loaded | _Attachable:
    loaded = _load(
        _extended(
            (0xBF, 0x16, 0, 0),  # r6 = r1: the segment
            (0x30, 0, 0, 13),  # r0 = byte 13: the flags
            (0x45, 0, 2, 0x04),  # if r0 & RST goto drop
            (0xB7, 0, 0, -1),
            (0x95, 0, 0, 0),
            (0xB7, 0, 0, 0),  # drop
            (0x95, 0, 0, 0),
        )
    )
    return loaded or _Attachable(
        _classic(
            (0x30, 0, 0, 13),  # ldb [13]: the flags
            (0x45, 0, 1, 0x04),  # jset #RST
            (0x06, 0, 0, 0),  # ret #0
            (0x06, 0, 0, 0xFFFFFFFF),  # ret #-1
        )
    )


def lock(sock: socket.socket) -> None:
    """Drop every inbound segment, silently, from now on."""
    program = _lock()
    sock.setsockopt(SOL_SOCKET, program.option, program.value)


def shield(sock: socket.socket) -> None:
    """Drop inbound RSTs only."""
    program = _shield()
    sock.setsockopt(SOL_SOCKET, program.option, program.value)


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
        own = _Attachable(program)
        sock.setsockopt(SOL_SOCKET, own.option, own.value)
        return
    try:
        sock.setsockopt(SOL_SOCKET, SO_DETACH_FILTER, 0)
    except OSError as error:
        if error.errno != errno.ENOENT:  # none attached
            raise


def _getsockopt(sock: socket.socket, buffer: object, count: ctypes.c_uint) -> None:
    pointer = ctypes.byref(count)
    if _libc.getsockopt(sock.fileno(), SOL_SOCKET, SO_GET_FILTER, buffer, pointer):
        error = ctypes.get_errno()
        what = "its eBPF filter can't be read, so not be put back" if error == errno.EACCES else ""
        raise OSError(error, what or os.strerror(error))
