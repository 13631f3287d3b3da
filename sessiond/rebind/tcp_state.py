"""The state of a TCP connection as plain data, taken from a socket and put into one.

The order is handover.md section 3, which follows CRIU's (soccr/soccr.c): in repair mode
(``TCP_REPAIR``, net/ipv4/tcp.c) ``connect(AF_UNSPEC)`` and ``connect`` send nothing, sequence
numbers can be set while the socket is closed, and what is written to the receive queue is received.
Nothing here depends on who owns the socket, so that a graft and a takeover can use it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass, replace

from sessiond.core.tuples import FourTuple
from sessiond.rebind import linux as lx
from sessiond.rebind.ports import Ports, transparent

RECEIVE_CHUNK = 64 * 1024
"""Bytes. One send() to the receive queue takes no more than about 72 KiB."""
ATTEMPTS = 8
"""Readings until two agree; the socket is locked, so only what had passed the filter remains."""

_OPTION = struct.Struct("=II")


class Unsteady(Exception):
    """The connection kept changing while it was read."""


class Unmovable(Exception):
    """This connection can't be taken out of the kernel; the message says why."""


@dataclass(frozen=True, slots=True)
class TcpState:
    """One end of an established connection. Sequence numbers are 32-bit."""

    tuple: FourTuple
    snd_una: int
    snd_nxt: int
    """What has been transmitted ends here."""
    rcv_nxt: int
    send_queue: bytes
    """From snd_una to write_seq."""
    receive_queue: bytes
    """Ends at rcv_nxt."""
    window: lx.Window
    timestamp: int
    mss_clamp: int
    options: int
    """TCPI_OPT_*."""
    snd_wscale: int
    rcv_wscale: int
    reuse: int
    """The application's SO_REUSEADDR, which leaving repair mode clears."""

    @property
    def transmitted(self) -> int:
        """Bytes on their way to the peer, not acknowledged."""
        return (self.snd_nxt - self.snd_una) & 0xFFFFFFFF

    @property
    def receive_window(self) -> int:
        """Bytes the peer may send beyond rcv_nxt (tcp_receive_window() in net/tcp.h)."""
        left = (self.window.rcv_wup + self.window.rcv_wnd - self.rcv_nxt) & 0xFFFFFFFF
        return left if left < 2**31 else 0

    def trimmed(self, peer_rcv_nxt: int) -> TcpState:
        """Without what the peer has received.

        Args:
            peer_rcv_nxt: the next byte the peer expects. What TCP itself acknowledged counts too.

        Raises:
            ValueError: it names bytes that were never transmitted.
        """
        ahead = (peer_rcv_nxt - self.snd_una) & 0xFFFFFFFF
        if ahead >= 2**31:
            return self
        if ahead > self.transmitted:
            raise ValueError(f"the peer claims {ahead - self.transmitted} bytes never sent to it")
        return replace(
            self,
            snd_una=(self.snd_una + ahead) & 0xFFFFFFFF,
            send_queue=self.send_queue[ahead:],
        )

    def toward(self, new: FourTuple, snd_wnd: int) -> TcpState:
        """The same connection between other endpoints.

        Args:
            snd_wnd: bytes the peer can take beyond snd_una; 0 is the closed window.
        """
        window = self.window._replace(
            snd_wnd=snd_wnd, max_window=max(self.window.max_window, snd_wnd)
        )
        return replace(self, tuple=new, window=window)


def tuple_of(sock: socket.socket) -> FourTuple:
    """A connected socket's tuple."""
    return FourTuple(lx.endpoint(sock.getsockname()), lx.endpoint(sock.getpeername()))


def dump(sock: socket.socket) -> TcpState:
    """Read a connection whose socket is locked; it is in repair mode afterwards.

    Raises:
        Unmovable: it is not established.
        Unsteady: it would not stand still.
        OSError: the kernel refused.
    """
    info = lx.info(sock)
    require_established(info.state)
    reuse = sock.getsockopt(lx.SOL_SOCKET, socket.SO_REUSEADDR)
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR, lx.REPAIR_ON)
    has_timestamps = info.options & lx.TCPI_OPT_TIMESTAMPS
    mss_clamp = sock.getsockopt(lx.IPPROTO_TCP, lx.TCP_MAXSEG)
    where = tuple_of(sock)
    before = _numbers(sock)
    for _ in range(ATTEMPTS):
        write_seq, rcv_nxt, unacked, unsent, unread = before
        send_queue = _peek(sock, lx.SEND_QUEUE, unacked)
        receive_queue = _peek(sock, lx.RECV_QUEUE, unread)
        window = lx.window(sock)
        after = _numbers(sock)
        if before == after:
            break
        before = after
    else:
        raise Unsteady(f"{where} still changes after {ATTEMPTS} readings")
    return TcpState(
        tuple=where,
        snd_una=(write_seq - unacked) & 0xFFFFFFFF,
        snd_nxt=(write_seq - unsent) & 0xFFFFFFFF,
        rcv_nxt=rcv_nxt,
        send_queue=send_queue,
        receive_queue=receive_queue,
        window=window,
        timestamp=lx.get_u32(sock, lx.TCP_TIMESTAMP) if has_timestamps else 0,
        mss_clamp=mss_clamp,
        options=info.options,
        snd_wscale=info.snd_wscale,
        rcv_wscale=info.rcv_wscale,
        reuse=reuse,
    )


def isns(sock: socket.socket) -> tuple[int, int]:
    """Both initial sequence numbers, this end's first (handover.md section 7).

    Good until the socket is restored for the first time: the counters start again then. Ours is
    counted from bytes sent, not acknowledged: only for the end that dialled does bytes_acked
    include the SYN.

    Raises:
        OSError: the kernel refused.
    """
    reuse = sock.getsockopt(lx.SOL_SOCKET, socket.SO_REUSEADDR)
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR, lx.REPAIR_ON)
    try:
        write_seq, rcv_nxt, _, unsent, _ = _numbers(sock)
        info = lx.info(sock)
    finally:
        resume(sock, reuse)
    snd_nxt = write_seq - unsent
    return (
        (snd_nxt - (info.bytes_sent - info.bytes_retrans) - 1) & 0xFFFFFFFF,
        (rcv_nxt - info.bytes_received - 1) & 0xFFFFFFFF,
    )


def resume(sock: socket.socket, reuse: int) -> None:
    """Leave repair mode without a probe; it clears SO_REUSEADDR, which is the application's."""
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR, lx.REPAIR_OFF_NO_PROBE)
    if reuse:
        sock.setsockopt(lx.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def restore(sock: socket.socket, state: TcpState, ports: Ports, *, foreign: bool = False) -> None:
    """Make a socket in repair mode this connection, and leave it live.

    It is disconnected first; whatever it was is gone, silently. What is in the send queue is sent
    as new data as soon as the window allows.

    Args:
        foreign: the local address need not be this host's (putting back what a loss took).

    Raises:
        OSError: the kernel refused; the socket is in repair mode and of no connection.
    """
    buffer_lock = sock.getsockopt(lx.SOL_SOCKET, lx.SO_BUF_LOCK)
    lx.disconnect(sock)
    _set_sequence(sock, lx.SEND_QUEUE, state.snd_una)
    _set_sequence(sock, lx.RECV_QUEUE, state.rcv_nxt - len(state.receive_queue))
    with transparent(sock) if foreign else contextlib.nullcontext():
        ports.connect(sock, state.tuple)
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR_OPTIONS, _options(state))
    if state.options & lx.TCPI_OPT_TIMESTAMPS:
        lx.set_u32(sock, lx.TCP_TIMESTAMP, state.timestamp)
    if state.receive_queue:
        _refill_receive_queue(sock, state.receive_queue)
    lx.set_window(sock, state.window)
    resume(sock, state.reuse)
    if state.send_queue:
        _refill_send_queue(sock, state.send_queue)
    if state.send_queue or state.receive_queue:
        # SO_*BUFFORCE ends autotuning; give back what the application had.
        sock.setsockopt(lx.SOL_SOCKET, lx.SO_BUF_LOCK, buffer_lock)


def _numbers(sock: socket.socket) -> tuple[int, int, int, int, int]:
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR_QUEUE, lx.SEND_QUEUE)
    write_seq = lx.get_u32(sock, lx.TCP_QUEUE_SEQ)
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR_QUEUE, lx.RECV_QUEUE)
    rcv_nxt = lx.get_u32(sock, lx.TCP_QUEUE_SEQ)
    return (
        write_seq,
        rcv_nxt,
        lx.queue_length(sock, lx.SIOCOUTQ),
        lx.queue_length(sock, lx.SIOCOUTQNSD),
        lx.queue_length(sock, lx.SIOCINQ),
    )


def _peek(sock: socket.socket, queue: int, length: int) -> bytes:
    if not length:
        return b""
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR_QUEUE, queue)
    data = sock.recv(length + 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    if len(data) != length:
        raise Unsteady(f"a queue of {length} bytes gave {len(data)}")
    return data


def _set_sequence(sock: socket.socket, queue: int, number: int) -> None:
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR_QUEUE, queue)
    lx.set_u32(sock, lx.TCP_QUEUE_SEQ, number)


def _options(state: TcpState) -> bytes:
    options = _OPTION.pack(lx.TCPOPT_MSS, state.mss_clamp)
    if state.options & lx.TCPI_OPT_WSCALE:
        options += _OPTION.pack(lx.TCPOPT_WINDOW, state.snd_wscale | state.rcv_wscale << 16)
    if state.options & lx.TCPI_OPT_SACK:
        options += _OPTION.pack(lx.TCPOPT_SACK_PERM, 0)
    if state.options & lx.TCPI_OPT_TIMESTAMPS:
        options += _OPTION.pack(lx.TCPOPT_TIMESTAMP, 0)
    return options


def _refill_receive_queue(sock: socket.socket, data: bytes) -> None:
    size = sock.getsockopt(lx.SOL_SOCKET, socket.SO_RCVBUF)
    if size < 2 * len(data):  # the option doubles what it is given
        sock.setsockopt(lx.SOL_SOCKET, lx.SO_RCVBUFFORCE, len(data) + RECEIVE_CHUNK)
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR_QUEUE, lx.RECV_QUEUE)
    rest, chunk = memoryview(data), RECEIVE_CHUNK
    while rest:
        try:
            rest = rest[sock.send(rest[:chunk], socket.MSG_DONTWAIT) :]
        except OSError:
            if chunk <= 1024:
                raise
            chunk //= 2
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR_QUEUE, lx.NO_QUEUE)


def _refill_send_queue(sock: socket.socket, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[sock.send(rest, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            size = sock.getsockopt(lx.SOL_SOCKET, socket.SO_SNDBUF)
            sock.setsockopt(lx.SOL_SOCKET, lx.SO_SNDBUFFORCE, size + len(rest))


_STATES = {
    2: "is still connecting",
    3: "is still connecting",
    4: "is being closed by this end (FIN_WAIT1)",
    5: "is half closed by this end (FIN_WAIT2)",
    6: "is closed (TIME_WAIT)",
    7: "is closed",
    8: "is half closed by the peer (CLOSE_WAIT)",
    9: "is being closed (LAST_ACK)",
    10: "is a listening socket",
    11: "is being closed by both ends (CLOSING)",
}


def require_established(state: int) -> None:
    """Raise ``Unmovable`` for a connection that is not established at both ends."""
    if state != lx.TCP_ESTABLISHED:
        raise Unmovable(f"the connection {_STATES.get(state, f'is in state {state}')}")
