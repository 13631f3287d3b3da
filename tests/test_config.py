"""The configuration: defaults, drop-ins, and what is said about every kind of mistake."""

from __future__ import annotations

import io
import json
import re
import string
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessiond.config import Config, ConfigError, Section, check, load

EXAMPLE = Path(__file__).parents[1] / "systemd" / "sessiond.toml"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sessiond.toml"


def problems_of(file: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(file)
    return [str(problem).removeprefix(f"{file.parent}/") for problem in caught.value.problems]


def drop_in(file: Path, name: str, text: str) -> None:
    directory = file.with_name(file.name + ".d")
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(text)


def test_example_file_states_every_default_and_nothing_else(tmp_path: Path) -> None:
    uncommented = re.sub(r"^#(?=\w+ = )", "", EXAMPLE.read_text(), flags=re.MULTILINE)
    shown = tomllib.loads(uncommented)
    assert shown == json.loads(msgspec.json.encode(Config()))


def test_example_file_as_installed_is_the_defaults() -> None:
    assert load(EXAMPLE) == Config()


def test_the_man_page_states_every_option_with_its_default() -> None:
    page = (EXAMPLE.parents[1] / "docs" / "man" / "sessiond.toml.5").read_text()
    stated: dict[str, Any] = {}
    table = stated
    for section, option, quote, value in re.findall(
        r"^\.Ss \[(\w+)\]|^\.It Li (\w+) No = (Qq )?(.+)$", page, re.MULTILINE
    ):
        if section:
            table = stated[section] = {}
        else:
            table[option] = value if quote else tomllib.loads(f"value = {value}")["value"]
    assert stated == json.loads(msgspec.json.encode(Config()))


def test_every_option_says_what_is_allowed() -> None:
    def descriptions(section: type[Section]) -> dict[str, Any]:
        return {
            f.name: descriptions(f.type)
            if isinstance(f.type, type) and issubclass(f.type, Section)
            else [meta.description for meta in f.type.__metadata__]
            for f in msgspec.structs.fields(section)
        }

    def leaves(tree: dict[str, Any]) -> list[Any]:
        return [x for v in tree.values() for x in (leaves(v) if isinstance(v, dict) else [v])]

    found = leaves(descriptions(Config))
    assert found
    assert all(len(texts) == 1 and texts[0] for texts in found)


def test_an_empty_file_is_the_defaults(file: Path) -> None:
    file.write_text("")
    assert load(file) == Config()


def test_a_named_file_that_is_missing_is_an_error(file: Path) -> None:
    assert problems_of(file) == ["sessiond.toml: cannot be read: No such file or directory"]


def test_a_directory_in_the_place_of_the_file_is_an_error(file: Path) -> None:
    file.mkdir()
    assert problems_of(file) == ["sessiond.toml: cannot be read: Is a directory"]


def test_drop_ins_win_in_the_order_of_their_names(file: Path) -> None:
    file.write_text('[peer]\nport = 1\nallow_loopback = true\n[policy]\nprefer = ["a", "b"]\n')
    drop_in(file, "20-last.toml", "[peer]\nport = 3\n")
    drop_in(file, "10-first.toml", '[peer]\nport = 2\n[policy]\nprefer = ["c"]\n')
    drop_in(file, "30-not-ours.conf", "port = 4")
    config = load(file)
    assert (config.peer.port, config.peer.allow_loopback) == (3, True)
    assert config.policy.prefer == ("c",)


def test_a_drop_in_directory_elsewhere(file: Path, tmp_path: Path) -> None:
    file.write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.toml").write_text('[log]\nlevel = "debug"\n')
    assert load(file, tmp_path / "elsewhere").log.level == "debug"


def test_a_file_in_the_place_of_the_drop_in_directory_is_an_error(file: Path) -> None:
    file.write_text("")
    file.with_name("sessiond.toml.d").write_text("")
    assert problems_of(file) == ["sessiond.toml.d: cannot be read: Not a directory"]


def test_a_mistake_in_a_drop_in_names_that_file(file: Path) -> None:
    file.write_text("")
    drop_in(file, "10.toml", '\n[log]\nlevel = "loud"\n')
    assert problems_of(file) == [
        'sessiond.toml.d/10.toml:3: log.level: "loud" is not allowed, '
        'it is one of "debug", "info", "warning", "error"'
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[peer]\nport = 0\n", "2: peer.port: 0 is not allowed, it is an integer from 1 to 65535"),
        (
            "[peer]\nport = 65536\n",
            "2: peer.port: 65536 is not allowed, it is an integer from 1 to 65535",
        ),
        (
            "peer.port = true\n",
            "1: peer.port: true is not allowed, it is an integer from 1 to 65535",
        ),
        (
            "peer = { port = '7' }",
            '1: peer.port: "7" is not allowed, it is an integer from 1 to 65535',
        ),
        (
            "[ peer ]\n\n'port' = 1.5",
            "3: peer.port: 1.5 is not allowed, it is an integer from 1 to 65535",
        ),
        ("\npeer = 7", "2: peer: 7 is not allowed, it is a table: [peer]"),
        ("[[peer]]\nport = 7", "1: peer: [{'port': 7}] is not allowed, it is a table: [peer]"),
        (
            "insecure_peers = true",
            "1: insecure_peers: is gone: messages between daemons are sealed always; "
            "delete the line ([peers] trust says whose keys are accepted)",
        ),
        (
            "[peers]\ntrust = 'everyone'",
            '2: peers.trust: "everyone" is not allowed, '
            'it is one of "first-use", "pinned", "anyone"',
        ),
        (
            "# port\n[peer] # ours\nprot = 2006",
            "3: peer.prot: unknown key, [peer] has port, allow_loopback",
        ),
        (
            "[pear]\nport = 2006",
            "1: pear: unknown key, the top level has state_directory, "
            "local, peer, peers, policy, resolver, log, limits",
        ),
        (
            "[resolver]\nnameservers = ['dns.test']",
            '2: resolver.nameservers: ["dns.test"] is not allowed, '
            'it is a list of IP addresses such as ["192.0.2.53", "2001:db8::53"]',
        ),
        (
            "[resolver]\ntimeout_s = 0",
            "2: resolver.timeout_s: 0 is not allowed, it is seconds, a number from 0.1 to 60",
        ),
        (
            "[resolver]\ntimeout_s = inf",
            "2: resolver.timeout_s: inf is not allowed, it is seconds, a number from 0.1 to 60",
        ),
        (
            "[resolver]\ntimeout_s = nan",
            "2: resolver.timeout_s: nan is not allowed, it is seconds, a number from 0.1 to 60",
        ),
        (
            "[policy]\nprefer = 'eth0'",
            '2: policy.prefer: "eth0" is not allowed, '
            'it is a list of interface name patterns such as ["eth*", "wlan0"]',
        ),
        (
            "[policy]\ngain_debounce_ms = -1",
            "2: policy.gain_debounce_ms: -1 is not allowed, "
            "it is milliseconds, an integer from 0 to 3600000",
        ),
        (
            "[local]\nsocket = 'run.sock'",
            '2: local.socket: "run.sock" is not allowed, '
            "it is an absolute path of at most 107 characters",
        ),
        ("a = 1\na = 2", "2: not TOML: Cannot overwrite a value"),
        ("[peer]\nport = ", "2: not TOML: Invalid value"),
        ('[log]\nlevel = "', "2: not TOML: Unterminated string"),
    ],
)
def test_a_mistake_is_reported_with_line_key_and_what_is_allowed(
    file: Path, text: str, problem: str
) -> None:
    file.write_text(text)
    assert problems_of(file) == [f"sessiond.toml:{problem}"]


def test_all_mistakes_of_all_files_are_reported_at_once(file: Path) -> None:
    file.write_text("[peer]\nport = 0\n[log]\nlevel = 3\n")
    drop_in(file, "10.toml", "[limits]\nsessions = 0\n")
    assert [problem.split(" ")[0] for problem in problems_of(file)] == [
        "sessiond.toml:2:",
        "sessiond.toml:4:",
        "sessiond.toml.d/10.toml:2:",
    ]


def test_bytes_that_are_no_text_are_reported_with_their_line(file: Path) -> None:
    file.write_bytes(b"[log]\nlevel = '\xff'\n")
    assert problems_of(file) == ["sessiond.toml:2: is not UTF-8 text"]


def test_the_line_of_a_key_that_stands_in_two_tables(file: Path) -> None:
    file.write_text("[limits]\nsessions = 5\n[local]\ngroup = 'g'\nsessions = 5\n")
    assert problems_of(file) == [
        "sessiond.toml:5: local.sessions: unknown key, [local] has socket, group"
    ]


KEY = "-".join(["aaaa"] * 13)


def test_pins_are_names_or_addresses_with_keys(file: Path) -> None:
    pins = [("server.test", KEY), ("2001:db8::1", KEY), ("server.test", KEY.replace("-", ""))]
    file.write_text(
        "".join(f'[[peers.pin]]\nname = "{name}"\nkey = "{key}"\n' for name, key in pins)
    )
    assert [(pin.name, pin.key) for pin in load(file).peers.pin] == pins


@pytest.mark.parametrize(
    "pin", ['name = "a b"', f'name = "a"\nkey = "{KEY[1:]}"', f'key = "{KEY}"', 'pin = "a"', ""]
)
def test_a_pin_that_is_none_is_reported_with_what_it_must_be(file: Path, pin: str) -> None:
    file.write_text(f"[log]\n[[peers.pin]]\n{pin}\n")
    (problem,) = problems_of(file)
    assert problem.startswith("sessiond.toml:2: peers.pin: ")
    assert "a name (a DNS name or an address) and a key (a fingerprint" in problem


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("", 0, ""),
        ("insecure_peers = true", 78, "messages between daemons are sealed always"),
        ("state_directory = 7", 78, "it is an absolute path"),
    ],
)
def test_check_prints_why_not_and_gives_the_exit_status(
    file: Path, text: str, status: int, said: str
) -> None:
    file.write_text(text)
    errors = io.StringIO()
    assert check(file, errors=errors) == status
    assert said in errors.getvalue()
    assert bool(errors.getvalue()) == (status != 0)


keys = st.text(string.ascii_lowercase + "_", min_size=1, max_size=8)
values = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


def toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return repr(value) if isinstance(value, float) else json.dumps(value)


@given(table=st.sampled_from(["", "[peer]", "[policy]", "[log]", "[x]"]), key=keys, value=values)
def test_any_file_gives_a_configuration_or_its_problems_with_a_line(
    tmp_path_factory: pytest.TempPathFactory, table: str, key: str, value: Any
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(f"{table}\n".encode() + f"{key} = {toml(value)}\n".encode())
    try:
        problems = []
        load(file)
    except ConfigError as error:
        problems = error.problems
    assert all(problem.line for problem in problems)
