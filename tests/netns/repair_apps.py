"""Applications whose sockets are moved under them. Run as ``python repair_apps.py WHAT FD ...``.

Each says ``ready`` when it is at work, works until its standard input closes, and ends with one
line that says what it saw. Any error ends it with a traceback and an exit code.
"""

from __future__ import annotations

import hashlib
import os
import random
import select
import socket
import sys
import threading
import time

BLOCK = 1 << 16
TRAILER = b"\xff" * BLOCK


def block(number: int) -> bytes:
    return random.Random(number).randbytes(BLOCK - 1) + b"\0"


def say(word: str) -> None:
    print(word, flush=True)


def whole(sock: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        chunk = sock.recv(length - len(data))
        if not chunk:
            raise EOFError(f"end of file after {len(data)} of {length} bytes")
        data += chunk
    return bytes(data)


def stop_asked() -> threading.Event:
    asked = threading.Event()

    def wait() -> None:
        os.read(0, 1)
        asked.set()

    threading.Thread(target=wait, daemon=True).start()
    return asked


def bulk(sock: socket.socket) -> None:
    """Write and read as fast as it goes, in two threads; hash what was read and written."""
    asked = stop_asked()
    wrote, read = hashlib.sha256(), hashlib.sha256()
    blocks = [block(number) for number in range(16)]
    counts = [0, 0]

    def write() -> None:
        while not asked.is_set():
            data = blocks[counts[0] % 16]
            sock.sendall(data)
            wrote.update(data)
            counts[0] += 1
        sock.sendall(TRAILER)

    writer = threading.Thread(target=write)
    writer.start()
    say("ready")
    while (data := whole(sock, BLOCK)) != TRAILER:
        read.update(data)
        counts[1] += 1
    writer.join()
    say(f"{wrote.hexdigest()} {read.hexdigest()} {counts[0]} {counts[1]}")


def echo(sock: socket.socket) -> None:
    """A thread blocked in recv(), until end of file."""
    say("ready")
    count = 0
    while data := sock.recv(65536):
        sock.sendall(data)
        count += len(data)
    say(f"echoed {count}")


def polled(sock: socket.socket, how: str) -> None:
    """The same with select, poll, epoll level or edge triggered; nothing else may wake it."""
    sock.setblocking(False)
    epoll = select.epoll()
    edge = select.EPOLLET if how == "edge" else 0
    epoll.register(sock, select.EPOLLIN | select.EPOLLRDHUP | edge)
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    say("ready")
    count = idle = 0
    while True:
        if how == "select":
            select.select([sock], [], [sock])
        elif how == "poll":
            poll.poll()
        else:
            epoll.poll()
        try:
            data = sock.recv(65536)
        except BlockingIOError:
            idle += 1
            continue
        if not data:
            break
        sock.sendall(data)
        count += len(data)
    say(f"echoed {count} idle {idle}")


def threads(sock: socket.socket) -> None:
    """Eight threads: four blocked in recv() in turn, four that compute."""
    lock = threading.Lock()
    count = 0
    done = threading.Event()

    def serve() -> None:
        nonlocal count
        while data := sock.recv(4096):
            with lock:
                sock.sendall(data)
                count += len(data)
        done.set()

    def compute() -> None:
        while not done.is_set():
            hashlib.sha256(b"x" * 1000)

    workers = [threading.Thread(target=work) for work in (serve, compute) for _ in range(4)]
    for worker in workers:
        worker.start()
    say("ready")
    for worker in workers:
        worker.join()
    say(f"echoed {count}")


def forked(sock: socket.socket) -> None:
    """A child that has inherited the socket serves it; the parent only waits."""
    if (child := os.fork()) == 0:
        echo(sock)
        os._exit(0)
    os.waitpid(child, 0)
    say("the child has ended")


def ticker(sock: socket.socket) -> None:
    """Counts, so that others see whether it runs."""
    del sock
    say("ready")
    number = 0
    while True:
        number += 1
        say(str(number))
        time.sleep(0.001)


def main() -> None:
    what, fd, *more = sys.argv[1:]
    sock = socket.socket(fileno=int(fd))
    globals()[what](sock, *more)


if __name__ == "__main__":
    main()
