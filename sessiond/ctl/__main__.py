"""sessionctl: a client of the daemon's local socket, nothing more.

This is the one place where what went wrong becomes a sentence and an exit status.
"""

from __future__ import annotations

import gc
import importlib
import signal
import sys
from typing import NoReturn

import click

from libhsock.errors import DaemonUnavailable as Unavailable
from libhsock.errors import Denied, HsockError, NotFound, ProtocolError, UsageError
from sessiond import __version__

FAILED, USAGE, UNAVAILABLE, NOT_FOUND, DENIED = 1, 2, 3, 4, 5

VERDICTS: list[tuple[type[HsockError], int, str]] = [
    (UsageError, USAGE, ""),
    (Unavailable, UNAVAILABLE, "see systemctl status sessiond; --socket names another"),
    (ProtocolError, UNAVAILABLE, "is sessiond of the same version as sessionctl?"),
    (NotFound, NOT_FOUND, "sessionctl list shows the sessions you may see"),
    (Denied, DENIED, "root and members of the group sessiond may do it"),
    (HsockError, FAILED, ""),
]
"""Exit status of each kind of error, and what to do about it; the first that fits."""


VERBS = {
    "list": "sessions",
    "show": "sessions",
    "rebind": "sessions",
    "monitor": "monitor",
    "stats": "host",
    "network": "host",
    "peers": "peers",
    "completion": "completion",
}
"""Each verb and the module that has it, as ``verb_<name>``."""


class Verbs(click.Group):
    """Loads a verb when it is asked for: `list` must answer soon."""

    def list_commands(self, context: click.Context) -> list[str]:
        """In the order of the man page."""
        return list(VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The verb, or None where there is none of this name."""
        if name not in VERBS:
            return None
        module = importlib.import_module(f"sessiond.ctl.{VERBS[name]}")
        gc.freeze()  # the modules stay to the end: collections pass them over, the last one too
        verb: click.Command = getattr(module, f"verb_{name}")
        return verb


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    metavar="PATH",
    envvar="SESSIOND_SOCKET",
    help="The daemon's socket.  [default: $SESSIOND_SOCKET or /run/sessiond/sessiond.sock]",
)
@click.version_option(__version__, message="sessionctl %(version)s")
@click.pass_context
def cli(context: click.Context, socket: str | None) -> None:
    """Show and move the live TCP sessions of sessiond.

    An ID is a session's id or any beginning of it that no other session shares.

    \b
    Exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 no daemon,
                 4 no such session, 5 not allowed.
    """
    context.obj = socket


def main() -> NoReturn:
    """The console script."""
    # Ended as a shell expects it: by the signal, without a word. libhsock asks for no SIGPIPE on
    # the daemon's socket, so it can only mean the reader of the output.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        cli.main(prog_name="sessionctl", standalone_mode=False)
        sys.exit(0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except HsockError as error:
        status, advice = next(
            (s, advice) for kind, s, advice in VERDICTS if isinstance(error, kind)
        )
        print(f"sessionctl: {error}{advice and '; '}{advice}", file=sys.stderr)
        sys.exit(status)


if __name__ == "__main__":
    main()
