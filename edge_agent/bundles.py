"""Which bundle reads: the one in use, the one before it, and what happens when a file is damaged.

Reads and writes rows of `bundles` and files in bundles/ of data_dir; holds the open Reader for the pipeline.
Never decides whether a new release is good enough (releases.py) and never talks to the hub.
Source: ARCHITECTURE.md, "Releases".
"""

import errno
import logging
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from edge_agent import database, ledger
from edge_agent.config import Config
from edge_agent.database import transaction
from edge_agent.infer import Reader
from fleet_link.errors import SiteError
from fleet_link.files import write_durably
from fleet_link.messages import ReleaseReport
from models import bundle as bundle_file
from models.errors import BundleError

log = logging.getLogger(__name__)

IN_USE = "the bundle in use"  # name of its alarm
STAND_IN = "stand_in_bundle"  # counter: the first 48 bits of the digest that reads while the one in use cannot
FROM_HUB_BEFORE = "a release of the hub before"


@dataclass(frozen=True)
class Active:
    reader: Reader
    digest: str
    release_version: int  # of this box's hub; 0: came with the software, or from a hub before


class ActiveBundle:
    """What the pipeline asks before each series. A swap is one reference assignment: no series is dropped or read twice."""

    def __init__(self, active: Active) -> None:
        self._current = active

    @property
    def current(self) -> Active:
        return self._current

    def swap(self, active: Active) -> None:
        self._current = active


def path_of(digest: str) -> str:
    """Relative to data_dir."""
    return f"bundles/{digest}.bundle"


def open_reader(config: Config, path: Path) -> Reader:
    """Raises BundleError when the file or its known answer is wrong; SiteError when this machine cannot open it now."""
    settings = config.inference
    try:
        engines = config.box.data_dir / "engines"
        return Reader.open(path, settings.providers, settings.threads, engines, settings.precision)
    except BundleError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno in (None, errno.ENOENT):
            raise
        raise SiteError(str(error), advice="check the disk and its rights") from error
    except (OSError, MemoryError) as error:
        raise SiteError(f"{path.name} cannot be opened: {error}", advice="free some disk and memory") from error


def base_file(db: sqlite3.Connection, data_dir: Path, digest: str) -> Path | None:
    """The file of a bundle that this box has used; None if it has not."""
    row = db.execute(
        "SELECT path FROM bundles WHERE bundle_digest = ? AND state IN ('active', 'previous')", (digest,)
    ).fetchone()
    path = data_dir / row["path"] if row else None
    return path if path and path.exists() else None


def file_that_reads(db: sqlite3.Connection, data_dir: Path) -> Path | None:
    """Of the bundle in use, or of what reads for it since the last start; None before the first one."""
    stand_in = database.counter(db, STAND_IN)
    if stand_in:
        return next(data_dir.glob(path_of(f"{stand_in:012x}*")), None)
    row = db.execute("SELECT path FROM bundles WHERE state = 'active'").fetchone()
    return data_dir / row["path"] if row else None


def is_coming(db: sqlite3.Connection, digest: str) -> bool:
    """True while the bundle is on its way or being checked."""
    found = db.execute(
        "SELECT 1 FROM bundles WHERE bundle_digest = ? AND state IN ('offered', 'fetched')", (digest,)
    ).fetchone()
    return found is not None


def load_active(db: sqlite3.Connection, config: Config, now: float) -> ActiveBundle:
    """At start: open the bundle in use; if it is damaged, the one before it; at last the shipped one.

    One that only cannot be opened now stays the one in use, and is tried again at the next start.
    Raises SiteError when not even the shipped bundle runs.
    """
    failed: list[tuple[sqlite3.Row, str]] = []
    waiting = False
    for row in _in_order(db):
        try:
            reader = open_reader(config, config.box.data_dir / row["path"])
            if reader.bundle.digest != row["bundle_digest"]:
                raise BundleError("the file has another digest than when it was activated")
        except BundleError as error:
            log.error("bundle %s cannot be used: %s", row["bundle_digest"][:12], error)
            failed.append((row, str(error)))
            continue
        except SiteError as error:
            _tell_waiting(db, error, now)
            waiting = True
            continue
        if _is_outdated(row, config):
            break
        if waiting:
            _keep_stand_in(db, row["bundle_digest"])
        else:
            _roll_back(db, failed, row, now)
        return ActiveBundle(Active(reader, row["bundle_digest"], row["release_version"]))
    shipped = _open_shipped(config)
    if waiting:
        _keep_stand_in(db, shipped.digest)
    else:
        _use_shipped(db, shipped, failed, now)
    return ActiveBundle(shipped)


def activate(db: sqlite3.Connection, digest: str, release_version: int, now: float) -> None:
    """The one in use becomes `previous`. Call inside a transaction."""
    db.execute(
        "UPDATE bundles SET state = 'previous', changed_at = ? WHERE state = 'active' AND bundle_digest <> ?",
        (now, digest),
    )
    _end_waiting(db)
    database.end_alarm(db, release_name(release_version))
    db.execute(
        "INSERT INTO bundles VALUES (?, ?, ?, 'active', '', ?) ON CONFLICT(bundle_digest) DO UPDATE"
        " SET reason = CASE state WHEN 'refused' THEN '' ELSE reason END, state = 'active',"
        " release_version = excluded.release_version, changed_at = excluded.changed_at",
        (digest, release_version, path_of(digest), now),
    )


def forget_releases(db: sqlite3.Connection, data_dir: Path) -> None:
    """The hub is another: what is here goes on reading, its numbers mean nothing any more. Call inside a transaction."""
    for row in db.execute("SELECT * FROM bundles WHERE state NOT IN ('active', 'previous')").fetchall():
        database.end_alarm(db, release_name(row["release_version"]))
        (data_dir / row["path"]).unlink(missing_ok=True)
    db.execute("DELETE FROM bundles WHERE state NOT IN ('active', 'previous')")
    db.execute("UPDATE bundles SET release_version = 0, reason = ? WHERE release_version > 0", (FROM_HUB_BEFORE,))


def refuse(db: sqlite3.Connection, digest: str, reason: str, now: float) -> None:
    """Call inside a transaction."""
    db.execute(
        "UPDATE bundles SET state = 'refused', reason = ?, changed_at = ? WHERE bundle_digest = ?",
        (reason[: ledger.MAX_REASON_CHARACTERS], now, digest),
    )


def release_name(release_version: int) -> str:
    """Of its alarm."""
    return f"release {release_version}"


def clear_out(db: sqlite3.Connection, data_dir: Path) -> None:
    """Files of refused bundles and of all but the newest `previous` one go, unless an open round still builds on them."""
    needed = {known.plan.base_digest for known in ledger.in_states(db, *ledger.OPEN_STATES)}
    kept_previous = 1
    for row in db.execute(
        "SELECT * FROM bundles WHERE state IN ('previous', 'refused') ORDER BY changed_at DESC"
    ).fetchall():
        if row["bundle_digest"] in needed:
            continue
        if row["state"] == "previous" and kept_previous:
            kept_previous -= 1
            continue
        (data_dir / row["path"]).unlink(missing_ok=True)
        if row["state"] == "previous":
            db.execute("DELETE FROM bundles WHERE bundle_digest = ?", (row["bundle_digest"],))


def _in_order(db: sqlite3.Connection) -> list[sqlite3.Row]:
    return db.execute(
        "SELECT * FROM bundles WHERE state IN ('active', 'previous') ORDER BY state = 'previous', changed_at DESC"
    ).fetchall()


def _tell_waiting(db: sqlite3.Connection, error: SiteError, now: float) -> None:
    text = f"{IN_USE} cannot be opened: {error}; another one reads; restart edge-agent to try it again"
    log.error("%s (%s)", text, error.advice)
    database.raise_alarm(db, IN_USE, text, now)


def _keep_stand_in(db: sqlite3.Connection, digest: str) -> None:
    database.keep(db, STAND_IN, int(digest[:12], 16))


def _end_waiting(db: sqlite3.Connection) -> None:
    database.end_alarm(db, IN_USE)
    database.forget(db, STAND_IN)


def _shipped(config: Config) -> Path:
    return config.inference.bundle or bundle_file.SHIPPED


def _is_outdated(row: sqlite3.Row, config: Config) -> bool:
    """A box that never had a release follows the bundle of its software or its configuration."""
    never_had = row["release_version"] == 0 and row["reason"] != FROM_HUB_BEFORE
    return bool(never_had and row["bundle_digest"] != _digest(_shipped(config)))


def _open_shipped(config: Config) -> Active:
    source = _shipped(config)
    digest = _digest(source)
    path = config.box.data_dir / path_of(digest)
    write_durably(path, source.read_bytes(), mode=0o644)
    try:
        reader = open_reader(config, path)
    except BundleError as error:
        raise SiteError(f"the bundle {source.name} cannot be used: {error}", advice=error.advice) from error
    return Active(reader, digest, 0)


def _use_shipped(db: sqlite3.Connection, shipped: Active, failed: list[tuple[sqlite3.Row, str]], now: float) -> None:
    with transaction(db):
        for row, reason in failed:
            _report_rolled_back(db, row, reason, now)
        activate(db, shipped.digest, 0, now)
    log.info("bundle %s is in use, the one that came with the software or its configuration", shipped.digest[:12])


def _roll_back(db: sqlite3.Connection, failed: list[tuple[sqlite3.Row, str]], to: sqlite3.Row, now: float) -> None:
    _end_waiting(db)
    if not failed:
        return
    with transaction(db):
        for row, reason in failed:
            _report_rolled_back(db, row, reason, now)
        activate(db, to["bundle_digest"], to["release_version"], now)
    log.warning("rolled back to bundle %s", to["bundle_digest"][:12])


def _report_rolled_back(db: sqlite3.Connection, row: sqlite3.Row, reason: str, now: float) -> None:
    refuse(db, row["bundle_digest"], reason, now)
    if row["release_version"]:
        report(db, ReleaseReport(
            message_id=ledger.message_id("rolled-back", row["bundle_digest"], now),
            release_version=row["release_version"],
            bundle_digest=row["bundle_digest"],
            outcome="rolled-back",
            reason=reason[: ledger.MAX_REASON_CHARACTERS],
        ), now)  # fmt: skip


def report(db: sqlite3.Connection, message: ReleaseReport, now: float) -> None:
    """Into the durable outbox."""
    ledger.enqueue(db, message, now)


def _digest(path: Path) -> str:
    try:
        return bundle_file.file_digest(path)
    except OSError as error:
        raise SiteError(f"the bundle {path} cannot be read: {error}", advice="check inference.bundle") from error
