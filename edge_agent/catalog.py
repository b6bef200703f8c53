"""The catalog: which series there are, what state each is in, and what had to be set aside.

Reads and writes the tables series, instances, unreadable, quarantine and removals; the clock is the caller's.
Never opens an instance's pixels, never logs a UID: a series has a number of our own.
Source: states and the facts that make them true are the table below; file order PS3.4 Annex B (C-STORE is kept, then told).
"""

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from logging import getLogger
from pathlib import Path
from typing import NewType

from edge_agent import instances
from edge_agent.database import transaction
from edge_agent.instances import Header, HeaderError, Kept

log = getLogger(__name__)

SeriesNo = NewType("SeriesNo", int)

OTHER_CONTENT = "SOPInstanceUID came before with other content"


class State(StrEnum):
    RECEIVING = "receiving"  # instances are on disk; more may come
    DUE = "due"  # expected count there and association over, or nothing new for quiet_time_s
    READ = "read"  # a row in results holds the findings of this version
    REPORTED = "reported"  # the report files of this version are on disk and in the outbox
    FAILED = "failed"  # `reason` says why; the instances stay, a late instance tries again
    NOT_FOR_US = "not-for-us"  # no task of the network reads such images; `reason` says which


class Event(Enum):
    INSTANCE = auto()
    COMPLETE = auto()
    READ = auto()
    REPORTED = auto()
    FAILED = auto()
    NOT_FOR_US = auto()


TRANSITIONS: dict[tuple[State, Event], State] = {
    **{(state, Event.INSTANCE): State.RECEIVING for state in State},
    (State.RECEIVING, Event.COMPLETE): State.DUE,
    (State.DUE, Event.READ): State.READ,
    (State.DUE, Event.FAILED): State.FAILED,
    (State.DUE, Event.NOT_FOR_US): State.NOT_FOR_US,
    (State.READ, Event.REPORTED): State.REPORTED,
    (State.READ, Event.FAILED): State.FAILED,
}


class Outcome(StrEnum):
    CATALOGED = "cataloged"
    AGAIN = "again"  # the same bytes came before
    QUARANTINED = "quarantined"


@dataclass(frozen=True)
class Admission:
    outcome: Outcome
    series_no: SeriesNo | None = None
    reason: str = ""


@dataclass(frozen=True)
class SeriesRow:
    series_no: SeriesNo
    StudyInstanceUID: str
    SeriesInstanceUID: str
    Modality: str
    state: State
    version: int  # of the newest result; the next one is version + 1
    instance_count: int
    expected_count: int | None
    last_instance_at: float
    reason: str


@dataclass(frozen=True)
class QuarantineRow:
    quarantine_no: int
    path: str
    size: int
    reason: str
    calling_ae: str
    received_at: float


def add_instance(db: sqlite3.Connection, header: Header, kept: Kept, *, calling_ae: str, now: float) -> Admission:
    """Give a kept file its place: in a series, or in quarantine with the reason. Twice is once.

    A late instance re-opens its series, whatever became of it. Other bytes under a known UID take the place of a copy
    that could not be decoded; beside one that could, they are set aside.
    """
    with transaction(db):
        twin = db.execute("SELECT * FROM instances WHERE SOPInstanceUID = ?", (header.SOPInstanceUID,)).fetchone()
        series = db.execute("SELECT * FROM series WHERE SeriesInstanceUID = ?", (header.SeriesInstanceUID,)).fetchone()
        if twin and twin["sha256"] == kept.sha256:
            if series and _wants_again(db, series):  # sent again on purpose: tried again
                _touch(db, series, now)
            return Admission(Outcome.AGAIN, SeriesNo(twin["series_no"]))
        if twin and series and twin["series_no"] == series["series_no"] and _is_unreadable(db, header.SOPInstanceUID):
            _replace(db, twin, header, kept, calling_ae=calling_ae, now=now)
            _touch(db, series, now)
            return Admission(Outcome.CATALOGED, SeriesNo(series["series_no"]))
        if not twin and (not series or series["StudyInstanceUID"] == header.StudyInstanceUID):
            series_no = _reopen(db, series, header, now) if series else _insert_series(db, header, now)
            _insert_instance(db, series_no, header, kept, now)
            return Admission(Outcome.CATALOGED, series_no)
    if not twin:
        return quarantine(db, kept, "its series belongs to another study", calling_ae=calling_ae, now=now)
    return quarantine(db, kept, OTHER_CONTENT, calling_ae=calling_ae, now=now, rival_of=header.SOPInstanceUID)


def quarantine(
    db: sqlite3.Connection, kept: Kept, reason: str, *, calling_ae: str, now: float, rival_of: str = ""
) -> Admission:
    """List a kept file as set aside; the operator sees it in `edge-agent status`. `reason` holds no patient data.

    `rival_of` is the SOPInstanceUID of the stored copy whose place the file may take; see `offer_rivals`.
    """
    with transaction(db):
        if db.execute("SELECT 1 FROM quarantine WHERE path = ?", (kept.path,)).fetchone():
            return Admission(Outcome.AGAIN, reason=reason)
        _set_aside(db, kept, reason, calling_ae, now, rival_of)
    return Admission(Outcome.QUARANTINED, reason=reason)


def offer_rivals(db: sqlite3.Connection, data_dir: Path, now: float) -> None:
    """Copies that came while nobody knew that the stored one is unreadable take its place now, the newest first.

    What was replaced is no rival any more, so two unreadable copies do not change places for ever.
    """
    rivals = db.execute(
        "SELECT q.* FROM quarantine q JOIN unreadable u USING (SOPInstanceUID) ORDER BY quarantine_no DESC"
    ).fetchall()
    for row in rivals:
        kept = Kept(row["path"], row["size"], Path(row["path"]).stem)
        try:
            header = instances.read_file_header(data_dir / row["path"])
        except HeaderError as error:  # damaged or lost since it came
            log.warning("quarantine %d cannot replace an unreadable image: %s", row["quarantine_no"], error)
            continue
        add_instance(db, header, kept, calling_ae=row["calling_ae"], now=now)


def quarantined(db: sqlite3.Connection) -> list[QuarantineRow]:
    rows = db.execute(
        "SELECT quarantine_no, path, size, reason, calling_ae, received_at FROM quarantine ORDER BY quarantine_no"
    )
    return [QuarantineRow(**dict(row)) for row in rows]


def association_ended(db: sqlite3.Connection, last_instance_at: Mapping[SeriesNo, float]) -> None:
    """No more comes on this association, released or aborted; `last_instance_at`: when it brought each series' last.

    A series that another association is still feeding has a newer last instance and stays open.
    """
    with transaction(db):
        for series_no, at in last_instance_at.items():
            db.execute(
                "UPDATE series SET association_ended = 1 WHERE series_no = ? AND last_instance_at <= ?", (series_no, at)
            )


def next_due(db: sqlite3.Connection, now: float, *, quiet_time_s: float) -> SeriesRow | None:
    """The series that waits longest for being read, moved to DUE; the same one again until it is marked.

    Due at once when its association is over and the expected count is there, else after quiet_time_s without a new
    instance. A last instance from the future is a clock that was set back: it is not waited for.
    """
    row = db.execute(
        """
        SELECT * FROM series WHERE state = 'due' OR (state = 'receiving' AND (
            (association_ended = 1 AND instance_count >= expected_count) OR ABS(? - last_instance_at) >= ?))
        ORDER BY last_instance_at LIMIT 1
        """,
        (now, quiet_time_s),
    ).fetchone()
    if row is None:
        return None
    if row["state"] == State.RECEIVING:
        _move(db, row["series_no"], Event.COMPLETE)
    return series(db, row["series_no"])


def series(db: sqlite3.Connection, series_no: int) -> SeriesRow:
    row = db.execute("SELECT * FROM series WHERE series_no = ?", (series_no,)).fetchone()
    values = {name: row[name] for name in SeriesRow.__dataclass_fields__}
    return SeriesRow(**{**values, "state": State(row["state"])})


def mark_read(db: sqlite3.Connection, row: SeriesRow) -> int:
    """A result of `row` exists: its version is row.version + 1, which is given back.

    One statement each, so that the caller can put it into the transaction that writes the result.
    A series that a late instance re-opened meanwhile keeps RECEIVING and is read again.
    """
    db.execute("UPDATE series SET version = ? WHERE series_no = ?", (row.version + 1, row.series_no))
    _clear_unreadable(db, row.series_no)
    _move(db, row.series_no, Event.READ)
    return row.version + 1


def mark_reported(db: sqlite3.Connection, series_no: int) -> None:
    _move(db, series_no, Event.REPORTED)


def mark_failed(db: sqlite3.Connection, series_no: int, reason: str, unreadable: Sequence[str] = ()) -> None:
    """`reason` is for the operator and holds no patient data; `unreadable`: paths of instances that cannot be decoded."""
    with transaction(db):
        _fail(db, series_no, reason, unreadable)


def mark_missing(
    db: sqlite3.Connection, series_no: int, reason: str, paths: Sequence[Path], unreadable: Sequence[str]
) -> None:
    """An image was not there when the series was read: failed, unless all have come by now; then it stays DUE.

    Looked at in the transaction: a file is on the disk before it is cataloged, so its sender comes before or after.
    """
    with transaction(db):
        if not all(path.exists() for path in paths):
            _fail(db, series_no, reason, unreadable)


def mark_not_for_us(db: sqlite3.Connection, series_no: int, reason: str) -> None:
    _move(db, series_no, Event.NOT_FOR_US, reason)


def images_removed_at(db: sqlite3.Connection, series_no: int) -> float | None:
    """When the images of a series were old enough to go; None while they are here."""
    row = db.execute("SELECT removed_at FROM removals WHERE series_no = ?", (series_no,)).fetchone()
    return float(row["removed_at"]) if row else None


def repair(db: sqlite3.Connection, data_dir: Path, now: float) -> None:
    """What kill -9 can leave behind, made whole. Only before the port opens.

    Half-written files go (nobody was told), whole files without a row get one (their sender may have been told nothing;
    its repeat is then "again"), and no association is still open.
    """
    instances.make_folders(data_dir)
    unfinished = instances.remove_unfinished(data_dir)
    known = {row["path"] for row in db.execute("SELECT path FROM instances UNION SELECT path FROM quarantine")}
    orphans = [path for path in instances.all_files(data_dir) if str(path.relative_to(data_dir)) not in known]
    for path in orphans:
        kept = Kept(str(path.relative_to(data_dir)), path.stat().st_size, path.stem)
        try:
            add_instance(db, instances.read_file_header(path), kept, calling_ae="", now=now)
        except HeaderError as error:
            quarantine(db, kept, str(error), calling_ae="", now=now)
    offer_rivals(db, data_dir, now)
    db.execute("UPDATE series SET association_ended = 1 WHERE state = 'receiving'")
    if unfinished or orphans:
        log.info("start-up repair: %d unfinished files removed, %d files cataloged", unfinished, len(orphans))


def _insert_series(db: sqlite3.Connection, header: Header, now: float) -> SeriesNo:
    series_no = db.execute(
        """
        INSERT INTO series (StudyInstanceUID, SeriesInstanceUID, Modality, state, expected_count, instance_count,
                            first_instance_at, last_instance_at) VALUES (?, ?, ?, ?, ?, 1, ?, ?)
        """,
        (
            header.StudyInstanceUID,
            header.SeriesInstanceUID,
            header.Modality,
            State.RECEIVING,
            header.expected_count,
            now,
            now,
        ),
    ).lastrowid
    assert series_no is not None  # an INSERT has one
    log.info("series %d: new, %s", series_no, State.RECEIVING)
    return SeriesNo(series_no)


def _insert_instance(db: sqlite3.Connection, series_no: int, header: Header, kept: Kept, now: float) -> None:
    db.execute(
        "INSERT INTO instances VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            header.SOPInstanceUID,
            series_no,
            header.SOPClassUID,
            header.TransferSyntaxUID,
            kept.path,
            kept.size,
            kept.sha256,
            now,
        ),
    )


def _reopen(db: sqlite3.Connection, row: sqlite3.Row, header: Header, now: float) -> SeriesNo:
    """One more instance."""
    db.execute(
        """
        UPDATE series SET instance_count = instance_count + 1,
            expected_count = NULLIF(MAX(IFNULL(expected_count, 0), ?), 0) WHERE series_no = ?
        """,
        (header.expected_count or 0, row["series_no"]),
    )
    _touch(db, row, now)
    return SeriesNo(row["series_no"])


def _touch(db: sqlite3.Connection, row: sqlite3.Row, now: float) -> None:
    """Something came for the series: back to RECEIVING, with its association open and its images wanted."""
    series_no = row["series_no"]
    db.execute("UPDATE series SET last_instance_at = ?, association_ended = 0 WHERE series_no = ?", (now, series_no))
    db.execute("DELETE FROM removals WHERE series_no = ?", (series_no,))
    if row["state"] != State.RECEIVING:
        _move(db, series_no, Event.INSTANCE)


def _wants_again(db: sqlite3.Connection, row: sqlite3.Row) -> bool:
    """True where the same bytes are news: the series failed or its images were removed, and more of it may follow."""
    return row["state"] in (State.FAILED, State.RECEIVING) or images_removed_at(db, row["series_no"]) is not None


def _is_unreadable(db: sqlite3.Connection, SOPInstanceUID: str) -> bool:
    found = db.execute("SELECT 1 FROM unreadable WHERE SOPInstanceUID = ?", (SOPInstanceUID,)).fetchone()
    return found is not None


def _clear_unreadable(db: sqlite3.Connection, series_no: int) -> None:
    db.execute(
        "DELETE FROM unreadable WHERE SOPInstanceUID IN (SELECT SOPInstanceUID FROM instances WHERE series_no = ?)",
        (series_no,),
    )


def _replace(
    db: sqlite3.Connection, old: sqlite3.Row, header: Header, kept: Kept, *, calling_ae: str, now: float
) -> None:
    """Other bytes under the UID of an unreadable instance; the old ones are kept in quarantine."""
    for table in ("unreadable", "instances"):
        db.execute(f"DELETE FROM {table} WHERE SOPInstanceUID = ?", (header.SOPInstanceUID,))  # noqa: S608
    db.execute("DELETE FROM quarantine WHERE path = ?", (kept.path,))  # where it waited as a rival
    _insert_instance(db, old["series_no"], header, kept, now)
    log.info("series %d: an image that could not be decoded is replaced", old["series_no"])
    reason = "could not be decoded; another copy took its place"
    _set_aside(db, Kept(old["path"], old["size"], old["sha256"]), reason, calling_ae, now, "")


def _set_aside(db: sqlite3.Connection, kept: Kept, reason: str, calling_ae: str, now: float, rival_of: str) -> None:
    number = db.execute(
        "INSERT INTO quarantine (path, size, reason, calling_ae, received_at, SOPInstanceUID) VALUES (?, ?, ?, ?, ?, ?)",
        (kept.path, kept.size, reason, calling_ae, now, rival_of),
    ).lastrowid
    log.warning("quarantine %d: %s", number, reason)


def _fail(db: sqlite3.Connection, series_no: int, reason: str, unreadable: Sequence[str]) -> None:
    _clear_unreadable(db, series_no)
    db.executemany(
        "INSERT INTO unreadable SELECT SOPInstanceUID FROM instances WHERE series_no = ? AND path = ?",
        [(series_no, path) for path in unreadable],
    )
    _move(db, series_no, Event.FAILED, reason)


def _move(db: sqlite3.Connection, series_no: int, event: Event, reason: str = "") -> None:
    """Take the series along TRANSITIONS; an event that no longer fits (a late instance came first) changes nothing."""
    state = State(db.execute("SELECT state FROM series WHERE series_no = ?", (series_no,)).fetchone()["state"])
    after = TRANSITIONS.get((state, event))
    if after is None:
        return
    moved = db.execute(
        "UPDATE series SET state = ?, reason = ? WHERE series_no = ? AND state = ?", (after, reason, series_no, state)
    ).rowcount
    if moved:
        log.info("series %d: %s -> %s%s", series_no, state, after, f" ({reason})" if reason else "")
