"""A few raw rtnetlink messages: what a careful application would write to watch its addresses, and
the fastest way to take one away."""

from __future__ import annotations

import os
import socket
import struct
import time

_RTM_NEWADDR, _RTM_DELADDR = 20, 21
_RTMGRP_IPV4_IFADDR = 0x10
_IFA_LOCAL = 2
_NLMSG_ERROR = 2
_NLM_F_REQUEST, _NLM_F_ACK = 1, 4
_HEADER = struct.Struct("=IHHII")
_ADDRESS = struct.Struct("=BBBBI")
_ATTRIBUTE = struct.Struct("=HH")


def watch() -> socket.socket:
    """A socket that becomes readable when an IPv4 address comes or goes."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    sock.bind((0, _RTMGRP_IPV4_IFADDR))
    return sock


def deleted(data: bytes) -> list[str]:
    """The addresses whose removal a packet from ``watch`` tells."""
    found = []
    while len(data) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(data)
        if kind == _RTM_DELADDR:
            found += _local(data[_HEADER.size + _ADDRESS.size : length])
        data = data[(length + 3) & ~3 :]
    return found


def _local(attributes: bytes) -> list[str]:
    while len(attributes) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if kind == _IFA_LOCAL:
            return [socket.inet_ntoa(attributes[4:8])]
        attributes = attributes[(length + 3) & ~3 :]
    return []


class Scissors:
    """Takes an IPv4 address from an interface, at a known moment. Made on its host."""

    def __init__(self, interface: str, address: str, prefix: int) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._sock.bind((0, 0))
        attribute = _ATTRIBUTE.pack(8, _IFA_LOCAL) + socket.inet_aton(address)
        index = socket.if_nametoindex(interface)
        body = _ADDRESS.pack(socket.AF_INET, prefix, 0, 0, index) + attribute
        flags = _NLM_F_REQUEST | _NLM_F_ACK
        self._message = _HEADER.pack(_HEADER.size + len(body), _RTM_DELADDR, flags, 1, 0) + body

    def cut(self) -> float:
        """Delete the address; when, CLOCK_MONOTONIC in seconds. Raises OSError."""
        moment = time.monotonic()
        self._sock.send(self._message)
        answer = self._sock.recv(4096)
        _, kind, *_ = _HEADER.unpack_from(answer)
        (error,) = struct.unpack_from("=i", answer, _HEADER.size)
        if kind != _NLMSG_ERROR or error:
            raise OSError(-error, f"the address can't be deleted: {os.strerror(-error)}")
        return moment

    def close(self) -> None:
        self._sock.close()
