"""The kernel's counters of one network namespace, and the difference of two readings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

_SHORT = ("Tcp", "TcpExt", "MPTcpExt")


class Counters(Mapping[str, int]):
    """What /proc/net/snmp, snmp6 and netstat say: ``counters["Tcp.RetransSegs"]``.

    The group may be left out for those of TCP: ``(after - before)["TCPTimeouts"]``.
    """

    def __init__(self, values: Mapping[str, int]) -> None:
        self._values = dict(values)

    @classmethod
    def read(cls) -> Self:
        """Those of the namespace the calling thread is in."""
        values: dict[str, int] = {}
        for file in ("snmp", "netstat"):
            lines = Path("/proc/thread-self/net", file).read_text().splitlines()
            for names, numbers in zip(lines[::2], lines[1::2], strict=True):
                group, _, rest = names.partition(":")
                pairs = zip(rest.split(), numbers.split()[1:], strict=True)
                values |= {f"{group}.{name}": int(number) for name, number in pairs}
        for line in Path("/proc/thread-self/net/snmp6").read_text().splitlines():
            name, number = line.split()
            values[f"Ip6.{name}"] = int(number)
        return cls(values)

    def __sub__(self, before: Counters) -> Counters:
        # Some of IPv6 are listed from their first time on.
        names = {**self._values, **before._values}
        return Counters(
            {one: self._values.get(one, 0) - before._values.get(one, 0) for one in names}
        )

    def __add__(self, other: Counters) -> Counters:
        names = {**self._values, **other._values}
        return Counters(
            {one: self._values.get(one, 0) + other._values.get(one, 0) for one in names}
        )

    def changed(self) -> dict[str, int]:
        """Those that are not zero, for the eye."""
        return {name: value for name, value in self.items() if value}

    def __getitem__(self, name: str) -> int:
        for full in (name, *(f"{group}.{name}" for group in _SHORT)):
            if full in self._values:
                return self._values[full]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Counters({self.changed()})"
