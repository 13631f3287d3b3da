"""From a name and a service to numeric candidates: sessiond's answer, or the system's own."""

from __future__ import annotations

import socket
from typing import Any, NamedTuple

from libhsock import eyeballs, wire
from libhsock.errors import HsockError, NameNotResolved, NoLocalAddress, UsageError
from libhsock.eyeballs import Candidate

_FAMILIES = {0: socket.AF_UNSPEC, 4: socket.AF_INET, 6: socket.AF_INET6}


class Target(NamedTuple):
    """What the application asked to be connected to."""

    name: str
    service: str
    family: wire.Family
    srv: bool

    def __str__(self) -> str:
        return (
            f"[{self.name}]:{self.service}" if ":" in self.name else f"{self.name}:{self.service}"
        )

    def literal(self) -> list[Candidate] | None:
        """The one candidate if name and service are numeric already."""
        if not self.service.isdecimal() or "%" in self.name:
            return None
        for version in (4, 6):
            try:
                socket.inet_pton(_FAMILIES[version], self.name)
            except OSError:
                continue
            if self.family not in (0, version):
                raise NameNotResolved(f"{self.name} is no IPv{self.family} address")
            return [(self.name, int(self.service))]
        return None

    def call(self) -> wire.Resolve:
        """The question to sessiond."""
        return wire.Resolve(self.name, self.service, self.family, self.srv)

    def resolved(self, resolution: wire.Resolution) -> list[Candidate]:
        """sessiond's answer as candidates in the order of dialling."""
        candidates = list(resolution.candidates)
        # The priorities of SRV records go before the turns of the families.
        return candidates if self.srv else eyeballs.interleave(candidates)

    def question(self) -> tuple[str, str, int, int]:
        """The arguments of getaddrinfo()."""
        return self.name, self.service, _FAMILIES[self.family], socket.SOCK_STREAM

    def answered(self, answer: list[Any]) -> list[Candidate]:
        """The answer of getaddrinfo() as candidates in the order of dialling."""
        return eyeballs.interleave((str(a[0]), int(a[1])) for *_, a in answer)

    def unanswered(self, error: OSError | UnicodeError) -> HsockError:
        """What an error of getaddrinfo() means."""
        if isinstance(error, UnicodeError):
            return UsageError(f"{self.name!r} is no host name: {error}")
        why = error.strerror
        if not any_address():
            return NoLocalAddress(
                f"{self} can't be looked up: no interface of this host has an address",
                [f"getaddrinfo: {why}"],
            )
        return NameNotResolved(f"{self} could not be resolved", [f"getaddrinfo: {why}"])


def target(address: tuple[str, int | str], family: wire.Family = 0, srv: bool = False) -> Target:
    """Check what the application asked. Raises UsageError."""
    name, service = address
    if isinstance(service, int) and not 0 <= service < 65536:
        raise UsageError(f"{service} is no port")
    if family not in _FAMILIES:
        raise UsageError("family is 0, 4 or 6")
    wire.check_host(name)
    return Target(name, str(service), family, srv)


def any_address() -> bool:
    """Some interface other than loopback has a route or a global address (proc(5), /proc/net)."""
    routes = [line.split() for line in _lines("/proc/self/net/route")[1:]]
    addresses = [line.split() for line in _lines("/proc/self/net/if_inet6")]
    return any(route[0] != "lo" for route in routes) or any(a[3] == "00" for a in addresses)


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().splitlines()
    except FileNotFoundError:  # a kernel without this IP version
        return []
