"""The box's database: one SQLite file, WAL, every commit on disk.

Reads and writes `box.db` in data_dir; the tables are in schema.sql.
Never shared between threads: each thread opens its own connection.
Source: SQLite documentation, "Write-Ahead Logging" and PRAGMA synchronous.
"""

import os
import re
import sqlite3
import stat
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from fleet_link.errors import SiteError

SCHEMA_VERSION = 5
# Counters; the second is to reach the first.
SECRETS_DELETED, SECRETS_FORGOTTEN = "secrets_deleted", "secrets_forgotten"
TIMEOUT_S = 30.0  # a thread waits so long for another's transaction
# What schema.sql cannot do to a table that is there already, by the version that it leads to.
CHANGES = {2: "ALTER TABLE quarantine ADD COLUMN SOPInstanceUID TEXT NOT NULL DEFAULT ''"}


def connect(data_dir: Path) -> sqlite3.Connection:
    """Open (and on first use create) the database. Autocommit; group statements with `with transaction(db):`.

    Raises SiteError when the file is from a newer software version.
    """
    path = data_dir / "box.db"
    with suppress(OSError):  # there already, or SQLite says better what is wrong
        os.mknod(path, stat.S_IFREG | 0o600)  # no descriptor: closing one would drop the locks of other connections
    db = sqlite3.connect(path, isolation_level=None, timeout=TIMEOUT_S)  # -wal and -shm get the mode of box.db
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA foreign_keys=ON")
    db.execute("PRAGMA secure_delete=ON")  # secrets of a masked round do not stay in free pages
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > SCHEMA_VERSION:
        raise SiteError(
            f"box.db has schema {version}, this software knows {SCHEMA_VERSION}",
            advice="install the software version that wrote it, or a newer one",
        )
    if version < SCHEMA_VERSION:
        _bring_up_to_date(db)
    return db


def _bring_up_to_date(db: sqlite3.Connection) -> None:
    """Whole or not at all; a second process that opens the database at the same time waits and finds it done."""
    with transaction(db):
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'quarantine'").fetchone():
            for number in sorted(CHANGES):
                if number > max(version, 1):  # a file with tables is of version 1 at least, even where it says 0
                    db.execute(CHANGES[number])
        schema = files("edge_agent").joinpath("schema.sql").read_text("utf-8")
        for statement in filter(str.strip, re.sub(r"--.*", "", schema).split(";")):
            db.execute(statement)  # executescript() would commit first
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


class transaction:  # noqa: N801 - reads as a statement: `with transaction(db):`
    """BEGIN IMMEDIATE … COMMIT, ROLLBACK on any exception."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> sqlite3.Connection:
        self._db.execute("BEGIN IMMEDIATE")
        return self._db

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")


def note_secret_deleted(db: sqlite3.Connection) -> None:
    """In the transaction that deletes it: there is something to forget from then on, also after a power cut."""
    count(db, SECRETS_DELETED)


def has_to_forget(db: sqlite3.Connection) -> bool:
    """Whether a deleted secret may still be in the write-ahead log."""
    return counter(db, SECRETS_FORGOTTEN) < counter(db, SECRETS_DELETED)


def forget_on_disk(db: sqlite3.Connection) -> bool:
    """What was deleted leaves the write-ahead log too. False where another thread reads or writes at this moment: try again.

    Nothing is waited for. Source: SQLite, PRAGMA wal_checkpoint: TRUNCATE ends with no reader left that needs the log.
    """
    deleted = counter(db, SECRETS_DELETED)
    db.execute("PRAGMA busy_timeout=0")
    try:
        is_busy = bool(db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
    finally:
        db.execute(f"PRAGMA busy_timeout={int(TIMEOUT_S * 1000)}")
    if is_busy:
        return False
    keep(db, SECRETS_FORGOTTEN, deleted)
    return True


def count(db: sqlite3.Connection, name: str, amount: int = 1) -> None:
    """Add to a counter that survives restarts."""
    db.execute(
        "INSERT INTO counters VALUES (?, ?) ON CONFLICT(name) DO UPDATE SET value = value + excluded.value",
        (name, amount),
    )


def keep(db: sqlite3.Connection, name: str, value: int) -> None:
    """Set a counter that is no sum: highest sequence, connected or not."""
    db.execute(
        "INSERT INTO counters VALUES (?, ?) ON CONFLICT(name) DO UPDATE SET value = excluded.value", (name, value)
    )


def counter(db: sqlite3.Connection, name: str) -> int:
    """0 where nothing was counted yet."""
    row = db.execute("SELECT value FROM counters WHERE name = ?", (name,)).fetchone()
    return int(row["value"]) if row else 0


def forget(db: sqlite3.Connection, name: str) -> None:
    db.execute("DELETE FROM counters WHERE name = ?", (name,))


def raise_alarm(db: sqlite3.Connection, name: str, text: str, now: float, *, is_notice: bool = False) -> None:
    """What somebody must look at, told to status and hub until it is ended. `text` holds no patient data.

    An alarm holds new releases back from this box, a notice does not.
    """
    db.execute(
        "INSERT INTO alarms (name, text, raised_at, is_notice) VALUES (?, ?, ?, ?) ON CONFLICT(name)"
        " DO UPDATE SET text = excluded.text, raised_at = excluded.raised_at, is_notice = excluded.is_notice",
        (name, text, now, is_notice),
    )


def end_alarm(db: sqlite3.Connection, name: str) -> None:
    db.execute("DELETE FROM alarms WHERE name = ?", (name,))


def alarms(db: sqlite3.Connection) -> list[str]:
    """Texts, the newest last."""
    return _texts(db, is_notice=False)


def notices(db: sqlite3.Connection) -> list[str]:
    """Texts, the newest last."""
    return _texts(db, is_notice=True)


def _texts(db: sqlite3.Connection, *, is_notice: bool) -> list[str]:
    rows = db.execute("SELECT text FROM alarms WHERE is_notice = ? ORDER BY raised_at, name", (is_notice,))
    return [str(row["text"]) for row in rows]
