"""The laboratory's daemons and captures."""

from __future__ import annotations

import socket

import pytest

from tests.support.capture import capture
from tests.support.dns import NameServer
from tests.support.lab import Lab, LabError
from tests.support.service import Service
from tests.support.sessiond import Sessiond
from tests.support.topology import Topology


def test_names_change_while_the_name_server_runs(lab: Lab, net: Topology) -> None:
    names = lab.enter(NameServer(net.dns))
    names.set("server", "10.1.1.2", "2001:db8:11::2")
    assert (names.ask("server", "A"), names.ask("server", "AAAA")) == (
        ["10.1.1.2"],
        ["2001:db8:11::2"],
    )
    names.set("server", "10.1.2.2")
    assert (names.ask("server", "A"), names.ask("server", "AAAA")) == (["10.1.2.2"], [])
    names.set_srv("_echo._tcp.app", "0 0 7000 server.test.")
    assert names.ask("_echo._tcp.app", "SRV") == ["0 0 7000 server.test."]


def test_programs_of_a_host_resolve_by_it(lab: Lab, net: Topology) -> None:
    lab.enter(NameServer(net.dns)).set("server", "10.1.1.2")
    assert "10.1.1.2" in net.client.run("getent", "ahostsv4", "server.test").stdout


def test_a_service_that_does_not_come_up_is_an_error_with_its_log(net: Topology) -> None:
    class Broken(Service):
        name = "broken"

        def argv(self) -> tuple[str, ...]:
            return ("sh", "-c", "echo out of paper; exit 3")

    with pytest.raises(LabError, match=r"status 3(.|\n)*out of paper"):
        Broken(net.client).start()


def test_a_capture_holds_what_passed_while_it_ran(net: Topology) -> None:
    with net.server.entered():
        listener = socket.create_server(("10.1.1.2", 7000))
    with listener, capture(net.client, "wifi", "tcp port 7000") as wire:
        with net.client.entered():
            near = socket.create_connection(("10.1.1.2", 7000))
        far, _ = listener.accept()
        near.sendall(b"Hello Server 1!")
        assert far.recv(100) == b"Hello Server 1!"
        near.close()
        far.close()
    segments = wire.segments()
    assert [str(one["TCP"].flags) for one in segments[:3]] == ["S", "SA", "A"]
    assert b"Hello Server 1!" in b"".join(bytes(one["TCP"].payload) for one in segments)


def test_sessiond_comes_up_and_answers(net: Topology) -> None:
    with Sessiond(net.client) as daemon:
        assert daemon.ctl("list").returncode == 0
    assert daemon.process.returncode == 0
