"""A real name server for the laboratory: knotd with the zone ``test.``, changed while it runs."""

from __future__ import annotations

from collections.abc import Sequence

import dns.message
import dns.query
import dns.rcode
import dns.update

from tests.support.host import Host
from tests.support.namespace import LabError
from tests.support.service import Service

_ZONE = """\
$TTL {ttl}
@ SOA ns hostmaster 1 3600 600 86400 1
@ NS ns
ns A {ipv4}
ns AAAA {ipv6}
"""
_CONFIG = """\
server:
    rundir: {directory}
    listen: [ {ipv4}@53, {ipv6}@53 ]
    background-workers: 1
    udp-workers: 1
    tcp-workers: 1
database:
    storage: {directory}
    journal-db-max-size: 8M
    kasp-db-max-size: 8M
    timer-db-max-size: 8M
acl:
  - id: lab
    action: update
log:
  - target: stderr
    any: info
zone:
  - domain: test.
    storage: {directory}
    file: test.zone
    acl: lab
    zonefile-sync: -1
    journal-content: none
    zonefile-load: whole
"""


class NameServer(Service):
    """knotd, serving the zone ``test.`` on the host's first uplink.

    Args:
        host: where, usually ``Topology.dns``.
        ttl: of all records, seconds.
    """

    name = "knotd"

    def __init__(self, host: Host, ttl: int = 1) -> None:
        super().__init__(host)
        self._ttl = ttl
        uplink = next(iter(host.uplinks.values()))
        self.address = uplink.address(4)
        names = {
            "directory": self.directory,
            "ipv4": self.address,
            "ipv6": uplink.address(6),
            "ttl": ttl,
        }
        (self.directory / "test.zone").write_text(_ZONE.format(**names))
        (self.directory / "knot.conf").write_text(_CONFIG.format(**names))

    def argv(self) -> tuple[str, ...]:
        return ("knotd", "-c", str(self.directory / "knot.conf"))

    def set(self, name: str, *addresses: str) -> None:
        """``set("server", "10.1.1.2", "2001:db8:11::2")``: these are the name's A and AAAA records
        now, and no others. In force when it returns (RFC 2136). Raises LabError."""
        self._replace(name, "A", [one for one in addresses if ":" not in one])
        self._replace(name, "AAAA", [one for one in addresses if ":" in one])

    def set_srv(self, name: str, *records: str) -> None:
        """``set_srv("_echo._tcp.app", "0 0 7000 server.test.")``, as ``set``."""
        self._replace(name, "SRV", records)

    def ask(self, name: str, kind: str) -> list[str]:
        """The records of a name in the zone, as text."""
        query = dns.message.make_query(f"{name}.test.", kind)
        answer = self.host.call(dns.query.udp, query, self.address, timeout=3)
        return sorted(str(record) for found in answer.answer for record in found)

    def _replace(self, name: str, kind: str, records: Sequence[str]) -> None:
        update = dns.update.UpdateMessage("test.")
        update.delete(name, kind)
        for record in records:
            update.add(name, self._ttl, kind, record)
        answer = self.host.call(dns.query.tcp, update, self.address, timeout=3)
        if answer.rcode() != dns.rcode.NOERROR:
            raise LabError(f"knotd refused to change {name}: {dns.rcode.to_text(answer.rcode())}")
