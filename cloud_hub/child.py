"""Child processes that the kernel ends together with the thread that started them: a killed hub leaves none behind.

Gives a command line.
Never starts anything itself.
Source: setpriv(1), PR_SET_PDEATHSIG in prctl(2).
"""

import shutil
from collections.abc import Sequence

from fleet_link.errors import SiteError


def dies_with_us(command: Sequence[str]) -> list[str]:
    """Raises SiteError where util-linux is missing."""
    setpriv = shutil.which("setpriv") or shutil.which("setpriv", path="/usr/bin:/bin")
    if setpriv is None:
        raise SiteError("setpriv is not installed", advice="apt-get install util-linux")
    return [setpriv, "--pdeathsig", "KILL", *command]
