"""Whose keys are accepted: the configuration, what was pinned by request, what was met."""

from __future__ import annotations

from pathlib import Path

import pytest

from sessiond import config
from sessiond.keyring import Keyring, Known
from sessiond.seal.fingerprint import fingerprint
from sessiond.seal.trust import Outcome

A, B, C = b"a" * 32, b"b" * 32, b"c" * 32
ADDRESS = "192.0.2.1"


def keyring(directory: Path, trust: config.Peers | None = None) -> tuple[Keyring, list[str]]:
    changed: list[str] = []
    return Keyring(trust or config.Peers(), directory, changed.append), changed


def outcome(keys: Keyring, key: bytes, name: str | None = "server.test") -> Outcome:
    return keys.judge(key, name, ADDRESS).outcome


async def test_a_key_met_is_the_only_one_until_it_is_forgotten(tmp_path: Path) -> None:
    keys, changed = keyring(tmp_path)
    assert outcome(keys, A) is Outcome.NEW
    await keys.remember("server.test", A)
    assert (outcome(keys, A), outcome(keys, B)) == (Outcome.ACCEPTED, Outcome.CHANGED)
    assert await keys.forget("Server.Test.")
    assert outcome(keys, B) is Outcome.NEW
    assert not await keys.forget("server.test")
    assert changed[0] == "server.test"


async def test_a_pin_by_request_counts_at_once_and_after_a_restart(tmp_path: Path) -> None:
    keys, changed = keyring(tmp_path)
    await keys.remember("server.test", A)
    await keys.pin("server.test", B)
    for one in (keys, keyring(tmp_path)[0]):
        assert (outcome(one, B), outcome(one, A)) == (Outcome.ACCEPTED, Outcome.REFUSED)
        assert [*one.known("server.test")] == [
            Known("server.test", A, "first-use"),
            Known("server.test", B, "pinned"),
        ]
    assert changed == ["server.test"]
    assert await keys.forget("server.test")
    assert [*keys.known()] == []
    assert outcome(keys, C) is Outcome.NEW


async def test_a_pin_of_the_configuration_is_not_forgotten(tmp_path: Path) -> None:
    pin = config.Pin("server.test", fingerprint(A))
    keys, _ = keyring(tmp_path, config.Peers("pinned", (pin,)))
    assert not await keys.forget("server.test")
    assert keys.configured("SERVER.test")
    assert (outcome(keys, A), outcome(keys, B)) == (Outcome.ACCEPTED, Outcome.REFUSED)
    assert (outcome(keys, A, None), outcome(keys, B, None)) == (Outcome.ACCEPTED, Outcome.REFUSED)
    await keys.pin("laptop.test", B)
    assert outcome(keys, B, None) is Outcome.ACCEPTED


async def test_what_is_no_name_is_a_value_error(tmp_path: Path) -> None:
    keys, _ = keyring(tmp_path)
    for wrong in (keys.pin("a b", A), keys.forget("")):
        with pytest.raises(ValueError, match="neither a DNS name nor an address"):
            await wrong
    with pytest.raises(ValueError, match="neither"):
        keys.known("a\nb")
