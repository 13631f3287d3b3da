"""The demo's programs: ordinary applications that use libhsock as they would use socket."""

from __future__ import annotations

import hashlib
import os
import select
import socket
import struct
import threading
import time
from pathlib import Path

import libhsock
from tests.support.worker import Talk

FILE_PORT, ECHO_PORT = 7000, 7001
RATE = 12_500_000
"""Bytes per second at which the server sends: a 100 Mbit/s line (SO_MAX_PACING_RATE)."""
KEYSTROKE = 0.04
"""Seconds between two keys of the echo session."""
_SO_MAX_PACING_RATE = 47
_SIZE = struct.Struct("!Q")
_CHUNK = 1 << 18
_REPORT = 0.1


def make_file(path: Path, size: int) -> str:
    """Write so many random bytes; their SHA-256."""
    found = hashlib.sha256()
    with path.open("wb") as file:
        for begin in range(0, size, 1 << 22):
            block = os.urandom(min(1 << 22, size - begin))
            found.update(block)
            file.write(block)
    return found.hexdigest()


def serve(talk: Talk, daemon: str, file: Path) -> None:
    """The server's program: a file for who connects to one port, an echo on the other."""
    os.environ["SESSIOND_SOCKET"] = daemon
    files = libhsock.create_server(("", FILE_PORT))
    echoes = libhsock.create_server(("", ECHO_PORT))
    threading.Thread(target=_serve_echo, args=(echoes,), daemon=True).start()
    talk.tell("listening")
    with files.accept()[0] as sock, file.open("rb") as content:
        sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, RATE)
        sock.sendall(_SIZE.pack(file.stat().st_size))
        sock.sendfile(content)
    talk.hear()


def _serve_echo(listener: libhsock.HSocket) -> None:
    sock, _ = listener.accept()
    with sock:
        while data := sock.recv(100):
            sock.sendall(data)


def download(talk: Talk, daemon: str, host: str, to: Path) -> str:
    """Fetch the file; tells the session's id, then (bytes so far, size). Returns its SHA-256."""
    os.environ["SESSIOND_SOCKET"] = daemon
    found, received, told = hashlib.sha256(), 0, 0.0
    with libhsock.create_connection((host, FILE_PORT), 10) as sock, to.open("wb") as file:
        talk.tell(_introduce(sock))
        sock.settimeout(30)
        (size,) = _SIZE.unpack(sock.recv(_SIZE.size, socket.MSG_WAITALL))
        while received < size:
            data = sock.recv(_CHUNK)
            if not data:
                raise EOFError(f"the stream ended after {received} of {size} bytes")
            found.update(data)
            file.write(data)
            received += len(data)
            if time.monotonic() > told + _REPORT or received == size:
                told = time.monotonic()
                talk.tell((received, size))
    return found.hexdigest()


def type_at_terminal(talk: Talk, daemon: str, host: str) -> None:
    """Type a key, wait for its echo, again and again until told to stop.

    Tells the session's id, then for each key what came back and after how many ms.
    """
    os.environ["SESSIOND_SOCKET"] = daemon
    text = "the quick brown fox jumps over the lazy dog. "
    with libhsock.create_connection((host, ECHO_PORT), 10) as sock:
        talk.tell(_introduce(sock))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(30)
        for number in range(1 << 30):
            key = text[number % len(text)].encode()
            typed = time.monotonic()
            sock.sendall(key)
            echo = sock.recv(100)
            if echo != key:
                raise ValueError(f"typed {key!r}, and {echo!r} came back")
            talk.tell((echo.decode(), (time.monotonic() - typed) * 1000))
            if select.select([talk.fileno()], [], [], KEYSTROKE)[0]:
                return


def _introduce(sock: libhsock.HSocket) -> str:
    """The session's id once it is mobile. Raises RuntimeError with the reason why it is not."""
    session = sock.session
    if not session.wait_mobile(5):
        raise RuntimeError(f"the session can't move: {session.reason}")
    return str(session.id)
