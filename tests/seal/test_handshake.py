"""Handshakes between two hosts, and what strangers can do to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessiond.seal.cookie import Cookies, Source
from sessiond.seal.datagram import COOKIE_BYTES, SIZES, Reason, Refused, Type, header, parse
from sessiond.seal.handshake import (
    COOKIES_FROM,
    HANDSHAKE_SECONDS,
    MAX_HANDSHAKES,
    MAX_PER_PREFIX,
    Host,
    Initiator,
    Responder,
)
from sessiond.seal.indices import Indices
from sessiond.seal.noise import KEY_BYTES, public_key
from sessiond.seal.transport import Transport

from . import calm
from .hosts import SOURCE, flipped, host, peer, shake
from .test_noise import LOW_ORDER

COOKIE = range(8 + KEY_BYTES, 8 + KEY_BYTES + COOKIE_BYTES)
"""Where it is in an initiation."""


@pytest.fixture
def alice() -> Host:
    return host("a")


@pytest.fixture
def bob() -> Host:
    return host("b")


@pytest.fixture
def responder(bob: Host) -> Responder:
    return Responder(bob, Cookies(0.0))


def reason(call: Callable[..., object], *arguments: object) -> Reason:
    with pytest.raises(Refused) as caught:
        call(*arguments)
    return caught.value.reason


def ask(responder: Responder, initiator: Initiator, source: Source = SOURCE) -> bytes:
    return responder.initiation(initiator.initiation(), source, 0.0)


def complete(initiator: Initiator, responder: Responder, response: bytes) -> tuple[bytes, bytes]:
    """What each end learns of the other: its key."""
    answer = initiator.response(response)
    confirmation, _ = initiator.confirm(answer, 0.0)
    return answer.peer.static, responder.confirmation(confirmation, 0.0).peer.static


def readdressed(datagram: bytes, index: int) -> bytes:
    return datagram[:4] + index.to_bytes(4, "big") + datagram[8:]


def test_both_learn_who_the_other_is_and_have_keys(alice: Host, bob: Host) -> None:
    done = shake(alice, bob)
    ends = Transport(alice.indices), Transport(bob.indices)
    ends[0].install(done.initiators)
    ends[1].install(done.responders)
    for sender, receiver in (ends, ends[::-1]):
        assert receiver.open(sender.seal(b"hello", 0.0), 0.0)[:2] == (b"hello", True)
    sizes = [len(datagram) for datagram in (done.initiation, done.response, done.confirmation)]
    assert sizes == [SIZES[type_] for type_ in (Type.INITIATION, Type.RESPONSE, Type.CONFIRMATION)]


def test_the_initiator_learns_the_peer_before_it_says_who_it_is(
    alice: Host, bob: Host, responder: Responder
) -> None:
    initiator = Initiator(alice)
    response = ask(responder, initiator)
    assert initiator.response(response).peer == peer(bob)
    spoken = initiator.initiation() + response
    assert public_key(alice.static) not in spoken
    assert alice.instance not in spoken


def test_a_daemon_that_started_anew_is_known_by_its_instance(alice: Host, bob: Host) -> None:
    again = Host(bob.static, b"B" * 16, Indices())
    first, second = Initiator(alice), Initiator(alice)
    before = first.response(ask(Responder(bob, Cookies(0.0)), first)).peer
    after = second.response(ask(Responder(again, Cookies(0.0)), second)).peer
    assert before.static == after.static
    assert before.instance != after.instance


def test_every_flipped_bit_of_an_initiation_ends_the_handshake(alice: Host, bob: Host) -> None:
    initiator = Initiator(alice)
    for place, wrong in flipped(initiator.initiation()):
        responder = Responder(bob, Cookies(0.0))
        if place in COOKIE:
            # Only whoever asks for it reads it.
            initiator.response(responder.initiation(wrong, SOURCE, 0.0))
            continue
        try:
            response = responder.initiation(wrong, SOURCE, 0.0)
        except Refused:
            continue
        assert reason(initiator.response, response) in (Reason.UNKNOWN, Reason.FORGED)
        to_her = readdressed(response, initiator.index)
        assert reason(initiator.response, to_her) is Reason.FORGED


def test_every_flipped_bit_of_a_response_is_refused_and_forgiven(
    alice: Host, responder: Responder
) -> None:
    initiator = Initiator(alice)
    response = ask(responder, initiator)
    for _, wrong in flipped(response):
        with pytest.raises(Refused):
            initiator.response(wrong)
    assert complete(initiator, responder, response)


def test_every_flipped_bit_of_a_confirmation_is_refused_and_forgiven(
    alice: Host, responder: Responder
) -> None:
    initiator = Initiator(alice)
    confirmation, _ = initiator.confirm(initiator.response(ask(responder, initiator)), 0.0)
    for _, wrong in flipped(confirmation):
        with pytest.raises(Refused):
            responder.confirmation(wrong, 0.0)
    assert responder.confirmation(confirmation, 0.0).peer == peer(alice)


def test_every_other_length_is_malformed(alice: Host, bob: Host) -> None:
    done = shake(alice, bob)
    for datagram, read, *arguments in (
        (done.initiation, done.responder.initiation, SOURCE, 0.0),
        (done.response, done.initiator.response),
        (done.confirmation, done.responder.confirmation, 0.0),
    ):
        for wrong in (*(datagram[:size] for size in range(len(datagram))), datagram + b"\0"):
            assert reason(read, wrong, *arguments) is Reason.MALFORMED


@calm
@given(junk=st.binary(min_size=80, max_size=130), type_=st.sampled_from(list(Type)))
def test_junk_is_refused_and_nothing_else(junk: bytes, type_: Type) -> None:
    initiator, responder = Initiator(host("a")), Responder(host("b"), Cookies(0.0))
    for datagram in (junk, header(type_, initiator.index) + junk):
        for read, *arguments in (
            (initiator.cookie,),
            (initiator.response,),
            (responder.initiation, SOURCE, 0.0),
            (responder.confirmation, 0.0),
        ):
            reason(read, datagram, *arguments)


def test_a_repeated_initiation_is_answered_with_the_same_response(
    alice: Host, bob: Host, responder: Responder
) -> None:
    initiator = Initiator(alice)
    first, second = ask(responder, initiator), ask(responder, initiator)
    assert first == second
    assert len(bob.indices) == 1
    assert complete(initiator, responder, second)


def test_a_late_copy_of_an_initiation_begins_nothing(alice: Host, bob: Host) -> None:
    done = shake(alice, bob)
    assert done.responder.initiation(done.initiation, SOURCE, 0.0) == done.response
    assert len(bob.indices) == 1


def test_a_replayed_initiation_gives_nobody_anything(alice: Host, bob: Host) -> None:
    done = shake(alice, bob)
    later = 2 * HANDSHAKE_SECONDS
    response = done.responder.initiation(done.initiation, ("203.0.113.9", 9), later)
    assert response != done.response
    assert reason(done.initiator.response, response) is Reason.REPLAYED
    assert reason(done.responder.confirmation, done.confirmation, later) is Reason.UNKNOWN
    (index,) = done.responder._begun
    replayed = readdressed(done.confirmation, index)
    assert reason(done.responder.confirmation, replayed, later) is Reason.FORGED


def test_a_repeated_confirmation_is_told_apart(alice: Host, bob: Host) -> None:
    done = shake(alice, bob)
    assert reason(done.responder.confirmation, done.confirmation, 0.0) is Reason.REPLAYED


def test_a_second_response_after_the_confirmation_is_refused(alice: Host, bob: Host) -> None:
    done = shake(alice, bob)
    assert reason(done.initiator.response, done.response) is Reason.REPLAYED


def test_a_handshake_is_confirmed_once(alice: Host, responder: Responder) -> None:
    initiator = Initiator(alice)
    answer = initiator.response(ask(responder, initiator))
    initiator.confirm(answer, 0.0)
    with pytest.raises(RuntimeError, match="once"):
        initiator.confirm(answer, 0.0)


def test_who_answers_first_with_a_key_of_its_own_does_not_end_the_handshake(
    alice: Host, bob: Host, responder: Responder
) -> None:
    initiator, eve = Initiator(alice), host("e")
    race = initiator.response(ask(Responder(eve, Cookies(0.0)), initiator))
    assert race.peer == peer(eve)
    assert complete(initiator, responder, ask(responder, initiator)) == (
        public_key(bob.static),
        public_key(alice.static),
    )


def test_datagrams_of_another_handshake_are_refused(alice: Host, responder: Responder) -> None:
    first, second = Initiator(alice), Initiator(alice)
    to_first, to_second = ask(responder, first), ask(responder, second)
    assert reason(first.response, to_second) is Reason.UNKNOWN
    assert reason(first.response, readdressed(to_second, first.index)) is Reason.FORGED
    by_first, firsts = first.confirm(first.response(to_first), 0.0)
    _, seconds = second.confirm(second.response(to_second), 0.0)
    assert (
        reason(responder.confirmation, readdressed(by_first, seconds.remote_index), 0.0)
        is Reason.FORGED
    )
    assert responder.confirmation(by_first, 0.0).keypair.local_index == firsts.remote_index


def test_a_reflected_handshake_is_refused(alice: Host) -> None:
    initiator, mirror = Initiator(alice), Responder(alice, Cookies(0.0))
    assert reason(initiator.response, initiator.initiation()) is Reason.MALFORMED
    response = ask(mirror, initiator)
    assert reason(initiator.response, response) is Reason.OURSELVES


def test_a_host_with_a_copied_key_is_refused_by_the_responder_too(bob: Host) -> None:
    twin, responder = host("b"), Responder(bob, Cookies(0.0))
    initiator = Initiator(twin)
    initiator._host = host("x")  # It would refuse as well, and first.
    answer = initiator.response(ask(responder, initiator))
    confirmation, _ = initiator.confirm(answer, 0.0)
    assert reason(responder.confirmation, confirmation, 0.0) is Reason.OURSELVES
    assert len(bob.indices) == 0
    responder.expire(HANDSHAKE_SECONDS)
    assert len(bob.indices) == 0


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[:8])
def test_an_ephemeral_key_of_low_order_leaves_nothing(
    point: bytes, alice: Host, bob: Host, responder: Responder
) -> None:
    initiation = Initiator(alice).initiation()
    wrong = initiation[:8] + point + initiation[8 + KEY_BYTES :]
    assert reason(responder.initiation, wrong, SOURCE, 0.0) is Reason.FORGED
    assert len(bob.indices) == 0


def test_another_version_is_refused_with_that_reason(alice: Host, responder: Responder) -> None:
    initiation = Initiator(alice).initiation()
    wrong = initiation[:1] + b"\x02" + initiation[2:]
    assert reason(responder.initiation, wrong, SOURCE, 0.0) is Reason.VERSION


def test_an_unconfirmed_handshake_is_forgotten(
    alice: Host, bob: Host, responder: Responder
) -> None:
    initiator = Initiator(alice)
    confirmation, _ = initiator.confirm(initiator.response(ask(responder, initiator)), 0.0)
    responder.expire(HANDSHAKE_SECONDS - 0.001)
    assert len(bob.indices) == 1
    assert reason(responder.confirmation, confirmation, HANDSHAKE_SECONDS) is Reason.UNKNOWN
    assert len(bob.indices) == 0


def test_a_finished_handshake_leaves_its_index_to_the_keys(alice: Host, bob: Host) -> None:
    done = shake(alice, bob)
    end = Transport(bob.indices)
    end.install(done.responders)
    done.responder.expire(HANDSHAKE_SECONDS)
    assert bob.indices.owner(done.responders.local_index) is end


def test_an_initiator_that_gives_up_frees_its_index(alice: Host) -> None:
    initiator = Initiator(alice)
    assert alice.indices.owner(initiator.index) is initiator
    initiator.close()
    assert len(alice.indices) == 0


def distinct(number: int) -> Source:
    """Sources of as many networks as asked for."""
    return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 2006


def flood(responder: Responder, count: int) -> list[Type]:
    """As many strangers, each from a source of its own that it does not hold."""
    stranger, said = host("s"), []
    for number in range(count):
        question = Initiator(stranger).initiation()
        answer = responder.initiation(question, distinct(number), 0.0)
        assert len(answer) <= len(question)
        said.append(parse(answer)[0])
    return said


def test_a_flood_gets_cookies_and_leaves_nothing(bob: Host, responder: Responder) -> None:
    said = flood(responder, 500)
    assert said == [Type.RESPONSE] * COOKIES_FROM + [Type.COOKIE] * (500 - COOKIES_FROM)
    assert len(bob.indices) == COOKIES_FROM
    responder.expire(HANDSHAKE_SECONDS)
    assert len(bob.indices) == 0
    assert flood(responder, 1) == [Type.RESPONSE]


def test_who_shows_its_cookie_gets_through_a_flood(
    alice: Host, bob: Host, responder: Responder
) -> None:
    flood(responder, 100)
    initiator = Initiator(alice)
    initiator.cookie(ask(responder, initiator))
    assert parse(responder.initiation(initiator.initiation(), distinct(7), 0.0))[0] is Type.COOKIE
    assert len(bob.indices) == COOKIES_FROM
    assert complete(initiator, responder, ask(responder, initiator))


def test_every_flipped_bit_of_a_cookie_is_refused_or_useless(
    alice: Host, responder: Responder
) -> None:
    flood(responder, COOKIES_FROM)
    initiator = Initiator(alice)
    cookie = ask(responder, initiator)
    for place, wrong in flipped(cookie):
        if place < 8 + KEY_BYTES:
            with pytest.raises(Refused):
                initiator.cookie(wrong)
        else:
            initiator.cookie(wrong)
            assert ask(responder, initiator) == cookie
    initiator.cookie(cookie)
    assert parse(ask(responder, initiator))[0] is Type.RESPONSE


def test_a_cookie_is_taken_only_from_a_reader_of_the_initiation(
    alice: Host, responder: Responder
) -> None:
    flood(responder, COOKIES_FROM)
    first, second = Initiator(alice), Initiator(alice)
    for_second = ask(responder, second)
    assert reason(first.cookie, for_second) is Reason.UNKNOWN
    assert reason(first.cookie, readdressed(for_second, first.index)) is Reason.FORGED


def with_cookie(responder: Responder, source: Source) -> Initiator:
    """One that can show a cookie, because too many have asked before."""
    flood(responder, COOKIES_FROM)
    initiator = Initiator(host("s"))
    initiator.cookie(ask(responder, initiator, source))
    return initiator


def test_handshakes_are_bounded_also_with_cookies(bob: Host, responder: Responder) -> None:
    for number in range(MAX_HANDSHAKES):
        source = distinct(number)
        answer = ask(responder, with_cookie(responder, source), source)
        assert parse(answer)[0] is Type.RESPONSE
    one_more = with_cookie(responder, SOURCE)
    assert reason(ask, responder, one_more) is Reason.BUSY
    assert len(bob.indices) == COOKIES_FROM + MAX_HANDSHAKES
    responder.expire(HANDSHAKE_SECONDS)
    assert len(bob.indices) == 0


@pytest.mark.parametrize(
    ("sources", "elsewhere"),
    [
        ([("192.0.2.1", port) for port in range(9)], ("192.0.2.2", 0)),
        ([(f"2001:db8::{number:x}", 9) for number in range(9)], ("2001:db8:0:1::", 9)),
    ],
    ids=["IPv4 address", "IPv6 /64"],
)
def test_one_network_cannot_take_all_handshakes(
    sources: list[Source], elsewhere: Source, responder: Responder
) -> None:
    for source in sources[:MAX_PER_PREFIX]:
        answer = ask(responder, with_cookie(responder, source), source)
        assert parse(answer)[0] is Type.RESPONSE
    one_more = with_cookie(responder, sources[-1])
    assert reason(ask, responder, one_more, sources[-1]) is Reason.BUSY
    answer = ask(responder, with_cookie(responder, elsewhere), elsewhere)
    assert parse(answer)[0] is Type.RESPONSE


def test_nobody_is_shut_out_by_who_forges_its_address(
    alice: Host, bob: Host, responder: Responder
) -> None:
    for _ in range(MAX_HANDSHAKES):
        ask(responder, Initiator(host("s")), SOURCE)
    assert len(bob.indices) == COOKIES_FROM
    initiator = Initiator(alice)
    initiator.cookie(ask(responder, initiator, SOURCE))
    assert complete(initiator, responder, ask(responder, initiator, SOURCE))


def test_finished_handshakes_count_too(responder: Responder) -> None:
    for _ in range(MAX_PER_PREFIX):
        initiator = with_cookie(responder, SOURCE)
        complete(initiator, responder, ask(responder, initiator))
    one_more = with_cookie(responder, SOURCE)
    assert reason(ask, responder, one_more) is Reason.BUSY
    late = responder.initiation(one_more.initiation(), SOURCE, HANDSHAKE_SECONDS)
    assert parse(late)[0] is Type.RESPONSE
