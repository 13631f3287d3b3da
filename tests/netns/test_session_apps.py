"""Applications of every kind, ten moves each: no error, no end of file, no byte lost."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from tests.netns import apps
from tests.netns.session_support import NAME, World, certificate
from tests.support.lab import Lab
from tests.support.wait import until

READER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <errno.h>

/* Sends lines, one when the last is back; no EINTR handling: any error ends it with status 1. */
int main(int argc, char **argv)
{
	int fd = atoi(argv[1]), turns = atoi(argv[2]);
	char line[64], back[64];

	for (int i = 0; i < turns; i++) {
		int length = sprintf(line, "line %d\n", i);
		int got = 0;

		if (send(fd, line, length, 0) != length)
			return perror("send"), 1;
		while (got < length) {
			ssize_t more = recv(fd, back + got, length - got, 0);

			if (more <= 0)
				return fprintf(stderr, "recv: %zd %s\n", more, strerror(errno)), 1;
			got += more;
		}
		if (memcmp(line, back, length))
			return fprintf(stderr, "not what was sent\n"), 1;
	}
	puts("all back");
	return 0;
}
"""


@pytest.fixture
def world(lab: Lab) -> World:
    return World(lab)


@pytest.mark.parametrize("app", [apps.threads, apps.selecting, apps.edge_triggered])
def test_it_never_notices(world: World, app: object) -> None:
    talk = world.talk(app)  # type: ignore[arg-type]
    world.ten_moves()
    assert world.settled(talk).moves >= 10
    world.finish(talk)


def test_asyncio_streams_never_notice(world: World) -> None:
    world.serve(apps.streams_echo)
    talk = world.talk(apps.streams)
    world.ten_moves()
    assert world.settled(talk).moves >= 10
    world.finish(talk)


@pytest.fixture
def contexts(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's, the client's."""
    if not shutil.which("openssl"):
        pytest.skip("not installed: openssl (on Debian: apt-get install openssl)")
    key, cert = certificate(tmp_path)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    client = ssl.create_default_context(cafile=str(cert))
    return server, client


@pytest.mark.parametrize("app", [apps.secure, apps.streams])
def test_tls_never_notices(
    world: World, contexts: tuple[ssl.SSLContext, ssl.SSLContext], app: object
) -> None:
    server, client = contexts
    world.serve(apps.echo, server)
    talk = world.talk(app, NAME, client)  # type: ignore[arg-type]
    world.ten_moves()
    assert world.settled(talk).moves >= 10
    world.finish(talk)


def test_a_c_program_blocked_in_recv_never_notices(world: World, tmp_path: Path) -> None:
    """It gets the connection from a launcher by exec and knows of no session."""
    source, program = tmp_path / "reader.c", tmp_path / "reader"
    source.write_text(READER)
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", program, source], check=True)
    output = tmp_path / "output"
    world.serve(apps.slow_echo)
    talk = world.talk(apps.become, NAME, str(program), str(output))
    until(lambda: Path(f"/proc/{talk.worker.pid}/exe").readlink() == program, "the C program")
    world.ten_moves()
    record = world.settled(talk)
    assert record.moves >= 10
    assert record.pid == talk.worker.pid
    assert world.echo is not None
    world.echo.tell("go")  # it has been blocked all the time; now its lines come back
    until(lambda: output.read_text(), "the C program's end")
    assert output.read_text() == "all back\n"
    assert world.server_errors() == []
