"""The daemons of other hosts, as this one hears and addresses them: sealed, over UDP."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sessiond import config
from sessiond.core import effects as ef
from sessiond.core import events as ev
from sessiond.core.tuples import Endpoint
from sessiond.edges.peer_udp import PeerUdp
from sessiond.keyring import Keyring
from sessiond.peer_codec import Malformed, decode, encode
from sessiond.ratelimit import RateLimit
from sessiond.seal import identity
from sessiond.seal.associations import Associations, Distrusted, Heard, Met, Output, Sent
from sessiond.seal.datagram import INSTANCE_BYTES, Refused
from sessiond.seal.handshake import Host
from sessiond.seal.indices import Indices
from sessiond.seal.noise import public_key
from sessiond.seal.private_file import PrivateFileError

log = logging.getLogger(__name__)

STRANGER_LOGS_PER_SECOND = 1
"""What anybody can trigger from the network must not fill the log."""


class Peers:
    """Seals what is sent, opens what comes, and gives ``seal.associations`` sockets and a clock.

    Args:
        port: the UDP port of every daemon.
        trust: whose keys are accepted.
        state_directory: holds this host's key and those it has met.
        wanted: whether sessions are shared with the peer of a key.
        post: takes the events.

    Raises:
        PrivateFileError: a file of the state directory can't be used.
    """

    def __init__(
        self,
        port: int,
        trust: config.Peers,
        state_directory: Path,
        wanted: Callable[[bytes], bool],
        post: Callable[[ev.Event], None],
    ) -> None:
        static = identity.load_or_make(state_directory)
        self.key = public_key(static)
        """This host's, public."""
        self.keyring = Keyring(trust, state_directory, self._forgotten)
        self._post = post
        self._loop = asyncio.get_running_loop()
        host = Host(static, secrets.token_bytes(INSTANCE_BYTES), Indices())
        now = self._loop.time()
        self._associations = Associations(host, self.keyring.judge, wanted, now)
        self._udp = PeerUdp(port, self._datagram, self._unreachable)
        self._refused: Counter[str] = Counter()
        self._stranger = RateLimit(STRANGER_LOGS_PER_SECOND)
        self._timer: asyncio.TimerHandle | None = None
        self._remembering: set[asyncio.Task[None]] = set()

    async def listen(self, addresses: Iterable[str]) -> dict[str, str]:
        """Be reachable at exactly these addresses.

        Returns:
            The addresses that could not be used, with the reason.
        """
        return await self._udp.listen(addresses)

    def send(self, send: ef.Send) -> None:
        """Say something to a peer; never blocks, may be lost."""
        payloads = encode(send.messages)
        now = self._loop.time()
        self._perform(self._associations.send(payloads, send.to, send.via, send.peer, now))

    def close(self) -> None:
        """Give the sockets back."""
        if self._timer is not None:
            self._timer.cancel()
        self._udp.close()

    def statistics(self) -> dict[str, Any]:
        """Counters; ``dropped`` says of what came from the network why nothing became of it."""
        return {
            "dropped": dict(self._refused),
            "handshakes": self._associations.handshakes,
            "associations": len(self._associations),
            "unsent": self._udp.unsent,
        }

    # What the network and time bring

    def _datagram(self, data: bytes, source: Endpoint, via: str) -> None:
        try:
            output = self._associations.receive(data, source, via, self._loop.time())
        except Refused as refused:
            self._drop(refused.reason, source, str(refused))
            output = []
        self._perform(output)

    def _unreachable(self, quoted: bytes, to: Endpoint, via: str) -> None:
        if self._associations.wrote(quoted, to):
            self._post(ev.Unreachable(to, via))

    def _tick(self) -> None:
        self._timer = None
        self._perform(self._associations.tick(self._loop.time()))

    def _perform(self, outputs: list[Output]) -> None:
        for output in outputs:
            match output:
                case Sent(datagram, to, via):
                    self._udp.send(datagram, Endpoint(*to), via)
                case Heard():
                    self._heard(output)
                case Met(name, key, line):
                    log.info("%s", line)
                    task = self._loop.create_task(self._remember(name, key))
                    self._remembering.add(task)
                    task.add_done_callback(self._remembering.discard)
                case Distrusted(address, name, line):
                    log.warning("%s", line)
                    self._post(ev.Untrusted(address, name, line))
        self._set_timer()

    def _heard(self, heard: Heard) -> None:
        source = Endpoint(*heard.source)
        try:
            messages = decode(heard.payload)
        except Malformed as error:
            self._drop("malformed message", source, str(error))
            return
        for message in messages:
            self._post(ev.Received(heard.peer, source, heard.via, heard.counter, message))

    def _drop(self, reason: str, source: Endpoint, why: str) -> None:
        self._refused[reason] += 1
        if self._stranger.allows():
            log.warning("ignored a datagram from %s: %s", source, why)

    def _set_timer(self) -> None:
        due = self._associations.deadline()
        if self._timer is not None:
            if self._timer.when() == due:
                return
            self._timer.cancel()
        self._timer = None if due is None else self._loop.call_at(due, self._tick)

    async def _remember(self, name: str, key: bytes) -> None:
        try:
            await self.keyring.remember(name, key)
        except PrivateFileError as error:
            log.error("%s's key is not remembered, whoever comes next is met anew: %s", name, error)

    def _forgotten(self, name: str) -> None:
        self._associations.forget(name)
