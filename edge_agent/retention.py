"""Retention: images of old series make room once their results are in the PACS and learning needs them no more.

Reads series, results, outbox, reviews and examples; writes rows of `removals` and deletes instance files.
Never touches a series that is not read and delivered; rows, findings, reports and training arrays stay. An example made
for another input size than the network of the day cannot be made again once the images are gone, and is left out.
"""

import json
import logging
import math
import sqlite3
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from edge_agent import database
from edge_agent.config import Config
from edge_agent.database import transaction
from edge_agent.evaluation import MAX_HELDOUT
from edge_agent.learn import EXAMPLES, NEWEST_REVIEWS
from fleet_link.errors import SiteError
from fleet_link.files import sync_folder

log = logging.getLogger(__name__)

DAY_S = 86400.0
HELDOUT = "heldout"
LOOK_S = 3600.0  # between two looks for series that have become old
RETRY_S = 60.0  # after the disk refused
MAX_SET_S = 60.0  # in the hour between two looks; a clock that NTP steers stays far below it
EARLIEST = 1_767_225_600  # 2026-01-01, Unix seconds: what came before came while the clock was wrong
STUCK = "old images"  # name of the notice

# Read, every object of every version delivered, no verdict that has yet to become an example, and not among the
# held-out cases that judge a release from their images (releases.evaluate). A verdict that no example can be made of
# keeps its images.
_MAY_GO = f"""
    FROM series s JOIN results r ON r.series_no = s.series_no AND r.version = s.version
    WHERE s.state = 'reported' AND s.last_instance_at < ? AND s.last_instance_at >= {EARLIEST}
      AND r.result_no IN (SELECT result_no FROM outbox)
      AND s.series_no NOT IN (SELECT p.series_no FROM outbox o JOIN results p USING (result_no) WHERE o.state <> 'delivered')
      AND s.series_no NOT IN (SELECT series_no FROM removals)
      AND s.series_no NOT IN (SELECT series_no FROM ({NEWEST_REVIEWS}))
      AND s.series_no NOT IN
        (SELECT series_no FROM ({EXAMPLES} ORDER BY e.review_no DESC LIMIT {MAX_HELDOUT}))
"""  # noqa: S608


@dataclass(frozen=True)
class Removable:
    """What retention could make room of, were it to begin at once."""

    series: int
    bytes: int


def removable(db: sqlite3.Connection) -> Removable:
    """Whatever its age."""
    row = db.execute(
        "SELECT COUNT(DISTINCT series_no), COALESCE(SUM(size), 0) FROM instances"  # noqa: S608
        f" WHERE series_no IN (SELECT s.series_no {_MAY_GO})",
        (math.inf, HELDOUT),
    ).fetchone()
    return Removable(*row)


class Retention:
    """Owned by one thread."""

    def __init__(
        self, config: Config, clock: Callable[[], float], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._data_dir = config.box.data_dir
        self._keep_s = config.storage.keep_days * DAY_S
        self._clock = clock
        self._monotonic = monotonic
        self._looked_at = clock(), monotonic()  # the first look is LOOK_S after the start: by then the clock is right
        self._retry_at: dict[int, float] = {}  # by series whose files could not be deleted
        self._told: str | None = None  # None before anything was told

    def step(self, db: sqlite3.Connection) -> bool:
        """Mark what has become old, then delete the files of one marked series. False when there is nothing to do now.

        A series whose files the disk does not give up stays marked and is tried again after RETRY_S; the others go on.
        """
        self._look(db)
        moment = self._monotonic()
        self._retry_at = {series_no: at for series_no, at in self._retry_at.items() if moment < at}
        series_no = next_marked(db, but=self._retry_at)
        if series_no is None:
            if not self._retry_at:
                self._tell(db, "")
            return False
        try:
            remove(db, self._data_dir, series_no)
        except SiteError as error:
            self._retry_at[series_no] = moment + RETRY_S
            self._tell(db, f"{error}: {error.advice}")
            return False
        return True

    def _look(self, db: sqlite3.Connection) -> None:
        """Once an hour; not where the clock was set in that hour, for then nobody knows how old a series is."""
        now, moment = self._clock(), self._monotonic()
        passed_s = moment - self._looked_at[1]
        if not self._keep_s or passed_s < LOOK_S:
            return
        set_by_s = now - self._looked_at[0] - passed_s
        self._looked_at = now, moment
        if abs(set_by_s) > MAX_SET_S:
            log.warning("the clock was set by %.0f s: old images are looked for in an hour", set_by_s)
            return
        mark(db, now - self._keep_s, now)

    def _tell(self, db: sqlite3.Connection, trouble: str) -> None:
        """A notice for as long as some files cannot be deleted: the box reads all the same."""
        if trouble == self._told:
            return
        if trouble:
            log.error("%s", trouble)
            database.raise_alarm(db, STUCK, trouble, self._clock(), is_notice=True)
        else:
            database.end_alarm(db, STUCK)
        self._told = trouble


def mark(db: sqlite3.Connection, older_than: float, now: float) -> None:
    """The first half: from here on the images count as removed, whatever happens."""
    with transaction(db):
        count = db.execute(
            f"INSERT INTO removals (series_no, removed_at) SELECT s.series_no, ? {_MAY_GO}", (now, older_than, HELDOUT)
        ).rowcount
    if count:
        log.info("images of %d series are older than storage.keep_days and go", count)


def next_marked(db: sqlite3.Connection, but: Collection[int] = ()) -> int | None:
    """A series whose files are still to be deleted."""
    row = db.execute(
        "SELECT series_no FROM removals WHERE done = 0 AND series_no NOT IN (SELECT value FROM json_each(?)) LIMIT 1",
        (json.dumps(list(but)),),
    ).fetchone()
    return int(row["series_no"]) if row else None


def remove(db: sqlite3.Connection, data_dir: Path, series_no: int) -> None:
    """The second half, for one marked series; twice is once.

    In one transaction: a sender that brings the same image again is catalogued before or after it (receive.py).
    Raises SiteError when the disk refuses; the series stays marked.
    """
    with transaction(db):
        if not db.execute("UPDATE removals SET done = 1 WHERE series_no = ?", (series_no,)).rowcount:
            return  # wanted again
        paths = db.execute("SELECT path FROM instances WHERE series_no = ?", (series_no,)).fetchall()
        _delete([data_dir / path["path"] for path in paths])
    log.info("series %d: images removed", series_no)


def _delete(paths: list[Path]) -> None:
    try:
        for path in paths:
            path.unlink(missing_ok=True)
        for folder in {path.parent for path in paths if path.parent.is_dir()}:
            sync_folder(folder)
    except OSError as error:
        raise SiteError(
            f"old images cannot be removed: {error.strerror}", advice="check the disk of data_dir"
        ) from error
