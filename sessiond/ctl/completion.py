"""The verb that prints a completion script."""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def verb_completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell; it asks the daemon for ids and addresses."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, "click knows every shell of SHELLS"
    root = context.find_root().command
    print(kind(root, {}, "sessionctl", "_SESSIONCTL_COMPLETE").source())
