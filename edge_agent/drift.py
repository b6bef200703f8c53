"""Drift: a notice for as long as a task's newest readings are unlike the bundle's reference.

Reads results; writes notices, which status, doctor and the heartbeat tell: task and statistic, nothing about patients.
Never changes how a series is judged.
Source: models.drift.
"""

import logging
import sqlite3
from collections.abc import Mapping

import msgspec
import numpy as np

from edge_agent import database, reviews, site_calibration
from edge_agent.reviews import Stated
from models import drift
from models.bundle import Bundle
from models.drift import Verdict
from models.errors import CaseError
from models.spec import Manifest, TaskSpec

log = logging.getLogger(__name__)

NEWEST = 1000  # results of all tasks among which each task's newest are looked for
ALARM = "drift of "  # and the task: name of the notice
ADVICE = "see what changed (scanner, protocol, patients) and review some of its series, so that this box follows"
_READINGS = """
    SELECT r.series_no, r.findings FROM results r
    JOIN series s ON s.series_no = r.series_no AND s.version = r.version
    WHERE r.bundle_digest = ? ORDER BY r.result_no DESC LIMIT ?
"""


def watch(db: sqlite3.Connection, bundle: Bundle, now: float) -> None:
    """Raise and end notices by what the results say now; may run any number of times."""
    drifted = {
        ALARM + task: text_of(task, verdict)
        for task, verdict in verdicts(db, bundle.digest, bundle.manifest).items()
        if verdict is not None and verdict.drifted
    }
    rows = db.execute("SELECT name FROM alarms WHERE substr(name, 1, ?) = ?", (len(ALARM), ALARM))
    raised = {row["name"] for row in rows.fetchall()}
    for name in drifted.keys() - raised:
        database.raise_alarm(db, name, drifted[name], now, is_notice=True)
        log.warning("%s", drifted[name])
    for name in raised - drifted.keys():
        database.end_alarm(db, name)
        log.info("%s is over", name)


def text_of(task: str, verdict: Verdict) -> str:
    return f"{task}: {verdict.of} has drifted by {verdict.statistic:.2f} (limit {verdict.limit:.2f}): {ADVICE}"


def verdicts(db: sqlite3.Connection, bundle_digest: str, manifest: Manifest) -> Mapping[str, Verdict | None]:
    """By task name; None without a reference or with too few readings. Asks the database only where there is one."""
    watched = {task.name: task for task in manifest.tasks if task.reference is not None}
    readings = _readings(db, bundle_digest, watched) if watched else {}
    return {task.name: _judge(task, readings.get(task.name, [])) for task in manifest.tasks}


def _readings(db: sqlite3.Connection, bundle_digest: str, watched: Mapping[str, TaskSpec]) -> dict[str, list[Stated]]:
    """Each task's newest, newest last."""
    found: dict[str, list[Stated]] = {name: [] for name in watched}
    for row in db.execute(_READINGS, (bundle_digest, NEWEST)):
        try:
            result = reviews.stated(row["findings"])
        except msgspec.ValidationError as error:
            log.warning("series %d: its result is left out: %s", row["series_no"], error)
            continue
        of_task = found.get(result.task)
        if of_task is not None and len(of_task) < drift.WINDOW:
            of_task.append(result)
        if all(len(results) == drift.WINDOW for results in found.values()):
            break
    return {name: results[::-1] for name, results in found.items()}


def _judge(task: TaskSpec, results: list[Stated]) -> Verdict | None:
    try:
        logits = [site_calibration.logits_of(result, task) for result in results]
        return drift.judge(task, np.array(logits), np.array([result.ood for result in results]))
    except CaseError as error:
        log.warning("%s: drift cannot be judged: %s", task.name, error)
        return None
