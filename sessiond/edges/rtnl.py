"""Tells when this network namespace's addresses, links or routes change, by rtnetlink.

A pushed message is applied as it comes: a loss is reported some 0.1 ms after the kernel said so,
no dump stands in its way. But every loss is followed, once the kernel is quiet, by a dump that has
the last word; so are ENOBUFS and messages that leave a doubt, at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable
from functools import partial

from pyroute2.netlink import (
    NETLINK_GET_STRICT_CHK,
    NETLINK_ROUTE,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    SOL_NETLINK,
    rtnl,
)

from sessiond.core.network import Network
from sessiond.core.rtnetlink import (
    ADDRESS,
    ATTRIBUTE,
    HEADER,
    LINK,
    ROUTE,
    RT_TABLE_MAIN,
    RTN_UNICAST,
    U32,
    Doubt,
    Tables,
    messages,
)

log = logging.getLogger(__name__)

# What pyroute2 has no plain constant for
NETLINK_ADD_MEMBERSHIP, SO_RCVBUFFORCE, KERNEL = 1, 33, 0
RTNLGRP_NEXTHOP, RTPROT_KERNEL, IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS = 32, 2, 29, 8

GROUPS = (
    *(rtnl.RTNLGRP_LINK, rtnl.RTNLGRP_IPV4_IFADDR, rtnl.RTNLGRP_IPV6_IFADDR),
    *(rtnl.RTNLGRP_IPV4_ROUTE, rtnl.RTNLGRP_IPV6_ROUTE, RTNLGRP_NEXTHOP),
)

RECEIVE = 1 << 16
"""Bytes; no rtnetlink datagram is larger."""
MESSAGES_AT_ONCE = 256
"""Read before the loop serves others again."""
BACKLOG = 100_000
"""Messages read at most after a dump; more than ``receive_buffer`` holds."""
DUMPS_AT_ONCE = 3
"""Tries at a dump that changes while it is taken; then the next quiet moment must do."""


class NetworkWatch:
    """Says when this network namespace's usable addresses or routes change.

    Args:
        on_change: called in the event loop with the snapshot it was last called with and the one
            that holds now. With something lost: at once. With gains only: at once, but not
            ``settled``, unless something comes and goes; and when nothing has changed for
            ``gain_debounce``, or ``gain_limit`` after the first one.
        gain_debounce, gain_limit: seconds.
        allow_loopback: count loopback addresses as usable (tests).
        max_routes: see ``Tables``.
        receive_buffer: bytes of messages the kernel keeps for us.
    """

    def __init__(
        self,
        on_change: Callable[[Network, Network], None],
        *,
        gain_debounce: float = 0.1,
        gain_limit: float = 0.5,
        allow_loopback: bool = False,
        max_routes: int = 1000,
        receive_buffer: int = 4 << 20,
    ) -> None:
        self._on_change = on_change
        self._debounce = gain_debounce
        self._limit = max(gain_limit, gain_debounce)
        self._new_tables = partial(Tables, allow_loopback=allow_loopback, max_routes=max_routes)
        self._tables = self._new_tables()
        self._receive_buffer = receive_buffer
        self._loop = asyncio.get_running_loop()
        self._events: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = self._latest = 0.0
        self._doubtful = False
        self._check: asyncio.Task[None] | None = None
        self._checked = float("-inf")
        self.current = Network()
        """What ``on_change`` was last told."""
        self.settled = True
        """False: that had gains only, and more may follow."""
        self._flapping = False
        """Something came and went since the kernel was last quiet: gains have to settle."""
        self.dumps = 0
        """How often the kernel was asked for everything."""

    async def start(self) -> Network:
        """Watch from now on.

        Returns:
            The snapshot that the first change is a change of.

        Raises:
            OSError: the kernel gives no rtnetlink socket or no dump.
        """
        self._events = sock = _netlink_socket()
        _enlarge(sock, self._receive_buffer)
        for group in GROUPS:
            sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        await self._resync()
        self.current = self._tables.network()
        self._loop.add_reader(sock, self._readable)
        return self.current

    def close(self) -> None:
        """Watch no more; no callback comes after this."""
        if self._timer is not None:
            self._timer.cancel()
        if self._check is not None:
            self._check.cancel()
        if self._events is not None:
            self._loop.remove_reader(self._events)
            self._events.close()
            self._events = None

    async def snapshot(self) -> Network:
        """What the kernel says now, apart from what is watched.

        Raises:
            OSError: the kernel gives no dump.
            Doubt: it changed while it was taken.
        """
        return (await self._dump()).network()

    # Messages

    def _readable(self) -> None:
        changed, doubtful = self._drain(MESSAGES_AT_ONCE)
        if changed:
            self._consider()
        if doubtful:
            self._doubtful = True
            if self._loop.time() - self._checked < self._debounce:
                self._wait_for_quiet()
            else:
                self._start_check()

    def _drain(self, limit: int) -> tuple[bool, bool]:
        """Apply what has come: whether something changed, and whether a dump must tell."""
        changed = doubtful = False
        assert self._events is not None, "the reader is gone before the socket is"
        for _ in range(limit):
            try:
                data, (sender, _) = self._events.recvfrom(RECEIVE)
                if sender == KERNEL:
                    for kind, flags, body in messages(data):
                        changed |= self._tables.apply(kind, flags, body)
            except BlockingIOError:
                break
            except (Doubt, struct.error) as reason:
                log.debug("asking the kernel for a dump: %s", reason)
                doubtful = True
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                log.debug("asking the kernel for a dump: messages were lost")
                doubtful = True
        return changed, doubtful

    def _consider(self) -> None:
        """Report a loss, and gains as what they are; wait for more."""
        after = self._tables.network()
        if after == self.current:
            return
        self._wait_for_quiet()
        if self.current.lost_in(after):
            self._doubtful = True
            self._flapping |= not self.settled
            self._report(after)
        elif not self._flapping:
            self._report(after, settled=False)

    def _report(self, after: Network, *, settled: bool = True) -> None:
        before, self.current, self.settled = self.current, after, settled
        self._on_change(before, after)

    def _report_settled(self) -> None:
        after = self._tables.network()
        if after != self.current or not self.settled:
            self._report(after)

    # Quiet

    def _wait_for_quiet(self) -> None:
        now = self._loop.time()
        if self._timer is None:
            self._latest = now + self._limit
            self._timer = self._loop.call_at(now + self._debounce, self._quiet)
        self._due = min(now + self._debounce, self._latest)

    def _quiet(self) -> None:
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._quiet)
            return
        self._timer = None
        self._flapping = False
        if self._doubtful:
            self._start_check(then_report=True)
        else:
            self._report_settled()

    # Dumps

    def _start_check(self, *, then_report: bool = False) -> None:
        if self._check is not None:
            self._wait_for_quiet()
            return
        self._check = self._loop.create_task(self._checking(then_report))

    async def _checking(self, then_report: bool) -> None:
        assert self._events is not None, "close() cancels this task"
        # What comes meanwhile waits in the socket and is applied on top of the dump.
        self._loop.remove_reader(self._events)
        try:
            await self._resync()
        except OSError as error:
            log.warning("no dump of the network, going on with what is known: %s", error)
        finally:
            self._check = None
            if self._events is not None:
                self._loop.add_reader(self._events, self._readable)
        if then_report:
            self._report_settled()
        else:
            self._consider()

    async def _resync(self) -> None:
        """Make the tables what the kernel has."""
        self._doubtful = True
        for _ in range(DUMPS_AT_ONCE):
            try:
                self._tables = await self._dump()
            except Doubt as reason:
                log.debug("dumping again: %s", reason)
                continue
            _, self._doubtful = self._drain(BACKLOG)
            if not self._doubtful:
                break
        self._checked = self._loop.time()
        if self._doubtful:
            self._wait_for_quiet()

    async def _dump(self) -> Tables:
        self.dumps += 1
        tables = self._new_tables()
        mask = ATTRIBUTE.pack(8, IFLA_EXT_MASK) + U32.pack(RTEXT_FILTER_SKIP_STATS)
        await _ask(tables, rtnl.RTM_GETLINK, LINK.pack(0, 0, 0, 0, 0) + mask)
        await _ask(tables, rtnl.RTM_GETADDR, ADDRESS.pack(0, 0, 0, 0, 0))
        for family in (socket.AF_INET, socket.AF_INET6):
            ignored = tables.ignored
            await _ask(tables, rtnl.RTM_GETROUTE, _route_request(family))
            if tables.ignored > ignored:
                await _ask(tables, rtnl.RTM_GETROUTE, _route_request(family, RTPROT_KERNEL))
        return tables


async def _ask(tables: Tables, kind: int, body: bytes) -> None:
    """Put one dump into the tables; end it early once they are full."""
    ignored = tables.ignored
    interrupted = False
    with _netlink_socket() as sock:
        sock.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        flags = NLM_F_REQUEST | NLM_F_DUMP
        sock.send(HEADER.pack(HEADER.size + len(body), kind, flags, 1, 0) + body)
        while tables.ignored == ignored:
            data = await asyncio.get_running_loop().sock_recv(sock, RECEIVE)
            for answer, flags, content in messages(data):
                interrupted |= bool(flags & NLM_F_DUMP_INTR)
                if answer in (NLMSG_DONE, NLMSG_ERROR):
                    _check_result(content)
                    if interrupted:
                        raise Doubt("the network changed during the dump")
                    return
                tables.apply(answer, flags, content)
            await asyncio.sleep(0)  # sock_recv never waits in a dump


def _check_result(content: bytes) -> None:
    result = int.from_bytes(content[:4], sys.byteorder, signed=True)
    if -result not in (0, errno.ENOENT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP):  # no such table
        raise OSError(-result, f"the kernel refuses an rtnetlink dump: {os.strerror(-result)}")


def _route_request(family: int, protocol: int = 0) -> bytes:
    return ROUTE.pack(family, 0, 0, 0, RT_TABLE_MAIN, protocol, 0, RTN_UNICAST, 0)


def _netlink_socket() -> socket.socket:
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    sock = socket.socket(socket.AF_NETLINK, kind, NETLINK_ROUTE)
    sock.bind((0, 0))
    return sock


def _enlarge(sock: socket.socket, size: int) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)
    except PermissionError:  # then rmem_max is the limit, and dumps are more frequent
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
