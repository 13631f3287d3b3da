"""The demo's timeline: lines that stay, and below them one line that lives."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass, field

_BAR = 26
_REDRAW = 0.05


@dataclass
class Screen:
    """Prints to standard output, with colours and a live line only on a terminal."""

    terminal: bool = field(
        default_factory=lambda: sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    began: float = field(default_factory=time.monotonic)
    _drawn: float = 0.0
    _live: str = ""

    def restart(self) -> None:
        """The timeline's zero is now."""
        self.began = time.monotonic()

    def title(self, text: str) -> None:
        """A heading."""
        self._line(self._paint("1", text))

    def text(self, text: str = "") -> None:
        """A line without time."""
        self._line(text)

    def happens(self, text: str) -> None:
        """What the network does."""
        self._line(f"{self._clock()}  {self._paint('1;33', '▼ ' + text)}")

    def follows(self, text: str) -> None:
        """What the sessions do."""
        self._line(f"{self._clock()}    {self._paint('32', '→')} {text}")

    def verdict(self, good: bool, text: str) -> None:
        """A line of the end's account."""
        self._line(f"  {self._paint('32', '✓') if good else self._paint('1;31', '✗')} {text}")

    def progress(self, received: int, size: int, rate: float, typed: str, echo_ms: float) -> None:
        """The live line."""
        if not self.terminal or time.monotonic() < self._drawn + _REDRAW:
            return
        self._drawn = time.monotonic()
        filled = round(_BAR * received / size) if size else 0
        bar = "█" * filled + "░" * (_BAR - filled)
        text = (
            f"{self._clock()}  {bar} {received / 1e6:5.0f} MB  {rate / 1e6:5.1f} MB/s"
            f"   echo {echo_ms:4.0f} ms  {typed[-20:]}▏"
        )
        self._live = text[: shutil.get_terminal_size().columns - 1]
        sys.stdout.write(f"\r\x1b[K{self._live}")
        sys.stdout.flush()

    def _line(self, text: str) -> None:
        if self._live:
            sys.stdout.write("\r\x1b[K")
        sys.stdout.write(text + "\n" + self._live)
        sys.stdout.flush()

    def finish(self) -> None:
        """No live line any more."""
        if self._live:
            sys.stdout.write("\r\x1b[K")
        self._live = ""

    def _clock(self) -> str:
        return self._paint("2", f"{time.monotonic() - self.began:7.3f} s")

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.terminal else text
