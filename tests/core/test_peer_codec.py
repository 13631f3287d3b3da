"""Datagrams: what is written is read again, whatever else is one typed error."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sessiond.core import messages as m
from sessiond.core.tuples import Endpoint
from sessiond.peer_codec import MAX_PAYLOAD, Malformed, decode, encode
from sessiond.seal.datagram import OVERHEAD

calm = settings(deadline=None)  # a busy machine

u32 = st.integers(0, 2**32 - 1)
port = st.integers(1, 65535)
address = st.ip_addresses().map(str)
addresses = st.lists(address, max_size=8).map(tuple)
endpoint = st.builds(Endpoint, address, port)
versions = st.sampled_from([(4,), (6,), (4, 6)])
proof = st.binary(min_size=32, max_size=32)
generation = st.integers(0, 2**31)
window = st.integers(0, 2**30)


def entries(entry: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(entry, min_size=1, max_size=m.ENTRIES_PER_MESSAGE).map(tuple)


marks = entries(st.builds(m.Mark, u32, generation))
message = st.one_of(
    st.builds(
        m.Bind,
        st.binary(min_size=16, max_size=16),
        u32,
        endpoint,
        endpoint,
        proof,
        versions,
        addresses,
        st.booleans(),
    ),
    st.builds(m.Bound, u32, u32, proof, versions, addresses),
    st.builds(m.Ping, u32, addresses),
    st.builds(m.Pong, u32, endpoint, addresses),
    st.builds(m.Prepare, marks),
    st.builds(m.Prepared, marks),
    st.builds(
        m.Move,
        address,
        address,
        entries(st.builds(m.MoveEntry, u32, generation, port, port, u32, window, st.booleans())),
    ),
    st.builds(m.Moved, entries(st.builds(m.MovedEntry, u32, generation, u32, window))),
    st.builds(m.Settled, marks),
    st.builds(
        m.Refused, st.tuples(st.builds(m.RefusedEntry, u32, generation, st.text(max_size=50)))
    ),
    st.builds(m.Close, st.tuples(st.builds(m.CloseEntry, u32, st.text(max_size=50)))),
)


@calm
@given(st.lists(message, min_size=1, max_size=12))
def test_messages_come_out_as_they_went_in(messages: list[m.Message]) -> None:
    assert [message for payload in encode(messages) for message in decode(payload)] == messages


@calm
@given(st.lists(message, min_size=1, max_size=12))
def test_no_datagram_is_larger_than_a_path_takes(messages: list[m.Message]) -> None:
    assert MAX_PAYLOAD + OVERHEAD == 1200
    assert all(len(payload) <= MAX_PAYLOAD for payload in encode(messages))


def test_a_full_batch_with_the_largest_values_fits_one_datagram() -> None:
    entry = m.MoveEntry(2**32 - 1, 2**31, 65535, 65535, 2**32 - 1, 2**30, True)
    longest = "2001:db8:1111:1111:1111:1111:1111:1111"
    move = m.Move(longest, longest, (entry,) * m.ENTRIES_PER_MESSAGE)
    (payload,) = encode([move])
    assert len(payload) <= MAX_PAYLOAD


@calm
@given(st.binary(max_size=200))
@example(b"")
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\x91" * 100_000)
@example(msgpack.packb(7))
@example(msgpack.packb(((),)))
@example(msgpack.packb(((99,),)))
@example(msgpack.packb(((7, "10.0.0.1", "nonsense", ()),)))
@example(msgpack.packb(((7, "10.0.0.1", "10.0.0.2", ((1, 1, 0, 1, 1, 1, True),)),)))
def test_anything_else_is_malformed(payload: bytes) -> None:
    assume(payload != msgpack.packb(()))
    with pytest.raises(Malformed):
        decode(payload)


@calm
@given(st.lists(message, min_size=1, max_size=3), st.data())
def test_a_damaged_datagram_is_read_or_refused_never_worse(
    messages: list[m.Message], data: st.DataObject
) -> None:
    (damaged, *_) = map(bytearray, encode(messages))
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    for candidate in (damaged, damaged[:cut]):
        try:
            decode(bytes(candidate))
        except Malformed:
            continue
