"""What the verbs share: the daemon, sessions by the beginning of their id, and JSON."""

from __future__ import annotations

import sys
from typing import Any

import click

from libhsock.client import Client
from libhsock.errors import HsockError, NotFound, UsageError

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")

ID_LENGTH = 32
"""Digits of a session's id in full: 128 bits."""


def client(socket: str | None) -> Client:
    """The daemon at a path; ``None`` is the default one."""
    return Client(socket, name="sessionctl")


def full_id(daemon: Client, beginning: str) -> str:
    """The id of the one session whose id begins so. Raises NotFound, or UsageError for several."""
    beginning = beginning.lower()
    if len(beginning) >= ID_LENGTH:
        return beginning
    found = [r.session for r in daemon.sessions() if r.session.startswith(beginning)]
    if not found:
        raise NotFound(f"no session's id begins with {beginning}")
    if len(found) > 1:
        examples = " and ".join(found[:2])
        raise UsageError(
            f"{len(found)} sessions begin with {beginning}, such as {examples}; say more"
        )
    return found[0]


def complete_id(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Ids for the shell's completion; none where there is no daemon to ask."""
    try:
        with client(socket_of(context)) as daemon:
            ids = [record.session for record in daemon.sessions()]
    except HsockError:
        return []
    return [session for session in ids if session.startswith(incomplete.lower())]


def socket_of(context: click.Context) -> str | None:
    """``--socket`` while the shell completes, when no verb runs."""
    socket: str | None = context.find_root().params.get("socket")
    return socket


session_argument = click.argument("session", metavar="ID", shell_complete=complete_id)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    import json  # `list` must answer soon, and a table needs none

    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    print()
