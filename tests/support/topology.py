"""The usual laboratory: a client and a server with two uplinks each, a router, a name server.

    client                        router                         server
    ┌──────────────┐  wifi  ┌───────────────────┐  lan0  ┌──────────────┐
    │ wifi      .2 ├────────┤ .1 wifi   lan0 .1 ├────────┤ .2      lan0 │
    │              │        │                   │        │              │
    │ eth       .2 ├────────┤ .1 eth    lan1 .1 ├────────┤ .2      lan1 │
    └──────────────┘  eth   │                   │  lan1  └──────────────┘
                            │        dns .1     │
                            └──────────┬────────┘
                                   .2  │ dns     knotd: server.test
                                  ┌────┴────┐
                                  │   dns   │
                                  └─────────┘

    link   IPv4            IPv6                 metric
    wifi   10.0.1.0/24     2001:db8:1::/64      100
    eth    10.0.2.0/24     2001:db8:2::/64      200
    lan0   10.1.1.0/24     2001:db8:11::/64     100
    lan1   10.1.2.0/24     2001:db8:12::/64     200
    dns    10.53.0.0/24    2001:db8:53::/64     100

The host's address ends in .2 and ::2, the router's in .1 and ::1. Every source address reaches
everything through its own uplink (see ``Host.configure``). Any link can have a delay element in
it (see ``tests.support.delay``).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from ipaddress import ip_interface
from typing import NamedTuple

from tests.support.lab import Delay, Host, Lab, Uplink


class Link(NamedTuple):
    """A host's cable to the router; both of its ends have this name."""

    host: str
    ipv4: str
    """The subnet without its last number: ``"10.0.1"``."""
    ipv6: str
    metric: int

    def addresses(self, number: int) -> tuple[str, str]:
        """Those of the host with the number, with prefix length."""
        return f"{self.ipv4}.{number}/24", f"{self.ipv6}::{number}/64"


LINKS = {
    "wifi": Link("client", "10.0.1", "2001:db8:1", 100),
    "eth": Link("client", "10.0.2", "2001:db8:2", 200),
    "lan0": Link("server", "10.1.1", "2001:db8:11", 100),
    "lan1": Link("server", "10.1.2", "2001:db8:12", 200),
    "dns": Link("dns", "10.53.0", "2001:db8:53", 100),
}
NAMESERVERS = ("10.53.0.2", "2001:db8:53::2")
"""Where ``tests.support.dns.NameServer`` listens."""


@dataclass
class Topology:
    """The hosts, and the delay elements by the names of their links."""

    client: Host
    server: Host
    router: Host
    dns: Host
    delays: dict[str, Delay] = field(default_factory=dict)


def two_hosts(
    lab: Lab, delays: Collection[str] = (), versions: Collection[int] = (4, 6)
) -> Topology:
    """Build it.

    Args:
        delays: the links that get a delay element, which at first delays nothing; "ab" is from the
            host to the router.
        versions: of IP that the links have.
    """
    hosts = {name: lab.host(name) for name in ("client", "server", "dns")}
    router = lab.host("router")
    for version in ("ipv4/conf/all/forwarding", "ipv6/conf/all/forwarding"):
        router.sysctl(f"net/{version}", 1)
    elements: dict[str, Delay] = {}
    for name, link in LINKS.items():
        if name in delays:
            elements[name] = lab.delayed_link(hosts[link.host], name, router, name)
        else:
            lab.link(hosts[link.host], name, router, name)
        near, far = (
            tuple(one for one in link.addresses(number) if ip_interface(one).version in versions)
            for number in (2, 1)
        )
        gateways = tuple(str(ip_interface(one).ip) for one in far)
        hosts[link.host].configure(Uplink(name, near, gateways, link.metric))
        router.configure(Uplink(name, far))
    for name in ("client", "server"):
        hosts[name].nameservers(*NAMESERVERS)
    return Topology(hosts["client"], hosts["server"], router, hosts["dns"], elements)
