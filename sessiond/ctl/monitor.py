"""The verb that tells what happens, as it happens."""

from __future__ import annotations

import json
import time

import click

from libhsock import wire
from libhsock.wire import Kind
from sessiond.ctl.ask import client, complete_id, full_id, json_option
from sessiond.ctl.table import milliseconds


def line_of(event: wire.Event) -> str:
    """One event for people: when, which session, what, where, how or why."""
    whole, fraction = divmod(event.time, 1)
    clock = f"{time.strftime('%H:%M:%S', time.localtime(whole))}.{int(fraction * 1000):03}"
    where = f"{event.local} > {event.remote}" if event.local else ""
    how = [event.engine or "", f"gap {milliseconds(event.gap_ms)}" if event.gap_ms else ""]
    details = ", ".join(part for part in (where, *how, event.reason or "") if part)
    return f"{clock}  {event.session[:8]:8}  {event.kind:8}  {details}".rstrip()


def json_line_of(event: wire.Event) -> str:
    """One event as NDJSON, the fields it has."""
    return json.dumps(event.to_map(), ensure_ascii=False)


@click.command("monitor")
@click.argument("session", metavar="[ID]", required=False, shell_complete=complete_id)
@json_option
@click.pass_obj
def verb_monitor(socket: str | None, session: str | None, as_json: bool) -> None:
    """What happens to all sessions, or to one until it is closed, a line each."""
    written = json_line_of if as_json else line_of
    with client(socket) as daemon:
        one = full_id(daemon, session) if session else None
        kind: str = Kind.OVERFLOW
        # An overflow ends a stream: what is in it says that events were lost, the next goes on.
        while kind == Kind.OVERFLOW:
            for event in daemon.events(one):
                print(written(event), flush=True)
                kind = event.kind
