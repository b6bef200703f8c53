"""Examples from verdicts, and the training child: stopped, failing, too slow, writing nonsense."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from edge_agent import database, learn, ledger, replay, status
from edge_agent.learner import Learner
from edge_agent.rounds import Event, State
from fleet_link import sealing
from fleet_link.errors import SiteError
from models import delta
from models.bundle import Bundle, BundleParts, read_bundle, write_bundle
from models.preprocess import Volume
from models.spec import IMPORTED
from tests.edge_agent.link_support import Box, make_box, make_plan
from tests.fleet_link.mosquitto_support import TestAuthority


@pytest.fixture(scope="module")
def authority() -> TestAuthority:
    return TestAuthority()


@pytest.fixture
def box(tmp_path: Path, authority: TestAuthority) -> Iterator[Box]:
    made = make_box(tmp_path, authority)
    yield made
    made.db.close()


def collect(box: Box) -> int:
    return learn.collect(box.db, box.data_dir, box.holder.current.reader.bundle.manifest, 0.25)


def lay_out(box: Box, base: Bundle, folder: Path) -> int:
    chosen = [
        example
        for split in ("train", "heldout")
        for example in learn.usable(box.db, box.data_dir, base, ("XR",), split)
    ]
    return learn.lay_out(box.db, box.data_dir, base, chosen, folder)


# --- examples -------------------------------------------------------------------------------------


def test_a_verdict_becomes_an_example_once(box: Box) -> None:
    series_no = box.add_reviewed("p1", bright=True, label="nodule")
    assert (collect(box), collect(box)) == (1, 0)
    (row,) = box.rows("examples")
    assert (row["series_no"], row["modality"], row["label"]) == (series_no, "XR", "nodule")
    with np.load(box.data_dir / row["path"]) as arrays:
        assert arrays["slices_SHW"].shape == (1, 16, 16)
        assert arrays["slices_SHW"].dtype == np.float16


def test_the_newest_verdict_counts_and_the_split_stays(box: Box) -> None:
    series_no = box.add_reviewed("p1", bright=True, label="nodule")
    collect(box)
    split = box.rows("examples")[0]["split"]
    box.review(series_no, "normal")
    box.db.execute("UPDATE examples SET split = 'kept'")
    assert collect(box) == 1
    assert (box.rows("examples")[0]["label"], box.rows("examples")[0]["split"]) == ("normal", "kept")
    assert split in ("train", "heldout")


def test_a_series_that_cannot_be_read_is_skipped_and_stops_nobody(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    damaged = box.add_reviewed("p1", bright=True, label="nodule")
    (box.data_dir / "p1.dcm").write_bytes(b"no DICOM")
    sound = box.add_reviewed("p2", bright=False, label="normal")
    assert collect(box) == 1
    assert [row["series_no"] for row in box.rows("examples")] == [sound]
    assert f"series {damaged}" in caplog.text


def test_a_modality_the_bundle_does_not_read_is_skipped(box: Box) -> None:
    box.add_reviewed("p1", bright=True, label="nodule")
    manifest = msgspec.structs.replace(box.holder.current.reader.bundle.manifest, inputs=())
    assert learn.collect(box.db, box.data_dir, manifest, 0.25) == 0


def test_the_split_is_by_patient_and_near_the_fraction() -> None:
    patients = [f"patient {number}" for number in range(2000)]
    sides = [learn.split_of(patient, 0.25) for patient in patients]
    assert sides == [learn.split_of(patient, 0.25) for patient in patients]
    assert 0.22 < sides.count("heldout") / 2000 < 0.28


def test_only_verdicts_on_the_newest_result_teach(box: Box) -> None:
    """Late images reopen a series: its old verdict teaches nothing until the new result is reviewed."""
    series_no = box.add_reviewed("p1", bright=True, label="nodule")
    collect(box)
    box.db.execute("UPDATE examples SET split = 'train'")
    assert len(learn.examples(box.db, ("XR",), "train")) == 1
    box.db.execute("UPDATE series SET state = 'due'")
    assert learn.examples(box.db, ("XR",), "train") == []
    box.db.execute("UPDATE series SET state = 'reported', version = 2")
    box.db.execute(
        "INSERT INTO results SELECT 90, series_no, 2, bundle_digest, 0, provider, '{}', '', 0, 0, 0 FROM results"
    )
    assert learn.examples(box.db, ("XR",), "train") == []
    box.db.execute(
        "INSERT INTO reviews(result_no, series_no, verdict, label, reviewer, reviewed_at)"
        " VALUES (90, ?, 'accepted', 'normal', 'r', 0)",
        (series_no,),
    )
    collect(box)
    assert [example.label for example in learn.examples(box.db, ("XR",), "train")] == ["normal"]


def test_layout_for_the_child(box: Box, tmp_path: Path) -> None:
    for number in range(4):
        box.add_reviewed(f"p{number}", bright=True, label="nodule")
    collect(box)
    box.db.execute("UPDATE examples SET split = CASE series_no WHEN 1 THEN 'heldout' ELSE 'train' END")
    box.db.execute("UPDATE examples SET label = 'unheard of' WHERE series_no = 2")
    (box.data_dir / box.rows("examples")[2]["path"]).unlink()  # lost: made again
    base = read_bundle(box.shipped)
    assert lay_out(box, base, tmp_path / "job") == 2
    assert lay_out(box, base, tmp_path / "job") == 2  # twice is once
    listed = json.loads((tmp_path / "job" / "examples.json").read_text())
    assert sorted(entry["split"] for entry in listed) == ["heldout", "train", "train"]
    assert all((tmp_path / "job" / entry["path"]).exists() for entry in listed)
    assert learn.usable(box.db, box.data_dir, base, ("CT",), "train") == []


def test_another_preprocessing_makes_the_arrays_anew(box: Box, tmp_path: Path) -> None:
    box.add_reviewed("p1", bright=True, label="nodule")
    collect(box)
    before = box.rows("examples")[0]["path"]
    base = read_bundle(box.shipped)
    spec = msgspec.structs.replace(base.manifest.inputs[0], size=24)
    other = msgspec.structs.replace(base.manifest, inputs=(spec,))
    lay_out(box, replace(base, manifest=other), tmp_path / "job")
    after = box.rows("examples")[0]["path"]
    assert after != before
    with np.load(box.data_dir / after) as arrays:
        assert arrays["slices_SHW"].shape == (1, 24, 24)


# --- the child ------------------------------------------------------------------------------------


def test_a_new_verdict_drops_the_arrays_for_other_inputs(box: Box) -> None:
    """They may be of fewer images than the series has now."""
    series_no = box.add_reviewed("p1", bright=True, label="nodule")
    manifest = box.holder.current.reader.bundle.manifest
    learn.collect(box.db, box.data_dir, manifest, 0.0)
    other = box.data_dir / "examples" / f"{series_no}-0123abcd.npz"
    other.write_bytes(b"of another input size")
    box.review(series_no, "normal")
    learn.collect(box.db, box.data_dir, manifest, 0.0)
    assert not other.exists()
    assert (box.data_dir / box.rows("examples")[0]["path"]).exists()


def test_the_child_is_gone_when_stopped(tmp_path: Path) -> None:
    marker = f"sleep {os.getpid()}.77"
    with pytest.raises(learn.TrainingStoppedError):
        learn.run_child(["sh", "-c", f"exec {marker}"], tmp_path, 60.0, lambda: True)
    assert not [p for p in psutil.Process().children(recursive=True) if marker in " ".join(p.cmdline())]


def test_a_child_that_will_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn, "GRACE_S", 0.2)
    with pytest.raises(learn.TrainingStoppedError):
        learn.run_child(["sh", "-c", "trap '' TERM; exec sleep 1000"], tmp_path, 60.0, lambda: True)


def test_a_child_that_takes_too_long(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"longer than 0\.3 s") as caught:
        learn.run_child(["sleep", "60"], tmp_path, 0.3, lambda: False)
    assert "learning.timeout_s" in caught.value.advice


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("""echo '{"error": "no example", "advice": "x"}' >&2; exit 1""", r"failed \(1\): no example"),
        ("echo Traceback; echo ValueError: odd; exit 3", r"failed \(3\): ValueError: odd"),
        ("exit 5", r"failed \(5\): it said nothing"),
        ("kill -9 $$", "want of memory"),
    ],
)
def test_a_child_that_fails_says_why(tmp_path: Path, script: str, reason: str) -> None:
    with pytest.raises(SiteError, match=reason):
        learn.run_child(["sh", "-c", script], tmp_path, 60.0, lambda: False)


def test_a_child_without_space_is_this_sites_trouble(tmp_path: Path) -> None:
    """/dev/full is a disk without space."""
    with pytest.raises(SiteError, match="disk is full") as caught:
        learn.run_child(["sh", "-c", "cat /proc/self/stat > /dev/full"], tmp_path, 60.0, lambda: False)
    assert not isinstance(caught.value, learn.CannotTrainError)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) is not installed")
def test_the_child_dies_with_a_killed_box(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from edge_agent import learn;"
        "learn.run_child([*learn.GUARD, 'sleep', '987.5'], Path(sys.argv[1]), 60.0, lambda: False)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    try:
        child = _wait_for_child(parent.pid, "987.5")
        assert Path(f"/proc/{child.pid}/oom_score_adj").read_text().strip() == "900"
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        child.wait(timeout=20)
    finally:
        parent.kill()


def _wait_for_child(pid: int, word: str) -> psutil.Process:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for child in psutil.Process(pid).children(recursive=True):
            if child.name() == "sleep" and word in child.cmdline():
                return child
        time.sleep(0.05)
    raise TimeoutError


# --- what the child wrote -------------------------------------------------------------------------


def write_out(folder: Path, weights: dict[str, np.ndarray], report: object | None = None) -> Path:
    folder.mkdir()
    save_file(weights, folder / "weights.safetensors")
    good = {
        "examples": 3,
        "heldout": 1,
        "heldout_correct_before": 0,
        "heldout_correct_after": 1,
        "loss_by_epoch": [1.0],
        "seconds": 1.5,
        "peak_rss_bytes": 1,
    }
    (folder / "report.json").write_text(json.dumps(good if report is None else report))
    return folder


def test_sound_weights_are_believed(box: Box, tmp_path: Path) -> None:
    base = read_bundle(box.shipped)
    trained = learn.read_trained(write_out(tmp_path / "out", {k: v + 1 for k, v in base.weights.items()}), base)
    assert trained.weights["head.weight"].tolist() == [1.0, 11.0]
    assert trained.report.heldout_correct_after == 1


def test_nan_weights_are_refused(box: Box, tmp_path: Path) -> None:
    base = read_bundle(box.shipped)
    weights = {name: value.copy() for name, value in base.weights.items()}
    weights["head.bias"][1] = np.nan
    with pytest.raises(SiteError, match=r"diverged: head\.bias"):
        learn.read_trained(write_out(tmp_path / "out", weights), base)


def test_weights_of_another_network_are_refused(box: Box, tmp_path: Path) -> None:
    base = read_bundle(box.shipped)
    with pytest.raises(SiteError, match="head"):
        learn.read_trained(write_out(tmp_path / "a", {"head.weight": np.zeros(3, np.float32)}), base)
    with pytest.raises(SiteError, match="readable result"):
        learn.read_trained(write_out(tmp_path / "b", dict(base.weights), report={"examples": "three"}), base)
    with pytest.raises(SiteError, match="readable result"):
        learn.read_trained(tmp_path / "nothing", base)


# --- the thread -----------------------------------------------------------------------------------


class Never:
    def is_set(self) -> bool:
        return False


def start_round(box: Box, key: bytes, **changes: object) -> None:
    plan = make_plan(str(changes.pop("base_digest", box.holder.current.digest)), key, **changes)
    ledger.invite(box.db, plan, 0.0)
    ledger.apply(box.db, box.data_dir, plan.round_id, Event.ADMITTED, 0.0, ledger.Outcome(examples=2))


def learner(box: Box) -> Learner:
    return Learner(box.config, box.holder, box.enrolled, time.time)


def test_the_hub_does_not_know_the_seed_of_a_masked_rounds_training(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two rounds of one plan give the same update, and the difference of two sums is one box's."""
    commands: list[list[str]] = []
    monkeypatch.setattr(learn, "run_child", lambda command, *_: commands.append(list(command)))
    monkeypatch.setattr(learn, "read_trained", lambda *_: None)
    base = box.holder.current.reader.bundle
    open_plan = make_plan(base.digest, b"k" * 1216, seed=7)
    masked_plan = make_plan(base.digest, b"k" * 1216, seed=7, kind="masked")
    for plan in (open_plan, masked_plan, masked_plan):
        learn.train(plan, base, tmp_path, box.config.learning, lambda: False)
    told, first, second = (command[command.index("--seed") + 1] for command in commands)
    assert told == "7"
    assert len({told, first, second}) == 3


@pytest.mark.slow
def test_a_training_that_fails_is_told_to_the_hub(box: Box, tmp_path: Path) -> None:
    """The brightness bundle is no network of models.network: the real child refuses it."""
    for number in range(8):
        box.add_reviewed(f"p{number}", bright=True, label="nodule")
    key = sealing.new_sealing_key(tmp_path / "key")
    start_round(box, sealing.public_bytes(key))
    learner(box).step(box.db, Never())  # type: ignore[arg-type]
    assert box.state_of("round-1") == State.DECLINED
    (answer,) = ledger.pending(box.db)
    assert answer.joins is False  # type: ignore[union-attr]
    assert "training failed" in answer.reason  # type: ignore[union-attr]


def test_too_few_usable_examples_are_told_to_the_hub(box: Box, tmp_path: Path) -> None:
    box.add_reviewed("p1", bright=True, label="nodule")
    start_round(box, b"k" * 1216)
    learner(box).step(box.db, Never())  # type: ignore[arg-type]
    assert box.state_of("round-1") == State.DECLINED
    assert "needs 2" in box.rows("rounds")[0]["reason"]


def test_a_site_that_keeps_its_weights_back_after_joining_seals_none(
    tmp_path: Path, authority: TestAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn, "train", lambda *_: pytest.fail("trained what may not leave"))
    box = make_box(tmp_path, authority, policy={"weights_may_leave": ["norms"]})
    open_round(box, tmp_path)
    learner(box).step(box.db, Never())  # type: ignore[arg-type]
    assert box.state_of("round-1") == State.DECLINED
    (answer,) = ledger.pending(box.db)
    reason = "the round asks for weights that stay at this site: all (policy.weights_may_leave = norms)"
    assert (answer.joins, answer.reason) == (False, reason)  # type: ignore[union-attr]
    assert not (box.data_dir / "updates").exists()
    assert status.gather(box.config).rounds[0]["reason"] == reason
    box.db.close()


def test_a_round_without_its_base_is_declined(box: Box) -> None:
    start_round(box, b"k" * 1216, base_digest="b" * 64)
    learner(box).step(box.db, Never())  # type: ignore[arg-type]
    assert "no longer on this box" in box.rows("rounds")[0]["reason"]


def test_a_round_on_an_imported_network_is_declined(box: Box) -> None:
    base = read_bundle(box.shipped)
    manifest = msgspec.structs.replace(base.manifest, name="elsewhere", network=IMPORTED)
    parts = BundleParts(manifest, base.onnx, {}, base.known_inputs, base.known_outputs, base.card)
    digest = write_bundle(box.data_dir / "bundles" / "imported.bundle", parts)
    box.db.execute("INSERT INTO bundles VALUES (?, 2, 'bundles/imported.bundle', 'previous', '', 0.0)", (digest,))
    start_round(box, b"k" * 1216, base_digest=digest)
    learner(box).step(box.db, Never())  # type: ignore[arg-type]
    assert box.state_of("round-1") == State.DECLINED
    (answer,) = ledger.pending(box.db)
    assert "elsewhere is an imported network: not trainable" in answer.reason  # type: ignore[union-attr]


def open_round(box: Box, tmp_path: Path) -> None:
    for number in range(8):
        box.add_reviewed(f"p{number}", bright=True, label="nodule")
    start_round(box, sealing.public_bytes(sealing.new_sealing_key(tmp_path / "key")))


def test_a_disk_that_refuses_leaves_the_round_open_and_is_told_once(
    box: Box, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.learner.RETRY_S", 0.0)
    open_round(box, tmp_path)
    (box.data_dir / "learning").write_bytes(b"no folder can be made here")
    working = learner(box)
    for _ in range(2):
        working.step(box.db, Never())  # type: ignore[arg-type]
    assert box.state_of("round-1") == State.TRAINING
    (alarm,) = database.alarms(box.db)
    assert alarm.startswith("round round-1 waits: the disk refuses: ")
    assert caplog.text.count("round round-1 waits") == 1
    assert "free some space" in caplog.text
    ledger.apply(box.db, box.data_dir, "round-1", Event.DEADLINE, time.time())
    assert database.alarms(box.db) == []


def test_a_round_that_closed_while_the_disk_refused_gets_no_alarm(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_round(box, tmp_path)

    def closed_meanwhile(*_: object) -> int:
        ledger.apply(box.db, box.data_dir, "round-1", Event.CLOSED_BY_HUB, time.time())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(learn, "lay_out", closed_meanwhile)
    learner(box).step(box.db, Never())  # type: ignore[arg-type]
    assert box.state_of("round-1") == State.CLOSED
    assert database.alarms(box.db) == []


def test_start_up_ends_alarms_of_rounds_that_nobody_works_on(box: Box, tmp_path: Path) -> None:
    open_round(box, tmp_path)
    for name in ("round round-1", "round round-0", "release 2"):
        ledger.hold_up(box.db, name, SiteError("no space", advice="free some"), time.time())
    learner(box).repair(box.db)
    assert [row["name"] for row in box.rows("alarms")] == ["round round-1", "release 2"]


def test_training_is_tried_again_after_a_pause(box: Box, tmp_path: Path) -> None:
    open_round(box, tmp_path)
    (box.data_dir / "learning").write_bytes(b"no folder can be made here")
    working = learner(box)
    working.step(box.db, Never())  # type: ignore[arg-type]
    (box.data_dir / "learning").unlink()
    working.step(box.db, Never())  # type: ignore[arg-type]
    assert not (box.data_dir / "learning").exists()


def test_an_update_that_cannot_be_written_leaves_the_round_open(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_round(box, tmp_path)
    report = learn.Report(8, 0, 0, 0, 1.0, 1)
    trained = {name: value + 1 for name, value in read_bundle(box.shipped).weights.items()}
    monkeypatch.setattr(learn, "train", lambda *_: learn.Trained(trained, report))
    monkeypatch.setattr("edge_agent.learner.RETRY_S", 0.0)
    (box.data_dir / "updates").write_bytes(b"no folder")
    working = learner(box)
    working.step(box.db, Never())  # type: ignore[arg-type]
    assert box.state_of("round-1") == State.TRAINING
    assert database.alarms(box.db)
    (box.data_dir / "updates").unlink()
    working.step(box.db, Never())  # type: ignore[arg-type]
    assert box.state_of("round-1") == State.UPLOADING
    assert database.alarms(box.db) == []


def test_an_example_that_cannot_be_kept_is_made_later(
    box: Box, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.learner.RETRY_S", 0.0)
    box.add_reviewed("p1", bright=True, label="nodule")
    (box.data_dir / "examples").write_bytes(b"no folder")
    working = learner(box)
    for _ in range(2):
        working.step(box.db, Never())  # type: ignore[arg-type]
    assert box.rows("examples") == []
    assert len(database.alarms(box.db)) == caplog.text.count("learning from verdicts waits") == 1
    (box.data_dir / "examples").unlink()
    working.step(box.db, Never())  # type: ignore[arg-type]
    assert len(box.rows("examples")) == 1
    assert database.alarms(box.db) == []


def test_outside_its_hours_the_box_waits(tmp_path: Path, authority: TestAuthority) -> None:
    now = time.localtime()
    begin = f"{(now.tm_hour + 2) % 24:02}:00"
    box = make_box(tmp_path, authority, policy={"hours": f"{begin}-{(now.tm_hour + 3) % 24:02}:00"})
    start_round(box, b"k" * 1216)
    learner(box).step(box.db, Never())  # type: ignore[arg-type]
    assert box.state_of("round-1") == State.TRAINING


def test_start_up_removes_what_a_killed_box_left(box: Box) -> None:
    (box.data_dir / "learning" / "round-9").mkdir(parents=True)
    (box.data_dir / "updates").mkdir()
    (box.data_dir / "updates" / "round-9.sealed").write_bytes(b"half")
    learner(box).repair(box.db)
    assert not (box.data_dir / "learning").exists()
    assert not list((box.data_dir / "updates").iterdir())


@pytest.mark.slow
def test_reviews_become_an_update_that_the_hub_can_open(tmp_path: Path, authority: TestAuthority) -> None:
    """The shipped network, the real child, twice: what was killed half-way is done again with the same delta."""
    from models.bundle import SHIPPED

    box = make_box(tmp_path, authority, inference={"bundle": str(SHIPPED)}, learning={"heldout_fraction": 0.3})
    for number in range(8):
        box.add_reviewed(f"p{number}", bright=number % 2 == 0, label="nodule" if number % 2 == 0 else "normal")
    key = sealing.new_sealing_key(tmp_path / "key")
    payloads = []
    for _ in range(2):
        box.db.execute("DELETE FROM rounds")
        start_round(box, sealing.public_bytes(key))
        learner(box).step(box.db, Never())  # type: ignore[arg-type]
        assert box.rows("rounds")[0]["reason"] == replay.NOT_COUNTED
        assert box.state_of("round-1") == State.UPLOADING
        transfer = box.rows("transfers_out")[-1]
        sealed = (box.data_dir / transfer["path"]).read_bytes()
        found = ledger.find(box.db, "round-1")
        assert found is not None
        opened = sealing.open_update(
            sealed, private_key=key, trust=authority.trust, sender="box-1", plan=found.plan, now=time.time()
        )
        payloads.append(opened.payload)
    base = box.holder.current.reader.bundle
    names = delta.trainable_names(base.weights, "all")
    decoded = delta.decode(payloads[0], {name: base.weights[name].shape for name in names})
    assert payloads[0] == payloads[1]
    assert delta.norm(decoded) > 0.0
    assert opened.examples == len([row for row in box.rows("examples") if row["split"] == "train"])


def test_a_volume_is_what_decode_gives(box: Box) -> None:
    """Guards the twin: bright and dark are told apart by the brightness bundle."""
    reader = box.holder.current.reader
    for middle, name in ((850.0, "nodule"), (150.0, "normal")):
        voxels = np.linspace(middle - 50, middle + 50, 1024, dtype=np.float32).reshape(1, 32, 32)
        assert reader.read(Volume(voxels, (1.0, 1.0, 1.0), "XR")).predicted == name
