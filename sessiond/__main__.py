"""Parse arguments, run the daemon."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

import click

from sessiond import __version__, config
from sessiond.edges.systemd import activated_socket


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-c",
    "--config",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=config.DEFAULT_PATH,
    show_default=True,
    help="Configuration file; PATH.d/*.toml are its drop-ins.",
)
@click.option("--check-config", is_flag=True, help="Check the configuration and exit (0 or 78).")
@click.version_option(__version__, prog_name="sessiond")
def main(path: Path, check_config: bool) -> None:
    """Keep TCP sessions alive while addresses change under them."""
    status = config.check(path)
    if check_config or status:
        sys.exit(status)
    settings = config.load(path)
    logging.basicConfig(
        level=settings.log.level.upper(), format="%(levelname)s %(name)s: %(message)s"
    )
    sys.exit(asyncio.run(_serve(settings)))


async def _serve(settings: config.Config) -> int:
    from sessiond.daemon import Daemon
    from sessiond.seal.private_file import PrivateFileError

    try:
        await Daemon(settings, activated_socket()).run()
    except PrivateFileError as error:
        logging.getLogger("sessiond").critical("%s", error)
        return config.EX_CONFIG
    except OSError as error:
        logging.getLogger("sessiond").critical("cannot serve: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    main()
