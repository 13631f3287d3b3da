"""Waiting for a condition instead of for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_PAUSE = 0.002


def until(condition: Callable[[], T], what: str, timeout: float = 10, pause: float = _PAUSE) -> T:
    """Ask again and again until the answer is true, and return it.

    Args:
        condition: asked again after every pause.
        what: is awaited, for the error.
        timeout, pause: seconds.

    Raises:
        TimeoutError: it did not become true.
    """
    deadline = time.monotonic() + timeout
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout} s in vain: {what}")
        time.sleep(pause)
    return answer
