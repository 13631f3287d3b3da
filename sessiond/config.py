"""The daemon's configuration: every option with its type, unit, bounds and default.

One TOML file and its drop-ins, in the order of their names; of an option set twice the later one
wins, lists are replaced and not joined. Units are in the names (``_ms``, ``_s``), the rest are
counts. systemd/sessiond.toml shows all of it, commented.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TextIO

import msgspec
from msgspec import Meta, Struct

from sessiond.seal import fingerprint
from sessiond.seal.trust import canonical

DEFAULT_PATH = Path("/etc/sessiond/sessiond.toml")
EX_CONFIG = 78
"""sysexits.h: something was found in an unconfigured or misconfigured state."""

Switch = Annotated[bool, Meta(description="true or false")]
Count = Annotated[int, Meta(ge=1, le=10_000_000, description="an integer from 1 to 10000000")]
Milliseconds = Annotated[
    int, Meta(ge=0, le=3_600_000, description="milliseconds, an integer from 0 to 3600000")
]
AbsolutePath = Annotated[str, Meta(pattern="^/", description="an absolute path")]
SocketPath = Annotated[
    str,
    Meta(pattern="^/", max_length=107, description="an absolute path of at most 107 characters"),
]
Globs = Annotated[
    tuple[Annotated[str, Meta(min_length=1)], ...],
    Meta(description='a list of interface name patterns such as ["eth*", "wlan0"]'),
]


_GONE = {
    ("insecure_peers",): "is gone: messages between daemons are sealed always; delete the line "
    "([peers] trust says whose keys are accepted)"
}
"""Options of earlier versions, and what to do about them."""


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file. Each of its fields is an option."""


class Local(Section, frozen=True, forbid_unknown_fields=True):
    """The socket applications and sessionctl talk to."""

    socket: SocketPath = "/run/sessiond/sessiond.sock"
    group: Annotated[str, Meta(min_length=1, description="the name of a group")] = "sessiond"


class Peer(Section, frozen=True, forbid_unknown_fields=True):
    """How the daemons of two hosts talk."""

    port: Annotated[int, Meta(ge=1, le=65535, description="an integer from 1 to 65535")] = 2006
    allow_loopback: Switch = False


class Pin(Section, frozen=True, forbid_unknown_fields=True):
    """A key that a peer must have."""

    name: str
    key: str

    def __post_init__(self) -> None:
        canonical(self.name)
        fingerprint.parse(self.key)


class Peers(Section, frozen=True, forbid_unknown_fields=True):
    """Which hosts are what they say they are."""

    trust: Annotated[
        Literal["first-use", "pinned", "anyone"],
        Meta(description='one of "first-use", "pinned", "anyone"'),
    ] = "first-use"
    pin: Annotated[
        tuple[Pin, ...],
        Meta(
            description="a list of tables [[peers.pin]], each with a name (a DNS name or an "
            "address) and a key (a fingerprint, of 'sessionctl peers fingerprint' there)"
        ),
    ] = ()


class Policy(Section, frozen=True, forbid_unknown_fields=True):
    """Which address a session uses, and when it moves."""

    prefer: Globs = ()
    avoid: Globs = ()
    prefer_ipv6: Switch = True
    move_on_better: Switch = True
    gain_debounce_ms: Milliseconds = 100
    min_move_interval_ms: Milliseconds = 1000


class Resolver(Section, frozen=True, forbid_unknown_fields=True):
    """How names become addresses."""

    nameservers: Annotated[
        tuple[str, ...],
        Meta(description='a list of IP addresses such as ["192.0.2.53", "2001:db8::53"]'),
    ] = ()
    timeout_s: Annotated[
        float, Meta(ge=0.1, le=60, description="seconds, a number from 0.1 to 60")
    ] = 3.0
    cache_size: Count = 1000

    def __post_init__(self) -> None:
        for nameserver in self.nameservers:
            ip_address(nameserver)


class Log(Section, frozen=True, forbid_unknown_fields=True):
    """What the daemon says."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description='one of "debug", "info", "warning", "error"'),
    ] = "info"


class Limits(Section, frozen=True, forbid_unknown_fields=True):
    """What one daemon holds at most, so that no user can starve the others."""

    sessions: Count = 100_000
    sessions_per_uid: Count = 50_000
    clients_per_uid: Count = 1000


class Config(Section, frozen=True, forbid_unknown_fields=True):
    """The whole configuration; ``Config()`` is the defaults."""

    state_directory: AbsolutePath = "/var/lib/sessiond"
    local: Local = Local()
    peer: Peer = Peer()
    peers: Peers = Peers()
    policy: Policy = Policy()
    resolver: Resolver = Resolver()
    log: Log = Log()
    limits: Limits = Limits()


class Problem(NamedTuple):
    """One thing wrong with one file."""

    file: Path
    line: int | None
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else f"{self.file}"
        return f"{where}: {self.message}"


class ConfigError(Exception):
    """The configuration cannot be used; ``problems`` says every reason."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


def load(path: Path = DEFAULT_PATH, dropin_dir: Path | None = None) -> Config:
    """Read the file and its drop-ins.

    Args:
        path: The main file. Only ``DEFAULT_PATH`` may be missing; then the defaults hold.
        dropin_dir: Holds further ``*.toml``; ``None`` is the file's own path with ``.d`` added.

    Raises:
        ConfigError: A file can't be read, is no TOML, or has an unknown or illegal option.
    """
    dropin_dir = dropin_dir or path.with_name(path.name + ".d")
    files = [] if path == DEFAULT_PATH and not path.exists() else [path]
    problems: list[Problem] = []
    merged: dict[str, Any] = {}
    for file in [*files, *_drop_ins(dropin_dir)]:
        try:
            _merge(merged, _read(file))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return msgspec.convert(merged, Config)


def check(
    path: Path = DEFAULT_PATH, dropin_dir: Path | None = None, *, errors: TextIO | None = None
) -> int:
    """What ``--check-config`` does: print one line for each problem.

    Returns:
        0 if a daemon would start with this configuration, else ``EX_CONFIG`` (78).
    """
    errors = errors or sys.stderr
    try:
        load(path, dropin_dir)
    except ConfigError as error:
        print(error, file=errors)
        return EX_CONFIG
    return 0


def _drop_ins(directory: Path) -> list[Path]:
    try:
        return sorted(entry for entry in directory.iterdir() if entry.suffix == ".toml")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError([_unreadable(directory, error)]) from error


def _unreadable(file: Path, error: OSError) -> Problem:
    return Problem(file, None, f"cannot be read: {error.strerror}")


def _read(file: Path) -> dict[str, Any]:
    """A file's tables, each option valid by itself."""
    try:
        text = file.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except OSError as error:
        raise ConfigError([_unreadable(file, error)]) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError([Problem(file, line, "is not UTF-8 text")]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_problem(file, text, str(error))]) from error
    found = [
        Problem(file, _line_of(text, keys), f"{'.'.join(keys)}: {message}")
        for keys, message in _illegal(tables, Config, ())
    ]
    if found:
        raise ConfigError(found)
    return tables


def _syntax_problem(file: Path, text: str, message: str) -> Problem:
    at = re.search(r" \(at line (\d+), column \d+\)| \(at end of document\)", message)
    if at is None:
        return Problem(file, None, f"not TOML: {message}")
    line = int(at[1]) if at[1] else text.count("\n") + 1
    return Problem(file, line, f"not TOML: {message[: at.start()]}")


def _illegal(
    table: dict[str, Any], section: type[Section], keys: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """The options of a table that are unknown or have an illegal value, and what is allowed."""
    options = {option.name: option.type for option in msgspec.structs.fields(section)}
    for name, value in table.items():
        here = (*keys, name)
        option = options.get(name)
        if here in _GONE:
            yield here, _GONE[here]
        elif option is None:
            where = f"[{'.'.join(keys)}]" if keys else "the top level"
            yield here, f"unknown key, {where} has {', '.join(options)}"
        elif isinstance(option, type) and issubclass(option, Section):
            if isinstance(value, dict):
                yield from _illegal(value, option, here)
            else:
                yield here, f"{value!r} is not allowed, it is a table: [{name}]"
        else:
            try:
                msgspec.convert({name: value}, section)
            except msgspec.ValidationError:
                yield here, f"{_toml(value)} is not allowed, it is {_allowed(option)}"


def _allowed(option: Any) -> str:
    description = next(meta.description for meta in option.__metadata__)
    assert isinstance(description, str), "every option's type says what is allowed"
    return description


def _toml(value: Any) -> str:
    """A value as its writer wrote it, shortened."""
    text = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
    return text if len(text) <= 60 else text[:57] + "..."


_HEADER = re.compile(r"\s*\[\[?\s*([^\[\]]+?)\s*\]")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")


def _line_of(text: str, keys: tuple[str, ...]) -> int | None:
    """The line, from 1, that sets an option; tomllib keeps no positions."""
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = _parts(header[1])
            if table[: len(keys)] == keys:
                return number
        elif key := _KEY.match(line):
            named = (*table, *_parts(key[1]))
            # The shorter one is an inline table, the longer one is below the table asked for.
            if named == keys[: len(named)] or named[: len(keys)] == keys:
                return number
    return None


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _merge(into: dict[str, Any], tables: dict[str, Any]) -> None:
    for name, value in tables.items():
        if isinstance(value, dict):
            _merge(into.setdefault(name, {}), value)
        else:
            into[name] = value
