"""rtnetlink messages, one after the other, into the snapshot of what a session can use.

pyroute2 takes 300 us to decode one RTM_NEWLINK, and a lost address must be known sooner; so the few
fields that matter are unpacked here. tests/netns/test_rtnl.py has pyroute2 check the result.

What the kernel does not say (Linux 6.18, seen): when an interface goes down or loses its last IPv4
address, its IPv4 routes vanish without RTM_DELROUTE (net/ipv4/fib_frontend.c, fib_disable_ip), and
RTM_NEWROUTE with NLM_F_REPLACE is the only sign of the replaced route's end. Both are concluded
here; what cannot be concluded is a ``Doubt``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from ipaddress import ip_address, ip_network
from struct import Struct
from typing import NamedTuple

from sessiond.core.network import Address, Network, Route

AF_UNSPEC, AF_INET, AF_INET6 = 0, 2, 10
NLM_F_REPLACE = 0x100
# linux/rtnetlink.h
RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR = 16, 17, 20, 21
RTM_NEWROUTE, RTM_DELROUTE, RTM_DELNEXTHOP = 24, 25, 105
RT_TABLE_MAIN, RTN_UNICAST, RTM_F_CLONED, RTNH_F_DEAD = 254, 1, 0x200, 1
RT_SCOPE_UNIVERSE, RT_SCOPE_HOST = 0, 254
RTA_DST, RTA_SRC, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC = 1, 2, 4, 5, 6, 7
RTA_MULTIPATH, RTA_VIA = 9, 18
# linux/if_addr.h
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_SECONDARY, IFA_F_DADFAILED, IFA_F_DEPRECATED, IFA_F_TENTATIVE = 0x01, 0x08, 0x20, 0x40
# linux/if.h, if_link.h, netlink.h
IFF_UP, IFF_LOOPBACK, IFF_RUNNING, IFF_LOWER_UP = 0x1, 0x8, 0x40, 0x10000
IFLA_IFNAME, NLA_TYPE_MASK = 3, 0x3FFF

CARRIES = IFF_UP | IFF_RUNNING | IFF_LOWER_UP
UNUSABLE = IFA_F_TENTATIVE | IFA_F_DADFAILED | IFA_F_DEPRECATED
"""RFC 4862 section 5.5.4; an optimistic address (RFC 4429) is tentative too."""
LINK_LOCAL = b"\xa9\xfe", b"\xfe\x80"
"""First bytes; an administrator may give such an IPv4 address any scope."""

HEADER = Struct("=IHHII")
"""nlmsghdr: length, type, flags, sequence number, sender's port."""
ATTRIBUTE = Struct("=HH")
LINK = Struct("=BxHiII")
ADDRESS = Struct("=BBBBi")
ROUTE = Struct("=BBBBBBBBI")
_NEXTHOP = Struct("=HBBi")
U32 = Struct("=I")
SIZES = {AF_INET: 4, AF_INET6: 16}
"""Bytes of an address."""


class Doubt(Exception):
    """The messages do not tell what the kernel has now: only a dump does."""


class _Link(NamedTuple):
    name: str
    flags: int

    @property
    def loopback(self) -> bool:
        return bool(self.flags & IFF_LOOPBACK)

    @property
    def carries(self) -> bool:
        return self.flags & CARRIES == CARRIES


class _AddressKey(NamedTuple):
    link: int
    family: int
    address: bytes
    peer: bytes
    prefix: int


class _RouteKey(NamedTuple):
    family: int
    destination: bytes
    prefix: int
    tos: int
    metric: int


_Hop = tuple[int, bytes]
"""Interface index, and what else tells two routes with one key apart."""


class Tables:
    """Links, addresses and routes of one network namespace, as the messages tell them.

    Args:
        allow_loopback: take the loopback interface's addresses too, with their networks' routes.
        max_routes: routes with a gateway kept besides default ones; further ones are counted in
            ``ignored``. A full Internet table costs no more than its messages.
    """

    def __init__(self, *, allow_loopback: bool, max_routes: int) -> None:
        self._allow_loopback = allow_loopback
        self._max_routes = max_routes
        self._links: dict[int, _Link] = {}
        self._addresses: dict[_AddressKey, tuple[int, int]] = {}
        self._routes: dict[_RouteKey, dict[_Hop, bool]] = {}
        self._known: tuple[Route, ...] | None = None
        self.ignored = 0

    def apply(self, kind: int, flags: int, data: bytes) -> bool:
        """Take one message in.

        Args:
            kind: nlmsg_type.
            flags: nlmsg_flags.
            data: what follows the nlmsghdr.

        Returns:
            Whether ``network`` may have another answer now.

        Raises:
            Doubt, struct.error: the message leaves open what the kernel has now.
        """
        if kind in (RTM_NEWROUTE, RTM_DELROUTE):
            changed = self._route(kind == RTM_NEWROUTE, flags, data)
        elif kind in (RTM_NEWADDR, RTM_DELADDR):
            return self._address(kind == RTM_NEWADDR, data)
        elif kind in (RTM_NEWLINK, RTM_DELLINK):
            changed = self._link(kind == RTM_NEWLINK, data)
        elif kind == RTM_DELNEXTHOP:
            raise Doubt("a nexthop object went, maybe with routes")
        else:
            return False
        if changed:
            self._known = None
        return changed

    def network(self) -> Network:
        """What of it a session can use."""
        found = [
            (key.link, key.family, _rank(key, flags), key.address, key.prefix)
            for key, (flags, scope) in self._addresses.items()
            if self._usable(key, flags, scope)
        ]
        addresses = tuple(
            Address(_text(address), prefix, self._links[index].name)
            for index, family, _, address, prefix in sorted(found)
        )
        return Network(addresses, self._usable_routes())

    def _link(self, new: bool, data: bytes) -> bool:
        family, _, index, flags, _ = LINK.unpack_from(data)
        if family != AF_UNSPEC:  # a bridge about its ports
            return False
        before = self._links.get(index)
        if not new:
            self._links.pop(index, None)
            self._addresses = {k: v for k, v in self._addresses.items() if k.link != index}
            self._drop_routes(index)
            return before is not None
        name = _attributes(data, LINK.size).get(IFLA_IFNAME)
        if name is None:
            raise Doubt("a link without a name")
        link = _Link(name.rstrip(b"\0").decode(errors="replace"), flags & (CARRIES | IFF_LOOPBACK))
        self._links[index] = link
        if not flags & IFF_UP:
            self._drop_routes(index)
        return link != before

    def _address(self, new: bool, data: bytes) -> bool:
        family, prefix, flags, scope, index = ADDRESS.unpack_from(data)
        if family not in SIZES:
            return False
        attributes = _attributes(data, ADDRESS.size)
        peer = attributes.get(IFA_ADDRESS, b"")
        own = attributes.get(IFA_LOCAL, peer)
        if IFA_FLAGS in attributes:
            (flags,) = U32.unpack(attributes[IFA_FLAGS])
        if len(own) != SIZES[family] or index not in self._links:
            raise Doubt("an address of the wrong size or on an unknown link")
        if self._links[index].loopback:
            self._known = None
        key = _AddressKey(index, family, own, peer, prefix)
        before = self._addresses.pop(key, None)
        if new:
            self._addresses[key] = flags, scope
            return before != (flags, scope)
        others = (k for k in self._addresses if k.link == index and k.family == family)
        if family == AF_INET and next(others, None) is None:
            self._drop_routes(index, family)
        return before is not None

    def _route(self, new: bool, flags: int, data: bytes) -> bool:
        family, prefix, _, tos, table, _, _, kind, state = ROUTE.unpack_from(data)
        if (
            family not in SIZES
            or table != RT_TABLE_MAIN
            or kind != RTN_UNICAST
            or state & RTM_F_CLONED
        ):
            return False
        attributes = _attributes(data, ROUTE.size)
        destination = attributes.get(RTA_DST, b"")
        if len(destination) not in (0, SIZES[family]):
            raise Doubt("a destination of the wrong size")
        if destination.startswith(LINK_LOCAL):
            return False
        (metric,) = U32.unpack(attributes.get(RTA_PRIORITY, bytes(4)))
        key = _RouteKey(family, destination, prefix, tos, metric)
        known = self._routes.get(key, {})
        if not new:
            gone = dict(_hops(attributes, state))
            left = {hop: dead for hop, dead in known.items() if hop not in gone}
        elif flags & NLM_F_REPLACE and len(known) > 1:
            raise Doubt("one of several equal routes was replaced")
        elif not known and self._too_many(prefix, attributes):
            self.ignored += 1
            return False
        else:
            left = dict(_hops(attributes, state))
            left = left if flags & NLM_F_REPLACE else known | left
        self._routes[key] = left
        if not left:
            del self._routes[key]
        return left != known

    def _too_many(self, prefix: int, attributes: dict[int, bytes]) -> bool:
        connected = RTA_OIF in attributes and not attributes.keys() & {RTA_GATEWAY, RTA_VIA}
        return len(self._routes) >= self._max_routes and prefix > 0 and not connected

    def _drop_routes(self, index: int, family: int | None = None) -> None:
        """What the kernel does, unsaid, with the routes of an interface."""
        for key, hops in list(self._routes.items()):
            if family in (None, key.family):
                left = {hop: dead for hop, dead in hops.items() if hop[0] != index}
                self._routes[key] = left
                if not left:
                    del self._routes[key]
        self._known = None

    def _usable(self, key: _AddressKey, flags: int, scope: int) -> bool:
        link = self._links[key.link]
        if not link.carries or flags & UNUSABLE:
            return False
        if link.loopback:
            return self._allow_loopback and scope in (RT_SCOPE_UNIVERSE, RT_SCOPE_HOST)
        return scope == RT_SCOPE_UNIVERSE and not key.address.startswith(LINK_LOCAL)

    def _usable_routes(self) -> tuple[Route, ...]:
        if self._known is None:
            self._known = tuple(sorted({*self._routes_of_links(), *self._routes_of_loopback()}))
        return self._known

    def _routes_of_links(self) -> Iterator[Route]:
        for key, hops in self._routes.items():
            address = _text(key.destination or bytes(SIZES[key.family]))
            for (index, _), dead in hops.items():
                link = self._links.get(index)
                if link is not None and link.carries and not dead:
                    yield Route(f"{address}/{key.prefix}", link.name, key.metric)

    def _routes_of_loopback(self) -> Iterator[Route]:
        """They are in the table ``local``."""
        for key, (flags, scope) in self._addresses.items():
            link = self._links[key.link]
            if link.loopback and self._usable(key, flags, scope):
                address = _text(key.address)
                yield Route(str(ip_network(f"{address}/{key.prefix}", strict=False)), link.name, 0)


def _rank(key: _AddressKey, flags: int) -> int:
    """RFC 6724 rule 7: a temporary IPv6 address first. An IPv4 one with this flag is secondary."""
    extra = bool(flags & IFA_F_SECONDARY)
    return int(extra if key.family == AF_INET else not extra)


def _attributes(data: bytes, offset: int) -> dict[int, bytes]:
    """Type and value of each attribute; of a repeated one the last."""
    found = {}
    while offset + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, offset)
        if length < ATTRIBUTE.size:
            raise Doubt("a malformed attribute")
        found[kind & NLA_TYPE_MASK] = data[offset + ATTRIBUTE.size : offset + length]
        offset += length + 3 & ~3
    return found


def _hops(attributes: dict[int, bytes], state: int) -> Iterator[tuple[_Hop, bool]]:
    """The ways a route goes, and whether each is dead."""
    source = attributes.get(RTA_PREFSRC, b"") + attributes.get(RTA_SRC, b"")
    if RTA_OIF in attributes:
        (index,) = U32.unpack(attributes[RTA_OIF])
        yield (index, _gateway(attributes) + source), bool(state & RTNH_F_DEAD)
    data = attributes.get(RTA_MULTIPATH, b"")
    while data:
        length, state, _, index = _NEXTHOP.unpack_from(data)
        if length < _NEXTHOP.size:
            raise Doubt("a malformed nexthop")
        nested = _attributes(data[:length], _NEXTHOP.size)
        yield (index, _gateway(nested) + source), bool(state & RTNH_F_DEAD)
        data = data[length + 3 & ~3 :]


def _gateway(attributes: dict[int, bytes]) -> bytes:
    return attributes.get(RTA_GATEWAY) or attributes.get(RTA_VIA, b"")


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """nlmsg_type, nlmsg_flags and the rest of each message of a datagram."""
    offset = 0
    while offset + HEADER.size <= len(data):
        length, kind, flags, _, _ = HEADER.unpack_from(data, offset)
        if length < HEADER.size or offset + length > len(data):
            raise Doubt("a truncated message")
        yield kind, flags, data[offset + HEADER.size : offset + length]
        offset += length + 3 & ~3


@lru_cache(maxsize=4096)
def _text(address: bytes) -> str:
    return str(ip_address(address))
