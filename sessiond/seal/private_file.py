"""Files of the state directory that only the daemon may read, written whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODE = 0o600
MAX_BYTES = 16 << 20


class PrivateFileError(Exception):
    """The file can't be used as it is; the message says which, why and what to do."""


def read(path: Path) -> bytes | None:
    """All of it; None: there is no such file.

    Raises:
        PrivateFileError: it can't be read, is not this user's alone, or is no plain file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PrivateFileError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        _check(path, os.fstat(descriptor))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def create(path: Path, data: bytes) -> bool:
    """Write a file that does not exist; False: it does, and stays as it is.

    Raises:
        PrivateFileError: it can't be written.
    """
    with _written(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    return True


def replace(path: Path, data: bytes) -> None:
    """Write a file, or write it anew; at every moment it is the old or the new one.

    Raises:
        PrivateFileError: it can't be written; the old one stays.
    """
    with _written(path, data) as temporary:
        os.rename(temporary, path)


def _check(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise PrivateFileError(f"{path}: is not a plain file; move it away")
    if status.st_uid != os.geteuid():
        raise PrivateFileError(
            f"{path}: belongs to user {status.st_uid} and not to the daemon's, {os.geteuid()}; "
            f"chown it if you trust it, else delete it"
        )
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise PrivateFileError(
            f"{path}: is open to others (mode {stat.S_IMODE(status.st_mode):04o}); if nobody has "
            f"read or changed it: chmod {MODE:o} {path}; else delete it, and it is made anew"
        )
    if status.st_size > MAX_BYTES:
        raise PrivateFileError(f"{path}: has {status.st_size} bytes, at most {MAX_BYTES} are read")


@contextmanager
def _written(path: Path, data: bytes) -> Iterator[Path]:
    """The data safely in a temporary file beside the path, whose name is gone afterwards."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, MODE
        )
        try:
            with open(descriptor, "wb") as file:
                os.fchmod(descriptor, MODE)
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(path.parent)
    except OSError as error:
        raise PrivateFileError(f"{path}: cannot be written: {error.strerror}") from error


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
