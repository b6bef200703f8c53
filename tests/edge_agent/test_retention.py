"""Old images make room: only those read, delivered and no longer wanted for learning; kill -9 at any step; sent again."""

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from pydicom import dcmread

from edge_agent import catalog, database, decode, delivery, health, instances, learn, pipeline, retention, reviews
from edge_agent import config as configuration
from edge_agent.bundles import Active, ActiveBundle
from edge_agent.catalog import Outcome, State
from edge_agent.images import ImageError, Images
from edge_agent.infer import Reader
from edge_agent.pipeline import Pipeline
from edge_agent.retention import DAY_S, LOOK_S, RETRY_S, Retention
from edge_agent.reviews import ReviewError
from models.bundle import SHIPPED, Bundle
from models.phantom_dicom import write_series
from models.phantoms import phantom
from tests.edge_agent.dicom_support import write

T0 = 1_800_000_000.0
KEEP_DAYS = 30
LATER = T0 + (KEEP_DAYS + 1) * DAY_S


class Times:
    """Two clocks: one that people set, one that only runs."""

    def __init__(self, clock: float) -> None:
        self.clock = clock
        self.moment = 5.0

    def pass_s(self, seconds: float) -> None:
        self.clock += seconds
        self.moment += seconds


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
        times = Times(now - LOOK_S)
        kept = self.retention(times, **storage)
        times.pass_s(LOOK_S)
        while kept.step(self.db):
            pass

    def retention(self, times: "Times", **storage: int) -> Retention:
        config = configuration.parse(
            {"box": {"data_dir": str(self.data_dir)}, "storage": {"keep_days": KEEP_DAYS, **storage}},
            folder=self.data_dir,
        )
        return Retention(config, lambda: times.clock, lambda: times.moment)

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


def _lay_out(box: Box, base: Bundle, folder: Path) -> int:
    return learn.lay_out(box.db, box.data_dir, base, learn.usable(box.db, box.data_dir, base, ["XR"], "train"), folder)


def test_a_verdict_that_is_no_example_yet_holds_the_images(box: Box) -> None:
    _review(box)
    box.settle()
    assert box.here()


def test_an_example_to_train_on_keeps_its_arrays_apart(box: Box, tmp_path: Path) -> None:
    _review(box)
    _collect(box, heldout_fraction=0.0)
    box.settle()
    assert not box.here()
    assert _lay_out(box, box.holder.current.reader.bundle, tmp_path / "round") == 1


def test_an_example_for_another_input_is_used_though_the_images_are_gone(box: Box, tmp_path: Path) -> None:
    _review(box)
    _collect(box, heldout_fraction=0.0)
    bundle = box.holder.current.reader.bundle
    spec = bundle.manifest.input_for("XR")
    assert spec is not None
    other = msgspec.structs.replace(spec, size=spec.size * 2)
    inputs = tuple(other if known.modality == "XR" else known for known in bundle.manifest.inputs)
    larger = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, inputs=inputs))
    assert _lay_out(box, larger, tmp_path / "larger") == 1
    box.settle()
    assert not box.here()
    for number, base in enumerate((bundle, larger, bundle)):  # both kinds of arrays are on the disk
        assert _lay_out(box, base, tmp_path / str(number)) == 1


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


def _removed_series(box: Box, images: int) -> list[bytes]:
    """Series 2: a CT of so many images, read, delivered and removed."""
    sent = write_series(phantom("CT", "normal", 3), box.data_dir / "ct", patient_seed=3)[:images]
    contents = [path.read_bytes() for path in sent]
    for content in contents:
        box.receive_file(content, T0)
    box.read()
    box.deliver()
    assert catalog.series(box.db, 2).state is State.REPORTED
    box.settle()
    assert not box.here(2)
    return contents


def test_images_sent_again_in_one_association_are_waited_for(box: Box) -> None:
    contents = _removed_series(box, 3)
    for number, content in enumerate(contents):
        kept = instances.keep(box.data_dir, [content], min_free_bytes=0)
        header = instances.read_file_header(box.data_dir / kept.path)
        catalog.add_instance(box.db, header, kept, calling_ae="CT", now=LATER + 9.0 * number)
        assert catalog.next_due(box.db, LATER + 9.0 * number + 8.0, quiet_time_s=10.0) is None
    catalog.association_ended(box.db, {catalog.SeriesNo(2): LATER + 18.0})
    box.read(LATER + 40.0)
    row = catalog.series(box.db, 2)
    assert (row.state, row.version) == (State.REPORTED, 2)


def test_images_sent_again_one_association_each_end_up_read(box: Box) -> None:
    """Each is due at once and read: failed until the last is here."""
    for number, content in enumerate(_removed_series(box, 3)):
        box.receive_file(content, LATER + number)
        box.read(LATER + number + 0.5)
    row = catalog.series(box.db, 2)
    assert (row.state, row.version) == (State.REPORTED, 2)


def test_the_last_image_that_comes_back_during_the_reading_is_not_missed(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    *first, last = _removed_series(box, 2)
    box.receive_file(first[0], LATER)
    decoding = decode.to_volume

    def arrives_late(paths: Sequence[Path]) -> decode.Decoded:
        try:
            return decoding(paths)
        finally:
            monkeypatch.undo()
            box.receive_file(last, LATER + 1)

    monkeypatch.setattr(decode, "to_volume", arrives_late)
    box.read(LATER + 2)
    assert catalog.series(box.db, 2).state is State.REPORTED


def test_an_image_that_comes_back_between_mark_and_removal_stays(box: Box) -> None:
    content = box.receive(1, T0)
    retention.mark(box.db, LATER - KEEP_DAYS * DAY_S, LATER)
    box.receive_file(content, LATER + 1)
    assert retention.next_marked(box.db) is None
    retention.remove(box.db, box.data_dir, 1)
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

    times = Times(LATER)
    retention.mark(box.db, LATER - KEEP_DAYS * DAY_S, LATER)
    kept = box.retention(times)
    with monkeypatch.context() as patched:
        patched.setattr(retention, "sync_folder", refuses)
        assert not kept.step(box.db)
    (notice,) = database.notices(box.db)
    assert "cannot be removed: Input/output error" in notice
    assert database.alarms(box.db) == []
    times.pass_s(RETRY_S - 1)
    assert not kept.step(box.db)  # not yet
    assert database.notices(box.db) == [notice]
    times.pass_s(1)
    assert kept.step(box.db)
    assert not kept.step(box.db)
    assert not box.here()
    assert database.notices(box.db) == []


def test_one_file_that_stays_holds_up_no_other_series(box: Box) -> None:
    box.receive(2)
    box.read()
    box.deliver()
    stuck = box.data_dir / box.db.execute("SELECT path FROM instances WHERE series_no = 1").fetchone()["path"]
    stuck.unlink()
    stuck.mkdir()
    times = Times(LATER)
    kept = box.retention(times)
    times.pass_s(LOOK_S)
    assert not kept.step(box.db)  # reading gets its turn
    assert kept.step(box.db)
    assert not box.here(2)
    assert len(database.notices(box.db)) == 1
    assert box.db.execute("SELECT series_no FROM removals WHERE done = 0").fetchone()["series_no"] == 1


def test_it_looks_once_an_hour_first_an_hour_after_the_start(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []
    monkeypatch.setattr(retention, "mark", lambda db, older_than, now: looks.append(now))
    times = Times(LATER)
    kept = box.retention(times)
    for seconds in (0.0, LOOK_S - 1, 1.0, 1.0, LOOK_S - 2, 1.0):
        times.pass_s(seconds)
        kept.step(box.db)
    assert looks == [LATER + LOOK_S, LATER + 2 * LOOK_S]
    assert isinstance(pipeline.Pipeline(box.config, box.holder, lambda: 0.0)._retention, Retention)


@pytest.mark.parametrize("set_by_s", [400 * DAY_S, -400 * DAY_S, 61.0])
def test_a_clock_that_was_set_makes_no_image_old(box: Box, monkeypatch: pytest.MonkeyPatch, set_by_s: float) -> None:
    looks: list[float] = []
    monkeypatch.setattr(retention, "mark", lambda db, older_than, now: looks.append(now))
    times = Times(LATER)
    kept = box.retention(times)
    times.pass_s(1.0)
    times.clock += set_by_s
    times.pass_s(LOOK_S)
    kept.step(box.db)
    assert looks == []
    times.pass_s(LOOK_S - 1)
    kept.step(box.db)
    assert looks == []
    times.pass_s(1)
    kept.step(box.db)
    assert len(looks) == 1  # a whole hour without a jump


def test_images_that_came_while_the_clock_said_1970_stay(box: Box) -> None:
    box.db.execute("UPDATE series SET last_instance_at = 300.0")
    box.settle()
    assert box.here()


def test_a_full_disk_is_told_with_what_could_go_and_nothing_goes_early(box: Box) -> None:
    box.receive(2)  # waits to be read
    size = box.db.execute("SELECT size FROM instances WHERE series_no = 1").fetchone()["size"]
    (alarm,) = health.alarms(box.db, box.config, free=0)
    assert f"a smaller storage.keep_days removes up to {size} bytes, the images of 1 delivered series" in alarm
    box.settle(T0 + 100)
    assert box.here(1)
    assert box.here(2)
    assert health.alarms(box.db, box.config, free=1 << 60) == []


def test_a_full_disk_says_what_helps_where_nothing_is_removed(box: Box) -> None:
    def alarm(**sections: dict[str, object]) -> str:
        own = {"box": {"data_dir": str(box.data_dir)}, **sections}
        (told,) = health.alarms(box.db, configuration.parse(own, folder=box.data_dir), free=0)
        return told

    assert "a storage.keep_days above 0 removes up to" in alarm(pacs={"enabled": True}, storage={"keep_days": 0})
    assert "above 0 removes up to" in alarm(storage={"keep_days": 0})  # delivered while it was enabled
    box.db.execute("DELETE FROM outbox")
    assert "no images are removed while pacs.enabled = false" in alarm()
