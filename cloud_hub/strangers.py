"""Refusals of those who have not shown who they are: a few are written one by one, the rest is counted and told.

Writes rows of the table refusals and log lines: at most BURST at once and PER_MINUTE after that, and one sum a minute.
Never lets a stranger fill the disk or the log, or keep the one writer of the database busy.
Source: token bucket (RFC 2697, one colour).
"""

import logging
import threading
from collections.abc import Callable

from cloud_hub.database import Database, Device, record_refusal

log = logging.getLogger(__name__)

BURST = 20
PER_MINUTE = 20.0
TELL_S = 60.0  # how often the owner's loop calls `tell`


class Strangers:
    """`refused` from any thread; `tell` every TELL_S from the loop. `seconds` never goes back."""

    def __init__(self, database: Database, *, clock: Callable[[], float], seconds: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        self._seconds = seconds
        self._lock = threading.Lock()
        self._tokens = float(BURST)
        self._filled_at = seconds()
        self._untold = 0

    def refused(self, *, device: str, what: str, reason: str) -> None:
        """`device` as claimed: kept only where the registry knows it. `reason` in our own words."""
        if not self._may_write():
            return
        with self._database.writing() as session:
            known = device if session.get(Device, device) is not None else ""
            record_refusal(session, device=known, what=what, reason=reason, now=self._clock())
        log.warning("%s refused%s: %s", what, f" for {known}" if known else "", reason)

    def tell(self) -> None:
        """The refusals since the last call that were not written, as one row and one line."""
        with self._lock:
            untold, self._untold = self._untold, 0
        if not untold:
            return
        reason = "more than are written one by one"
        with self._database.writing() as session:
            record_refusal(session, device="", what="strangers", reason=reason, now=self._clock(), count=untold)
        log.warning("%d more requests of strangers refused", untold)

    def _may_write(self) -> bool:
        with self._lock:
            now = self._seconds()
            self._tokens = min(float(BURST), self._tokens + (now - self._filled_at) * PER_MINUTE / 60.0)
            self._filled_at = now
            if self._tokens < 1.0:
                self._untold += 1
                return False
            self._tokens -= 1.0
            return True
