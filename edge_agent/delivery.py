"""Delivery: the durable outbox of results, emptied into the PACS for as long as it takes.

Reads and writes rows of `outbox`; sends through pacs.PacsSender.
Never loses a result: one that the PACS refuses for good is kept and listed with the reason.
Source: ARCHITECTURE.md, "DICOM side"; IHE Radiology, AI Results profile.
"""

import random
import sqlite3
from collections.abc import Callable, Iterable
from logging import getLogger
from pathlib import Path
from threading import Event

from edge_agent.config import Config
from edge_agent.database import connect
from edge_agent.pacs import Outcome, PacsAwayError, PacsSender
from edge_agent.report import ReportFile

log = getLogger(__name__)

POLL_S = 0.05
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0

_DUE = """
SELECT o.item_no, o.kind, o.path, o.attempts, r.series_no
FROM outbox o JOIN results r ON r.result_no = o.result_no
WHERE o.state = 'pending' AND o.next_try_at <= ? ORDER BY o.item_no LIMIT 1
"""


def enqueue(db: sqlite3.Connection, result_no: int, files: Iterable[ReportFile], data_dir: Path, now: float) -> None:
    """Put a result's files into the outbox; one that is there already stays as it is."""
    db.executemany(
        "INSERT INTO outbox (result_no, kind, SOPInstanceUID, path, next_try_at) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT(SOPInstanceUID) DO NOTHING",
        [(result_no, file.kind, file.SOPInstanceUID, str(file.path.relative_to(data_dir)), now) for file in files],
    )


def mark_delivered(db: sqlite3.Connection, item_no: int, now: float, reservation: str = "") -> None:
    """The PACS has the object; `reservation` is the warning that it answered with, if any."""
    db.execute(
        "UPDATE outbox SET state = 'delivered', attempts = attempts + 1, delivered_at = ?, last_error = ? WHERE item_no = ?",
        (now, reservation, item_no),
    )


def mark_refused(db: sqlite3.Connection, item_no: int, reason: str) -> None:
    db.execute(
        "UPDATE outbox SET state = 'refused', attempts = attempts + 1, last_error = ? WHERE item_no = ?",
        (reason, item_no),
    )


def postpone(db: sqlite3.Connection, item_no: int, reason: str, next_try_at: float) -> None:
    db.execute(
        "UPDATE outbox SET attempts = attempts + 1, last_error = ?, next_try_at = ? WHERE item_no = ?",
        (reason, next_try_at, item_no),
    )


def retry_refused(db: sqlite3.Connection, now: float) -> int:
    """After the PACS was put right: try every refused object again. Gives how many."""
    return db.execute("UPDATE outbox SET state = 'pending', next_try_at = ? WHERE state = 'refused'", (now,)).rowcount


def wait_s(attempts: int, jitter: float) -> float:
    """Doubling from FIRST_WAIT_S to LONGEST_WAIT_S; `jitter` of 0..1 takes off up to half, so that boxes do not march in step."""
    full_s = min(FIRST_WAIT_S * 2.0 ** min(attempts, 16), LONGEST_WAIT_S)
    return full_s * (1.0 - jitter / 2.0)


class Delivery:
    """Owned by one thread."""

    def __init__(self, config: Config, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._sender = PacsSender(config.pacs)
        self._random = random.SystemRandom()
        self._away = 0  # failed attempts to reach the PACS since it last answered
        self._away_until = 0.0

    def run(self, stop: Event) -> None:
        db = connect(self._config.box.data_dir)
        try:
            while not stop.is_set():
                if not self.step(db):
                    self._sender.release_idle(self._clock())
                    stop.wait(POLL_S)
        finally:
            self._sender.close()
            db.close()

    def step(self, db: sqlite3.Connection) -> bool:
        """Try the oldest object that is due. False when there is nothing to do now."""
        now = self._clock()
        item = db.execute(_DUE, (now,)).fetchone() if now >= self._away_until else None
        if item is None:
            return False
        try:
            answer = self._sender.store(self._config.box.data_dir / item["path"], now)
        except PacsAwayError as error:
            self._pacs_is_away(db, item, error)
            return False
        self._pacs_answers()
        if answer.outcome is Outcome.DELIVERED:
            mark_delivered(db, item["item_no"], self._clock(), answer.text)
            log.info("series %d: %s delivered", item["series_no"], item["kind"])
        elif answer.outcome is Outcome.REFUSED:
            mark_refused(db, item["item_no"], answer.text)
            log.error("series %d: the PACS refused the %s: %s", item["series_no"], item["kind"], answer.text)
        else:
            postpone(db, item["item_no"], answer.text, now + wait_s(item["attempts"], self._random.random()))
            log.warning("series %d: %s later: %s", item["series_no"], item["kind"], answer.text)
        return True

    def _pacs_is_away(self, db: sqlite3.Connection, item: sqlite3.Row, error: PacsAwayError) -> None:
        """Nothing is tried until the wait is over; every object that waits shows why.

        The object on its way lets others go first next time: it may be the one that the PACS breaks off at.
        """
        self._away_until = self._clock() + wait_s(self._away, self._random.random())
        self._away += 1
        db.execute("UPDATE outbox SET last_error = ? WHERE state = 'pending'", (str(error),))
        next_try_at = self._away_until + wait_s(item["attempts"], self._random.random())
        postpone(db, item["item_no"], str(error), next_try_at)
        if self._away == 1:
            log.warning("results wait: %s (%s)", error, error.advice)

    def _pacs_answers(self) -> None:
        if self._away:
            log.info("the PACS answers again after %d attempts", self._away)
        self._away = 0
        self._away_until = 0.0
