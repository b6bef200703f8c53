"""The main path where something is odd: one series never stops the others."""

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from edge_agent import catalog, config, database, decode, drift, instances, pipeline, report, status
from edge_agent.bundles import Active, ActiveBundle
from edge_agent.infer import Reader
from edge_agent.pipeline import ATTEMPT, MAX_ATTEMPTS, Pipeline
from fleet_link.errors import SiteError
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


@pytest.mark.parametrize("part", ["unreadable", "offer_rivals"])
def test_a_defect_while_looking_for_what_is_unreadable_stops_nobody(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    taken, db = box
    _cut_short(taken, db, tmp_path)
    of = decode if part == "unreadable" else catalog
    monkeypatch.setattr(of, part, _once(MemoryError(), getattr(of, part)))
    assert taken.step(db)
    assert _states(db)[2] == "failed"
    assert not taken.step(db)


@pytest.mark.parametrize(("of", "part", "state"), [(report, "write", "failed"), (drift, "watch", "reported")])
def test_a_defect_after_the_reading_stops_nobody(
    box: Box, monkeypatch: pytest.MonkeyPatch, of: Any, part: str, state: str
) -> None:
    taken, db = box
    monkeypatch.setattr(of, part, _once(KeyError("odd"), getattr(of, part)))
    assert taken.step(db)
    assert taken.step(db)
    assert _states(db) == [state, "reported"]


def test_a_report_that_cannot_be_made_after_a_kill_stops_no_start(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, db = box
    with monkeypatch.context() as killed:
        killed.setattr(report, "write", _once(KeyboardInterrupt(), report.write))  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            taken.step(db)
    assert _states(db)[0] == "read"
    monkeypatch.setattr(report, "write", _once(MemoryError(), report.write))
    taken.report_unreported(db)
    assert _states(db)[0] == "failed"


def test_a_defect_that_ends_the_thread_again_and_again_fails_the_series(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, db = box

    def odd(*_: object) -> int:
        raise sqlite3.IntegrityError("UNIQUE constraint failed")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "keep_result", odd)
        for _ in range(MAX_ATTEMPTS):  # each ends the thread, and the service starts anew
            with pytest.raises(sqlite3.IntegrityError):
                taken.step(db)
        assert taken.step(db)
    assert taken.step(db)
    assert _states(db) == ["failed", "reported"]


def test_a_disk_that_refuses_the_result_never_fails_the_series(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, db = box

    def refuses(*_: object) -> int:
        raise SiteError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "keep_result", refuses)
        for _ in range(MAX_ATTEMPTS + 1):
            with pytest.raises(SiteError):
                taken.step(db)
    assert taken.step(db)
    assert _states(db)[0] == "reported"


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


def _receive(db: sqlite3.Connection, data_dir: Path, content: bytes) -> catalog.Admission:
    kept = instances.keep(data_dir, [content], min_free_bytes=0)
    header = instances.read_file_header(data_dir / kept.path)
    return catalog.add_instance(db, header, kept, calling_ae="CR", now=time.time() - 1)


def _cut_short(taken: Pipeline, db: sqlite3.Connection, tmp_path: Path) -> bytes:
    """A third series whose pixels end too early; gives the whole file."""
    while taken.step(db):
        pass
    (path,) = write_series(phantom("XR", "nodule", 3), tmp_path / "sent", patient_seed=3)
    whole = path.read_bytes()
    _receive(db, tmp_path, whole[:-1000])
    return whole


def test_a_whole_copy_repairs_a_series_that_came_cut_short(box: Box, tmp_path: Path) -> None:
    taken, db = box
    whole = _cut_short(taken, db, tmp_path)
    assert taken.step(db)
    assert _states(db)[2] == "failed"
    assert _receive(db, tmp_path, whole).outcome is catalog.Outcome.CATALOGED
    assert taken.step(db)
    assert _states(db)[2] == "reported"
    (old,) = catalog.quarantined(db)
    assert (tmp_path / old.path).read_bytes() == whole[:-1000]  # nothing is lost


def test_a_whole_copy_that_comes_before_the_short_one_is_read_repairs_it_too(box: Box, tmp_path: Path) -> None:
    taken, db = box
    whole = _cut_short(taken, db, tmp_path)
    assert _receive(db, tmp_path, whole).outcome is catalog.Outcome.QUARANTINED
    assert taken.step(db)
    assert taken.step(db)
    assert _states(db)[2] == "reported"


def test_beside_a_series_that_was_read_other_bytes_are_set_aside(box: Box, tmp_path: Path) -> None:
    taken, db = box
    whole = _cut_short(taken, db, tmp_path)
    first = tmp_path / db.execute("SELECT path FROM instances WHERE series_no = 1").fetchone()["path"]
    assert _receive(db, tmp_path, first.read_bytes()[:-1000]).outcome is catalog.Outcome.QUARANTINED
    assert _states(db)[0] == "reported"
    assert whole


class FakeSessionOfAnExhaustedGpu:
    """There is no GPU here: stands for a CUDA session that has passed its known answers and then runs out of memory."""

    def run(self, names: object, inputs: object) -> list[object]:
        raise RuntimeError("CUDA failure 2: out of memory")


def test_a_fake_gpu_out_of_memory_fails_no_series_and_is_a_notice_until_the_next_start(
    box: Box, tmp_path: Path
) -> None:
    taken, db = box
    reader, cpu = taken._holder.current.reader, "CPUExecutionProvider"
    sessions = {"CUDAExecutionProvider": FakeSessionOfAnExhaustedGpu(), cpu: reader._session}
    falling = Reader(reader.bundle, tuple(sessions), sessions.__getitem__)
    taken._holder.swap(Active(falling, reader.bundle.digest, 0))
    _run_until(taken, lambda: _states(db) == ["reported", "reported"] and database.notices(db) != [])
    assert [row["provider"] for row in db.execute("SELECT provider FROM results")] == [cpu, cpu]
    (notice,) = database.notices(db)
    assert notice.startswith("CUDAExecutionProvider failed while reading; CPUExecutionProvider reads since")
    assert notice in status.gather(taken._config).notices
    assert database.alarms(db) == []  # the box is fit for a release

    again = Pipeline(taken._config, ActiveBundle(Active(reader, reader.bundle.digest, 0)), time.time)
    _run_until(again, lambda: database.notices(db) == [])


def _run_until(taken: Pipeline, fact: Callable[[], bool]) -> None:
    stop = Event()
    thread = Thread(target=taken.run, args=(stop,))
    thread.start()
    deadline = time.monotonic() + 60.0
    while not fact() and time.monotonic() < deadline:
        time.sleep(0.02)
    stop.set()
    thread.join()
    assert fact()


def _once(error: Exception, then: Callable[..., Any]) -> Callable[..., Any]:
    errors = [error]

    def call(*args: Any, **kwargs: Any) -> Any:
        if errors:
            raise errors.pop()
        return then(*args, **kwargs)

    return call
