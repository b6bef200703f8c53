"""Tell systemd how the service is: ready, alive, stopping; and log to the journal where it is there.

Writes to the socket named by NOTIFY_SOCKET through systemd-python, where that is installed; does nothing elsewhere.
Never needed for the service to work.
Source: sd_notify(3), sd_watchdog_enabled(3), systemd.journal.
"""

import logging
import os
import sys
import traceback
import warnings
from typing import Any

try:
    from systemd import daemon as _systemd
    from systemd import journal as _journal
except ImportError:  # an optional extra: it builds from source
    _systemd = None
    _journal = None

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def ready(status: str) -> None:
    _notify(f"READY=1\nSTATUS={status}")


def status(text: str) -> None:
    _notify(f"STATUS={text}")


def watchdog() -> None:
    _notify("WATCHDOG=1")


def stopping() -> None:
    _notify("STOPPING=1")


def watchdog_interval_s(default_s: float) -> float:
    """Half of what systemd allows between two signs of life, or `default_s` where it asks for none."""
    try:
        return int(os.environ["WATCHDOG_USEC"]) / 2_000_000
    except (KeyError, ValueError):
        return default_s


def set_up_logging(level: str) -> None:
    """One line per state change: to the journal when systemd reads our stderr, else to stderr with a time."""
    if _journal is not None and "JOURNAL_STREAM" in os.environ:
        handler: logging.Handler = _journal.JournalHandler(SYSLOG_IDENTIFIER=os.path.basename(sys.argv[0]))
        handler.setFormatter(_WithoutValues("%(name)s: %(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(_WithoutValues(_FORMAT))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    warnings.simplefilter("ignore")  # pydicom's warnings quote the values of elements
    for chatty in ("pynetdicom", "httpx", "httpcore", "uvicorn.access", "tuf", "pydicom", "highdicom"):
        logging.getLogger(chatty).setLevel(logging.ERROR)  # their lines may hold patient data or tokens


class _WithoutValues(logging.Formatter):
    """Shows where an unexpected exception arose, and its type; its text may quote a patient's data."""

    def formatException(self, ei: Any) -> str:
        kind, _, trace = ei
        return "".join(traceback.format_tb(trace)) + f"{kind.__name__} (text withheld: it may hold patient data)"


def _notify(message: str) -> None:
    if _systemd is not None:
        _systemd.notify(message)
