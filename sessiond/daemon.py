"""The composition root: builds the edges, owns the inbox and the one loop."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import socket
from contextlib import AsyncExitStack
from pathlib import Path

from sessiond.config import Config
from sessiond.core import events as ev
from sessiond.core.machine import Core
from sessiond.core.network import Network
from sessiond.core.paths import Policy
from sessiond.edges.local import LocalServer
from sessiond.edges.resolver import Resolver
from sessiond.edges.rtnl import NetworkWatch
from sessiond.edges.sockdiag import DestroyWatch
from sessiond.edges.systemd import Supervisor
from sessiond.inbox import Inbox
from sessiond.peers import Peers
from sessiond.perform import Performer
from sessiond.rebind.repair import Repair
from sessiond.registry import Registry
from sessiond.service import Service

log = logging.getLogger(__name__)

WIND_DOWN_SECONDS = 2.0
"""At the end, for handovers under way; then the sockets are left where they work best."""


class Daemon:
    """One sessiond.

    Args:
        config: the whole configuration.
        listener: the local socket a supervisor handed over, if it did.

    Raises:
        PrivateFileError: a file of the state directory can't be used.
    """

    def __init__(self, config: Config, listener: socket.socket | None = None) -> None:
        self._config = config
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._inbox = Inbox(self._loop.time)
        self._rebinding: asyncio.Task[None] | None = None
        self._told: ev.NetworkChanged | None = None

        policy = config.policy
        self._peers = Peers(
            config.peer.port,
            config.peers,
            Path(config.state_directory),
            lambda host: host in self._core.table.associations,
            self._inbox.post,
        )
        self._core = Core(
            self._peers.key,
            config.peer.port,
            Policy(policy.prefer, policy.avoid, policy.prefer_ipv6),
            min_move_interval=policy.min_move_interval_ms / 1000,
            move_on_better=policy.move_on_better,
            allow_loopback=config.peer.allow_loopback,
        )
        self._engine = Repair(self._interface_of)
        self._destroyed = DestroyWatch(self._socket_destroyed)
        self._registry = Registry(self._engine, self._destroyed.unwatch)
        self._network = NetworkWatch(
            self._network_changed,
            gain_debounce=policy.gain_debounce_ms / 1000,
            allow_loopback=config.peer.allow_loopback,
        )
        self._resolver = Resolver(
            nameservers=config.resolver.nameservers,
            timeout=config.resolver.timeout_s,
            cache_size=config.resolver.cache_size,
            network=lambda: self._network.current,
        )
        self._performer = Performer(
            self._peers,
            self._engine,
            self._registry.connections,
            self._resolver,
            self._registry,
            self._inbox.post,
        )
        self._service = Service(
            self._core,
            self._engine,
            self._registry,
            self._resolver,
            self._peers,
            config.limits,
            self._dispatch,
            self._destroyed.watch,
        )

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        _raise_descriptor_limit()
        async with AsyncExitStack() as undo:
            await self._start(undo)
            # What is here now stays: the collector need not walk it in the middle of a handover.
            gc.freeze()
            gc.set_threshold(50_000, 20, 100)
            stop = asyncio.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, stop.set)
            supervisor = Supervisor()
            supervisor.ready(f"listening on {self._config.local.socket}")
            log.info("ready: local socket %s", self._config.local.socket)
            alive = asyncio.create_task(supervisor.keep_alive())
            serving = asyncio.create_task(self._inbox.serve(self._dispatch, self._core.deadline))
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            supervisor.stopping()
            if serving.done():
                serving.result()  # it never ends by itself: this raises what stopped it
            for task in (alive, serving, stopping):
                task.cancel()
            await asyncio.gather(alive, serving, stopping, return_exceptions=True)
            await self._wind_down()

    async def _wind_down(self) -> None:
        """Leave every socket live, without a filter and as its application has set it."""
        sessions = self._core.table.sessions
        try:
            async with asyncio.timeout(WIND_DOWN_SECONDS):
                while any(session.waits_for_peer for session in sessions.values()):
                    self._dispatch(await self._inbox.next(self._core.deadline))
        except TimeoutError:
            log.warning("stopping amid handovers: a peer does not answer")
        sockets = self._registry.connections
        self._engine.release([sockets[one.handle] for one in sessions.values() if one.mobile])

    async def _start(self, undo: AsyncExitStack) -> None:
        undo.callback(self._peers.close)
        self._destroyed.start()
        undo.callback(self._destroyed.close)
        network = await self._network.start()
        undo.callback(self._network.close)
        await self._listen(network)
        self._dispatch(ev.NetworkChanged(network))
        local = LocalServer(
            Path(self._config.local.socket),
            self._service,
            group=self._config.local.group,
            clients_per_uid=self._config.limits.clients_per_uid,
            listener=self._listener,
        )
        await local.start()
        undo.push_async_callback(local.close)

    def _dispatch(self, event: ev.Event) -> None:
        """The daemon's whole control flow."""
        for effect in self._core.handle(event, self._loop.time()):
            self._performer.perform(effect)
        self._inbox.wake()

    # What edges report

    def _socket_destroyed(self, cookie: int) -> None:
        handle = self._registry.by_cookie.get(cookie)
        if handle is not None:
            self._inbox.post(ev.Ended(handle, ev.CONNECTION_ENDED))

    def _network_changed(self, before: Network, after: Network) -> None:
        """Act at once, or, with new addresses, as soon as their UDP sockets are there."""
        if not set(after.addresses) <= set(before.addresses):
            self._performer.bury()
        if self._rebinding is not None and not self._rebinding.done():
            return  # it has still sockets to make, and takes this change in as well
        if set(after.addresses) <= set(before.addresses):
            self._tell(after)
        self._rebinding = asyncio.create_task(self._follow_network())

    async def _follow_network(self) -> None:
        while True:
            current = self._network.current
            await self._listen(current)
            if self._network.current == current:
                break
        self._tell(current)

    def _tell(self, network: Network) -> None:
        event = ev.NetworkChanged(network, self._network.settled)
        if event != self._told:
            self._told = event
            self._inbox.post(event)

    async def _listen(self, network: Network) -> None:
        failed = await self._peers.listen(address.address for address in network.addresses)
        for address, reason in failed.items():
            log.warning("no peer can be reached from %s: %s", address, reason)

    def _interface_of(self, address: str) -> str | None:
        return next(iter(self._network.current.interfaces_of(address)), None)


def _raise_descriptor_limit() -> None:
    """Every connection being moved needs two descriptors for the time of a step."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
