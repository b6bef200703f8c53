"""Retention: images of old series make room once their results are in the PACS and learning needs them no more.

Reads series, results, outbox, reviews and examples; writes rows of `removals` and deletes instance files.
Never touches a series that is not read and delivered; rows, findings, reports and training arrays stay.
"""

import logging
import math
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_agent.config import Config
from edge_agent.database import transaction
from edge_agent.learn import EXAMPLES, NEWEST_REVIEWS
from edge_agent.releases import MAX_HELDOUT
from fleet_link.errors import SiteError
from fleet_link.files import sync_folder

log = logging.getLogger(__name__)

DAY_S = 86400.0
HELDOUT = "heldout"
LOOK_S = 3600.0  # between two looks for series that have become old

# Read, every object of every version delivered, no verdict that has yet to become an example, and not among the
# held-out cases that judge a release from their images (releases.evaluate).
_MAY_GO = f"""
    FROM series s JOIN results r ON r.series_no = s.series_no AND r.version = s.version
    WHERE s.state = 'reported' AND s.last_instance_at < ?
      AND r.result_no IN (SELECT result_no FROM outbox)
      AND s.series_no NOT IN (SELECT p.series_no FROM outbox o JOIN results p USING (result_no) WHERE o.state <> 'delivered')
      AND s.series_no NOT IN (SELECT series_no FROM removals)
      AND s.series_no NOT IN (SELECT series_no FROM ({NEWEST_REVIEWS}))
      AND s.series_no NOT IN
        (SELECT series_no FROM ({EXAMPLES} ORDER BY e.review_no DESC LIMIT {MAX_HELDOUT}))
"""  # noqa: S608


@dataclass(frozen=True)
class Removable:
    """What a smaller storage.keep_days could make room of."""

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

    def __init__(self, config: Config, clock: Callable[[], float]) -> None:
        self._data_dir = config.box.data_dir
        self._keep_s = config.storage.keep_days * DAY_S
        self._clock = clock
        self._looked_at = 0.0

    def step(self, db: sqlite3.Connection) -> bool:
        """Mark what has become old, then delete the files of one marked series. False when there is nothing to do now.

        Raises SiteError when the disk refuses; the series stays marked and is tried again.
        """
        now = self._clock()
        if self._keep_s and abs(now - self._looked_at) >= LOOK_S:
            self._looked_at = now
            mark(db, now - self._keep_s, now)
        return remove_next(db, self._data_dir)


def mark(db: sqlite3.Connection, older_than: float, now: float) -> None:
    """The first half: from here on the images count as removed, whatever happens."""
    with transaction(db):
        count = db.execute(
            f"INSERT INTO removals (series_no, removed_at) SELECT s.series_no, ? {_MAY_GO}", (now, older_than, HELDOUT)
        ).rowcount
    if count:
        log.info("images of %d series are older than storage.keep_days and go", count)


def remove_next(db: sqlite3.Connection, data_dir: Path) -> bool:
    """The second half, for one series; twice is once. False when none is marked.

    In one transaction: a sender that brings the same image again is catalogued before or after it (receive.py).
    """
    row = db.execute("SELECT series_no FROM removals WHERE done = 0 LIMIT 1").fetchone()
    if row is None:
        return False
    series_no = row["series_no"]
    with transaction(db):
        if db.execute("UPDATE removals SET done = 1 WHERE series_no = ?", (series_no,)).rowcount:  # still unwanted
            paths = db.execute("SELECT path FROM instances WHERE series_no = ?", (series_no,)).fetchall()
            _delete([data_dir / path["path"] for path in paths])
    log.info("series %d: images removed", series_no)
    return True


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
