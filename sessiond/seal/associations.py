"""All associations of this host: datagrams, payloads and time in, datagrams and payloads out.

A payload for a peer with an association is sealed at once, whatever address it goes to: the peer
finds the keys by the index in front. Only who has none waits for a handshake (``meeting``). A
stranger's datagram is refused before anything is kept, except for the bounded table of
``handshake.Responder``.

A peer that has lost its keys shows only as silence. So when payloads have gone unanswered for a
while the next ones are followed by a handshake, which delays none of them.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from sessiond.seal.cookie import Cookies, Source
from sessiond.seal.datagram import Reason, Refused, Type, parse
from sessiond.seal.handshake import Host, Peer, Responder
from sessiond.seal.meeting import Meeting, Named, Waiting
from sessiond.seal.transport import Keypair, NoKeys, Transport
from sessiond.seal.trust import Outcome, Verdict, canonical

SILENT_SECONDS = 0.5
"""Without an answer since the first of several payloads: perhaps the peer has lost its keys."""
BURST_SECONDS = 60.0
"""Payloads further apart are not of one attempt to reach the peer."""
RENEW_FIRST, RENEW_MAX = 60.0, 3600.0
"""Seconds between attempts to renew keys with a peer that does not answer."""
LEAST_PAUSE = 1.0
"""Seconds: a time computed in two ways may differ in its last bit, and must not keep us busy."""
LOOK_AGAIN = 600.0
"""Seconds until it is asked again whether keys that nobody wants should be renewed."""
MAX_ASSOCIATIONS = 4096
"""Beyond this, one that is not wanted goes for each that comes."""
MAX_MET = 4096
"""Names whose keys were judged since the start."""
RECENT = 64
"""Datagrams sent last that are known again when ICMP quotes them."""
KNOWN_BY = 24
"""Bytes: header and counter, and eight that nobody can guess."""

_COUNTER_BITS = 64


class Sent(NamedTuple):
    """A datagram to send."""

    datagram: bytes
    to: Source
    via: str
    """The local address it leaves from."""


class Heard(NamedTuple):
    """What a peer said."""

    peer: bytes
    """Its public key."""
    source: Source
    via: str
    counter: int
    """Strictly rising for a peer, also over its restarts."""
    payload: bytes


class Met(NamedTuple):
    """A key to remember."""

    name: str
    key: bytes
    line: str


class Distrusted(NamedTuple):
    """Who answers at the address may not be the peer meant; what waited for it is dropped."""

    address: str
    name: str
    line: str
    """Why, and what to do."""


Output = Sent | Heard | Met | Distrusted


class Association(Transport):
    """The keys shared with one instance of a peer's daemon, and where it is."""

    def __init__(self, host: Host, peer: Peer, former: bytes | None, epoch: int) -> None:
        super().__init__(host.indices)
        self.key, self.instance = peer
        self.former = former
        """The instance before this one: nothing of it counts any more."""
        self.epoch = epoch
        """Rising with each instance, as a counter begins anew with it."""
        self.endpoint: Source = ("", 0)
        self.via = ""
        self.heard_at = 0.0
        self.due: float | None = None
        self.meeting: Meeting | None = None
        """Confirmed to the peer, which has not said yet that it knows."""
        self.renew_at = float("-inf")
        self.renewals = 0
        """In vain, since the keys are due."""
        self._asked_at = float("-inf")
        self._asking_since: float | None = None

    def heard(self, source: Source, via: str, newest: bool, now: float) -> None:
        """The peer is alive; its newest datagram says where."""
        self.heard_at, self._asking_since = now, None
        if newest:
            self.endpoint, self.via = source, via

    def silent(self, now: float) -> bool:
        """Note that something is being said; whether the peer has been silent for long."""
        if self._asking_since is None or now - self._asked_at > BURST_SECONDS:
            self._asking_since = now
        self._asked_at = now
        return now - self._asking_since >= SILENT_SECONDS

    @property
    def next_at(self) -> float:
        """When keys must be renewed or forgotten."""
        return min(self.expires_at, max(self.rekey_at, self.renew_at))


class Associations:
    """The whole of it, without a clock or sockets.

    Args:
        host: this one.
        judge: whether a key may be that of a peer with this name at this address (``Trust.judge``).
        wanted: whether the association with a key is in use: then its keys are renewed.
        now: seconds, of any clock that does not jump.
    """

    def __init__(
        self,
        host: Host,
        judge: Callable[[bytes, str | None, str], Verdict],
        wanted: Callable[[bytes], bool],
        now: float,
    ) -> None:
        self._host = host
        self._judge = judge
        self._wanted = wanted
        self._responder = Responder(host, Cookies(now))
        self._by_key: dict[bytes, Association] = {}
        self._meetings: dict[bytes | Named, Meeting] = {}
        self._met: OrderedDict[Named, bytes] = OrderedDict()
        self._alarms: list[tuple[float, int, Meeting | Association]] = []
        self._order = itertools.count()
        self._epochs = itertools.count()
        self._recent: deque[tuple[bytes, Source]] = deque(maxlen=RECENT)
        self.handshakes = 0
        """Ended well."""

    def __len__(self) -> int:
        return len(self._by_key)

    def send(
        self, payloads: Iterable[bytes], to: Source, via: str, peer: bytes | str, now: float
    ) -> list[Output]:
        """Say something to a peer.

        Args:
            payloads: each for a datagram of its own, not empty.
            to, via: the path.
            peer: its key, or, before that is known, the name it was dialled by.

        Returns:
            The datagrams to send now; the payloads may have to wait for a handshake.
        """
        whom: bytes | Named
        if isinstance(peer, bytes):
            whom, association = peer, self._by_key.get(peer)
        else:
            whom = Named(to[0], peer)
            association = self._met_at(whom)
        payloads = list(payloads)
        if association is not None:
            try:
                output = [self._seal(association, one, to, via, now) for one in payloads]
            except NoKeys:
                pass
            else:
                if association.silent(now):
                    # A named peer may be another one by now: it should hear this as well.
                    again = payloads if isinstance(whom, Named) else []
                    return [*output, *self._meet(whom, again, to, via, now)]
                return [*output]
        return self._meet(whom, payloads, to, via, now)

    def receive(self, datagram: bytes, source: Source, via: str, now: float) -> list[Output]:
        """Take in what came from the network.

        Raises:
            Refused: it changed nothing.
        """
        type_, index, _ = parse(datagram)
        match type_:
            case Type.SEALED:
                return self._open(datagram, index, source, via, now)
            case Type.INITIATION:
                answer = self._responder.initiation(datagram, source, now)
                return [self._sent(answer, source, via)]
            case Type.CONFIRMATION:
                return self._confirmation(datagram, index, source, via, now)
            case Type.RESPONSE:
                return self._response(datagram, index, source, via, now)
            case Type.COOKIE:
                meeting = self._meeting(index)
                meeting.cookie(datagram)
                return [self._try(meeting, now)]

    def deadline(self) -> float | None:
        """When ``tick`` is due; None: not at all."""
        while self._alarms:
            when, _, one = self._alarms[0]
            if one.due == when:
                return when
            heapq.heappop(self._alarms)
        return None

    def tick(self, now: float) -> list[Output]:
        """Do what is due."""
        due = []
        while (when := self.deadline()) is not None and when <= now:
            *_, one = heapq.heappop(self._alarms)
            one.due = None
            due.append(one)
        output: list[Output] = []
        for one in due:
            if isinstance(one, Meeting):
                output += self._try_again(one, now)
            else:
                output += self._renew(one, now)
        return output

    def wrote(self, beginning: bytes, to: Source) -> bool:
        """Whether these bytes begin a datagram sent there lately: nobody else can know them."""
        return len(beginning) >= KNOWN_BY and (beginning[:KNOWN_BY], to) in self._recent

    def forget(self, name: str) -> None:
        """Judge whoever has this name, canonical, anew when it is dialled next."""
        for met in [one for one in self._met if _name(one) == name]:
            del self._met[met]

    # Sealed datagrams

    def _seal(
        self, association: Association, payload: bytes, to: Source, via: str, now: float
    ) -> Sent:
        return self._sent(association.seal(payload, now), to, via)

    def _open(
        self, datagram: bytes, index: int, source: Source, via: str, now: float
    ) -> list[Output]:
        association = self._host.indices.owner(index)
        if not isinstance(association, Association):
            raise Refused(Reason.UNKNOWN, f"no keys have index {index}")
        opened = association.open(datagram, now)
        association.heard(source, via, opened.newest, now)
        if association.meeting is not None and association.confirmed:
            self._alarm(association.meeting, None)
            association.meeting = None
            self._keys_are_new(association, now)
        if not opened.payload:
            return []
        counter = association.epoch << _COUNTER_BITS | opened.counter
        return [Heard(association.key, source, via, counter, opened.payload)]

    # Handshakes of others

    def _confirmation(
        self, datagram: bytes, index: int, source: Source, via: str, now: float
    ) -> list[Output]:
        try:
            peer, keypair = self._responder.confirmation(datagram, now)
        except Refused as refused:
            known = self._host.indices.owner(index)
            if refused.reason is not Reason.REPLAYED or not isinstance(known, Association):
                raise
            return [self._seal(known, b"", known.endpoint, known.via, now)]
        try:
            self._not_former(peer)
            verdict = self._judge(peer.static, None, source[0])
            if not verdict.trusted:
                raise Refused(Reason.UNTRUSTED, verdict.line)
        except Refused:
            self._host.indices.free(keypair.local_index)
            raise
        association = self._associate(peer, keypair, source, via, now)
        return [self._seal(association, b"", source, via, now)]

    # Handshakes of this host

    def _met_at(self, whom: Named) -> Association | None:
        """The association with a peer met under a name, if it still is at that address."""
        association = self._by_key.get(self._met.get(whom, b""))
        there = association is not None and association.endpoint[0] == whom.address
        return association if there else None

    def _meet(
        self, whom: bytes | Named, payloads: list[bytes], to: Source, via: str, now: float
    ) -> list[Output]:
        """Begin a handshake, or go on with it on this path."""
        meeting = self._meetings.get(whom)
        if meeting is None:
            meeting = self._meetings[whom] = Meeting(self._host, whom, now)
        for payload in payloads:
            meeting.wait(Waiting(payload, to, via))
        if meeting.fresh(to, via, now):
            return []
        meeting.to, meeting.via = to, via
        return [self._try(meeting, now)]

    def _try(self, meeting: Meeting, now: float) -> Sent:
        sent = self._sent(meeting.datagram(now), meeting.to, meeting.via)
        self._alarm(meeting, meeting.next_at)
        return sent

    def _try_again(self, meeting: Meeting, now: float) -> list[Output]:
        if not meeting.over(now):
            return [self._try(meeting, now)]
        if self._meetings.get(meeting.peer) is not meeting:
            return []  # confirmed in vain: the peer's silence will begin another
        del self._meetings[meeting.peer]
        meeting.close()
        if meeting.refusal is not None and isinstance(meeting.peer, Named):
            return [Distrusted(*meeting.peer, meeting.refusal)]
        return []

    def _meeting(self, index: int) -> Meeting:
        meeting = self._host.indices.owner(index)
        if not isinstance(meeting, Meeting):
            raise Refused(Reason.UNKNOWN, f"no handshake has index {index}")
        return meeting

    def _response(
        self, datagram: bytes, index: int, source: Source, via: str, now: float
    ) -> list[Output]:
        meeting = self._meeting(index)
        response = meeting.response(datagram)
        peer = response.peer
        self._not_former(peer)
        verdict = self._verdict(meeting.peer, peer.static)
        if not verdict.trusted:
            meeting.refuse(verdict.line, now)
            self._alarm(meeting, meeting.next_at)
            raise Refused(Reason.UNTRUSTED, verdict.line)
        confirmation, keypair = meeting.confirm(response, now)
        meeting.confirmed_by(confirmation, now)
        del self._meetings[meeting.peer]
        association = self._associate(peer, keypair, source, via, now)
        association.meeting = meeting
        meeting.to, meeting.via = source, via
        self._alarm(meeting, meeting.next_at)
        output: list[Output] = [self._sent(confirmation, source, via)]
        output += [
            self._seal(association, one.payload, one.to, one.via, now) for one in meeting.waiting
        ]
        if isinstance(meeting.peer, Named):
            self._met[meeting.peer] = peer.static
            if len(self._met) > MAX_MET:
                self._met.popitem(last=False)
            if verdict.outcome is Outcome.NEW:
                output.append(Met(_name(meeting.peer), peer.static, verdict.line))
        return output

    def _verdict(self, whom: bytes | Named, key: bytes) -> Verdict:
        if isinstance(whom, Named):
            return self._judge(key, _name(whom), whom.address)
        if key == whom:
            return Verdict(Outcome.ACCEPTED, "the peer's key, as before")
        return Verdict(Outcome.REFUSED, "another host answers where the peer was")

    # Keys

    def _not_former(self, peer: Peer) -> None:
        known = self._by_key.get(peer.static)
        if known is not None and peer.instance == known.former:
            raise Refused(Reason.REPLAYED, "a handshake of a daemon that has started anew since")

    def _associate(
        self, peer: Peer, keypair: Keypair, source: Source, via: str, now: float
    ) -> Association:
        association = self._by_key.get(peer.static)
        if association is None or association.instance != peer.instance:
            former = None
            if association is not None:
                former = association.instance
                self._drop(association)
            self._make_room()
            association = Association(self._host, peer, former, next(self._epochs))
            self._by_key[peer.static] = association
        elif association.meeting is not None:
            self._alarm(association.meeting, None)
            association.meeting = None
        association.install(keypair)
        association.heard(source, via, True, now)
        self._keys_are_new(association, now)
        self.handshakes += 1
        return association

    def _make_room(self) -> None:
        if len(self._by_key) >= MAX_ASSOCIATIONS:
            idle = [one for one in self._by_key.values() if not self._wanted(one.key)]
            if idle:
                self._drop(min(idle, key=lambda one: one.heard_at))

    def _keys_are_new(self, association: Association, now: float) -> None:
        association.renewals = 0
        # The old ones are due still, until the peer confirms that it has the new ones.
        association.renew_at = now + RENEW_FIRST
        self._alarm(association, association.next_at)

    def _renew(self, association: Association, now: float) -> list[Output]:
        association.expire(now)
        wanted = self._wanted(association.key)
        output: list[Output] = []
        if not wanted and association.expires_at == float("inf"):
            self._drop(association)
            return output
        if max(association.rekey_at, association.renew_at) <= now:
            association.renew_at = now + LOOK_AGAIN
            if wanted:
                pause = min(RENEW_FIRST * 2**association.renewals, RENEW_MAX)
                association.renew_at = now + pause
                association.renewals = min(association.renewals + 1, 16)
                output = self._meet(association.key, [], association.endpoint, association.via, now)
        self._alarm(association, max(association.next_at, now + LEAST_PAUSE))
        return output

    def _drop(self, association: Association) -> None:
        del self._by_key[association.key]
        association.close()
        self._alarm(association, None)
        if association.meeting is not None:
            self._alarm(association.meeting, None)

    # What everything ends with

    def _sent(self, datagram: bytes, to: Source, via: str) -> Sent:
        self._recent.append((datagram[:KNOWN_BY], to))
        return Sent(datagram, to, via)

    def _alarm(self, one: Meeting | Association, when: float | None) -> None:
        one.due = when
        if when is not None:
            heapq.heappush(self._alarms, (when, next(self._order), one))


def _name(whom: Named) -> str:
    """What its key is judged and remembered by."""
    try:
        return canonical(whom.name)
    except ValueError:
        return canonical(whom.address)
