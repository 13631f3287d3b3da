"""The file of keys met before: for people to read, and never understood in part."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessiond.seal.fingerprint import fingerprint
from sessiond.seal.known_peers import FILE, KnownPeers
from sessiond.seal.private_file import PrivateFileError, create
from sessiond.seal.trust import Level, Outcome, Trust

from . import calm

KEY, OTHER = b"k" * 32, b"o" * 32


def test_a_key_is_remembered_until_it_is_forgotten(tmp_path: Path) -> None:
    peers = KnownPeers(tmp_path)
    assert dict(peers) == {}
    peers.remember("Server.Example.", KEY)
    peers.remember("2001:DB8::1", OTHER)
    for read in (peers, KnownPeers(tmp_path)):
        assert dict(read) == {"server.example": KEY, "2001:db8::1": OTHER}
        assert len(read) == 2
    assert peers.forget("SERVER.example")
    assert not peers.forget("server.example")
    for read in (peers, KnownPeers(tmp_path)):
        assert dict(read) == {"2001:db8::1": OTHER}


def test_the_file_is_for_people_and_for_no_others(tmp_path: Path) -> None:
    peers = KnownPeers(tmp_path)
    peers.remember("b.example", OTHER)
    peers.remember("a.example", KEY)
    heading, *lines = (tmp_path / FILE).read_text().splitlines()
    assert heading.startswith("# ")
    assert "sessionctl peers forget NAME" in heading
    assert lines == [f"a.example {fingerprint(KEY)}", f"b.example {fingerprint(OTHER)}"]
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_people_may_write_it(tmp_path: Path) -> None:
    text = f"# mine\n\n  Server.Example \t {fingerprint(KEY).upper()}  \n"
    create(tmp_path / FILE, text.encode())
    assert dict(KnownPeers(tmp_path)) == {"server.example": KEY}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("server.example", "is not a name and a fingerprint"),
        (f"server.example {fingerprint(KEY)} more", "is not a name and a fingerprint"),
        (f"server.example {fingerprint(KEY)[:-1]}", "is not a name and a fingerprint"),
        (f"a/b {fingerprint(KEY)}", "is not a name and a fingerprint"),
        (f"first.example {fingerprint(OTHER)}", "names first.example again"),
        ("\x00\ufffd", "is not a name and a fingerprint"),
    ],
)
def test_a_line_it_cannot_read_is_named_and_nothing_is_guessed(
    line: str, why: str, tmp_path: Path
) -> None:
    create(tmp_path / FILE, f"first.example {fingerprint(KEY)}\n{line}\n".encode())
    with pytest.raises(PrivateFileError, match=f"{tmp_path / FILE}:2: {why}; correct the line"):
        KnownPeers(tmp_path)


@calm
@given(garbage=st.binary(max_size=60))
def test_garbage_ends_in_one_kind_of_error(
    garbage: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("state")
    create(directory / FILE, b"x " + garbage)
    with pytest.raises(PrivateFileError):
        KnownPeers(directory)


def test_a_file_others_can_write_is_refused(tmp_path: Path) -> None:
    KnownPeers(tmp_path).remember("server.example", KEY)
    (tmp_path / FILE).chmod(0o620)
    with pytest.raises(PrivateFileError, match="mode 0620"):
        KnownPeers(tmp_path)


def test_what_cannot_be_written_is_not_believed_either(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    peers = KnownPeers(state)
    peers.remember("server.example", KEY)
    (state / FILE).unlink()
    state.rmdir()
    with pytest.raises(PrivateFileError, match="cannot be written"):
        peers.remember("other.example", OTHER)
    with pytest.raises(PrivateFileError, match="cannot be written"):
        peers.forget("server.example")
    assert dict(peers) == {"server.example": KEY}


def test_what_is_no_name_is_not_remembered(tmp_path: Path) -> None:
    peers = KnownPeers(tmp_path)
    with pytest.raises(ValueError, match="neither a DNS name nor an address"):
        peers.remember("a\nb.example", KEY)
    assert not (tmp_path / FILE).exists()


def test_trust_reads_it(tmp_path: Path) -> None:
    peers = KnownPeers(tmp_path)
    trust = Trust(Level.FIRST_USE, {}, peers)
    assert trust.judge(KEY, "server.example", "192.0.2.1").outcome is Outcome.NEW
    peers.remember("server.example", KEY)
    assert trust.judge(OTHER, "server.example", "192.0.2.1").outcome is Outcome.CHANGED
    peers.forget("server.example")
    assert trust.judge(OTHER, "server.example", "192.0.2.1").outcome is Outcome.NEW
