"""Columns and quantities as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NOTHING = "-"


def columns(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table. A title that begins with ``>`` aligns its column to the right.

    No cell is cut and none is empty, so that awk(1) and cut(1) find their columns.
    """
    table = [[title.lstrip(">") for title in titles], *([c or NOTHING for c in r] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    sides = [">" if title.startswith(">") else "<" for title in titles]
    line = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return "".join(line.format(*row).rstrip() + "\n" for row in table)


def fields(pairs: Iterable[tuple[str, str]]) -> str:
    """One named value a line."""
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    return "".join(f"{name:<{width}}  {value or NOTHING}\n" for name, value in pairs)


def duration(seconds: float) -> str:
    """``"42s"``, ``"3m07s"``, ``"2h05m"``, ``"4d03h"``: the two largest units."""
    whole = max(0, int(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"


def milliseconds(value: float | None) -> str:
    """``"0.42ms"``, ``"1.9ms"``, ``"250ms"``: two figures below 10, none behind the point above."""
    if value is None:
        return NOTHING
    if value < 1:
        return f"{value:.2f}ms"
    return f"{value:.1f}ms" if value < 10 else f"{value:.0f}ms"


def number(value: float) -> str:
    """``"42"``, ``"0.125"``: at most three figures behind the point, none that say nothing."""
    return f"{value:.3f}".rstrip("0").rstrip(".")
