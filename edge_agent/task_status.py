"""What `status` and `doctor` say of each task: how often its sets held the reviewer's label, what it is judged by, its drift.

Reads box.db and the file of the bundle that reads; the daemon need not run.
Never shows patient data and never changes anything.
"""

import sqlite3
from dataclasses import dataclass

from edge_agent import bundles, drift, site_calibration
from edge_agent.config import Config
from models.bundle import Bundle, read_bundle
from models.drift import ENOUGH, Verdict
from models.errors import BundleError
from models.spec import TaskSpec


@dataclass(frozen=True)
class TaskStatus:
    task: str
    reviewed: int  # under the bundle in use
    covered: int  # of these: the set shown held the reviewer's label
    covered_by_bundle: int  # and would have, by the bundle's own calibration
    threshold_of_bundle: float
    threshold: float  # for the next series
    temperature_of_bundle: float
    temperature: float
    drift: float | None  # None where it is not watched, or not yet
    drift_limit: float | None
    drift_said: str  # for people
    drifted: bool


def gather(db: sqlite3.Connection, config: Config) -> list[TaskStatus]:
    """Nothing where there is no bundle yet, or its file is damaged: the next start of the daemon tells that."""
    path = bundles.file_that_reads(db, config.box.data_dir)
    if path is None:
        return []
    try:
        bundle = read_bundle(path)
    except BundleError:
        return []
    verdicts = drift.verdicts(db, bundle.digest, bundle.manifest)
    return [_of(db, config, bundle, task, verdicts[task.name]) for task in bundle.manifest.tasks]


def _of(db: sqlite3.Connection, config: Config, bundle: Bundle, task: TaskSpec, verdict: Verdict | None) -> TaskStatus:
    standing = site_calibration.standing(db, bundle.digest, task)
    used = standing.site if config.inference.adapt else standing.bundle
    return TaskStatus(
        task=task.name,
        reviewed=standing.site.cases,
        covered=standing.held,
        covered_by_bundle=standing.held_by_bundle,
        threshold_of_bundle=standing.bundle.threshold,
        threshold=used.threshold,
        temperature_of_bundle=standing.bundle.temperature,
        temperature=used.temperature,
        drift=verdict.statistic if verdict else None,
        drift_limit=verdict.limit if verdict else None,
        drift_said=_said(task, verdict),
        drifted=verdict is not None and verdict.drifted,
    )


def _said(task: TaskSpec, verdict: Verdict | None) -> str:
    if task.reference is None:
        return "no reference"
    if verdict is None:
        return f"fewer than {ENOUGH} readings"
    return (
        f"{'drifted' if verdict.drifted else 'none'}: {verdict.of} {verdict.statistic:.2f} (limit {verdict.limit:.2f})"
    )
