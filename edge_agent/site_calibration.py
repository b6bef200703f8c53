"""Site calibration: what this site's verdicts make of the temperature and threshold of the bundle in use.

Reads reviews and results; keeps nothing of its own: the same rows give the same calibration after any crash.
Never uses a verdict on another bundle's result, since only its own readings say how sure a bundle is.
Source: models.adaptive; verdicts in the order in which they were given.
"""

import logging
import sqlite3
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent import reviews
from edge_agent.reviews import Stated
from models import adaptive
from models.adaptive import Calibration
from models.bundle import Bundle
from models.errors import CaseError
from models.spec import TaskSpec

log = logging.getLogger(__name__)

MAX_CASES = 500  # the newest; older ones no longer change anything
_REVIEWED = """
    SELECT v.series_no, v.label, r.findings FROM reviews v JOIN results r USING (result_no)
    WHERE r.bundle_digest = ? AND json_extract(r.findings, '$.task') = ?
      AND v.review_no = (SELECT MAX(review_no) FROM reviews WHERE series_no = v.series_no)
    ORDER BY v.review_no DESC LIMIT ?
"""


@dataclass(frozen=True)
class Standing:
    """Of one task: how often the set held the reviewer's label, and what the next series will be judged by."""

    bundle: Calibration
    site: Calibration
    held: int = 0  # of site.cases, with the set that the result showed
    held_by_bundle: int = 0  # with the set that the bundle's own calibration would have shown


class SiteCalibration:
    """For one thread. Reads the cases again only where there is a new verdict or another bundle."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[str, int], Calibration]] = {}

    def of(self, db: sqlite3.Connection, bundle: Bundle, task: TaskSpec) -> Calibration:
        newest = int(db.execute("SELECT COALESCE(MAX(review_no), 0) FROM reviews").fetchone()[0])
        known = self._known.get(task.name)
        if known is None or known[0] != (bundle.digest, newest):
            known = (bundle.digest, newest), standing(db, bundle.digest, task).site
            self._known[task.name] = known
        return known[1]


def standing(db: sqlite3.Connection, bundle_digest: str, task: TaskSpec) -> Standing:
    """From every case that counts. A case that cannot be used is left out and logged."""
    state, own = adaptive.start(task), adaptive.bundled(task)
    held = held_by_bundle = 0
    rows = db.execute(_REVIEWED, (bundle_digest, task.name, MAX_CASES)).fetchall()
    for row in reversed(rows):
        try:
            result = reviews.stated(row["findings"])
            logits_K, truth = logits_of(result, task), _index(task, row["label"])
            state = adaptive.learn(state, logits_K, truth)
        except (CaseError, msgspec.ValidationError) as error:
            log.warning("series %d: its verdict does not calibrate: %s", row["series_no"], error)
            continue
        held += row["label"] in result.prediction_set
        held_by_bundle += adaptive.holds(own, logits_K, truth)
    return Standing(own, state.calibration, held, held_by_bundle)


def logits_of(result: Stated, task: TaskSpec) -> NDArray[np.float64]:
    """What the network said, but for a number added to all. Raises CaseError where the labels are not the task's."""
    by_name = {label.name: label.probability for label in result.labels}
    if set(by_name) != {label.name for label in task.labels}:
        raise CaseError(f"its labels are not those of {task.name}", advice="the result is left out")
    probabilities_K = np.array([by_name[label.name] for label in task.labels])
    return adaptive.raw_logits(probabilities_K, (result.calibration or adaptive.bundled(task)).temperature)


def _index(task: TaskSpec, label: str) -> int:
    names = [known.name for known in task.labels]
    if label not in names:
        raise CaseError(f"the task {task.name} has no label {label!r}", advice="the case is left out")
    return names.index(label)
