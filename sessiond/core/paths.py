"""Which local address serves which session: what is possible, and what is best.

A path is a local address with a peer's address. It is possible where a route of the local
address's interface leads to the peer's (longest prefix first, then the lower metric). The main
table is not asked by source address, so the kernel may send a possible path's packets out of
another interface: such a path *strays*, and one that does not is better.

The same question is asked for thousands of sessions after one change of the network. Everything
that takes long is therefore decided for pairs of addresses, and remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address, ip_network
from itertools import chain, zip_longest
from typing import NamedTuple

from sessiond.core.network import Address, Network
from sessiond.core.tuples import Endpoint, FourTuple

_NOWHERE = Network()


@dataclass(frozen=True, slots=True)
class Policy:
    """What the configuration prefers.

    Args:
        prefer: interface name patterns (``"eth*"``), the most preferred first.
        avoid: interfaces used only where no other one will do, the least bad first.
        prefer_ipv6: IPv6 first where both ends have it; otherwise a session keeps its family.
    """

    prefer: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    prefer_ipv6: bool = True

    def rank(self, interface: str) -> int:
        """Lower is better. An interface both preferred and avoided is preferred."""
        ranked = (*self.prefer, None, *self.avoid)
        for rank, pattern in enumerate(ranked):
            if pattern is not None and fnmatchcase(interface, pattern):
                return rank
        return len(self.prefer)


class Reach(NamedTuple):
    """How well an interface's routes lead to an address; the smaller one wins."""

    negated_prefix: int
    metric: int


def candidates(
    network: Network,
    current: FourTuple,
    peer_addresses: Sequence[str],
    versions: frozenset[int],
    policy: Policy,
    *,
    to: str | None = None,
) -> list[FourTuple]:
    """Where a session could be, best first.

    Better is: both addresses of one kind (RFC 6724 section 2.1, labels); then the interface policy
    prefers; a path that does not stray; the family policy prefers; the more specific route; the
    lower metric; what keeps the tuple as it is.

    Args:
        current: the session's tuple; its ports are kept, and it is a candidate itself if usable.
        peer_addresses: where the peer may be; forbidden ones are left out.
        versions: IP versions the socket can have.
        to: only this address or interface of this host.
    """
    local, remote = current.local.address, current.remote.address
    pairs = _pairs(network, local, remote, tuple(peer_addresses), versions, policy, to)
    return _tuples(current, pairs)


def usable(network: Network, current: FourTuple) -> bool:
    """Whether the local address is there and its interface has a route to the remote one."""
    reach = _reach(network, current.remote.address)
    return any(interface in reach for interface in network.interfaces_of(current.local.address))


def better(network: Network, current: FourTuple, policy: Policy) -> list[FourTuple]:
    """Paths to the same remote address that are worth leaving a working one for, best first.

    That is an interface which policy ranks higher, or, where it ranks them the same, the end of
    straying. A session moved to the first of them has none better: this does not flap.
    """
    pairs = _better_pairs(network, current.local.address, current.remote.address, policy)
    return _tuples(current, pairs)


@lru_cache(maxsize=4096)
def forbidden(
    address: str, network: Network = _NOWHERE, *, allow_loopback: bool = False
) -> str | None:
    """Why nothing may be sent to an address a peer named, or None (peer-protocol.md, property 5).

    Args:
        network: this host's; its own addresses and its networks' broadcast addresses are refused.
        allow_loopback: tests run both ends on one host.
    """
    ip = _parse(address)
    if ip is None:
        return "is not an IP address"
    if ip.is_unspecified:
        return "is the unspecified address"
    if ip.is_multicast:
        return "is a multicast address"
    if ip.is_link_local:
        return "is a link-local address"
    if ip.is_loopback:
        return None if allow_loopback else "is a loopback address"
    if ip.version == 4 and (ip.is_reserved or ip in _THIS_NETWORK or _is_broadcast(ip, network)):
        return "is a broadcast or reserved address"
    if network.interfaces_of(str(ip)):
        return "is an address of this host"
    return None


def destinations(network: Network, addresses: Iterable[str]) -> list[str]:
    """Order a name's addresses for connecting (RFC 6724 section 6, RFC 8305 section 4).

    Those that a usable local address of the same kind reaches come first, and in turns an IPv6 and
    an IPv4 one. Without a network all count as reached.
    """
    kept = list(dict.fromkeys(addresses))
    served = [a for a in kept if network == _NOWHERE or _serves(network, a)]
    rest = [a for a in kept if a not in served]
    return [*_in_turns(served), *_in_turns(rest)]


def _tuples(current: FourTuple, pairs: Iterable[tuple[str, str]]) -> list[FourTuple]:
    local, remote = current.local.port, current.remote.port
    return [FourTuple(Endpoint(ours, local), Endpoint(its, remote)) for ours, its in pairs]


@lru_cache(maxsize=1024)
def _pairs(
    network: Network,
    local: str,
    remote: str,
    peer_addresses: tuple[str, ...],
    versions: frozenset[int],
    policy: Policy,
    to: str | None,
) -> tuple[tuple[str, str], ...]:
    """``candidates``, of addresses."""
    wanted = to if to is None else canonical(to) or to
    version = _version(remote)
    found = []
    for peer_order, peer in enumerate(_targets(network, peer_addresses)):
        reach = _reach(network, peer)
        if _version(peer) not in versions or not reach:
            continue
        best = min(reach.values())
        other_family = _version(peer) != (6 if policy.prefer_ipv6 else version)
        for order, own in enumerate(network.addresses):
            if own.interface not in reach or _version(own.address) != _version(peer):
                continue
            if wanted is not None and wanted not in (own.address, own.interface):
                continue
            cost = (
                _label(own.address) != _label(peer),
                policy.rank(own.interface),
                reach[own.interface] != best,
                other_family,
                reach[own.interface],
                not _on_link(own, peer),
                own.address != local,
                peer != remote,
                order,
                peer_order,
            )
            found.append((cost, (own.address, peer)))
    return tuple(dict.fromkeys(pair for _, pair in sorted(found)))


@lru_cache(maxsize=1024)
def _better_pairs(
    network: Network, local: str, remote: str, policy: Policy
) -> tuple[tuple[str, str], ...]:
    """``better``, of addresses."""
    reach = _reach(network, remote)
    if not reach:
        return ()
    best = min(reach.values())

    def cost(address: str) -> tuple[bool, int, bool]:
        return min(
            (_label(address) != _label(remote), policy.rank(on), reach[on] != best)
            for on in network.interfaces_of(address)
            if on in reach
        )

    pairs = _pairs(network, local, remote, (remote,), frozenset((4, 6)), policy, None)
    if (local, remote) not in pairs:
        return pairs
    return tuple(pair for pair in pairs if cost(pair[0]) < cost(local))


def _targets(network: Network, peer_addresses: Iterable[str]) -> list[str]:
    """The addresses of a peer that something may be sent to, each once, in canonical text."""
    on_loopback = any(_loopback(own.address) for own in network.addresses)
    named = (canonical(address) for address in peer_addresses)
    return [
        address
        for address in dict.fromkeys(named)
        if address and forbidden(address, network, allow_loopback=on_loopback) is None
    ]


@lru_cache(maxsize=1024)
def _reach(network: Network, address: str) -> dict[str, Reach]:
    """The interfaces with a route to an address."""
    ip = _parse(address)
    if ip is None:
        return {}
    number, bits = int(ip), ip.max_prefixlen
    found: dict[str, Reach] = {}
    for destination, interface, metric in network.routes:
        version, first, prefix = _prefix(destination)
        if version == ip.version and (number ^ first) >> (bits - prefix) == 0:
            reach = Reach(-prefix, metric)
            found[interface] = min(found.get(interface, reach), reach)
    return found


def _serves(network: Network, peer: str) -> bool:
    """Whether a local address of the same kind reaches a peer's address."""
    reach = _reach(network, peer)
    return any(
        own.interface in reach and _label(own.address) == _label(peer) for own in network.addresses
    )


def _in_turns(addresses: Sequence[str]) -> list[str]:
    """An IPv6 address, an IPv4 address, and so on, each family in its order."""
    v6 = [address for address in addresses if _version(address) == 6]
    v4 = [address for address in addresses if _version(address) == 4]
    return [address for address in chain(*zip_longest(v6, v4)) if address is not None]


def _on_link(own: Address, peer: str) -> bool:
    """Whether a peer's address is in the network of a local one."""
    ours, its = _parse(own.address), _parse(peer)
    return (
        ours is not None
        and its is not None
        and (int(ours) ^ int(its)) >> (ours.max_prefixlen - own.prefix) == 0
    )


def _is_broadcast(ip: IPv4Address | IPv6Address, network: Network) -> bool:
    return any(
        _version(own.address) == 4
        and own.prefix < 31
        and ip == IPv4Network((own.address, own.prefix), strict=False).broadcast_address
        for own in network.addresses
    )


# Addresses as text; the same few are asked about again and again.


@lru_cache(maxsize=8192)
def _parse(address: str) -> IPv4Address | IPv6Address | None:
    try:
        ip = ip_address(address)
    except ValueError:
        return None
    if isinstance(ip, IPv6Address):
        if ip.scope_id is not None:
            return IPv6Address(int(ip))
        return ip.ipv4_mapped or ip
    return ip


def canonical(address: str) -> str | None:
    """An address as ``Endpoint`` writes it, or None if the text is not one.

    An IPv4-mapped one is an IPv4 address; a scope is dropped.
    """
    ip = _parse(address)
    return None if ip is None else str(ip)


def _version(address: str) -> int:
    return 6 if ":" in address else 4


def _loopback(address: str) -> bool:
    ip = _parse(address)
    return ip is not None and ip.is_loopback


@lru_cache(maxsize=8192)
def _prefix(destination: str) -> tuple[int, int, int]:
    """Version, number and length of a prefix."""
    net = ip_network(destination, strict=False)
    return net.version, int(net.network_address), net.prefixlen


_THIS_NETWORK = IPv4Network("0.0.0.0/8")
_LABELS = [
    (ip_network(prefix), label)
    for prefix, label in (
        ("::1/128", 0),
        ("0.0.0.0/0", 4),
        ("2002::/16", 2),
        ("2001::/32", 5),
        ("fc00::/7", 13),
        ("fec0::/10", 11),
        ("3ffe::/16", 12),
        ("::/0", 1),
    )
]
"""RFC 6724 section 2.1. IPv4-compatible ::/96 is left out, mapped addresses are IPv4."""


@lru_cache(maxsize=8192)
def _label(address: str) -> int | None:
    ip = _parse(address)
    return next((label for prefix, label in _LABELS if ip is not None and ip in prefix), None)
