"""sessiond on a host of the laboratory."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.host import Host
from tests.support.service import Service

_CONFIG = """\
state_directory = "{directory}"
[local]
socket = "{directory}/sessiond.sock"
group = "root"
[resolver]
nameservers = [{nameservers}]
[log]
level = "debug"
"""


class Sessiond(Service):
    """A host's sessiond; ``with Sessiond(net.client, nameservers=NAMESERVERS) as daemon:``.

    Args:
        host: where.
        extra: TOML, a drop-in that overrides what the laboratory has set.
        nameservers: the addresses the daemon asks; none: what the host's resolv.conf says.

    ``environment`` is what a program needs to find this daemon, ``socket`` the path in it.
    """

    name = "sessiond"

    def __init__(self, host: Host, extra: str = "", nameservers: tuple[str, ...] = ()) -> None:
        super().__init__(host)
        self.socket = str(self.directory / "sessiond.sock")
        self.environment = {**os.environ, "SESSIOND_SOCKET": self.socket}
        self._config = self.directory / "sessiond.toml"
        quoted = ", ".join(f'"{one}"' for one in nameservers)
        self._config.write_text(_CONFIG.format(directory=self.directory, nameservers=quoted))
        drop_ins = self.directory / "sessiond.toml.d"
        drop_ins.mkdir(exist_ok=True)
        (drop_ins / "50-extra.toml").write_text(extra)

    def argv(self) -> tuple[str, ...]:
        return (sys.executable, "-m", "sessiond", "--config", str(self._config))

    def ctl(
        self, *arguments: str, check: bool = True, timeout: float = 30
    ) -> subprocess.CompletedProcess[str]:
        """Run ``sessionctl`` against it. Raises CalledProcessError, TimeoutExpired."""
        return self.host.run(
            sys.executable,
            *("-m", "sessiond.ctl"),
            *arguments,
            check=check,
            timeout=timeout,
            env=self.environment,
        )
