"""The box's database: one SQLite file, WAL, every commit on disk.

Reads and writes `box.db` in data_dir; the tables are in schema.sql.
Never shared between threads: each thread opens its own connection.
Source: SQLite documentation, "Write-Ahead Logging" and PRAGMA synchronous.
"""

import sqlite3
from importlib.resources import files
from pathlib import Path

from fleet_link.errors import SiteError

SCHEMA_VERSION = 1


def connect(data_dir: Path) -> sqlite3.Connection:
    """Open (and on first use create) the database. Autocommit; group statements with `with transaction(db):`.

    Raises SiteError when the file is from a newer software version.
    """
    db = sqlite3.connect(data_dir / "box.db", isolation_level=None, timeout=30.0)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA foreign_keys=ON")
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > SCHEMA_VERSION:
        raise SiteError(
            f"box.db has schema {version}, this software knows {SCHEMA_VERSION}",
            advice="install the software version that wrote it, or a newer one",
        )
    if version < SCHEMA_VERSION:
        db.executescript(files("edge_agent").joinpath("schema.sql").read_text("utf-8"))
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    return db


class transaction:  # noqa: N801 - reads as a statement: `with transaction(db):`
    """BEGIN IMMEDIATE … COMMIT, ROLLBACK on any exception."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> sqlite3.Connection:
        self._db.execute("BEGIN IMMEDIATE")
        return self._db

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")


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
