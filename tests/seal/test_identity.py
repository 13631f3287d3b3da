"""The host's key: made once, kept, and never another one unsaid."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from sessiond.seal import private_file
from sessiond.seal.identity import FILE, load_or_make
from sessiond.seal.noise import public_key
from sessiond.seal.private_file import PrivateFileError


def test_it_is_made_at_the_first_start_and_stays(tmp_path: Path) -> None:
    state = tmp_path / "var" / "lib" / "sessiond"
    made = load_or_make(state)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert stat.S_IMODE((state / FILE).stat().st_mode) == 0o600
    assert public_key(load_or_make(state)) == public_key(made)
    assert [entry.name for entry in state.iterdir()] == [FILE]


def test_every_host_has_its_own(tmp_path: Path) -> None:
    assert public_key(load_or_make(tmp_path / "a")) != public_key(load_or_make(tmp_path / "b"))


def test_it_is_the_private_key_that_the_file_holds(tmp_path: Path) -> None:
    key = X25519PrivateKey.generate()
    (tmp_path / FILE).write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    (tmp_path / FILE).chmod(0o600)
    assert load_or_make(tmp_path).private_bytes_raw() == key.private_bytes_raw()


def test_two_first_starts_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = private_file.create
    others: list[X25519PrivateKey] = []

    def overtaken(path: Path, data: bytes) -> bool:
        if not others:
            monkeypatch.setattr(private_file, "create", create)
            others.append(load_or_make(tmp_path))
        return create(path, data)

    monkeypatch.setattr(private_file, "create", overtaken)
    assert public_key(load_or_make(tmp_path)) == public_key(others[0])


def test_a_key_others_can_read_is_refused_and_stays(tmp_path: Path) -> None:
    load_or_make(tmp_path)
    (tmp_path / FILE).chmod(0o640)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(PrivateFileError, match=r"mode 0640.*chmod 600"):
        load_or_make(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


X25519_PEM = X25519PrivateKey.generate().private_bytes(
    Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"secret\n",
        b"\xff\x00",
        X25519_PEM[: len(X25519_PEM) // 2],
        X25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password")
        ),
        Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        ),
    ],
    ids=["empty", "text", "binary", "half", "encrypted", "Ed25519"],
)
def test_what_is_no_key_is_said_and_never_replaced(content: bytes, tmp_path: Path) -> None:
    private_file.create(tmp_path / FILE, content)
    with pytest.raises(PrivateFileError, match=r"holds no X25519 private key.*backup, or delete"):
        load_or_make(tmp_path)
    assert (tmp_path / FILE).read_bytes() == content


def test_a_state_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PrivateFileError, match="cannot be made"):
        load_or_make(tmp_path / "file" / "state")
