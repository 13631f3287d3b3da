"""Silent sockets on tuples that a connection has left or is about to take (decisions/0003).

A socket in repair mode, behind a filter that drops all, answers nothing and is closed without a
segment (tcp_close()). While it is on a tuple, the kernel does not answer for that with RSTs, and
nobody else can take it.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from sessiond.core.tuples import FourTuple
from sessiond.rebind import linux as lx
from sessiond.rebind.ports import InterfaceOf, Ports

MOST = 8
"""Tuples held for one connection; beyond it, the one held longest is given up."""


class Tombstones:
    """Those of one connection, from its first step of a handover until that is over."""

    __slots__ = ("_held", "_vacated")

    def __init__(self) -> None:
        self._held: dict[FourTuple, socket.socket] = {}
        self._vacated: list[FourTuple] = []

    def __contains__(self, where: FourTuple) -> bool:
        return where in self._held

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, where: FourTuple, holder: socket.socket) -> None:
        """Keep a tuple until it is given up."""
        self.give_up(where)
        if len(self._held) == MOST:
            self.give_up(next(iter(self._held)))
        self._held[where] = holder

    def give_up(self, where: FourTuple) -> None:
        """Keep one no longer; silent."""
        holder = self._held.pop(where, None)
        if holder is not None:
            holder.close()

    def clear(self) -> None:
        """Keep none."""
        self._vacated.clear()
        while self._held:
            self._held.popitem()[1].close()

    def __del__(self) -> None:
        self.clear()  # the connection ended in the middle of a handover

    @contextmanager
    def making_way(self, to: FourTuple, interface_of: InterfaceOf) -> Iterator[None]:
        """Let the connection come onto a tuple while that is still held.

        A socket bound to a device is no rival to one that is not (inet_match()), and until that is
        there, it goes on taking what arrives by the device.
        """
        holder = self._held.get(to)
        if holder is not None:
            interface = interface_of(to.local.address) or ""
            try:
                device = interface.encode() + b"\0"
                holder.setsockopt(lx.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
            except OSError:
                interface = ""  # it has just gone
            if not interface:
                self.give_up(to)
        yield
        self.give_up(to)
        if to in self._vacated:
            self._vacated.remove(to)

    def bury(
        self, sock: socket.socket, leaving: FourTuple, ports: Ports, interface_of: InterfaceOf
    ) -> None:
        """Set a tombstone where the connection still is, so that the kernel at no time answers for
        the tuple. Where nothing can arrive now, or the port is not to stay bound, it comes later.

        Args:
            sock: the connection's socket, on the tuple.
        """
        interface = interface_of(leaving.local.address)
        if leaving in self._held or interface is None:
            return
        with lx.beside(sock, interface), contextlib.suppress(OSError):
            self.hold(leaving, ports.hold(leaving, beside=True))

    def vacated(self, where: FourTuple) -> None:
        """The connection has left; ``bury_vacated`` does what is still to be done."""
        if where not in self._held and where not in self._vacated:
            self._vacated.append(where)

    def bury_vacated(self, ports: Ports) -> None:
        """Set the tombstones that had time. If no descriptor is left for one, the peer's shield
        alone must do."""
        while self._vacated:
            where = self._vacated.pop()
            with contextlib.suppress(OSError):
                self.hold(where, ports.hold(where, foreign=True))
