"""Datagrams: what is written is read again, whatever else is one typed error."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sessiond.core import messages as m
from sessiond.core.tuples import Endpoint
from sessiond.peer_codec import MAX_DATAGRAM, Malformed, PeerCodec

HOST = b"h" * 16
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
    codec = PeerCodec(HOST)
    datagrams = [codec.decode(datagram) for datagram in codec.encode(messages)]
    assert [message for datagram in datagrams for message in datagram.messages] == messages
    counters = [datagram.counter for datagram in datagrams]
    assert counters == sorted(set(counters))


@calm
@given(st.lists(message, min_size=1, max_size=12))
def test_no_datagram_is_larger_than_a_path_takes(messages: list[m.Message]) -> None:
    assert all(len(datagram) <= MAX_DATAGRAM for datagram in PeerCodec(HOST).encode(messages))


@pytest.mark.parametrize("length", [20, 28, MAX_DATAGRAM])
def test_a_host_knows_the_beginning_of_its_own_datagrams(length: int) -> None:
    codec = PeerCodec(HOST, counter=2**40)
    (datagram,) = codec.encode([m.Ping(1, ("192.0.2.1",))])
    assert codec.wrote(datagram[:length])
    assert not PeerCodec(b"x" * 16).wrote(datagram[:length])
    assert not codec.wrote(datagram[:19])


def test_a_full_batch_with_the_largest_values_fits_one_datagram() -> None:
    entry = m.MoveEntry(2**32 - 1, 2**31, 65535, 65535, 2**32 - 1, 2**30, True)
    longest = "2001:db8:1111:1111:1111:1111:1111:1111"
    move = m.Move(longest, longest, (entry,) * m.ENTRIES_PER_MESSAGE)
    (datagram,) = PeerCodec(HOST).encode([move])
    assert len(datagram) <= MAX_DATAGRAM


@calm
@given(st.binary(max_size=200))
@example(b"")
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\x91" * 100_000)
@example(msgpack.packb((2, HOST, 1, ())))
@example(msgpack.packb((1, HOST[1:], 1, ())))
@example(msgpack.packb((1, HOST, 1, ((99,),))))
@example(msgpack.packb((1, HOST, 1, ((7, "10.0.0.1", "nonsense", ()),))))
@example(msgpack.packb((1, HOST, 1, ((7, "10.0.0.1", "10.0.0.2", ((1, 1, 0, 1, 1, 1, True),)),))))
def test_anything_else_is_malformed(datagram: bytes) -> None:
    with pytest.raises(Malformed):
        PeerCodec(HOST).decode(datagram)


@calm
@given(st.lists(message, min_size=1, max_size=3), st.data())
def test_a_damaged_datagram_is_read_or_refused_never_worse(
    messages: list[m.Message], data: st.DataObject
) -> None:
    codec = PeerCodec(HOST)
    (damaged, *_) = map(bytearray, codec.encode(messages))
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    for candidate in (damaged, damaged[:cut]):
        try:
            codec.decode(bytes(candidate))
        except Malformed:
            continue
