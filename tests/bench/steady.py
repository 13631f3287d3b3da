"""The contenders whose application does nothing: one socket, and something below it that moves.

``mptcp`` is the kernel's Multipath TCP (RFC 8684) with the second address as a backup subflow,
alone or beside a helper that tells the kernel when an address has gone. ``sessiond`` is this
project: the same programs, with libhsock's functions in the place of socket's.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from pyroute2.netlink.generic.mptcp import MPTCP

import libhsock
from libhsock import State
from tests.bench import rtnl
from tests.bench.stream import Gap, prepare, receive, send
from tests.support.host import Host
from tests.support.wait import until
from tests.support.worker import Talk

_IPPROTO_MPTCP = 262
_WIFI_ID, _ETH_ID = 1, 2


@dataclass(frozen=True)
class Plan:
    """One run. ``daemons`` are the paths of the client's and the server's sessiond; none: MPTCP."""

    kind: str
    download: bool
    server: tuple[str, int]
    window: float
    daemons: tuple[str, str] | None = None


def client(talk: Talk, plan: Plan) -> Gap | None:
    """The mover. Tells its session's id, or ""."""
    prepare()
    if plan.daemons:
        os.environ["SESSIOND_SOCKET"] = plan.daemons[0]
        opened = libhsock.create_connection(plan.server, 10)
        session = opened.session
        until(lambda: session.mobile and session.state == State.ESTABLISHED, "a mobile session")
        talk.tell(session.id)
        sock: socket.socket = opened
        sock.settimeout(None)
    else:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, _IPPROTO_MPTCP)
        sock.connect(plan.server)
        talk.tell("")
    return _play(talk, sock, plan, receiver=plan.download)


def server(talk: Talk, plan: Plan) -> Gap | None:
    """The end that stays."""
    prepare()
    if plan.daemons:
        os.environ["SESSIOND_SOCKET"] = plan.daemons[1]
        listener: socket.socket = libhsock.create_server(plan.server)
    else:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, _IPPROTO_MPTCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(plan.server)
        listener.listen()
    with listener:  # which Multipath TCP needs for the second subflow's handshake
        talk.tell("listening")
        sock, _ = listener.accept()
        return _play(talk, sock, plan, receiver=not plan.download)


def _play(talk: Talk, sock: socket.socket, plan: Plan, *, receiver: bool) -> Gap | None:
    if receiver:
        return receive(talk, sock, plan.kind, plan.window)
    send(talk, sock, plan.kind)
    return None


def helper(talk: Talk, address: str) -> None:
    """Tells the kernel's path manager of an address that was deleted, for ever."""
    prepare()
    watch = rtnl.watch()
    with MPTCP() as manager:  # type: ignore[no-untyped-call]
        manager.endpoint("show")
        talk.tell("watching")
        while True:
            if address in rtnl.deleted(watch.recv(65536)):
                manager.endpoint("del", id=_WIFI_ID, addr=address)


def allow_mptcp(client: Host, server: Host) -> None:
    """Let Multipath TCP use the client's two uplinks."""
    for host in (client, server):
        host.sysctl("net/mptcp/enabled", 1)
        host.ip("mptcp limits set subflows 4 add_addr_accepted 4")
    client.ip(f"mptcp endpoint add {client.address('eth')} id {_ETH_ID} dev eth subflow backup")
    restore_mptcp(client)


def restore_mptcp(client: Host) -> None:
    """Bring back the endpoint that the helper has deleted, or change nothing."""
    client.run(
        *f"ip mptcp endpoint add {client.address('wifi')} id {_WIFI_ID} dev wifi subflow".split(),
        check=False,
    )
