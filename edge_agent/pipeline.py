"""A study becomes a diagnosis: the box's main path from a complete series to report files in the outbox.

Reads catalog rows and instance files; writes findings, report files and outbox rows; removes old images in between.
Never talks to a scanner, the PACS or the hub: each hand-over is a row, and every step may run twice.
Source: ARCHITECTURE.md, "Five paths".
"""

import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from edge_agent import catalog, database, decode, delivery, drift, findings, instances, report
from edge_agent.bundles import Active, ActiveBundle
from edge_agent.catalog import SeriesRow
from edge_agent.config import Config
from edge_agent.decode import Decoded, DecodeError, MissingImageError, NotForUsError
from edge_agent.findings import Findings
from edge_agent.retention import Retention
from edge_agent.site_calibration import SiteCalibration
from fleet_link.errors import SiteError
from models.adaptive import Calibration, bundled
from models.spec import TaskSpec

log = logging.getLogger(__name__)

IDLE_S = 0.05  # between two looks at the catalog; a tenth of what a series takes
MAX_ATTEMPTS = 3
ATTEMPT = "attempt_at_series_"  # counter, before each reading and gone after it
RETRY_S = 5.0  # after the disk refused: the series stays due
PROVIDER = "provider"  # name of the notice


class Pipeline:
    """Owned by one thread. Reads one series at a time, in the order in which they became complete."""

    def __init__(self, config: Config, holder: ActiveBundle, clock: Callable[[], float]) -> None:
        self._config = config
        self._holder = holder
        self._clock = clock
        self._data_dir = config.box.data_dir
        self._retention = Retention(config, clock)
        self._site_calibration = SiteCalibration()
        self._watched = ""  # digest of the bundle whose drift the notices tell
        self._told_trouble: str | None = None  # of the reader; None before anything was told

    def run(self, stop: Event) -> None:
        db = database.connect(self._data_dir)
        self.report_unreported(db)
        while not stop.is_set():
            try:
                self._tell_trouble(db)
                self._watch_drift(db)
                worked = self.step(db)
                removed = self._retention.step(db)
                idle_s = 0.0 if worked or removed else IDLE_S
            except SiteError as error:
                log.error("the disk refuses, trying again: %s (%s)", error, error.advice)
                idle_s = RETRY_S
            stop.wait(idle_s)
        db.close()

    def step(self, db: sqlite3.Connection) -> bool:
        """Take one series all the way. False when none is due.

        Raises SiteError when this box cannot keep what it found; the series stays where it was.
        """
        series = catalog.next_due(db, self._clock(), quiet_time_s=self._config.dicom.quiet_time_s)
        if series is None:
            return False
        attempt = f"{ATTEMPT}{series.series_no}"
        database.count(db, attempt)
        try:
            if database.counter(db, attempt) > MAX_ATTEMPTS:  # a segfault or the out-of-memory killer raises nothing
                catalog.mark_failed(db, series.series_no, f"reading it has stopped the box {MAX_ATTEMPTS} times")
            else:
                with _one_odd_series(db, series.series_no):
                    self._read(db, series)
        except (SiteError, sqlite3.OperationalError):  # the disk's trouble: the series is not to blame
            database.forget(db, attempt)
            raise
        database.forget(db, attempt)
        return True

    def _read(self, db: sqlite3.Connection, series: SeriesRow) -> None:
        paths = instances.open(db, self._data_dir, series.series_no)
        try:
            decoded = decode.to_volume(paths)
            active = self._holder.current
            found = active.reader.read(decoded.volume, self._calibrate(db, active))
        except NotForUsError as error:
            catalog.mark_not_for_us(db, series.series_no, str(error))
        except DecodeError as error:
            unreadable = [str(path.relative_to(self._data_dir)) for path in decode.unreadable(paths)]
            if isinstance(error, MissingImageError):
                catalog.mark_missing(db, series.series_no, str(error), paths, unreadable)
            else:
                catalog.mark_failed(db, series.series_no, str(error), unreadable)
            catalog.offer_rivals(db, self._data_dir, self._clock())
        except SiteError as error:
            catalog.mark_failed(db, series.series_no, str(error))
        else:
            result_no = keep_result(db, self._data_dir, series, found, active)
            self._report(db, result_no, series.series_no, series.version + 1, found, decoded)
            drift.watch(db, active.reader.bundle, self._clock())

    def _calibrate(self, db: sqlite3.Connection, active: Active) -> Callable[[TaskSpec], Calibration]:
        """By what a task of the bundle in use is judged."""
        if not self._config.inference.adapt:
            return bundled
        return lambda task: self._site_calibration.of(db, active.reader.bundle, task)

    def _watch_drift(self, db: sqlite3.Connection) -> None:
        """Of a bundle that just came into use; later each result does it."""
        bundle = self._holder.current.reader.bundle
        if bundle.digest != self._watched:
            drift.watch(db, bundle, self._clock())
            self._watched = bundle.digest

    def _tell_trouble(self, db: sqlite3.Connection) -> None:
        """A notice for as long as the reader in use does not run where it should: the fallback reads as well."""
        trouble = self._holder.current.reader.trouble
        if trouble == self._told_trouble:
            return
        if trouble:
            database.raise_alarm(db, PROVIDER, trouble, self._clock(), is_notice=True)
        else:
            database.end_alarm(db, PROVIDER)
        self._told_trouble = trouble

    def report_unreported(self, db: sqlite3.Connection) -> None:
        """At start: series whose findings are kept and whose report is not (killed between the two)."""
        rows = db.execute(
            "SELECT r.* FROM series s JOIN results r ON r.series_no = s.series_no AND r.version = s.version WHERE s.state = ?",
            (catalog.State.READ,),
        ).fetchall()
        for row in rows:
            with _one_odd_series(db, row["series_no"]):
                self._report_again(db, row)

    def _report_again(self, db: sqlite3.Connection, row: sqlite3.Row) -> None:
        try:
            found = findings.restore(row["findings"], self._data_dir / row["maps_path"])
            decoded = decode.to_volume(instances.open(db, self._data_dir, row["series_no"]))
        except (SiteError, OSError, ValueError, KeyError) as error:  # its files were damaged meanwhile
            catalog.mark_failed(db, row["series_no"], f"its result cannot be read again: {type(error).__name__}")
            return
        self._report(db, row["result_no"], row["series_no"], row["version"], found, decoded)

    def _report(
        self, db: sqlite3.Connection, result_no: int, series_no: int, version: int, found: Findings, decoded: Decoded
    ) -> None:
        """Files first, then their outbox rows and the series' state in one transaction."""
        try:
            files = report.write(
                found,
                decoded,
                self._data_dir / "reports",
                series_no=series_no,
                version=version,
                institution=self._config.box.site,
            )
        except SiteError as error:
            catalog.mark_failed(db, series_no, str(error))
            return
        with database.transaction(db):
            if self._config.pacs.enabled:
                delivery.enqueue(db, result_no, files, self._data_dir, self._clock())
            catalog.mark_reported(db, series_no)


@contextmanager
def _one_odd_series(db: sqlite3.Connection, series_no: int) -> Iterator[None]:
    """Must not stop the box, whatever our code makes of it. The disk's trouble and the database's go on to the loop."""
    try:
        yield
    except (SiteError, sqlite3.Error):
        raise
    except Exception as error:  # a main loop
        log.exception("series %d: a defect in this software", series_no)
        catalog.mark_failed(db, series_no, f"a defect in this software: {type(error).__name__}")


def keep_result(db: sqlite3.Connection, data_dir: Path, series: SeriesRow, found: Findings, by: Active) -> int:
    """The arrays first, then the row with the series' state in one transaction. Gives result_no."""
    maps_path = f"maps/{series.series_no}-{series.version + 1}.npz"
    findings.write_maps(found, data_dir / maps_path)
    with database.transaction(db):
        version = catalog.mark_read(db, series)
        result_no = db.execute(
            """
            INSERT INTO results (series_no, version, bundle_digest, release_version, provider, findings, maps_path,
                                 abstained, last_instance_at, read_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
            """,
            (
                series.series_no,
                version,
                found.bundle_digest,
                by.release_version,
                found.provider,
                findings.to_json(found),
                maps_path,
                found.abstained,
                series.last_instance_at,
                found.read_at,
            ),
        ).lastrowid
    log.info("series %d: version %d read%s", series.series_no, version, ", abstained" if found.abstained else "")
    assert result_no is not None  # an INSERT has one
    return result_no
