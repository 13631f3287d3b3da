"""All associations of a host: values in and out, and a network that loses, repeats and reorders."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from sessiond.seal import associations as module
from sessiond.seal.associations import (
    LOOK_AGAIN,
    SILENT_SECONDS,
    Associations,
    Distrusted,
    Heard,
    Met,
    Output,
    Sent,
)
from sessiond.seal.cookie import Source
from sessiond.seal.datagram import Reason, Refused, Type, parse
from sessiond.seal.handshake import COOKIES_FROM, Host
from sessiond.seal.indices import Indices
from sessiond.seal.meeting import GRACE_SECONDS, MAX_WAITING, MEETING_SECONDS
from sessiond.seal.noise import public_key
from sessiond.seal.transport import REJECT_AFTER_SECONDS, REKEY_AFTER_SECONDS
from sessiond.seal.trust import Level, Trust
from tests.seal.hosts import flipped

ALICE, BOB, MALLORY = "192.0.2.1", "192.0.2.2", "203.0.113.66"
NAME = "bob.test"


class End:
    """A host at an address, with what it has heard."""

    def __init__(self, letter: str, address: str) -> None:
        self.letter, self.address = letter, address
        self.known: dict[str, bytes] = {}
        self.trust = Trust(Level.FIRST_USE, {}, self.known)
        self.wanted = True
        self.heard: list[Heard] = []
        self.distrusted: list[Distrusted] = []
        self.refused: list[Reason] = []
        self.start(0.0)

    def start(self, now: float) -> None:
        """The daemon starts, with the key it has always had."""
        static = X25519PrivateKey.from_private_bytes(self.letter.encode() * 32)
        self.key = public_key(static)
        host = Host(static, random.randbytes(16), Indices())
        self.indices = host.indices
        self.all = Associations(
            host, lambda *who: self.trust.judge(*who), lambda _: self.wanted, now
        )

    @property
    def source(self) -> Source:
        return (self.address, 2006)

    def payloads(self) -> list[bytes]:
        return [one.payload for one in self.heard]


class Wire:
    """Time, and what is on its way; ``disturb`` says what becomes of each datagram."""

    def __init__(self, *ends: End) -> None:
        self.ends = ends
        self.now = 0.0
        self.carried: list[Sent] = []
        self.under_way: list[Sent] = []
        self.disturb: Callable[[Sent], list[Sent]] = lambda sent: [sent]

    def say(self, end: End, payload: bytes, to: str, peer: bytes | str = NAME) -> None:
        self.take(end, end.all.send([payload], (to, 2006), end.address, peer, self.now))
        self.settle()

    def take(self, end: End, output: list[Output]) -> None:
        for one in output:
            match one:
                case Sent():
                    self.carried.append(one)
                    self.under_way += self.disturb(one)
                case Heard():
                    end.heard.append(one)
                case Met(name, key):
                    end.known[name] = key
                case Distrusted():
                    end.distrusted.append(one)

    def settle(self) -> None:
        """Deliver what is under way, and what that leads to."""
        while self.under_way:
            self.deliver(self.under_way.pop(0))

    def deliver(self, sent: Sent, source: Source | None = None) -> None:
        for end in self.ends:
            if end.address == sent.to[0]:
                came_from = source or (sent.via, 2006)
                try:
                    output = end.all.receive(sent.datagram, came_from, end.address, self.now)
                except Refused as refused:
                    end.refused.append(refused.reason)
                else:
                    self.take(end, output)

    def wait(self, seconds: float) -> None:
        """Let time pass, timers included."""
        until = self.now + seconds
        for _ in range(10_000):
            due = [when for end in self.ends if (when := end.all.deadline()) is not None]
            if not due or min(due) > until:
                break
            self.now = max(self.now, min(due))
            for end in self.ends:
                self.take(end, end.all.tick(self.now))
            self.settle()
        else:
            raise AssertionError("the timers never rest")
        self.now = until

    def types(self) -> list[Type]:
        """Of all datagrams so far."""
        return [parse(one.datagram)[0] for one in self.carried]


@pytest.fixture
def alice() -> End:
    return End("a", ALICE)


@pytest.fixture
def bob() -> End:
    return End("b", BOB)


@pytest.fixture
def wire(alice: End, bob: End) -> Wire:
    return Wire(alice, bob)


@pytest.fixture
def met(wire: Wire, alice: End, bob: End) -> Wire:
    """The two have an association, and nothing is due."""
    wire.say(alice, b"bind", BOB)
    wire.say(bob, b"bound", ALICE, alice.key)
    wire.carried.clear()
    return wire


def test_the_first_payload_waits_for_one_handshake(wire: Wire, alice: End, bob: End) -> None:
    wire.say(alice, b"bind", BOB)
    assert bob.payloads() == [b"bind"]
    expected = [Type.INITIATION, Type.RESPONSE, Type.CONFIRMATION, Type.SEALED, Type.SEALED]
    assert wire.types() == expected
    assert alice.known == {NAME: bob.key}
    assert (bob.heard[0].peer, bob.heard[0].source) == (alice.key, alice.source)


def test_with_keys_a_payload_is_one_datagram_whatever_its_address(
    met: Wire, alice: End, bob: End
) -> None:
    for address in ("198.51.100.1", "2001:db8::1", BOB):
        met.say(alice, b"move", address, bob.key)
    assert met.types() == [Type.SEALED] * 3
    assert bob.payloads() == [b"bind", b"move"]
    bob.address = "198.51.100.1"
    met.deliver(met.carried[0])
    assert bob.payloads() == [b"bind", b"move", b"move"]


def test_counters_rise_for_the_core_over_a_restart_of_the_peer(
    met: Wire, alice: End, bob: End
) -> None:
    bob.start(met.now)
    met.say(bob, b"new", ALICE, "alice.test")
    met.say(bob, b"newer", ALICE, alice.key)
    counters = [one.counter for one in alice.heard]
    assert alice.payloads() == [b"bound", b"new", b"newer"]
    assert counters == sorted(set(counters))


def test_a_restarted_peer_is_met_again_after_a_moments_silence(
    met: Wire, alice: End, bob: End
) -> None:
    bob.start(met.now)
    met.say(alice, b"move", BOB, bob.key)
    assert met.types() == [Type.SEALED]
    met.wait(SILENT_SECONDS)
    met.say(alice, b"move again", BOB, bob.key)
    assert met.types()[1:3] == [Type.SEALED, Type.INITIATION]  # the handshake delays nothing
    met.say(alice, b"and again", BOB, bob.key)
    assert bob.payloads()[-1] == b"and again"
    assert bob.refused == [Reason.UNKNOWN] * 2


def test_who_answers_keeps_its_keys_without_a_handshake(met: Wire, alice: End, bob: End) -> None:
    for _ in range(20):
        met.say(alice, b"ping", BOB, bob.key)
        met.say(bob, b"pong", ALICE, alice.key)
        met.wait(1)
    assert set(met.types()) == {Type.SEALED}


def test_a_name_that_was_met_needs_no_second_handshake(met: Wire, alice: End, bob: End) -> None:
    met.say(alice, b"another bind", BOB)
    assert met.types() == [Type.SEALED]
    met.say(alice, b"bind", BOB, "other.test")
    assert Type.INITIATION in met.types()
    assert alice.known == {NAME: bob.key, "other.test": bob.key}


def test_a_name_that_was_forgotten_is_judged_anew(met: Wire, alice: End) -> None:
    alice.all.forget(NAME)
    met.say(alice, b"another bind", BOB)
    assert Type.INITIATION in met.types()


def test_a_changed_key_is_refused_in_one_line_after_a_moment(
    wire: Wire, alice: End, bob: End
) -> None:
    alice.known[NAME] = End("m", MALLORY).key
    wire.say(alice, b"bind", BOB)
    assert alice.refused == [Reason.UNTRUSTED]
    assert not alice.distrusted
    wire.wait(GRACE_SECONDS)
    (told,) = alice.distrusted
    assert (told.address, told.name) == (BOB, NAME)
    assert "sessionctl peers forget bob.test" in told.line
    assert Type.CONFIRMATION not in wire.types()  # bob has not learnt who asked
    assert not bob.heard
    assert len(alice.indices) == 0


def test_a_forger_who_answers_first_does_not_keep_the_right_one_out(
    wire: Wire, alice: End, bob: End
) -> None:
    mallory = End("m", MALLORY)
    alice.known[NAME] = bob.key
    wire.disturb = lambda sent: []
    wire.say(alice, b"bind", BOB)
    (initiation,) = wire.carried
    (forged,) = mallory.all.receive(initiation.datagram, alice.source, MALLORY, 0.0)
    assert isinstance(forged, Sent)
    wire.deliver(forged, bob.source)
    assert alice.refused == [Reason.UNTRUSTED]
    wire.disturb = lambda sent: [sent]
    wire.deliver(initiation)
    wire.settle()
    wire.wait(2 * GRACE_SECONDS)
    assert bob.payloads() == [b"bind"]
    assert not alice.distrusted


def test_an_untrusted_caller_leaves_nothing_behind(wire: Wire, alice: End, bob: End) -> None:
    bob.trust = Trust(Level.PINNED, {}, {})
    wire.say(alice, b"bind", BOB)
    assert Reason.UNTRUSTED in bob.refused
    assert (len(bob.all), len(bob.indices), bob.heard) == (0, 0, [])


def test_of_what_waits_the_oldest_is_dropped(wire: Wire, alice: End, bob: End) -> None:
    wire.disturb = lambda sent: []
    for number in range(MAX_WAITING + 10):
        wire.say(alice, b"%d" % number, BOB)
    assert len(wire.carried) == 1
    wire.disturb = lambda sent: [sent]
    wire.wait(1)
    assert bob.payloads() == [b"%d" % number for number in range(10, MAX_WAITING + 10)]


def test_without_an_answer_it_is_given_up_and_begun_anew_when_asked(wire: Wire, alice: End) -> None:
    wire.say(alice, b"bind", "192.0.2.99")
    wire.wait(MEETING_SECONDS)
    assert len(alice.indices) == 0
    assert alice.all.deadline() is None
    assert len(wire.carried) == 6
    wire.say(alice, b"bind", "192.0.2.99")
    assert len(wire.carried) == 7


def test_keys_are_renewed_in_time_and_nothing_is_lost(met: Wire, alice: End, bob: End) -> None:
    met.wait(REKEY_AFTER_SECONDS)
    assert met.types() == [Type.INITIATION, Type.RESPONSE, Type.CONFIRMATION, Type.SEALED]
    for hour in range(5):
        met.say(alice, b"%d" % hour, BOB, bob.key)
        met.wait(REKEY_AFTER_SECONDS)
    assert bob.payloads()[1:] == [b"%d" % hour for hour in range(5)]
    assert len(alice.indices) <= 3


def test_an_idle_host_wakes_up_for_its_keys_only(met: Wire, alice: End, bob: End) -> None:
    met.wait(24 * REKEY_AFTER_SECONDS)
    assert met.types().count(Type.INITIATION) == 24
    assert len(met.carried) == 24 * 4


def test_keys_that_nobody_wants_are_forgotten(met: Wire, alice: End, bob: End) -> None:
    alice.wanted = bob.wanted = False
    met.wait(REJECT_AFTER_SECONDS + LOOK_AGAIN)
    assert met.carried == []
    assert (len(alice.all), len(alice.indices), alice.all.deadline()) == (0, 0, None)
    met.say(alice, b"hello again", BOB)
    assert bob.payloads()[-1] == b"hello again"


def test_after_hours_out_of_reach_the_first_payload_brings_keys(
    met: Wire, alice: End, bob: End
) -> None:
    met.disturb = lambda sent: []
    met.wait(3 * REJECT_AFTER_SECONDS)
    met.disturb = lambda sent: [sent]
    met.say(alice, b"back", BOB, bob.key)
    assert bob.payloads()[-1] == b"back"
    assert bob.heard[-1].counter > bob.heard[-2].counter


def test_a_peer_out_of_reach_is_not_sought_more_often_than_hourly_in_the_end(
    met: Wire, bob: End
) -> None:
    met.disturb = lambda sent: []
    met.wait(48 * 3600)
    met.carried.clear()
    met.wait(24 * 3600)
    assert len(met.carried) <= 2 * 24 * 7


def test_strangers_leave_nothing_and_who_is_known_goes_on(met: Wire, alice: End, bob: End) -> None:
    before = len(bob.indices)
    for number in range(2000):
        initiation = End("m", MALLORY).all.send([b"x"], bob.source, MALLORY, "bob", met.now)[0]
        assert isinstance(initiation, Sent)
        met.deliver(initiation, (f"198.51.{number // 250}.{number % 250}", number))
    assert len(bob.indices) <= before + COOKIES_FROM
    assert Type.COOKIE in met.types()
    met.say(alice, b"move", BOB, bob.key)
    assert bob.payloads()[-1] == b"move"
    met.wait(10)
    met.say(bob, b"x", MALLORY, "other")  # the responder's table is looked through
    late = End("c", "192.0.2.3")
    other = Wire(late, bob)
    other.now = met.now
    other.say(late, b"after the flood", BOB)
    assert bob.payloads()[-1] == b"after the flood"


def test_under_load_a_cookie_brings_a_newcomer_in(met: Wire, bob: End) -> None:
    for number in range(COOKIES_FROM + 1):
        initiation = End("m", MALLORY).all.send([b"x"], bob.source, MALLORY, "bob", met.now)[0]
        assert isinstance(initiation, Sent)
        met.deliver(initiation, (MALLORY, number))
    late = End("c", "192.0.2.3")
    other = Wire(late, bob)
    other.say(late, b"bind", BOB)
    assert Type.COOKIE in other.types()
    assert bob.payloads()[-1] == b"bind"


def test_associations_nobody_wants_make_room(
    monkeypatch: pytest.MonkeyPatch, wire: Wire, alice: End, bob: End
) -> None:
    monkeypatch.setattr(module, "MAX_ASSOCIATIONS", 3)
    wire.say(alice, b"bind", BOB)
    bob.all._wanted = lambda key: key == alice.key
    for letter in "cdefgh":
        stranger = End(letter, f"192.0.2.{ord(letter)}")
        other = Wire(stranger, bob)
        other.say(stranger, b"bind", BOB)
    assert len(bob.all) == 3
    wire.say(bob, b"still here", ALICE, alice.key)
    assert alice.payloads() == [b"still here"]


def test_what_icmp_quotes_is_known_again_only_where_it_went(wire: Wire, alice: End) -> None:
    wire.disturb = lambda sent: []
    wire.say(alice, b"bind", BOB)
    (sent,) = wire.carried
    assert alice.all.wrote(sent.datagram[:24], (BOB, 2006))
    assert alice.all.wrote(sent.datagram, (BOB, 2006))
    assert not alice.all.wrote(sent.datagram, (MALLORY, 2006))
    assert not alice.all.wrote(sent.datagram[:23], (BOB, 2006))
    assert not alice.all.wrote(bytes(len(sent.datagram)), (BOB, 2006))


def test_no_flipped_cut_or_reflected_datagram_changes_anything(
    met: Wire, alice: End, bob: End
) -> None:
    met.say(alice, b"move", BOB, bob.key)
    (sent,) = met.carried
    heard, endpoint = len(bob.heard), bob.all._by_key[alice.key].endpoint
    mallory = (MALLORY, 2006)
    for _, wrong in flipped(sent.datagram):
        met.deliver(sent._replace(datagram=wrong), mallory)
    for length in range(len(sent.datagram)):
        met.deliver(sent._replace(datagram=sent.datagram[:length]), mallory)
    met.deliver(sent, mallory)
    met.deliver(sent._replace(to=alice.source), bob.source)
    assert len(bob.heard) == heard
    assert bob.all._by_key[alice.key].endpoint == endpoint
    assert {Reason.FORGED, Reason.REPLAYED, Reason.MALFORMED} <= set(bob.refused)
    assert alice.refused == [Reason.UNKNOWN]
    met.say(alice, b"next", BOB, bob.key)
    assert bob.payloads()[-1] == b"next"


def test_what_was_recorded_of_a_former_instance_is_worth_nothing(
    met: Wire, alice: End, bob: End
) -> None:
    held: list[Sent] = []

    def hold(sent: Sent) -> list[Sent]:
        kept = parse(sent.datagram)[0] is Type.CONFIRMATION
        held.extend([sent] * kept)
        return [] if kept else [sent]

    met.disturb = hold
    met.say(alice, b"bind", BOB, "other.test")  # its confirmation comes too late
    met.disturb = lambda sent: [sent]
    alice.start(met.now)
    met.say(alice, b"new life", BOB)
    bob.refused.clear()
    met.deliver(held[0])
    assert bob.refused == [Reason.REPLAYED]
    met.say(bob, b"to the new one", ALICE, alice.key)
    assert alice.payloads()[-1] == b"to the new one"


@settings(deadline=None, max_examples=60)
@given(st.randoms(use_true_random=False), st.floats(0, 0.5), st.booleans())
def test_on_any_network_all_is_said_once_keys_agree_and_nothing_leaks(
    chance: random.Random, loss: float, both: bool
) -> None:
    """Requests repeated until answered, as the core does; lost, doubled, delayed and reordered."""
    alice, bob = End("a", ALICE), End("b", BOB)
    wire = Wire(alice, bob)
    late: list[Sent] = []

    def disturb(sent: Sent) -> list[Sent]:
        if chance.random() < loss:
            return []
        copies = [sent] * (2 if chance.random() < 0.2 else 1)
        if chance.random() < 0.3:
            late.extend(copies)
            return []
        return copies

    wire.disturb = disturb
    for round_ in range(30):
        payload = b"%d" % round_
        wire.say(alice, payload, BOB, bob.key if alice.known else NAME)
        if both:
            known = bool(bob.heard)
            wire.say(bob, payload, ALICE, alice.key if known else "alice.test")
        if round_ % 10 == 9 and chance.random() < 0.5:
            anew = alice if chance.random() < 0.5 else bob
            anew.start(wire.now)
            anew.heard.clear()
        wire.wait(chance.choice([0.01, 0.3, 1.0, 100.0, REKEY_AFTER_SECONDS]))
        chance.shuffle(late)
        while late and chance.random() < 0.8:
            wire.under_way.append(late.pop())
        wire.settle()
    wire.disturb = lambda sent: [sent]
    for attempt in range(8):
        wire.say(alice, b"last %d" % attempt, BOB, NAME)
        wire.say(bob, b"last %d" % attempt, ALICE, alice.key)
        wire.wait(1.0)
    assert bob.payloads()[-1] == b"last 7"
    assert alice.payloads()[-1] == b"last 7"
    for end in (alice, bob):
        counters = [one.counter for one in end.heard]
        assert len(counters) == len(set(counters))  # nothing was heard twice
        assert len(end.all) == 1
        assert len(end.indices) <= 3 + COOKIES_FROM
