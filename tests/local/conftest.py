"""Fixtures of the local protocol's and libhsock's tests."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from libhsock.testing import FakeDaemon


@pytest.fixture
def fake() -> Iterator[FakeDaemon]:
    """A daemon that knows ``server.test``, with both loopback addresses."""
    with FakeDaemon() as fake:
        fake.names["server.test"] = ["::1", "127.0.0.1"]
        yield fake


@pytest.fixture
def no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens where libhsock looks."""
    monkeypatch.setenv("SESSIOND_SOCKET", str(tmp_path / "none.sock"))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate of ``server.test`` signed by itself, in one file."""
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    command = [
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-nodes", "-days", "1", "-subj", "/CN=server.test"),
        *("-addext", "subjectAltName=DNS:server.test", "-keyout", str(file), "-out", "-"),
    ]
    try:
        made = subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl(1) to make a certificate")
    with file.open("ab") as pem:
        pem.write(made.stdout)
    return file


@pytest.fixture
def tls(certificate: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A client's and a server's context."""
    client = ssl.create_default_context(cafile=str(certificate))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    return client, server
