"""A correction becomes knowledge: examples from reviewed series, and fine-tuning in a child process.

Reads reviews, instance files and a base bundle; writes examples/ and learning/ in data_dir and rows of `examples`.
Never imports torch, never sends anything, never trains on a held-out patient.
Source: ARCHITECTURE.md, "Five paths"; the split is by patient, as DICOM PS3.3 C.7.1.1 names one.
"""

import errno
import hashlib
import io
import logging
import os
import secrets
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pydicom
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from edge_agent import decode, instances
from edge_agent.config import Learning
from edge_agent.evaluation import Evaluation
from fleet_link.errors import SiteError
from fleet_link.files import write_durably
from fleet_link.messages import RoundPlan
from fleet_link.sealing import plan_digest
from models.bundle import Bundle
from models.errors import VolumeError
from models.preprocess import Volume, prepare
from models.spec import InputSpec, Manifest

log = logging.getLogger(__name__)

POLL_S = 0.2
GRACE_S = 5.0
TAIL_BYTES = 2000
# The child dies with the thread that started it, and is the first to go when memory ends.
GUARD = ("setpriv", "--pdeathsig", "KILL", "choom", "-n", "900", "--")

NEWEST_REVIEWS = """
    SELECT r.series_no, r.review_no, r.label FROM reviews r
    LEFT JOIN examples e ON e.series_no = r.series_no
    JOIN results o ON o.result_no = r.result_no
    JOIN series s ON s.series_no = r.series_no AND s.version = o.version AND s.state = 'reported'
    WHERE r.review_no = (SELECT MAX(review_no) FROM reviews WHERE series_no = r.series_no)
      AND (e.review_no IS NULL OR e.review_no < r.review_no)
    ORDER BY r.review_no
"""
# The other half: what the newest verdict on the newest result has already become.
EXAMPLES = """
    SELECT e.series_no, e.review_no, e.modality, e.label, e.split FROM examples e
    JOIN reviews r ON r.review_no = e.review_no
    JOIN results o ON o.result_no = r.result_no
    JOIN series s ON s.series_no = e.series_no AND s.version = o.version AND s.state = 'reported'
    WHERE e.split = ? AND r.review_no = (SELECT MAX(review_no) FROM reviews WHERE series_no = e.series_no)
"""


class CannotTrainError(SiteError):
    """This round comes to nothing here, however often it is tried."""


class TrainingStoppedError(Exception):
    """The box stops or the round is over: the work is dropped and may be done again."""


class Report(msgspec.Struct, frozen=True):
    """out/report.json of the child, as far as the box uses it."""

    examples: int
    heldout: int
    heldout_correct_before: int
    heldout_correct_after: int
    seconds: float
    peak_rss_bytes: int

    @property
    def evaluation(self) -> Evaluation:
        return Evaluation(self.heldout, self.heldout_correct_before, self.heldout_correct_after)


class _ChildError(msgspec.Struct, frozen=True):
    error: str


@dataclass(frozen=True)
class Trained:
    weights: dict[str, NDArray[np.float32]]
    report: Report


@dataclass(frozen=True)
class Example:
    series_no: int
    review_no: int  # of the verdict it teaches
    modality: str
    label: str
    split: str


def collect(db: sqlite3.Connection, data_dir: Path, manifest: Manifest, heldout_fraction: float) -> int:
    """Turn every new verdict into an example. Gives how many changed; a series that cannot be read is skipped.

    Raises SiteError when an example cannot be kept; the verdicts from there on wait.
    """
    changed = 0
    for review in db.execute(NEWEST_REVIEWS).fetchall():
        try:
            teaching = _read(db, data_dir, manifest, review["series_no"])
        except (SiteError, VolumeError, OSError) as error:
            log.warning("series %d: no example can be made of it: %s", review["series_no"], error)
            continue
        _keep(db, data_dir, teaching, review, split_of(teaching.patient, heldout_fraction))
        changed += 1
    return changed


def has_uncollected(db: sqlite3.Connection) -> bool:
    """True while a verdict has not become an example; one that never can also counts."""
    return db.execute(NEWEST_REVIEWS + " LIMIT 1").fetchone() is not None


def examples(db: sqlite3.Connection, modalities: Sequence[str], split: str) -> list[Example]:
    rows = db.execute(EXAMPLES + " ORDER BY e.series_no", (split,))
    return [Example(**dict(row)) for row in rows if row["modality"] in modalities]


def newest_heldout(db: sqlite3.Connection, most: int) -> list[Example]:
    """Of every modality, the last reviewed first."""
    rows = db.execute(EXAMPLES + " ORDER BY e.review_no DESC LIMIT ?", ("heldout", most))
    return [Example(**dict(row)) for row in rows]


def usable(
    db: sqlite3.Connection, data_dir: Path, base: Bundle, modalities: Sequence[str], split: str
) -> list[Example]:
    """Those whose modality and label `base` knows, and whose arrays or images are here."""
    labels: dict[str, set[str]] = {t.modality: {label.name for label in t.labels} for t in base.manifest.tasks}
    inputs: dict[str, InputSpec] = {spec.modality: spec for spec in base.manifest.inputs}
    return [
        example
        for example in examples(db, modalities, split)
        if example.label in labels.get(example.modality, set())
        and example.modality in inputs
        and _is_at_hand(db, data_dir, example, inputs[example.modality])
    ]


def _is_at_hand(db: sqlite3.Connection, data_dir: Path, example: Example, spec: InputSpec) -> bool:
    arrays = data_dir / example_path(example.series_no, spec)
    return arrays.exists() or bool(instances.open(db, data_dir, example.series_no))


def lay_out(db: sqlite3.Connection, data_dir: Path, base: Bundle, chosen: Sequence[Example], folder: Path) -> int:
    """Fill `folder` with examples.json and arrays for the child, as `base` wants its input. Gives the number to train on.

    Examples whose images are gone stay out. Raises SiteError or OSError when the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    listed = []
    for example in chosen:
        spec = base.manifest.input_for(example.modality)
        assert spec is not None  # chosen from `usable`
        try:
            path, arrays = _arrays_for(db, data_dir, example, spec)
        except (SiteError, VolumeError) as error:
            log.warning("series %d: not learned from: %s", example.series_no, error)
            continue
        if arrays is not None:
            write_durably(data_dir / path, arrays)
            db.execute("UPDATE examples SET path = ? WHERE series_no = ?", (path, example.series_no))
        _link(data_dir / path, folder / Path(path).name)
        name = Path(path).name
        listed.append({"path": name, "modality": example.modality, "label": example.label, "split": example.split})
    write_durably(folder / "examples.json", msgspec.json.encode(listed))
    return sum(entry["split"] == "train" for entry in listed)


def train(plan: RoundPlan, base: Bundle, folder: Path, learning: Learning, stopped: Callable[[], bool]) -> Trained:
    """Fine-tune `base` on folder/examples.json in a child process.

    Raises TrainingStoppedError when `stopped` says so; CannotTrainError when the child fails, takes too long or writes
    nonsense; SiteError or OSError when the disk refuses.
    """
    out = folder / "out"
    command = [*GUARD, "nice", "-n", str(learning.nice), sys.executable, "-P", "-m", "models.training", "finetune"]
    command += ["--bundle", str(base.path), "--examples", str(folder), "--out", str(out)]
    command += ["--epochs", str(plan.epochs), "--lr", str(plan.learning_rate), "--trainable", plan.trainable]
    # The seed of a masked round's training is the box's own: two rounds of one plan must not give the same update. So is
    # that of a buffered one: a later one, which may be masked, may have the update.
    seed = secrets.randbelow(1 << 31) if plan.kind == "masked" or plan.buffer else plan.seed
    command += ["--seed", str(seed), "--threads", str(learning.threads)]
    if plan.share < 1.0:
        command += ["--share", str(plan.share), "--share-seed", plan_digest(plan).hex()]
    run_child(command, folder, learning.timeout_s, stopped)
    return read_trained(out, base)


def run_child(command: Sequence[str], folder: Path, timeout_s: float, stopped: Callable[[], bool]) -> None:
    """Run to the end, with what it says in folder/child.log; raises as `train` does. The child never outlives the call."""
    log_path = folder / "child.log"
    deadline = time.monotonic() + timeout_s
    with log_path.open("wb") as log_file:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file, cwd=folder)
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(POLL_S)
                if child.returncode is not None:
                    break
                if stopped():
                    raise TrainingStoppedError
                if time.monotonic() > deadline:
                    raise CannotTrainError(
                        f"training took longer than {timeout_s:g} s", advice="raise learning.timeout_s"
                    )
        finally:
            _end(child)
    if child.returncode == -9:
        raise CannotTrainError("training was killed, most likely for want of memory", advice="give the box more memory")
    if child.returncode != 0:
        said = log_path.read_bytes()[-TAIL_BYTES:].decode("utf-8", "replace")
        if os.strerror(errno.ENOSPC) in said:
            raise SiteError("the disk is full", advice="free some space")
        raise CannotTrainError(f"training failed ({child.returncode}): {_complaint(said)}", advice=f"read {log_path}")


def read_trained(out: Path, base: Bundle) -> Trained:
    """What the child wrote, believed only as far as it fits the base."""
    try:
        report = msgspec.json.decode((out / "report.json").read_bytes(), type=Report)
        weights = safetensors_numpy.load_file(out / "weights.safetensors")
    except (OSError, msgspec.DecodeError, SafetensorError, ValueError) as error:
        raise CannotTrainError(
            f"training left no readable result: {error}", advice="compare the software's versions"
        ) from error
    for name, before in base.weights.items():
        if name not in weights or weights[name].shape != before.shape:
            raise CannotTrainError(f"training left no {name} of shape {before.shape}", advice="compare the versions")
        if not np.isfinite(weights[name]).all():
            raise CannotTrainError(
                f"training diverged: {name} is not finite", advice="ask the hub for a lower learning rate"
            )
    return Trained(weights, report)


def split_of(patient: str, heldout_fraction: float) -> str:
    """The same patient is always on the same side."""
    share = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64
    return "heldout" if share < heldout_fraction else "train"


def example_path(series_no: int, spec: InputSpec) -> str:
    """Named by the preprocessing too: a bundle with another spec needs other arrays."""
    tag = hashlib.sha256(msgspec.json.encode(spec)).hexdigest()[:8]
    return f"examples/{series_no}-{tag}.npz"


@dataclass(frozen=True)
class _Teaching:
    """A reviewed series as an example, not yet on the disk."""

    patient: str
    modality: str
    path: str  # relative to data_dir
    arrays: bytes


def _read(db: sqlite3.Connection, data_dir: Path, manifest: Manifest, series_no: int) -> _Teaching:
    paths = instances.open(db, data_dir, series_no)
    volume = decode.to_volume(paths).volume
    spec = manifest.input_for(volume.modality)
    if spec is None:
        raise SiteError(f"the bundle has no task for {volume.modality}")
    return _Teaching(_patient(paths[0]), volume.modality, example_path(series_no, spec), _arrays(volume, spec))


def _keep(db: sqlite3.Connection, data_dir: Path, teaching: _Teaching, review: sqlite3.Row, split: str) -> None:
    _drop_arrays(data_dir, review["series_no"])
    write_durably(data_dir / teaching.path, teaching.arrays)
    db.execute(
        "INSERT INTO examples VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT(series_no) DO UPDATE"
        " SET review_no = excluded.review_no, label = excluded.label, path = excluded.path",
        (review["series_no"], review["review_no"], teaching.modality, review["label"], split, teaching.path),
    )
    log.info("series %d: example for learning", review["series_no"])


def _drop_arrays(data_dir: Path, series_no: int) -> None:
    """Those for other input sizes too: the series may have had fewer images then."""
    try:
        for path in (data_dir / "examples").glob(f"{series_no}-*.npz"):
            path.unlink()
    except OSError as error:
        raise SiteError(f"an example cannot be replaced: {error.strerror}", advice="check disk and rights") from error


def _arrays_for(db: sqlite3.Connection, data_dir: Path, example: Example, spec: InputSpec) -> tuple[str, bytes | None]:
    """Path, and the arrays where they are not here: the bundle wants its input otherwise, or the file is lost."""
    path = example_path(example.series_no, spec)
    if (data_dir / path).exists():
        return path, None
    return path, _arrays(decode.to_volume(instances.open(db, data_dir, example.series_no)).volume, spec)


def _link(source: Path, target: Path) -> None:
    """The child reads names of its own folder only; a hard link costs no copy."""
    target.unlink(missing_ok=True)
    os.link(source, target)


def _arrays(volume: Volume, spec: InputSpec) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, slices_SHW=prepare(volume, spec).slices_SHW.astype(np.float16))
    return content.getvalue()


def _patient(path: Path) -> str:
    ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID", "StudyInstanceUID"])
    return str(ds.get("PatientID") or ds.get("StudyInstanceUID") or path)


def _complaint(said: str) -> str:
    """The child's own words: its last line, which is JSON where it knows what is wrong."""
    last = said.strip().splitlines()[-1] if said.strip() else "it said nothing"
    try:
        return msgspec.json.decode(last, type=_ChildError).error[:300]
    except msgspec.DecodeError:
        return last[:300]


def _end(child: "subprocess.Popen[bytes]") -> None:
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
    if child.poll() is None:
        child.kill()
        child.wait()
