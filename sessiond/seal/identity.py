"""The host's static key: made when the daemon first starts, in the state directory.

PKCS #8 in PEM, unencrypted, so that ``openssl pkey`` can read it.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from sessiond.seal import private_file
from sessiond.seal.private_file import PrivateFileError

FILE = "host_key"


def load_or_make(state_directory: Path) -> X25519PrivateKey:
    """The host's key; of several daemons that start for the first time at once all get the same.

    Args:
        state_directory: is made, for this user alone, if it is not there.

    Raises:
        PrivateFileError: the file can't be read, written or trusted, or holds no such key.
    """
    path = state_directory / FILE
    try:
        state_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise PrivateFileError(f"{state_directory}: cannot be made: {error.strerror}") from error
    pem = private_file.read(path)
    if pem is None:
        private_file.create(path, _pem(X25519PrivateKey.generate()))
        pem = private_file.read(path)
    return _key(path, pem or b"")


def _pem(key: X25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _key(path: Path, pem: bytes) -> X25519PrivateKey:
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, X25519PrivateKey):
        raise PrivateFileError(
            f"{path}: holds no X25519 private key in PEM; restore it from a backup, or delete it: "
            f"a new one is made, and peers that know the old one must forget it"
        )
    return key
