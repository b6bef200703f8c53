"""Rows of results and reviews as the pipeline and the page leave them, without images; a bundle that knows drift.

Writes only to the database and folder it is given.
Never asserts; tests do.
"""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from edge_agent import findings
from edge_agent.findings import Findings, LabelProbability
from models import drift
from models.adaptive import Calibration, bundled
from models.bundle import SHIPPED, Bundle, BundleParts, read_bundle, write_bundle
from models.calibration import softmax
from models.spec import Manifest, TaskSpec


def add_result(
    db: sqlite3.Connection,
    digest: str,
    task: TaskSpec,
    logits: Sequence[float],
    *,
    by: Calibration | None = None,
    ood: float = 1.0,
) -> int:
    """A series with its result, judged `by` (None: as an older version kept it); gives series_no."""
    used = by or bundled(task)
    labels = tuple(
        LabelProbability(label.name, label.code, float(p), label.is_finding)
        for label, p in zip(task.labels, softmax(np.array(logits), used.temperature), strict=True)
    )
    nothing, none = np.zeros(0, np.float32), np.zeros(0, np.int64)
    found = Findings(
        task=task.name, modality=task.modality, labels=labels,
        predicted=max(labels, key=lambda label: label.probability).name,
        prediction_set=tuple(label.name for label in labels if label.probability >= used.threshold),
        abstained=False, abstain_reason="", ood=ood, map_label=labels[1].name, bundle_digest=digest,
        bundle_name="b", bundle_version="1", provider="CPU", read_at=0.0, map_SHW=nothing,
        slice_weights_S=nothing, source_index_S=none, calibration=by,
    )  # fmt: skip
    (number,) = db.execute("SELECT COUNT(*) + 1 FROM series").fetchone()
    db.execute(
        "INSERT INTO series(series_no, StudyInstanceUID, SeriesInstanceUID, Modality, state, version, first_instance_at,"
        " last_instance_at) VALUES (?, '1.2', ?, 'CR', 'reported', 1, 0, 0)",
        (number, f"1.2.{number}"),
    )
    db.execute(
        "INSERT INTO results VALUES (?, ?, 1, ?, 0, 'CPU', ?, '', 0, 0, 0)",
        (number, number, digest, findings.to_json(found)),
    )
    return int(number)


def add_review(db: sqlite3.Connection, series_no: int, label: str) -> None:
    db.execute(
        "INSERT INTO reviews(result_no, series_no, verdict, label, reviewer, reviewed_at)"
        " SELECT result_no, series_no, 'corrected', ?, 'r', 0 FROM results WHERE series_no = ?",
        (label, series_no),
    )


def with_reference(path: Path, seed: int = 0) -> Bundle:
    """The shipped bundle, whose first task, and no other, expects readings, those that `expected` draws."""
    shipped = read_bundle(SHIPPED)
    logits_NK, ood_N = expected(seed, 300)
    first = shipped.manifest.tasks[0]
    told = msgspec.structs.replace(first, reference=drift.reference(logits_NK, ood_N, first.temperature))
    others = [msgspec.structs.replace(task, reference=None) for task in shipped.manifest.tasks[1:]]
    manifest: Manifest = msgspec.structs.replace(shipped.manifest, tasks=(told, *others))
    parts = BundleParts(
        manifest, shipped.onnx, shipped.weights, shipped.known_inputs, shipped.known_outputs, shipped.card
    )
    write_bundle(path, parts)
    return read_bundle(path)


def expected(seed: int, cases: int, distance: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """logits_NK and ood_N."""
    generator = np.random.default_rng(seed)
    return generator.normal(0, 2, (cases, 3)), distance * generator.gamma(9.0, 1 / 9, cases)
