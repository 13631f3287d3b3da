"""One host of the laboratory."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_interface
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from tests.support import namespace as ns
from tests.support.counters import Counters
from tests.support.worker import Worker

T = TypeVar("T")
P = ParamSpec("P")

_OWN_TABLE = 100
"""Number of the routing table of a host's first uplink."""
_STOP_SECONDS = 3


@dataclass(frozen=True)
class Uplink:
    """An interface with its addresses (``"10.0.1.2/24"``), its routers and what it costs."""

    interface: str
    addresses: tuple[str, ...]
    gateways: tuple[str, ...] = ()
    metric: int = 100

    def address(self, version: int = 4) -> str:
        """The first address of the version, without its prefix length."""
        found = [ip_interface(one).ip for one in self.addresses]
        return next(str(one) for one in found if one.version == version)


class Host:
    """A network namespace with what a test does in it. Made by ``Lab.host``."""

    def __init__(self, name: str, namespace: str, directory: Path, undo: ExitStack) -> None:
        self.name = name
        self.namespace = namespace
        self.directory = directory / name
        """Temporary files of this host."""
        self.directory.mkdir()
        self.uplinks: dict[str, Uplink] = {}
        self._undo = undo
        self._ruled: set[IPv4Network | IPv6Network] = set()

    # Its network

    def configure(self, uplink: Uplink) -> None:
        """Give an interface its addresses, and routes.

        Its default routes stand in the main table with the uplink's metric, and alone in a table
        of their own that is looked up for packets from its subnets: so every source address
        reaches everything through its own uplink, whichever uplink is preferred.
        """
        self.uplinks[uplink.interface] = uplink
        self.gain(uplink.interface)

    def gain(self, interface: str, addresses: tuple[str, ...] | None = None) -> None:
        """Link up, addresses and routes there.

        Args:
            addresses: new ones, with prefix length, instead of the configured; ``address`` tells
                them from then on.
        """
        uplink = self.uplinks[interface]
        if addresses is not None:
            uplink = self.uplinks[interface] = replace(uplink, addresses=addresses)
        commands = [f"link set dev {interface} up"]
        for address in uplink.addresses:
            nodad = " nodad" if ip_interface(address).version == 6 else ""
            commands.append(f"addr replace {address} dev {interface}{nodad}")
        commands += [
            f"route replace {route}" for one in (4, 6) for route in self._routes(uplink, one)
        ]
        self.ip(*commands)
        self._add_rules(uplink)

    def lose(
        self, interface: str, how: Literal["addresses", "link"] = "addresses", version: int = 0
    ) -> None:
        """What leaving a network looks like.

        Args:
            how: ``"addresses"`` deletes the interface's global addresses and its routes, the link
                stays up; ``"link"`` sets the link down, on which the kernel keeps IPv4 addresses.
            version: 4 or 6 deletes only the addresses and routes of that version; 0 all.
        """
        if how == "link":
            return self.ip(f"link set dev {interface} down")
        uplink = self.uplinks[interface]
        versions = (version,) if version else (4, 6)
        addresses = [one for one in uplink.addresses if ip_interface(one).version in versions]
        # The kernel takes the routes with the last IPv4 address, but IPv6 routes stay (there it is
        # router advertisements that take them): delete both, and be content with what is gone.
        routes = [route for one in versions for route in self._routes(uplink, one)]
        ns.ip(
            *(f"addr delete {address} dev {interface}" for address in addresses),
            *(f"route delete {route}" for route in routes),
            namespace=self.namespace,
            force=True,
        )

    def address(self, interface: str, version: int = 4) -> str:
        """The configured address of an interface, without prefix length."""
        return self.uplinks[interface].address(version)

    def ip(self, *commands: str) -> None:
        """Commands of ip(8) on this host, all in one process. Raises LabError."""
        ns.ip(*commands, namespace=self.namespace)

    def sysctl(self, name: str, value: object) -> None:
        """``host.sysctl("net/ipv4/tcp_fastopen", 7)``. Raises OSError."""
        self.call(ns.sysctl, name, str(value))

    def nameservers(self, *addresses: str) -> None:
        """The resolv.conf that programs started by ``popen`` and ``run`` see."""
        directory = ns.RESOLV / self.namespace
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "resolv.conf").write_text(
            "".join(f"nameserver {address}\n" for address in addresses) + "options timeout:1\n"
        )

    def counters(self) -> Counters:
        """The kernel's counters now; subtract an earlier reading."""
        return self.call(Counters.read)

    # What runs on it

    def entered(self) -> AbstractContextManager[None]:
        """The calling thread is on this host: for making sockets, which then stay there."""
        return ns.entered(self.namespace)

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on this host, in this thread. For what blocks, see ``fork``."""
        with self.entered():
            return function(*args, **kwargs)

    def fork(self, function: Callable[..., Any], *args: Any) -> Worker:
        """Run a function as a process of its own; its first argument is a ``Talk``."""
        worker = Worker(self.namespace, function, *args)
        self._undo.callback(worker.stop)
        return worker

    def popen(self, *argv: str, **kwargs: Any) -> subprocess.Popen[str]:
        """Start a program; it is stopped with the lab or by ``stop``.

        Must be called in a thread that lives as long as the program may (PR_SET_PDEATHSIG).
        """
        process = subprocess.Popen(self._here(argv), text=True, **kwargs)
        self._undo.callback(stop, process)
        return process

    def run(
        self, *argv: str, check: bool = True, timeout: float = 30, **kwargs: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, output captured. Raises CalledProcessError, TimeoutExpired."""
        return subprocess.run(
            self._here(argv), check=check, timeout=timeout, text=True, capture_output=True, **kwargs
        )

    def _here(self, argv: tuple[str, ...]) -> list[str]:
        # Both execute the next, so that the process started is the program itself.
        return ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.namespace, *argv]

    def _routes(self, uplink: Uplink, version: int) -> list[str]:
        if all(ip_interface(own).version != version for own in uplink.addresses):
            return []
        table = self._table(uplink.interface)
        return [
            f"default via {gateway} dev {uplink.interface} {where}"
            for gateway in uplink.gateways
            if ip_address(gateway).version == version
            for where in (f"metric {uplink.metric}", f"table {table}")
        ]

    def _add_rules(self, uplink: Uplink) -> None:
        if not uplink.gateways:
            return
        table = self._table(uplink.interface)
        for own in uplink.addresses:
            subnet = ip_interface(own).network
            if subnet not in self._ruled:
                self._ruled.add(subnet)
                rule = f"rule add from {subnet} table {table} pref {table}"
                ns.ip(rule, namespace=self.namespace, version=subnet.version)

    def _table(self, interface: str) -> int:
        return _OWN_TABLE + list(self.uplinks).index(interface)


def stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM, and SIGKILL if that does not end it in 3 s. Idempotent."""
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()
