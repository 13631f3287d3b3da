"""The verbs about peers: whose keys are accepted, and this host's own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from libhsock import wire
from libhsock.errors import HsockError
from sessiond.ctl.ask import client, json_option, print_json, socket_of
from sessiond.ctl.table import columns


@click.group("peers")
def verb_peers() -> None:
    """Show, pin and forget the keys of peers."""


def complete_name(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names for the shell's completion; none where there is no daemon to ask."""
    try:
        with client(socket_of(context)) as daemon:
            names = dict.fromkeys(peer.name for peer in daemon.peers())
    except HsockError:
        return []
    return [name for name in names if name.startswith(incomplete)]


name_argument = click.argument("name", metavar="NAME", shell_complete=complete_name)


@verb_peers.command("list")
@json_option
@click.pass_obj
def peers_list(socket: str | None, as_json: bool) -> None:
    """The keys of all peers."""
    with client(socket) as daemon:
        _show(daemon.peers(), as_json)


@verb_peers.command("show")
@name_argument
@json_option
@click.pass_obj
def peers_show(socket: str | None, name: str, as_json: bool) -> None:
    """The keys known under one name."""
    with client(socket) as daemon:
        _show(daemon.peers(name), as_json)


@verb_peers.command("pin")
@name_argument
@click.argument("key", metavar="KEY")
@click.pass_obj
def peers_pin(socket: str | None, name: str, key: str) -> None:
    """Accept only this key under a name."""
    with client(socket) as daemon:
        daemon.pin(name, key)
    print(f"{name} is pinned")


@verb_peers.command("forget")
@name_argument
@click.pass_obj
def peers_forget(socket: str | None, name: str) -> None:
    """Meet the peer again as if for the first time."""
    with client(socket) as daemon:
        daemon.forget(name)
    print(f"{name} is forgotten")


@verb_peers.command("fingerprint")
@json_option
@click.pass_obj
def peers_fingerprint(socket: str | None, as_json: bool) -> None:
    """This host's own key."""
    with client(socket) as daemon:
        key = daemon.fingerprint()
    if as_json:
        print_json({"key": key})
    else:
        print(key)


def _show(peers: Sequence[wire.PeerKey], as_json: bool) -> None:
    if as_json:
        print_json([peer.to_map() for peer in peers])
    elif peers:
        rows = [(peer.name, peer.source, peer.key) for peer in peers]
        sys.stdout.write(columns(("NAME", "SOURCE", "KEY"), rows))
    else:
        print("no peer's key is known", file=sys.stderr)
