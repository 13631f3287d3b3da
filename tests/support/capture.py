"""What was on a wire: tcpdump writes, scapy reads."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.host import Host, stop
from tests.support.namespace import LabError
from tests.support.wait import until

_MARKER_TYPE = 0x88B5
"""IEEE 802's local experimental EtherType: no host answers it."""
_MINIMUM_FRAME = 60


class Capture:
    """A running or finished capture; ``path`` is its pcap file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def packets(self) -> list[Any]:
        """All frames as scapy packets, once the capture is over."""
        from scapy.layers import inet, inet6  # noqa: F401 - teaches scapy to dissect
        from scapy.layers.l2 import Ether
        from scapy.utils import rdpcap

        return [one for one in rdpcap(str(self.path)) if one[Ether].type != _MARKER_TYPE]

    def segments(self) -> list[Any]:
        """The TCP segments among them."""
        from scapy.layers.inet import TCP

        return [one for one in self.packets() if TCP in one]


@contextmanager
def capture(host: Host, interface: str, expression: str = "") -> Iterator[Capture]:
    """Capture an interface's frames from before the body begins until after it has ended.

    Args:
        expression: of pcap-filter(7), such as ``"tcp port 7000"``; empty: everything.

    Raises:
        LabError: tcpdump can't capture there.
    """
    path = host.directory / f"{interface}-{os.urandom(3).hex()}.pcap"
    wanted = f"({expression}) or ether proto {_MARKER_TYPE}" if expression else ""
    process = host.popen(
        "tcpdump", "-i", interface, "-n", "-U", "-s", "0", "-B", "65536", "--immediate-mode",
        "-Z", "root", "-w", str(path), wanted, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    line = ""
    while "listening on" not in line:
        if not (line := process.stderr.readline()):
            raise LabError(f"tcpdump on {host.name} {interface} ended with {process.wait()}")
    try:
        yield Capture(path)
        _flush(host, interface, path)
    finally:
        stop(process)


def _flush(host: Host, interface: str, path: Path) -> None:
    """Send a frame of our own through the interface; when it is in the file, so is all before."""
    marker = os.urandom(16)
    with host.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind((interface, 0))
        frame = b"\xff" * 6 + wire.getsockname()[4] + _MARKER_TYPE.to_bytes(2, "big") + marker
        wire.send(frame.ljust(_MINIMUM_FRAME, b"\0"))

    def written() -> bool:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            return marker in file.read()

    until(written, f"the last frame in the capture of {host.name} {interface}")
