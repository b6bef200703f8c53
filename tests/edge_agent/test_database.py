"""The database file: private from its first moment, brought up to date whole, alarms that stay until they end."""

import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from edge_agent import catalog, database, instances
from fleet_link.errors import SiteError


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("open_umask")
def test_the_database_is_private_whatever_the_umask(tmp_path: Path) -> None:
    db = database.connect(tmp_path)
    database.count(db, "x")
    assert {path.name: _mode(path) for path in tmp_path.iterdir()} == {
        "box.db": 0o600,
        "box.db-wal": 0o600,
        "box.db-shm": 0o600,
    }
    db.close()


@pytest.mark.usefixtures("open_umask")
def test_folders_of_images_are_private_whatever_the_umask(tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir(mode=0o755)  # of an older version
    db = database.connect(tmp_path)
    catalog.repair(db, tmp_path, now=0.0)
    kept = instances.keep(tmp_path, (b"x",), min_free_bytes=0)
    folders = [tmp_path / name for name in ("instances", "maps", "reports", "examples", "learning")]
    assert {_mode(folder) for folder in [*folders, (tmp_path / kept.path).parent]} == {0o700}
    db.close()


def test_a_folder_that_is_not_there_is_said_by_sqlite(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        database.connect(tmp_path / "nowhere")


@pytest.mark.parametrize("said", [0, 1])
def test_a_database_of_version_1_is_brought_up_to_date_and_keeps_its_rows(tmp_path: Path, said: int) -> None:
    database.connect(tmp_path).close()
    old = sqlite3.connect(tmp_path / "box.db")
    for table in ("removals", "unreadable", "alarms"):
        old.execute(f"DROP TABLE {table}")
    old.execute("ALTER TABLE quarantine DROP COLUMN SOPInstanceUID")
    old.execute("INSERT INTO quarantine VALUES (1, 'a.dcm', 1, 'why', 'CT1', 0)")
    old.execute(f"PRAGMA user_version={said}")
    old.commit()
    old.close()
    for _ in range(2):
        db = database.connect(tmp_path)
        assert [dict(row)["SOPInstanceUID"] for row in db.execute("SELECT * FROM quarantine")] == [""]
        assert database.alarms(db) == []
        assert catalog.images_removed_at(db, 1) is None
        db.close()


def test_a_database_of_version_2_gets_what_finds_a_bundle_s_results(tmp_path: Path) -> None:
    old = database.connect(tmp_path)
    old.execute("DROP INDEX results_bundle")
    old.execute("PRAGMA user_version=2")
    old.close()
    db = database.connect(tmp_path)
    plan = db.execute("EXPLAIN QUERY PLAN SELECT * FROM results WHERE bundle_digest = '' ORDER BY result_no DESC")
    assert [row["detail"] for row in plan] == ["SEARCH results USING INDEX results_bundle (bundle_digest=?)"]
    db.close()


def test_a_database_of_version_3_gets_room_for_masked_rounds(tmp_path: Path) -> None:
    old = database.connect(tmp_path)
    old.execute("DROP TABLE masked_parts")
    old.execute("PRAGMA user_version=3")
    old.close()
    for _ in range(2):
        db = database.connect(tmp_path)
        assert list(db.execute("SELECT * FROM masked_parts")) == []
        db.close()


def forget(db: sqlite3.Connection, deletion: str) -> None:
    with database.transaction(db):
        db.execute(deletion)
        database.note_secret_deleted(db)


def test_what_is_forgotten_on_disk_is_in_none_of_its_files(tmp_path: Path) -> None:
    db = database.connect(tmp_path)
    secret = os.urandom(40)
    db.execute("INSERT INTO link_outbox VALUES ('a', ?, 0)", (secret,))
    assert any(secret in path.read_bytes() for path in tmp_path.iterdir())
    forget(db, "DELETE FROM link_outbox")
    assert database.forget_on_disk(db)
    assert not any(secret in path.read_bytes() for path in tmp_path.iterdir())
    db.close()


def test_a_secret_that_somebody_still_reads_is_forgotten_once_he_has_read(tmp_path: Path) -> None:
    """Nobody waits for him, what is deleted meanwhile goes too, and a deletion of later begins anew."""
    db, reader = database.connect(tmp_path), database.connect(tmp_path)
    secrets = [os.urandom(40) for _ in range(3)]

    def on_disk() -> list[bool]:
        files = [path.read_bytes() for path in tmp_path.iterdir()]
        return [any(secret in content for content in files) for secret in secrets]

    for number, secret in enumerate(secrets):
        db.execute("INSERT INTO link_outbox VALUES (?, ?, 0)", (str(number), secret))
    reader.execute("BEGIN")
    assert len(reader.execute("SELECT * FROM link_outbox").fetchall()) == 3
    for number in (0, 1):
        forget(db, f"DELETE FROM link_outbox WHERE message_id = '{number}'")
        assert not database.forget_on_disk(db)
    assert on_disk() == [True, True, True]
    assert database.has_to_forget(db)
    reader.execute("COMMIT")
    assert database.forget_on_disk(db)
    assert not database.has_to_forget(db)
    assert on_disk() == [False, False, True]
    forget(db, "DELETE FROM link_outbox")
    assert database.forget_on_disk(db)
    assert on_disk() == [False, False, False]
    db.close()
    reader.close()


def test_a_secret_deleted_before_a_power_cut_is_forgotten_after_it(tmp_path: Path) -> None:
    """Killed between the deletion and the log's end: the next start finds it to be done."""
    secret = os.urandom(40)
    script = (
        "import os, sys; from pathlib import Path; from edge_agent import database;"
        " db = database.connect(Path(sys.argv[1]));"
        " db.execute('INSERT INTO link_outbox VALUES (?, ?, 0)', ('a', bytes.fromhex(sys.argv[2])));"
        " db.execute('BEGIN IMMEDIATE'); db.execute('DELETE FROM link_outbox');"
        " database.note_secret_deleted(db); db.execute('COMMIT'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), secret.hex()], check=False)
    assert secret in (tmp_path / "box.db-wal").read_bytes()
    db = database.connect(tmp_path)
    assert database.has_to_forget(db)
    assert database.forget_on_disk(db)
    assert not any(secret in path.read_bytes() for path in tmp_path.iterdir())
    db.close()


def test_every_table_of_the_schema_is_made(tmp_path: Path) -> None:
    db = database.connect(tmp_path)
    made = {row["name"] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    plain = sqlite3.connect(":memory:")
    plain.executescript(files("edge_agent").joinpath("schema.sql").read_text("utf-8"))
    assert made == {name for (name,) in plain.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    db.close()


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    db = database.connect(tmp_path)
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(SiteError, match="schema 99"):
        database.connect(tmp_path)


def test_an_alarm_stays_until_it_is_ended(tmp_path: Path) -> None:
    db = database.connect(tmp_path)
    database.raise_alarm(db, "provider", "first", 2.0)
    database.raise_alarm(db, "disk", "other", 1.0)
    database.raise_alarm(db, "provider", "second", 3.0)
    assert database.alarms(db) == ["other", "second"]
    database.end_alarm(db, "provider")
    database.end_alarm(db, "provider")
    assert database.alarms(db) == ["other"]
    db.close()
