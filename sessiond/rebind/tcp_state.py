"""The state of a TCP connection as plain data, taken from a socket and put into one.

The order is handover.md section 3, which follows CRIU's (soccr/soccr.c): in repair mode
(``TCP_REPAIR``, net/ipv4/tcp.c) ``connect(AF_UNSPEC)`` and ``connect`` send nothing, sequence
numbers can be set while the socket is closed, and what is written to the receive queue is received.
Nothing here depends on who owns the socket, so that a graft and a takeover can use it.

Throughout, the socket is locked (filters.py) and nobody else uses it (process.py): a segment that
arrives makes what was read stale, and repair mode makes the application's recv() fail.

Bytes that are on their way can be put back in two ways. As transmitted, they wait for a
retransmission timer that starts again at 1 s. As new, they leave at once, behind a closed window
that ``let_out`` opens when the lock is off, so that no acknowledgement is dropped. New they may be
only where the peer has said, and will not change, how far it has received (``trimmed``): of an
acknowledgement beyond snd_nxt TCP takes no notice (tcp_ack()), so a connection that takes back more
than the peer has not got stands still for ever.

A FIN is one sequence number, and always put back as new: the end that sent it sends it again, and
the end that had it is restored as if it had not, but with its receiving shut down, so that the
application goes on seeing the end of the stream. So sequence numbers here count data only.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import NamedTuple

from sessiond.core.tuples import FourTuple
from sessiond.rebind import linux as lx
from sessiond.rebind.ports import Ports

RECEIVE_CHUNK = 64 * 1024
"""Bytes. One send() to the receive queue takes no more than about 72 KiB."""
ATTEMPTS = 8
"""Readings until two agree; the socket is locked, so only what had passed the filter remains."""

SMALLEST_CHUNK = 1024
SEGMENT = 1460
"""Bytes. A sender waits behind a smaller window than a segment (RFC 9293 section 3.8.6.2.1)."""
HEAD_ROOM = 128 * 1024
"""Bytes of the send queue's first segment that may be acknowledged already and still be there."""

_OPTION = struct.Struct("=II")


class Unsteady(Exception):
    """The connection kept changing while it was read."""


class Unmovable(Exception):
    """This connection can't be taken out of the kernel; the message says why."""


class TcpState(NamedTuple):
    """One end of a connection, as data. Sequence numbers are 32-bit, and count no FIN."""

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
    peek_offset: int
    """The application's SO_PEEK_OFF, which a disconnect clears."""
    sending_ended: bool
    """The application has shut down sending; a FIN follows the send queue."""
    receiving_ended: bool
    """The application sees the end of the stream after the receive queue."""

    @property
    def transmitted(self) -> int:
        """Bytes on their way to the peer, not acknowledged."""
        return (self.snd_nxt - self.snd_una) & 0xFFFFFFFF

    @property
    def unsent(self) -> int:
        """Bytes at the end of the send queue that were never transmitted."""
        return len(self.send_queue) - self.transmitted

    @property
    def to_send(self) -> bool:
        """Whether anything, if only the FIN, is to leave when the window opens."""
        return bool(self.send_queue) or self.sending_ended

    @property
    def receive_window(self) -> int:
        """Bytes the peer may send beyond rcv_nxt (tcp_receive_window() in net/tcp.h)."""
        left = (self.window.rcv_wup + self.window.rcv_wnd - self.rcv_nxt) & 0xFFFFFFFF
        return left if left < 2**31 else 0

    def trimmed(self, peer_rcv_nxt: int) -> TcpState:
        """Without what the peer has received, the rest as if never transmitted.

        Args:
            peer_rcv_nxt: the next byte the peer expects, final. If it is older than what TCP itself
                has acknowledged, nothing is known of the rest, and nothing changes. It may be
                beyond ``snd_nxt``, where that was taken back for a move that did not come about.

        Raises:
            ValueError: it names bytes that were never written.
        """
        ahead = (peer_rcv_nxt - self.snd_una) & 0xFFFFFFFF
        if ahead >= 2**31:
            return self
        if ahead > len(self.send_queue):
            beyond = ahead - len(self.send_queue)
            raise ValueError(f"the peer claims {beyond} bytes never sent to it")
        snd_una = (self.snd_una + ahead) & 0xFFFFFFFF
        return self._replace(snd_una=snd_una, snd_nxt=snd_una, send_queue=self.send_queue[ahead:])

    def transmitted_to(self, snd_nxt: int) -> TcpState:
        """Undo a rewinding: transmitted was everything up to here, if that is more."""
        more = (snd_nxt - self.snd_nxt) & 0xFFFFFFFF
        return self._replace(snd_nxt=snd_nxt) if 0 < more <= self.unsent else self

    def toward(self, new: FourTuple, snd_wnd: int) -> TcpState:
        """The same connection between other endpoints.

        Args:
            snd_wnd: bytes the peer can take beyond snd_una; 0 is the closed window.
        """
        window = self.window._replace(
            snd_wnd=snd_wnd, max_window=max(self.window.max_window, snd_wnd)
        )
        return self._replace(tuple=new, window=window)


def tuple_of(sock: socket.socket) -> FourTuple:
    """A connected socket's tuple."""
    return FourTuple(lx.endpoint(sock.getsockname()), lx.endpoint(sock.getpeername()))


def dump(sock: socket.socket, reuse: int | None = None) -> TcpState:
    """Read a connection; its socket is in repair mode afterwards.

    Args:
        reuse: its SO_REUSEADDR, if that is known.

    Raises:
        Unmovable: it is not established, or both ends have ended it.
        Unsteady: it would not stand still.
        OSError: the kernel refused. After an error it is not in repair mode.
    """
    if reuse is None:
        reuse = sock.getsockopt(lx.SOL_SOCKET, socket.SO_REUSEADDR)
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR, lx.REPAIR_ON)
    try:
        return _read(sock, reuse)
    except BaseException:
        resume(sock, reuse)
        raise


def _read(sock: socket.socket, reuse: int) -> TcpState:
    where = tuple_of(sock)
    write_seq = _end_of(sock, lx.SEND_QUEUE)
    peek_offset = sock.getsockopt(lx.SOL_SOCKET, lx.SO_PEEK_OFF)
    if peek_offset >= 0:
        sock.setsockopt(lx.SOL_SOCKET, lx.SO_PEEK_OFF, -1)
    before = _reading(sock)
    for _ in range(ATTEMPTS):
        info = lx.info(sock)  # after rcv_nxt was read: a FIN that this counts shows in the state
        require_synchronized(info.state)
        fin = info.state in _FIN_SENT
        unacked = before.unacked - (fin and before.unacked > 0)
        unsent = before.unsent - (fin and before.unsent > 0)
        send_queue = _peek_unacked(sock, unacked)
        receive_queue = _peek(sock, lx.RECV_QUEUE, before.unread)
        after = _reading(sock, before)
        if before == after:
            break
        before = after
    else:
        raise Unsteady(f"{where} still changes after {ATTEMPTS} readings")
    has_timestamps = info.options & lx.TCPI_OPT_TIMESTAMPS
    return TcpState(
        tuple=where,
        snd_una=(write_seq - fin - unacked) & 0xFFFFFFFF,
        snd_nxt=(write_seq - fin - unsent) & 0xFFFFFFFF,
        rcv_nxt=(before.rcv_nxt - (info.state == lx.TCP_CLOSE_WAIT)) & 0xFFFFFFFF,
        send_queue=send_queue,
        receive_queue=receive_queue,
        window=before.window,
        timestamp=lx.get_u32(sock, lx.TCP_TIMESTAMP) if has_timestamps else 0,
        mss_clamp=sock.getsockopt(lx.IPPROTO_TCP, lx.TCP_MAXSEG),
        options=info.options,
        snd_wscale=info.snd_wscale,
        rcv_wscale=info.rcv_wscale,
        reuse=reuse,
        peek_offset=peek_offset,
        sending_ended=fin,
        receiving_ended=lx.receiving_ended(sock),
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
        write_seq = _end_of(sock, lx.SEND_QUEUE)
        rcv_nxt = _end_of(sock, lx.RECV_QUEUE)
        unsent = lx.queue_length(sock, lx.SIOCOUTQNSD)
        info = lx.info(sock)
        fin = info.state in _FIN_SENT and not unsent
        snd_nxt = write_seq - unsent - fin
    finally:
        resume(sock, reuse)
    return (
        (snd_nxt - (info.bytes_sent - info.bytes_retrans) - 1) & 0xFFFFFFFF,
        (rcv_nxt - info.bytes_received - 1) & 0xFFFFFFFF,
    )


def resume(sock: socket.socket, reuse: int, *, probe: bool = False) -> None:
    """Leave repair mode; that clears SO_REUSEADDR, which is the application's.

    Args:
        probe: send a window probe.
    """
    off = lx.REPAIR_OFF if probe else lx.REPAIR_OFF_NO_PROBE
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR, off)
    if reuse:
        sock.setsockopt(lx.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def leave(sock: socket.socket, state: TcpState) -> None:
    """After ``dump``: the connection goes on as it is."""
    resume(sock, state.reuse)
    if state.peek_offset >= 0:
        sock.setsockopt(lx.SOL_SOCKET, lx.SO_PEEK_OFF, state.peek_offset)


def install(
    sock: socket.socket,
    state: TcpState,
    ports: Ports,
    *,
    old: FourTuple | None = None,
    foreign: bool = False,
) -> None:
    """Make a socket in repair mode this connection, all but live.

    It is disconnected first; whatever it was is gone, silently. If there is something to send, the
    window is closed: take the lock off, then ``let_out``.

    Args:
        old: the tuple the socket had; None: unknown, or none.
        foreign: the local address need not be this host's (putting back what a loss took).

    Raises:
        OSError: the kernel refused; ``install`` can be tried again once the socket is in repair
            mode again.
    """
    buffers = _Buffers(sock) if state.send_queue or state.receive_queue else None
    lx.disconnect(sock, clear_error=False)  # the connect does
    if sock.getsockopt(lx.IPPROTO_TCP, lx.TCP_FASTOPEN_CONNECT):
        # Or the connect is deferred to the first write (tcp_fastopen_defer_connect()).
        sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_FASTOPEN_CONNECT, 0)
    _set_sequence(sock, lx.SEND_QUEUE, state.snd_una)
    _set_sequence(sock, lx.RECV_QUEUE, state.rcv_nxt - len(state.receive_queue))
    # The segment size is computed in the connect; TCP_REPAIR_OPTIONS alone comes too late for it
    # (tcp_connect_init()). The disconnect has cleared what the application once set.
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_MAXSEG, state.mss_clamp)
    ports.connect(sock, state.tuple, old, foreign)
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR_OPTIONS, _options(state))
    if state.options & lx.TCPI_OPT_TIMESTAMPS:
        lx.set_u32(sock, lx.TCP_TIMESTAMP, state.timestamp)
    if state.receive_queue:
        _refill_receive_queue(sock, state.receive_queue)
    transmitted = state.transmitted
    if transmitted:
        sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR_QUEUE, lx.SEND_QUEUE)
        _refill_send_queue(sock, state.send_queue[:transmitted])
    lx.set_window(sock, _settable(state))
    resume(sock, state.reuse)
    if len(state.send_queue) > transmitted:
        _refill_send_queue(sock, state.send_queue[transmitted:])
    if state.sending_ended:
        sock.shutdown(socket.SHUT_WR)
    if state.receiving_ended:
        sock.shutdown(socket.SHUT_RD)
    if buffers is not None:
        buffers.put_back(sock)
    if state.peek_offset >= 0:
        sock.setsockopt(lx.SOL_SOCKET, lx.SO_PEEK_OFF, state.peek_offset)


def _settable(state: TcpState) -> lx.Window:
    """The windows to install.

    What came last may have come out of order, beyond rcv_nxt, and is not put back. Its number must
    not stay as that of the last window update: it would keep the peer's next segments from opening
    the window, and where our own has shrunk since the kernel refuses it (tcp_repair_set_window()).
    """
    window = state.window
    if 0 < (window.snd_wl1 - state.rcv_nxt) & 0xFFFFFFFF < 2**31:
        window = window._replace(snd_wl1=state.rcv_nxt)
    if window.rcv_wup == (state.rcv_nxt + 1) & 0xFFFFFFFF:  # acknowledged: the peer's FIN too
        window = window._replace(rcv_wup=state.rcv_nxt)
    return window._replace(snd_wnd=0) if state.to_send else window


def let_out(sock: socket.socket, state: TcpState) -> None:
    """What was installed may leave now."""
    if state.to_send or state.window.snd_wnd < SEGMENT:
        _open_window(sock, state.window.snd_wnd)


def close_window(sock: socket.socket, state: TcpState) -> None:
    """Leave a connection where it is, but send nothing new until ``open_window`` or ``install``.

    What was transmitted may still be sent again, a segment at a time, by a retransmission timer.

    Args:
        sock: in repair mode, just dumped; it has left that afterwards.
        state: the dump.
    """
    lx.set_window(sock, _settable(state.toward(state.tuple, 0)))
    leave(sock, state)


def open_window(sock: socket.socket, snd_wnd: int) -> None:
    """Let out what waits behind a closed window, unless the peer has opened it already.

    Args:
        snd_wnd: bytes the peer can take, as far as is known.
    """
    if not lx.info(sock).snd_wnd:
        _open_window(sock, snd_wnd)


def _open_window(sock: socket.socket, snd_wnd: int) -> None:
    """The peer may have more room by now, and its news of that met nobody: where little is known of
    it, a probe has it say so again."""
    reuse = sock.getsockopt(lx.SOL_SOCKET, socket.SO_REUSEADDR)
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR, lx.REPAIR_ON)
    try:
        window = lx.window(sock)
        if snd_wnd > window.snd_wnd:
            largest = max(window.max_window, snd_wnd)
            lx.set_window(sock, window._replace(snd_wnd=snd_wnd, max_window=largest))
    finally:
        resume(sock, reuse, probe=snd_wnd < SEGMENT)
    lx.push(sock)


def abort(sock: socket.socket) -> None:
    """End a connection silently; the application gets ECONNABORTED, once."""
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR, lx.REPAIR_ON)
    lx.disconnect(sock, clear_error=False)
    resume(sock, 0)


class _Reading(NamedTuple):
    rcv_nxt: int
    unacked: int
    unsent: int
    unread: int
    window: lx.Window


def _reading(sock: socket.socket, before: _Reading | None = None) -> _Reading:
    """What a segment that was past the filter can still change.

    Args:
        before: the last one. With nothing unacknowledged and nothing unread it holds if rcv_nxt
            does, and the receive queue is still the chosen one.
    """
    if before is not None and not (before.unacked or before.unread):
        rcv_nxt = lx.get_u32(sock, lx.TCP_QUEUE_SEQ)
        if rcv_nxt == before.rcv_nxt:
            return before
    rcv_nxt = _end_of(sock, lx.RECV_QUEUE)
    unacked = lx.queue_length(sock, lx.SIOCOUTQ)
    unsent = lx.queue_length(sock, lx.SIOCOUTQNSD) if unacked else 0
    return _Reading(rcv_nxt, unacked, unsent, lx.queue_length(sock, lx.SIOCINQ), lx.window(sock))


def _end_of(sock: socket.socket, queue: int) -> int:
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR_QUEUE, queue)
    return lx.get_u32(sock, lx.TCP_QUEUE_SEQ)


def _peek_unacked(sock: socket.socket, length: int) -> bytes:
    """The send queue. Its first segment stays whole until all of it is acknowledged
    (tcp_clean_rtx_queue()), so there may be more; and too small a buffer is EFAULT."""
    try:
        data = _peek(sock, lx.SEND_QUEUE, length)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR_QUEUE, lx.SEND_QUEUE)
        data = sock.recv(length + HEAD_ROOM, socket.MSG_PEEK | socket.MSG_DONTWAIT)[-length:]
        if len(data) != length:
            raise Unsteady(f"a send queue of {length} bytes gave {len(data)}") from error
    return data


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
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR_QUEUE, lx.RECV_QUEUE)
    rest, chunk = memoryview(data), RECEIVE_CHUNK
    while rest:
        try:
            rest = rest[sock.send(rest[:chunk], socket.MSG_DONTWAIT) :]
        except OSError as error:
            if error.errno != errno.ENOMEM or chunk <= SMALLEST_CHUNK:
                raise
            if not _grow(sock, socket.SO_RCVBUF, lx.SO_RCVBUFFORCE, len(rest)):
                chunk //= 2
    sock.setsockopt(lx.IPPROTO_TCP, lx.TCP_REPAIR_QUEUE, lx.NO_QUEUE)


def _refill_send_queue(sock: socket.socket, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[sock.send(rest, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            if not _grow(sock, socket.SO_SNDBUF, lx.SO_SNDBUFFORCE, len(rest)):
                raise


def _grow(sock: socket.socket, option: int, force: int, more: int) -> bool:
    """Make room for more bytes and what the kernel keeps beside them; False: no more is allowed."""
    size = sock.getsockopt(lx.SOL_SOCKET, option)
    wanted = min(size // 2 + more + RECEIVE_CHUNK, _LARGEST_BUFFER)  # the kernel doubles it
    sock.setsockopt(lx.SOL_SOCKET, force, wanted)
    return sock.getsockopt(lx.SOL_SOCKET, option) > size


_LARGEST_BUFFER = (2**31 - 1) // 2


class _Buffers:
    """What the application's buffers were. Making room ends autotuning and forgets the sizes."""

    def __init__(self, sock: socket.socket) -> None:
        self._lock = sock.getsockopt(lx.SOL_SOCKET, lx.SO_BUF_LOCK)
        self._send = sock.getsockopt(lx.SOL_SOCKET, socket.SO_SNDBUF)
        self._receive = sock.getsockopt(lx.SOL_SOCKET, socket.SO_RCVBUF)

    def put_back(self, sock: socket.socket) -> None:
        if sock.getsockopt(lx.SOL_SOCKET, socket.SO_SNDBUF) > self._send:
            sock.setsockopt(lx.SOL_SOCKET, lx.SO_SNDBUFFORCE, self._send // 2)
        if sock.getsockopt(lx.SOL_SOCKET, socket.SO_RCVBUF) > self._receive:
            sock.setsockopt(lx.SOL_SOCKET, lx.SO_RCVBUFFORCE, self._receive // 2)
        sock.setsockopt(lx.SOL_SOCKET, lx.SO_BUF_LOCK, self._lock)


_FIN_SENT = (lx.TCP_FIN_WAIT1, lx.TCP_FIN_WAIT2)
_SYNCHRONIZED = (lx.TCP_ESTABLISHED, lx.TCP_CLOSE_WAIT, *_FIN_SENT)
_STATES = {
    2: "is still connecting",
    3: "is still connecting",
    6: "is closed (TIME_WAIT)",
    7: "is closed",
    9: "is being closed (LAST_ACK)",
    10: "is a listening socket",
    11: "is being closed by both ends (CLOSING)",
}


def require_synchronized(state: int) -> None:
    """Raise ``Unmovable`` for a connection that is not established, or ended by both ends."""
    if state not in _SYNCHRONIZED:
        raise Unmovable(f"the connection {_STATES.get(state, f'is in state {state}')}")
