"""The verbs about the host and its daemon: network, stats."""

from __future__ import annotations

import sys

import click

from sessiond.ctl.ask import client, json_option, print_json
from sessiond.ctl.table import columns, fields, number


@click.command("network")
@json_option
@click.pass_obj
def verb_network(socket: str | None, as_json: bool) -> None:
    """The addresses and routes that sessions can use now."""
    with client(socket) as daemon:
        view = daemon.network()
    if as_json:
        print_json(view.to_map())
        return
    addresses = [(f"{a.address}/{a.prefix}", a.interface) for a in view.addresses]
    routes = [(r.destination, r.interface, str(r.metric)) for r in view.routes]
    sys.stdout.write(columns(("ADDRESS", "INTERFACE"), addresses))
    sys.stdout.write("\n" + columns(("ROUTE", "INTERFACE", ">METRIC"), routes))
    if not addresses:
        print("no usable address: sessions wait until one comes", file=sys.stderr)


@click.command("stats")
@json_option
@click.pass_obj
def verb_stats(socket: str | None, as_json: bool) -> None:
    """The daemon's counters."""
    with client(socket) as daemon:
        counters = daemon.stats()
    if as_json:
        print_json(counters)
    else:
        sys.stdout.write(fields((name, number(value)) for name, value in counters.items()))
