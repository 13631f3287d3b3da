"""Verdicts: what is asked of a key, and the one line that says what to do."""

from __future__ import annotations

import pytest

from sessiond.seal.fingerprint import fingerprint
from sessiond.seal.trust import Level, Outcome, Trust, canonical

KEY, OTHER, THIRD = b"k" * 32, b"o" * 32, b"t" * 32
NAME, ADDRESS = "server.example", "192.0.2.1"
ACCEPTED, NEW, CHANGED, REFUSED = Outcome

PINNED, FIRST_USE, ANYONE = Level


@pytest.mark.parametrize(
    ("level", "pins", "known", "name", "outcome"),
    [
        # A pin decides, at every level.
        *((level, {NAME: [KEY]}, {}, NAME, ACCEPTED) for level in Level),
        *((level, {NAME: [OTHER]}, {}, NAME, REFUSED) for level in Level),
        *((level, {NAME: [OTHER, KEY]}, {}, NAME, ACCEPTED) for level in Level),
        *((level, {NAME: []}, {}, NAME, REFUSED) for level in Level),
        *((level, {ADDRESS: [KEY]}, {}, NAME, ACCEPTED) for level in Level),
        *((level, {ADDRESS: [OTHER]}, {}, NAME, REFUSED) for level in Level),
        *((level, {ADDRESS: [KEY]}, {}, None, ACCEPTED) for level in Level),
        *((level, {ADDRESS: [OTHER]}, {}, None, REFUSED) for level in Level),
        # That of the name before that of the address, and before what is remembered.
        *((level, {NAME: [KEY], ADDRESS: [OTHER]}, {}, NAME, ACCEPTED) for level in Level),
        *((level, {NAME: [OTHER], ADDRESS: [KEY]}, {}, NAME, REFUSED) for level in Level),
        *((level, {NAME: [KEY]}, {NAME: OTHER}, NAME, ACCEPTED) for level in Level),
        *((level, {NAME: [OTHER]}, {NAME: KEY}, NAME, REFUSED) for level in Level),
        # Without one the level does.
        (PINNED, {}, {}, NAME, REFUSED),
        (PINNED, {}, {NAME: KEY}, NAME, REFUSED),
        (PINNED, {"other.example": [KEY]}, {}, NAME, REFUSED),
        (PINNED, {"other.example": [KEY]}, {}, None, ACCEPTED),
        (PINNED, {"other.example": [OTHER]}, {}, None, REFUSED),
        (PINNED, {}, {}, None, REFUSED),
        (FIRST_USE, {}, {}, NAME, NEW),
        (FIRST_USE, {}, {NAME: KEY}, NAME, ACCEPTED),
        (FIRST_USE, {}, {NAME: OTHER}, NAME, CHANGED),
        (FIRST_USE, {}, {"other.example": OTHER}, NAME, NEW),
        (FIRST_USE, {}, {ADDRESS: OTHER}, NAME, NEW),
        (FIRST_USE, {}, {ADDRESS: OTHER}, ADDRESS, CHANGED),
        # Who comes from an address is not who was dialled there.
        (FIRST_USE, {}, {ADDRESS: OTHER}, None, ACCEPTED),
        (FIRST_USE, {}, {}, None, ACCEPTED),
        (ANYONE, {}, {NAME: OTHER}, NAME, ACCEPTED),
        (ANYONE, {}, {}, None, ACCEPTED),
    ],
)
def test_who_is_accepted(
    level: Level,
    pins: dict[str, list[bytes]],
    known: dict[str, bytes],
    name: str | None,
    outcome: Outcome,
) -> None:
    verdict = Trust(level, pins, known).judge(KEY, name, ADDRESS)
    assert verdict.outcome is outcome
    assert verdict.trusted is (outcome in (ACCEPTED, NEW))
    assert "\n" not in verdict.line
    assert verdict.line.startswith(f"{name or ADDRESS}: ") or name == NAME


def test_a_changed_key_says_what_to_do() -> None:
    line = Trust(FIRST_USE, {}, {NAME: OTHER}).judge(KEY, NAME, ADDRESS).line
    assert line.endswith(f"sessionctl peers forget {NAME}")
    assert fingerprint(KEY) in line
    assert fingerprint(OTHER) in line


def test_a_key_without_a_pin_says_what_to_do() -> None:
    line = Trust(PINNED, {}, {}).judge(KEY, NAME, ADDRESS).line
    assert line.endswith(f"sessionctl peers pin {NAME} {fingerprint(KEY)}")


def test_what_is_remembered_meanwhile_counts() -> None:
    known: dict[str, bytes] = {}
    trust = Trust(FIRST_USE, {}, known)
    assert trust.judge(KEY, NAME, ADDRESS).outcome is NEW
    known[NAME] = KEY
    assert trust.judge(KEY, NAME, ADDRESS).outcome is ACCEPTED
    assert trust.judge(OTHER, NAME, ADDRESS).outcome is CHANGED


@pytest.mark.parametrize(
    ("written", "form"),
    [
        ("Server.Example.", "server.example"),
        ("server", "server"),
        ("_svc.server.example", "_svc.server.example"),
        ("bücher.example", "bücher.example"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
    ],
)
def test_one_name_has_one_form(written: str, form: str) -> None:
    assert canonical(written) == form
    assert canonical(form) == form
    assert Trust(ANYONE, {written: [OTHER]}, {}).judge(KEY, form, ADDRESS).outcome is REFUSED
    assert Trust(ANYONE, {form: [OTHER]}, {}).judge(KEY, written, ADDRESS).outcome is REFUSED


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "a b",
        "a\nb",
        "a\n",
        "#a",
        "a..b",
        ".a",
        "a/b",
        "a" * 64,
        "a." * 127 + "a",
        "fe80::1%a b",
        "fe80::1%a\nb",
        "\x1b[2J",
        "a\u2028b",
    ],
)
def test_what_could_break_a_line_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="is neither a DNS name nor an address"):
        canonical(name)
