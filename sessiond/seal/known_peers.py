"""The keys of peers as first met, in a file of the state directory.

A line is a name and a fingerprint; empty lines and those that begin with # are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from sessiond.seal import fingerprint, private_file
from sessiond.seal.private_file import PrivateFileError
from sessiond.seal.trust import canonical

FILE = "known_peers"
_HEADING = "# Keys of peers that sessiond knows; sessionctl peers forget NAME removes one.\n"


class KnownPeers(Mapping[str, bytes]):
    """Public keys by canonical name, the same in memory and in the file.

    Args:
        file: its name in the state directory.

    Raises:
        PrivateFileError: a line can't be understood; without it its peer would be met as a new one.
    """

    def __init__(self, state_directory: Path, file: str = FILE) -> None:
        self._path = state_directory / file
        self._keys = self._read()

    def __getitem__(self, name: str) -> bytes:
        return self._keys[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def remember(self, name: str, key: bytes) -> None:
        """Keep a key.

        Raises:
            PrivateFileError: the file can't be written; then the key is not kept either.
        """
        self._write({**self._keys, canonical(name): key})

    def forget(self, name: str) -> bool:
        """Drop a key; False: there was none.

        Raises:
            PrivateFileError: the file can't be written; then nothing is forgotten.
        """
        kept = {known: key for known, key in self._keys.items() if known != canonical(name)}
        forgotten = len(kept) < len(self._keys)
        if forgotten:
            self._write(kept)
        return forgotten

    def _read(self) -> dict[str, bytes]:
        keys: dict[str, bytes] = {}
        data = private_file.read(self._path) or b""
        for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
            if line.strip() and not line.startswith("#"):
                try:
                    name, text = line.split()
                    name, key = canonical(name), fingerprint.parse(text)
                except ValueError as error:
                    raise self._illegible(number, "is not a name and a fingerprint") from error
                if name in keys:
                    raise self._illegible(number, f"names {name} again")
                keys[name] = key
        return keys

    def _illegible(self, number: int, why: str) -> PrivateFileError:
        return PrivateFileError(
            f"{self._path}:{number}: {why}; correct the line, or delete it if its peer may be met "
            f"as if for the first time"
        )

    def _write(self, keys: dict[str, bytes]) -> None:
        lines = (f"{name} {fingerprint.fingerprint(key)}\n" for name, key in sorted(keys.items()))
        private_file.replace(self._path, (_HEADING + "".join(lines)).encode())
        self._keys = keys
