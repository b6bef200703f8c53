"""Old images make room: only those read, delivered and no longer wanted for learning; kill -9 at any step; sent again."""

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from pydicom import dcmread

from edge_agent import catalog, database, delivery, health, instances, learn, pipeline, retention, reviews
from edge_agent import config as configuration
from edge_agent.bundles import Active, ActiveBundle
from edge_agent.catalog import Outcome, State
from edge_agent.images import ImageError, Images
from edge_agent.infer import Reader
from edge_agent.pipeline import Pipeline
from edge_agent.retention import DAY_S, LOOK_S, Retention
from edge_agent.reviews import ReviewError
from fleet_link.errors import SiteError
from models.bundle import SHIPPED
from models.phantom_dicom import write_series
from models.phantoms import phantom
from tests.edge_agent.dicom_support import write

T0 = 1_764_000_000.0
KEEP_DAYS = 30
LATER = T0 + (KEEP_DAYS + 1) * DAY_S


class Box(NamedTuple):
    db: sqlite3.Connection
    config: configuration.Config
    holder: ActiveBundle

    @property
    def data_dir(self) -> Path:
        return self.config.box.data_dir

    def receive(self, seed: int, at: float = T0) -> bytes:
        (path,) = write_series(phantom("XR", "nodule", seed), self.data_dir / "sent", patient_seed=seed)
        content = path.read_bytes()
        self.receive_file(content, at)
        return content

    def receive_file(self, content: bytes, at: float) -> catalog.Admission:
        kept = instances.keep(self.data_dir, [content], min_free_bytes=0)
        header = instances.read_file_header(self.data_dir / kept.path)
        admission = catalog.add_instance(self.db, header, kept, calling_ae="CR", now=at)
        assert admission.series_no is not None
        catalog.association_ended(self.db, {admission.series_no: at})
        return admission

    def read(self, at: float = T0 + 1) -> None:
        while Pipeline(self.config, self.holder, lambda: at).step(self.db):
            pass

    def deliver(self) -> None:
        for row in self.db.execute("SELECT item_no FROM outbox").fetchall():
            delivery.mark_delivered(self.db, row["item_no"], T0 + 2)

    def settle(self, now: float = LATER, **storage: int) -> None:
        """Everything that retention does at that time."""
        config = configuration.parse(
            {"box": {"data_dir": str(self.data_dir)}, "storage": {"keep_days": KEEP_DAYS, **storage}},
            folder=self.data_dir,
        )
        kept = Retention(config, lambda: now)
        while kept.step(self.db):
            pass

    def here(self, series_no: int = 1) -> bool:
        """Files and catalog agree on it."""
        rows = self.db.execute("SELECT path FROM instances WHERE series_no = ?", (series_no,)).fetchall()
        is_here = bool(instances.open(self.db, self.data_dir, series_no))
        assert {(self.data_dir / row["path"]).exists() for row in rows} == {is_here}
        return is_here


@pytest.fixture(scope="module")
def holder(tmp_path_factory: pytest.TempPathFactory) -> ActiveBundle:
    reader = Reader.open(SHIPPED, ["CPUExecutionProvider"], 1, tmp_path_factory.mktemp("engines"))
    return ActiveBundle(Active(reader, reader.bundle.digest, 0))


@pytest.fixture
def box(tmp_path: Path, holder: ActiveBundle) -> Iterator[Box]:
    """One X-ray, read and delivered."""
    own = {"box": {"data_dir": str(tmp_path)}, "dicom": {"quiet_time_s": 0.0}, "pacs": {"enabled": True}}
    made = Box(database.connect(tmp_path), configuration.parse(own, folder=tmp_path), holder)
    catalog.repair(made.db, tmp_path, T0)
    made.receive(1)
    made.read()
    made.deliver()
    yield made
    made.db.close()


def test_old_delivered_images_go_and_everything_else_stays(box: Box) -> None:
    reports = sorted((box.data_dir / "reports").iterdir())
    box.settle()
    assert not box.here()
    assert catalog.images_removed_at(box.db, 1) == LATER
    row = catalog.series(box.db, 1)
    assert (row.state, row.instance_count) == (State.REPORTED, 1)
    assert [len(box.db.execute(f"SELECT * FROM {table}").fetchall()) for table in ("instances", "results")] == [1, 1]
    assert sorted((box.data_dir / "reports").iterdir()) == reports
    assert list((box.data_dir / "maps").iterdir())


def test_younger_images_stay(box: Box) -> None:
    box.settle(T0 + KEEP_DAYS * DAY_S - 1)
    assert box.here()


def test_keep_days_0_keeps_for_ever(box: Box) -> None:
    box.settle(T0 + 1e9, keep_days=0)
    assert box.here()


@pytest.mark.parametrize("state", ["pending", "refused"])
def test_what_the_pacs_does_not_have_stays(box: Box, state: str) -> None:
    box.db.execute("UPDATE outbox SET state = ? WHERE item_no = 1", (state,))
    box.settle()
    assert box.here()


def test_what_was_never_meant_for_the_pacs_stays(box: Box) -> None:
    box.db.execute("DELETE FROM outbox")
    box.settle()
    assert box.here()


@pytest.mark.parametrize("state", [state for state in State if state is not State.REPORTED])
def test_what_is_not_read_to_the_end_stays(box: Box, state: State) -> None:
    box.db.execute("UPDATE series SET state = ?", (state,))
    box.settle()
    assert box.here()


def test_a_new_version_that_is_not_delivered_holds_the_images(box: Box) -> None:
    (path,) = write_series(phantom("XR", "nodule", 2), box.data_dir / "late", patient_seed=1)
    box.receive_file(path.read_bytes(), T0 + 5)
    box.db.execute("UPDATE series SET state = 'due' WHERE series_no = 1")
    box.read(T0 + 6)
    box.settle()
    assert box.here()


# --- learning


def _review(box: Box, now: float = T0 + 10) -> None:
    reviews.record(box.db, 1, "accepted", _predicted(box), "Dr. Ada", now)


def _predicted(box: Box) -> str:
    return reviews.stated(box.db.execute("SELECT findings FROM results").fetchone()["findings"]).predicted


def _collect(box: Box, heldout_fraction: float) -> None:
    learn.collect(box.db, box.data_dir, box.holder.current.reader.bundle.manifest, heldout_fraction)


def test_a_verdict_that_is_no_example_yet_holds_the_images(box: Box) -> None:
    _review(box)
    box.settle()
    assert box.here()


def test_an_example_to_train_on_keeps_its_arrays_apart(box: Box, tmp_path: Path) -> None:
    _review(box)
    _collect(box, heldout_fraction=0.0)
    box.settle()
    assert not box.here()
    bundle = box.holder.current.reader.bundle
    assert learn.lay_out(box.db, box.data_dir, bundle, ["XR"], tmp_path / "round") == 1


def test_a_held_out_case_keeps_its_images_to_judge_releases(box: Box) -> None:
    _review(box)
    _collect(box, heldout_fraction=1.0)
    box.settle()
    assert box.here()


def test_images_that_are_gone_cannot_be_judged(box: Box) -> None:
    box.settle()
    with pytest.raises(ReviewError, match="were removed") as refusal:
        _review(box, LATER + 1)
    assert refusal.value.advice


def test_the_page_is_told_why_there_is_no_image(box: Box) -> None:
    box.settle()
    with pytest.raises(ImageError, match="images of series 1 were removed from this box"):
        Images(box.data_dir).stack(box.db, 1)


# --- sent again


def test_sent_again_the_images_are_read_again(box: Box) -> None:
    content = box.receive(1, T0)
    box.settle()
    assert box.receive_file(content, LATER + 10).outcome is Outcome.AGAIN
    assert box.here()
    assert catalog.images_removed_at(box.db, 1) is None
    box.read(LATER + 11)
    row = catalog.series(box.db, 1)
    assert (row.state, row.version) == (State.REPORTED, 2)
    box.deliver()
    box.settle(LATER + 12 + LOOK_S)
    assert box.here()  # young again


def test_an_image_that_comes_back_between_mark_and_removal_stays(box: Box) -> None:
    content = box.receive(1, T0)
    retention.mark(box.db, LATER - KEEP_DAYS * DAY_S, LATER)
    box.receive_file(content, LATER + 1)
    assert not retention.remove_next(box.db, box.data_dir)
    assert box.here()


def test_a_late_image_of_a_removed_series_says_what_to_send(box: Box) -> None:
    box.settle()
    late = dcmread(next((box.data_dir / "sent").rglob("*.dcm")))
    late.SOPInstanceUID = late.file_meta.MediaStorageSOPInstanceUID = "1.2.3.99"
    box.receive_file(write(late, box.data_dir / "late.dcm").read_bytes(), LATER + 1)
    box.read(LATER + 100)
    row = catalog.series(box.db, 1)
    assert (row.state, row.reason) == (State.FAILED, "an image is no longer on this box")


# --- when things go wrong


def test_killed_after_the_mark_the_next_start_finishes(box: Box) -> None:
    retention.mark(box.db, LATER - KEEP_DAYS * DAY_S, LATER)
    catalog.repair(box.db, box.data_dir, LATER + 1)
    assert catalog.series(box.db, 1).state is State.REPORTED
    box.settle(LATER + 2, keep_days=0)  # what was begun is finished whatever is configured by then
    assert not box.here()


def test_killed_among_the_deletions_the_next_start_finishes(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(retention, "sync_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            box.settle()
    assert not instances.open(box.db, box.data_dir, 1)
    box.settle(LATER + 1)
    assert not box.here()


def test_a_disk_that_refuses_is_told_and_tried_again(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(retention, "sync_folder", refuses)
        with pytest.raises(SiteError, match="cannot be removed: Input/output error"):
            box.settle()
    box.settle(LATER + 1)
    assert not box.here()


def test_it_looks_once_an_hour_and_the_pipeline_asks_it(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []
    monkeypatch.setattr(retention, "mark", lambda db, older_than, now: looks.append(now))
    moments = iter([0.0 + LOOK_S, LOOK_S + 1, 2 * LOOK_S - 1, 2 * LOOK_S, 5.0])
    kept = Retention(box.config, _clock_of(moments))
    for _ in range(5):
        kept.step(box.db)
    assert looks == [LOOK_S, 2 * LOOK_S, 5.0]  # the last: a clock that was set back
    assert isinstance(pipeline.Pipeline(box.config, box.holder, lambda: 0.0)._retention, Retention)


def _clock_of(moments: Iterator[float]) -> Callable[[], float]:
    return lambda: next(moments)


def test_a_full_disk_is_told_with_what_could_go_and_nothing_goes_early(box: Box) -> None:
    box.receive(2)  # waits to be read
    size = box.db.execute("SELECT size FROM instances WHERE series_no = 1").fetchone()["size"]
    (alarm,) = health.alarms(box.db, box.config, free=0)
    assert f"a smaller storage.keep_days removes up to {size} bytes, the images of 1 delivered series" in alarm
    box.settle(T0 + 100)
    assert box.here(1)
    assert box.here(2)
    assert health.alarms(box.db, box.config, free=1 << 60) == []
