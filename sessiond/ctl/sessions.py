"""The verbs about sessions: list, show, rebind."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import click

from libhsock import wire
from libhsock.errors import HsockError
from sessiond.ctl.ask import (
    client,
    full_id,
    json_option,
    print_json,
    session_argument,
    socket_of,
)
from sessiond.ctl.table import columns, duration, fields, milliseconds

_TITLES = ("SESSION", "STATE", "PEER", "LOCAL", "REMOTE", ">MOVES", ">GAP", ">AGE")
_SHORTEST_ID = 8


@click.command("list")
@json_option
@click.pass_obj
def verb_list(socket: str | None, as_json: bool) -> None:
    """One line for each session."""
    with client(socket) as daemon:
        records = list(daemon.sessions())
    if as_json:
        print_json([record.to_map() for record in records])
    elif records:
        sys.stdout.write(table_of(records, time.time()))
    else:
        print("no sessions", file=sys.stderr)


def table_of(records: Sequence[wire.Record], now: float) -> str:
    """The sessions, in the order given, their ids as short as they stay apart."""
    ids = [record.session for record in records]
    length = _SHORTEST_ID
    while len({session[:length] for session in ids}) < len(set(ids)):
        length += 1
    return columns(
        _TITLES,
        (
            (
                record.session[:length],
                record.state,
                record.peer or "",
                record.local,
                record.remote,
                str(record.moves),
                milliseconds(record.gap_ms),
                duration(now - record.created),
            )
            for record in records
        ),
    )


@click.command("show")
@session_argument
@json_option
@click.pass_obj
def verb_show(socket: str | None, session: str, as_json: bool) -> None:
    """All about one session, and why it is not mobile."""
    with client(socket) as daemon:
        record = daemon.show(full_id(daemon, session))
    if as_json:
        print_json(record.to_map())
    else:
        sys.stdout.write(fields(description(record, time.time())))


def description(record: wire.Record, now: float) -> list[tuple[str, str]]:
    """Every field a person may want, named."""
    moves = f"{record.moves}"
    if record.moves:
        moves += f", the last with a gap of {milliseconds(record.gap_ms)}"
    return [
        ("session", record.session),
        ("state", record.state),
        ("mobile", _mobility(record)),
        ("peer", record.peer or ""),
        ("its sessiond", record.peer_daemon or ""),
        ("local", record.local),
        ("remote", record.remote),
        ("round trip", milliseconds(record.rtt_ms)),
        ("moves", moves),
        ("generation", str(record.generation)),
        ("opened by", f"{record.role}, process {record.pid}, descriptor {record.fd}"),
        ("user", _user(record.uid)),
        ("age", duration(now - record.created)),
    ]


def _mobility(record: wire.Record) -> str:
    """``"yes, engine repair"``, ``"no: why"``; a mobile session's reason is what limits it."""
    told = "yes" if record.mobile else "no"
    if record.mobile and record.engine:
        told += f", engine {record.engine}"
    return f"{told}: {record.reason}" if record.reason else told


def _user(uid: int) -> str:
    import pwd  # `list` must answer soon, and names no users

    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return str(uid)


def complete_destination(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    """Interfaces and addresses for the shell's completion."""
    try:
        with client(socket_of(context)) as daemon:
            view = daemon.network()
    except HsockError:
        return []
    names = dict.fromkeys(
        [a.interface for a in view.addresses] + [a.address for a in view.addresses]
    )
    return [name for name in names if name.startswith(incomplete)]


@click.command("rebind")
@session_argument
@click.option(
    "--to",
    metavar="ADDRESS|INTERFACE",
    shell_complete=complete_destination,
    help="Where to, of this host.  [default: the best there is]",
)
@json_option
@click.pass_obj
def verb_rebind(socket: str | None, session: str, to: str | None, as_json: bool) -> None:
    """Move a session now, while its path still works."""
    with client(socket) as daemon:
        before = daemon.show(full_id(daemon, session))
        record = daemon.rebind(before.session, to)
    if as_json:
        print_json(record.to_map())
    elif record.generation == before.generation:
        print(f"{record.session} is on {record.local} already")
    else:
        print(f"{record.session} moved: {summary(before, record)}")


def summary(before: wire.Record, after: wire.Record) -> str:
    """``"192.0.2.1:4000 > 198.51.100.1:80 to 192.0.2.9:4000 > …, repair, gap 1.9ms"``"""
    return (
        f"{before.local} > {before.remote} to {after.local} > {after.remote}, "
        f"{after.engine}, gap {milliseconds(after.gap_ms)}"
    )
