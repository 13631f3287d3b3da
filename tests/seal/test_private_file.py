"""Private files: for one reader, and never half."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from sessiond.seal import private_file
from sessiond.seal.private_file import PrivateFileError, create, read, replace


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "secret"


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777], ids=oct)
@pytest.mark.parametrize("write", [create, replace])
def test_a_file_is_for_its_owner_whatever_the_umask(
    write: Callable[[Path, bytes], object], umask: int, path: Path
) -> None:
    before = os.umask(umask)
    try:
        write(path, b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read(path) == b"x"
    assert names(path) == ["secret"]


def test_there_may_be_none(path: Path) -> None:
    assert read(path) is None


def test_what_exists_is_not_created_again(path: Path) -> None:
    assert create(path, b"first")
    assert not create(path, b"second")
    assert read(path) == b"first"
    assert names(path) == ["secret"]


def test_what_exists_is_replaced(path: Path) -> None:
    replace(path, b"first")
    replace(path, b"second")
    assert read(path) == b"second"
    assert names(path) == ["secret"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o777])
def test_what_others_may_touch_is_refused_with_what_to_do(mode: int, path: Path) -> None:
    create(path, b"x")
    path.chmod(mode)
    with pytest.raises(PrivateFileError, match=rf"{path}: .*mode {mode:04o}.*chmod 600 {path}"):
        read(path)
    path.chmod(0o600)
    assert read(path) == b"x"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_what_belongs_to_another_user_is_refused(path: Path) -> None:
    create(path, b"x")
    os.chown(path, 65534, -1)
    with pytest.raises(PrivateFileError, match="belongs to user 65534"):
        read(path)


def test_links_directories_and_pipes_are_refused(tmp_path: Path) -> None:
    create(tmp_path / "target", b"x")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "directory").mkdir(mode=0o700)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("link", "directory", "pipe"):
        with pytest.raises(PrivateFileError, match=f"{tmp_path / name}: "):
            read(tmp_path / name)


def test_replacing_a_link_leaves_its_target(tmp_path: Path) -> None:
    create(tmp_path / "target", b"x")
    (tmp_path / "link").symlink_to("target")
    assert not create(tmp_path / "link", b"y")
    replace(tmp_path / "link", b"y")
    assert (read(tmp_path / "link"), read(tmp_path / "target")) == (b"y", b"x")


def test_what_is_far_too_large_is_refused(path: Path) -> None:
    create(path, b"x")
    os.truncate(path, private_file.MAX_BYTES + 1)
    with pytest.raises(PrivateFileError, match="at most"):
        read(path)


@pytest.mark.parametrize(
    ("write", "call"),
    [(create, "fsync"), (create, "link"), (replace, "fsync"), (replace, "rename")],
)
def test_what_fails_leaves_what_was(
    write: Callable[[Path, bytes], object], call: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if write is replace:
        replace(path, b"before")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(os, call, fail)
        with pytest.raises(PrivateFileError, match=f"{path}: cannot be written: No space left"):
            write(path, b"after")
    assert names(path) == (["secret"] if write is replace else [])
    assert read(path) == (b"before" if write is replace else None)


def test_a_missing_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(PrivateFileError, match="cannot be written: No such file or directory"):
        replace(tmp_path / "nowhere" / "secret", b"x")


@pytest.mark.parametrize(("write", "name"), [(create, "link"), (replace, "rename")])
def test_the_name_appears_after_the_bytes_are_on_disk(
    write: Callable[[Path, bytes], object], name: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, naming = os.fsync, getattr(os, name)

    def synced(descriptor: int) -> None:
        done.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def named(source: Path, target: Path) -> None:
        assert Path(source).read_bytes() == b"x"
        done.append("name")
        naming(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, name, named)
    write(path, b"x")
    assert done == ["file", "name", "directory"]
