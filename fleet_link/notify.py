"""Tell systemd how the service is: ready, alive, stopping; and log to the journal where it is there.

Writes to the socket named by NOTIFY_SOCKET; to the journal through systemd-python, where that is installed.
Never needed for the service to work, and never in its way: a systemd that is busy is told again later.
Source: sd_notify(3), sd_watchdog_enabled(3), systemd.journal.
"""

import contextlib
import logging
import os
import socket
import sys
import threading
import traceback
import warnings
from typing import Any

try:
    from systemd import journal as _journal
except ImportError:  # an optional extra: it builds from source
    _journal = None

_PATIENCE_S = 5.0  # with what is said only once
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def ready(status: str) -> None:
    _notify(f"READY=1\nSTATUS={status}", _PATIENCE_S)


def status(text: str) -> None:
    _notify(f"STATUS={text}")


def watchdog() -> None:
    _notify("WATCHDOG=1")


def stopping() -> None:
    _notify("STOPPING=1", _PATIENCE_S)


def watchdog_interval_s(default_s: float) -> float:
    """Half of what systemd allows between two signs of life, or `default_s` where it asks for none."""
    try:
        return int(os.environ["WATCHDOG_USEC"]) / 2_000_000
    except (KeyError, ValueError):
        return default_s


def set_up_logging(level: str) -> None:
    """One line per state change: to the journal when systemd reads our stderr, else to stderr with a time."""
    if _journal is not None and "JOURNAL_STREAM" in os.environ:
        handler: logging.Handler = _Journal(_journal)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(_WithoutValues(_FORMAT))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    threading.excepthook = _without_text
    warnings.simplefilter("ignore")  # pydicom's warnings quote the values of elements
    for chatty in ("pynetdicom", "httpx", "httpcore", "uvicorn.access", "uvicorn.error", "tuf", "pydicom", "highdicom"):
        logging.getLogger(chatty).setLevel(logging.ERROR)  # their lines may hold patient data or tokens


class _WithoutValues(logging.Formatter):
    """Shows where an unexpected exception arose, and its type; its text may quote a patient's data."""

    def formatException(self, ei: Any) -> str:
        kind, _, trace = ei
        return "".join(traceback.format_tb(trace)) + f"{kind.__name__} (text withheld: it may hold patient data)"


class _Journal(logging.Handler):
    """The journal, through systemd-python. Its own handler would send the exception's text in a field of its own."""

    def __init__(self, journal: Any) -> None:
        super().__init__()
        self._journal = journal
        self._identifier = os.path.basename(sys.argv[0])
        self.setFormatter(_WithoutValues("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        priority = {"ERROR": 3, "CRITICAL": 2, "WARNING": 4, "INFO": 6}.get(record.levelname, 7)
        self._journal.send(self.format(record), PRIORITY=priority, SYSLOG_IDENTIFIER=self._identifier)


def _without_text(arguments: threading.ExceptHookArgs) -> None:
    """A thread that nobody guards, as an association's: its defect goes to the log under the same rule."""
    if arguments.exc_value is not None and arguments.exc_type is not SystemExit:
        where = (arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
        logging.getLogger(__name__).error("a thread stopped by a defect", exc_info=where)


def _notify(message: str, patience_s: float = 0.0) -> None:
    """One datagram: the units are Type=notify. Not by libsystemd's sd_notify, which waits where the socket is full."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
            channel.settimeout(patience_s)
            channel.sendto(message.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
