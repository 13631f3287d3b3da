"""A test in a network namespace of its own, inside this very process.

A namespace belongs to a thread: the test runs in a fresh one that leaves the others' namespaces
behind, and its coroutine, its sockets, its threads and its children are all inside. The kernel
removes the namespace with the last of them; there is no name, and nothing to clean up.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import subprocess
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def in_own_network(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in network and mount namespaces of its own, ``lo`` up."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        if os.geteuid() != 0:
            pytest.skip("creating network namespaces needs root")

        def inside() -> None:
            if _libc.unshare(CLONE_NEWNET | CLONE_NEWNS) != 0:
                pytest.skip(f"no new namespaces here: {os.strerror(ctypes.get_errno())}")
            command("mount --make-rprivate /")
            command("ip link set lo up")
            asyncio.run(test(*args, **kwargs))

        with ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(inside).result()

    return run


def command(line: str) -> str:
    """Run a command; what it printed.

    Raises:
        AssertionError: it failed.
    """
    done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return done.stdout


def batch(lines: Iterable[str]) -> None:
    """Have one ip(8) do many commands; written without the leading ``ip``."""
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(
        ["ip", "-batch", "-"], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
