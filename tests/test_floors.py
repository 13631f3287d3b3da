"""The floors of the house (docs/architecture.md): who may import whom, read from the sources.

__main__ -> daemon -> perform -> {edges, rebind} -> peer_codec -> core -> stdlib
daemon -> service -> peers -> {keyring -> seal, edges, peer_codec}
config <- daemon, __main__        edges never import each other
libhsock.{wire, errors} <- edges/local      libhsock.{wire, errors, client} <- ctl
libhsock never imports sessiond
edges/local: server -> client -> {requests -> backend -> caller, channel -> descriptors}
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Room(NamedTuple):
    """Modules under one name, and what they may import besides the standard library."""

    name: str
    own: tuple[str, ...] = ()
    """Names of this project; a name stands for what is below it too."""
    others: tuple[str, ...] = ()
    """Top-level packages of others."""
    not_even: tuple[str, ...] = ()
    """Of the standard library."""


PROTOCOL = ("libhsock.wire", "libhsock.errors", "libhsock.client")
FROM_CODEC = ("sessiond.peer_codec", "sessiond.core")
FROM_EDGES = ("sessiond.edges", "sessiond.rebind", *FROM_CODEC)
BESIDE_PERFORM = ("sessiond.registry", "sessiond.inbox", "sessiond.ratelimit")
PEERS = ("sessiond.peers", "sessiond.keyring", "sessiond.seal")
FROM_PERFORM = ("sessiond.perform", "sessiond.service", *PEERS, *BESIDE_PERFORM, *FROM_EDGES)
FROM_CHANNEL = ("sessiond.edges.local.descriptors", "sessiond.edges.local.limits")
FROM_BACKEND = ("sessiond.edges.local.backend", "sessiond.edges.local.caller")
CLOCKS_AND_IO = (
    *("asyncio", "logging", "os", "select", "selectors", "signal"),
    *("socket", "subprocess", "threading", "time"),
)

ROOMS = [
    Room("sessiond.__main__", ("sessiond.daemon", "sessiond.config", *FROM_PERFORM), ("click",)),
    Room("sessiond.daemon", ("sessiond.config", *FROM_PERFORM)),
    Room("sessiond.perform", FROM_EDGES),
    Room(
        "sessiond.service",
        ("sessiond.config", "sessiond.registry", *PEERS, *FROM_EDGES, "libhsock.errors"),
    ),
    Room("sessiond.registry", ("sessiond.rebind", *FROM_CODEC)),
    Room("sessiond.inbox", ("sessiond.core",)),
    Room("sessiond.peers", ("sessiond.config", "sessiond.ratelimit", *PEERS, *FROM_EDGES)),
    Room("sessiond.keyring", ("sessiond.config", "sessiond.seal")),
    Room("sessiond.config", ("sessiond.seal",), ("msgspec",)),
    Room("sessiond.ctl", ("sessiond.ctl", *PROTOCOL), ("click",)),
    Room("sessiond.edges.local.listener", ("libhsock.wire",)),
    Room("sessiond.edges.local.channel", (*FROM_CHANNEL, "libhsock.wire", "libhsock.errors")),
    Room("sessiond.edges.local.requests", (*FROM_BACKEND, "libhsock.wire", "libhsock.errors")),
    Room("sessiond.edges.local", ("sessiond.edges.local", "libhsock.wire", "libhsock.errors")),
    Room("sessiond.edges", FROM_CODEC, ("asyncio_dgram", "pyroute2", "dns")),
    Room("sessiond.rebind", ("sessiond.rebind", *FROM_CODEC)),
    Room("sessiond.peer_codec", ("sessiond.core",), ("msgpack", "msgspec")),
    Room("sessiond.seal.private_file"),
    Room("sessiond.seal", ("sessiond.seal",), ("cryptography",), CLOCKS_AND_IO),
    Room("sessiond.core", ("sessiond.core",), not_even=CLOCKS_AND_IO),
    Room("sessiond"),
    Room("libhsock", ("libhsock",), ("msgpack",)),
]
"""The first room whose name a module has, or is below, is its room."""


def below(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported anywhere in a source, also in a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(
                [*(parents if node.level else []), *([node.module or ""] * bool(node.module))]
            )
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def violations(module: str, package: str, source: str) -> list[str]:
    room = next(room for room in ROOMS if below(module, (room.name,)))
    found = []
    for line, name in imports(source, package):
        top = name.partition(".")[0]
        if name == "sessiond.__version__":
            allowed = below(module, ("sessiond",))
        elif top in ("sessiond", "libhsock"):
            allowed = below(name, room.own)
        elif top in sys.stdlib_module_names:
            allowed = top not in room.not_even
        else:
            allowed = top in room.others
        if not allowed:
            found.append(f"{module}:{line} imports {name}")
    return found


def modules() -> list[tuple[str, str, Path]]:
    """Module name, the package its relative imports start from, and file."""
    found = []
    for file in sorted([*ROOT.glob("sessiond/**/*.py"), *ROOT.glob("libhsock/**/*.py")]):
        parts = list(file.relative_to(ROOT).with_suffix("").parts)
        package = ".".join(parts[:-1])
        found.append((package if parts[-1] == "__init__" else ".".join(parts), package, file))
    return found


@pytest.mark.parametrize(
    ("module", "package", "file"), [pytest.param(*m, id=m[0]) for m in modules()]
)
def test_a_module_imports_only_what_its_floor_may(module: str, package: str, file: Path) -> None:
    assert violations(module, package, file.read_text()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("sessiond.core.machine", "import time"),
        ("sessiond.core.machine", "import msgspec"),
        ("sessiond.core.machine", "from sessiond import edges"),
        ("sessiond.core.machine", "from ..edges import rtnl"),
        ("sessiond.seal.transport", "import time"),
        ("sessiond.seal.identity", "import os"),
        ("sessiond.seal.noise", "from sessiond.core import tuples"),
        ("sessiond.edges.rtnl", "from sessiond.edges import resolver"),
        ("sessiond.edges.rtnl", "from . import resolver"),
        ("sessiond.edges.rtnl", "from libhsock import wire"),
        ("sessiond.edges.local.client", "from libhsock import hsocket"),
        ("sessiond.edges.local.client", "from sessiond.edges import resolver"),
        ("sessiond.edges.local.channel", "from sessiond.edges.local.backend import Backend"),
        ("sessiond.edges.local.requests", "from sessiond.edges.local.channel import Channel"),
        ("sessiond.rebind.repair", "from sessiond.edges import rtnl"),
        ("sessiond.perform", "from sessiond import daemon"),
        ("sessiond.ctl.sessions", "from sessiond.core import tuples"),
        ("sessiond.ctl.sessions", "import rich"),
        ("libhsock.client", "def f():\n    import sessiond"),
        ("libhsock.client", "import msgspec"),
        ("libhsock.client", "from sessiond import __version__"),
    ],
)
def test_an_import_across_the_floors_is_found(module: str, line: str) -> None:
    assert len(violations(module, module.rpartition(".")[0], line)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("sessiond.core.machine", "from .session import Session"),
        ("sessiond.core.machine", "from sessiond.core import tuples"),
        ("sessiond.seal.noise", "from cryptography.exceptions import InvalidTag"),
        ("sessiond.seal.private_file", "import os"),
        ("sessiond.edges.local", "from libhsock import errors, wire"),
        ("sessiond.edges.local", "from libhsock.wire import encode"),
        ("sessiond.daemon", "from sessiond import perform"),
        ("sessiond.ctl.sessions", "from libhsock.client import Client"),
        ("libhsock.client", "from . import wire"),
    ],
)
def test_an_import_down_the_floors_is_allowed(module: str, line: str) -> None:
    assert violations(module, module.rpartition(".")[0], line) == []
