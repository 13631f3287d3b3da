"""The thesis's programs and network (chapter 4), and what its figures show, checked on the wire."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

from sessiond.core.tuples import Endpoint, FourTuple
from sessiond.rebind import filters
from sessiond.rebind import linux as lx
from tests.support.lab import Host, Lab, Uplink
from tests.support.worker import Talk

FIRST, SECOND, THIRD = b"Hello Server 1!", b"Hello Server 2!", b"Hello Client 1!"
SERVER_PORT, NEW_SERVER_PORT, NEWER_SERVER_PORT = 10000, 1234, 4321
NEW_CLIENT_PORT = 33481
"""Ephemeral, as a client's is: 3481 in the figures."""
CLIENT = {4: "192.71.20.247", 6: "2001:db8:20::247"}
SERVER = {4: "192.71.20.245", 6: "2001:db8:20::245"}
NEW_CLIENT = {4: "192.71.20.246", 6: "2001:db8:20::246"}
NEW_SERVER = {4: "192.71.20.242", 6: "2001:db8:20::242"}


def thesis_network(lab: Lab) -> tuple[Host, Host]:
    """The laptop and the desktop in 192.71.20.240/28, each with its new address already there."""
    client, server = lab.host("client"), lab.host("server")
    lab.link(client, "eth0", server, "eth0")
    for host, *own in ((client, CLIENT, NEW_CLIENT), (server, SERVER, NEW_SERVER)):
        # Unbound sockets get the first of the IPv4 addresses, and the last of the IPv6 ones.
        addresses = [f"{one[4]}/28" for one in own] + [f"{one[6]}/64" for one in reversed(own)]
        host.configure(Uplink("eth0", tuple(addresses)))
    return client, server


def serve(talk: Talk, family: int) -> bytes:
    """The thesis's server; returns what it received."""
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("", SERVER_PORT))
        listener.listen()
        talk.tell("listening")
        sock, _ = listener.accept()
        with sock:
            received = _receive(sock, len(FIRST))
            talk.tell(sock.fileno())
            received += _receive(sock, len(SECOND))
            sock.sendall(THIRD)
        return received


def connect(
    talk: Talk, family: int, server: Endpoint, bind: Endpoint | None, hold_acks: bool
) -> tuple[bytes, bytes]:
    """The thesis's client; returns what it received, and after that.

    Args:
        bind: where it binds explicitly, if it does.
        hold_acks: no acknowledgement of the first message arrives before the rebind.
    """
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        if bind is not None:
            sock.bind(lx.sockaddr(family, bind))
        sock.connect(lx.sockaddr(family, server))
        if hold_acks:
            filters.lock(sock)
        sock.sendall(FIRST)
        talk.tell(sock.fileno())
        talk.hear(30)
        sock.sendall(SECOND)
        return _receive(sock, len(THIRD)), sock.recv(1)


def _receive(sock: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length and (more := sock.recv(length - len(received))):
        received += more
    return received


class Segment(NamedTuple):
    """A TCP segment of a capture."""

    tuple: FourTuple
    """As its sender sees it."""
    flags: str
    """As scapy writes them: S, SA, A, PA, FA, R."""
    seq: int
    ack: int
    payload: bytes

    @property
    def end(self) -> int:
        """The sequence number that follows it; SYN and FIN count one."""
        return (self.seq + len(self.payload) + sum(f in self.flags for f in "SF")) % 2**32


def dissect(packet: Any) -> Segment:
    """From scapy."""
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6

    tcp = packet[TCP]
    if IP in packet:
        ip = packet[IP]
        length = ip.len - ip.ihl * 4 - tcp.dataofs * 4
    else:
        ip = packet[IPv6]
        length = ip.plen - tcp.dataofs * 4
    where = FourTuple(Endpoint(ip.src, tcp.sport), Endpoint(ip.dst, tcp.dport))
    return Segment(where, str(tcp.flags), tcp.seq, tcp.ack, bytes(tcp.payload)[:length])


def check_wire(segments: Sequence[Segment], before: FourTuple, after: FourTuple) -> None:
    """One conversation, whatever its tuple: what figures 14 to 31 show.

    Args:
        before, after: the rebind, as the client sees it; where it was refused, twice the same.
    """
    handshake, rest = segments[:3], segments[3:]
    assert [one.flags for one in handshake] == ["S", "SA", "A"]
    fin = next(number for number, one in enumerate(rest) if "F" in one.flags)
    for one in rest[:fin]:
        assert not set(one.flags) & set("SFR"), one
    for one in rest[fin:]:
        assert not set(one.flags) & set("SR"), one
    _check_tuples(segments, before, after)
    _check_numbers(segments)
    payloads = [one.payload for one in segments if one.payload]
    assert payloads == [FIRST, SECOND, THIRD], "each message is on the wire once, in its order"


def _check_tuples(segments: Sequence[Segment], before: FourTuple, after: FourTuple) -> None:
    """Up to the rebind all is on the old tuple, from then on all is on the new one."""
    second = next(number for number, one in enumerate(segments) if one.payload == SECOND)
    for number, one in enumerate(segments):
        tuple_ = before if number < second else after
        assert one.tuple in (tuple_, tuple_.mirrored()), one


def _check_numbers(segments: Sequence[Segment]) -> None:
    """Each end's sequence numbers go on where it stopped; nothing is acknowledged that was not
    sent, and everything in the end.

    The ends are told apart by who sends next: a sender is known by its number, not its address.
    """
    client, server = segments[0].seq, segments[1].seq
    expected = {"client": client, "server": server}
    acked = {"client": client, "server": server}
    for one in segments:
        sender, other = ("client", "server") if _of_client(one, segments) else ("server", "client")
        assert one.seq == expected[sender], f"{sender} went on at {one.seq}: {one}"
        expected[sender] = one.end
        if "A" in one.flags:
            assert 0 <= (one.ack - acked[other]) % 2**32 < 2**31, f"taken back: {one}"
            assert 0 <= (expected[other] - one.ack) % 2**32 < 2**31, f"never sent: {one}"
            acked[other] = one.ack
    assert acked == expected


def _of_client(one: Segment, segments: Sequence[Segment]) -> bool:
    ports = {segments[0].tuple.remote.port, NEW_SERVER_PORT, NEWER_SERVER_PORT}
    return one.tuple.remote.port in ports and one.tuple.local.port not in ports
