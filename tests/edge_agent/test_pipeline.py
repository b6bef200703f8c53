"""The main path where something is odd: one series never stops the others."""

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent import catalog, config, database, decode, instances, pipeline
from edge_agent.bundles import Active, ActiveBundle
from edge_agent.infer import Reader
from edge_agent.pipeline import ATTEMPT, MAX_ATTEMPTS, Pipeline
from models.bundle import SHIPPED
from models.phantom_dicom import write_series
from models.phantoms import phantom

Box = tuple[Pipeline, sqlite3.Connection]


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """A pipeline with two X-ray series due, none of them read."""
    settings = config.parse({"box": {"data_dir": "."}, "dicom": {"quiet_time_s": 0.0}}, folder=tmp_path)
    reader = Reader.open(SHIPPED, ["CPUExecutionProvider"], 1, tmp_path / "engines")
    holder = ActiveBundle(Active(reader, reader.bundle.digest, 0))
    db = database.connect(tmp_path)
    for folder in ("maps", "reports"):
        (tmp_path / folder).mkdir()
    for seed in (1, 2):
        (path,) = write_series(phantom("XR", "nodule", seed), tmp_path / "sent", patient_seed=seed)
        kept = instances.keep(tmp_path, [path.read_bytes()], min_free_bytes=0)
        catalog.add_instance(db, instances.read_file_header(path), kept, calling_ae="CR", now=time.time() + seed - 10)
    return Pipeline(settings, holder, time.time), db


def _states(db: sqlite3.Connection) -> list[str]:
    return [row["state"] for row in db.execute("SELECT state FROM series ORDER BY series_no")]


def test_each_due_series_is_read_and_reported(box: Box) -> None:
    taken, db = box
    assert taken.step(db)
    assert taken.step(db)
    assert not taken.step(db)
    assert _states(db) == ["reported", "reported"]


def test_a_defect_in_one_series_fails_it_and_the_next_is_read(
    box: Box, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken, db = box
    monkeypatch.setattr(decode, "to_volume", _once(IndexError("list index out of range"), decode.to_volume))
    assert taken.step(db)
    assert taken.step(db)
    assert _states(db) == ["failed", "reported"]
    (reason,) = db.execute("SELECT reason FROM series WHERE state = 'failed'").fetchone()
    assert reason == "a defect in this software: IndexError"


def test_a_series_that_kills_the_process_again_and_again_is_given_up(box: Box) -> None:
    taken, db = box
    for _ in range(MAX_ATTEMPTS):  # what a segfault leaves: the count, and nothing else
        database.count(db, f"{ATTEMPT}1")
    assert taken.step(db)
    assert taken.step(db)
    assert _states(db) == ["failed", "reported"]


def test_a_locked_database_leaves_the_series_due(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, db = box
    locked = sqlite3.OperationalError("database is locked")
    monkeypatch.setattr(pipeline, "keep_result", _once(locked, pipeline.keep_result))
    with pytest.raises(sqlite3.OperationalError):
        taken.step(db)
    assert taken.step(db)
    assert _states(db)[0] == "reported"


def test_a_failed_series_that_is_sent_again_is_tried_again(box: Box, tmp_path: Path) -> None:
    taken, db = box
    taken.step(db)
    db.execute("UPDATE series SET state = 'failed', reason = 'x' WHERE series_no = 1")
    path = tmp_path / db.execute("SELECT path FROM instances WHERE series_no = 1").fetchone()["path"]
    kept = instances.keep(tmp_path, [path.read_bytes()], min_free_bytes=0)
    again = catalog.add_instance(db, instances.read_file_header(path), kept, calling_ae="CR", now=time.time() - 1)
    assert again.outcome is catalog.Outcome.AGAIN
    assert taken.step(db)
    assert taken.step(db)
    assert _states(db) == ["reported", "reported"]
    assert db.execute("SELECT instance_count FROM series WHERE series_no = 1").fetchone()[0] == 1


def _once(error: Exception, then: Callable[..., Any]) -> Callable[..., Any]:
    errors = [error]

    def call(*args: Any, **kwargs: Any) -> Any:
        if errors:
            raise errors.pop()
        return then(*args, **kwargs)

    return call
