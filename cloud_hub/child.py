"""Child processes that the kernel ends together with the thread that started them: a killed hub leaves none behind.

Gives a command line.
Never starts anything itself.
Source: setpriv(1), PR_SET_PDEATHSIG in prctl(2).
"""

import shutil
from collections.abc import Sequence

from fleet_link.errors import SiteError

# Mosquitto would tell systemd by itself that it is ready, in the hub's name. Source: sd_notify(3).
WITHOUT_SYSTEMD = ("env", "-u", "NOTIFY_SOCKET", "-u", "WATCHDOG_USEC", "-u", "WATCHDOG_PID")


def dies_with_us(command: Sequence[str]) -> list[str]:
    """Raises SiteError where util-linux is missing."""
    setpriv = shutil.which("setpriv") or shutil.which("setpriv", path="/usr/bin:/bin")
    if setpriv is None:
        raise SiteError("setpriv is not installed", advice="apt-get install util-linux")
    return [setpriv, "--pdeathsig", "KILL", *WITHOUT_SYSTEMD, *command]
