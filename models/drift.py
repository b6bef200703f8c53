"""Drift: are a site's recent readings still like those that the bundle was calibrated on?

Reads confidences and out-of-distribution scores of readings; gives a reference for the bundle, and a verdict against it.
Never looks at an image, never says why: other scanner, other patients and other mixture of findings look alike to it.
Source: two-sample Kolmogorov–Smirnov statistic (Smirnov 1939; Hodges 1958). Axes: N readings, K labels, Q reference points.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.calibration import F64, softmax
from models.errors import CaseError
from models.spec import Reference, TaskSpec

POINTS = 100  # of each distribution, kept in the bundle
WINDOW = 50  # newest readings that are judged
ENOUGH = 30  # fewer are not
# Chance of an alarm from one window of readings like the reference. Windows overlap: within 500 undrifted readings, 1 % of
# 600 boxes heard one at 1e-4 and none at 1e-5. The least difference seen is then 0.39. tests/models/test_drift.py.
FALSE_ALARM = 1e-5
_MOST_LOG_ODDS = 12.0
_DECIMALS = 4  # of both sides: where values pile up, a reference rounded alone would lie beside them


@dataclass(frozen=True)
class Verdict:
    """The larger of both differences of a task's recent readings to its reference."""

    of: Literal["confidence", "out-of-distribution score"]
    statistic: float  # greatest distance between the cumulative distributions, 0..1
    limit: float
    readings: int

    @property
    def drifted(self) -> bool:
        return self.statistic > self.limit


def reference(logits_NK: NDArray[np.floating], ood_N: NDArray[np.floating], temperature: float) -> Reference:
    """What the held-back cases of one task look like; for its TaskSpec.

    Raises CaseError for fewer than ENOUGH cases and for values that are not finite.
    """
    if len(logits_NK) < ENOUGH or len(logits_NK) != len(ood_N):
        raise CaseError(f"{len(logits_NK)} cases are too few for a reference", advice=f"hold back {ENOUGH} or more")
    confidence_N = confidence(logits_NK, temperature)
    _check_finite(confidence_N, ood_N)
    return Reference(cases=len(logits_NK), confidence_Q=_points(confidence_N), ood_Q=_points(ood_N))


def confidence(logits_NK: NDArray[np.floating], temperature: float) -> F64:
    """Log odds of the most likely label at the bundle's own temperature; a number added to a case's logits is nothing."""
    top_N = softmax(logits_NK, temperature).max(-1)
    with np.errstate(divide="ignore"):
        odds_N = np.log(top_N) - np.log1p(-top_N)
    return np.asarray(np.clip(odds_N, -_MOST_LOG_ODDS, _MOST_LOG_ODDS))


def judge(task: TaskSpec, logits_NK: NDArray[np.floating], ood_N: NDArray[np.floating]) -> Verdict | None:
    """The newest WINDOW of a task's readings, newest last. None without a reference or with fewer than ENOUGH.

    Raises CaseError for values that are not finite.
    """
    if task.reference is None or len(logits_NK) < ENOUGH:
        return None
    confidence_N, recent_ood_N = confidence(logits_NK[-WINDOW:], task.temperature), np.asarray(ood_N)[-WINDOW:]
    _check_finite(confidence_N, recent_ood_N)
    of_confidence = greatest_distance(np.array(task.reference.confidence_Q), confidence_N)
    of_ood = greatest_distance(np.array(task.reference.ood_Q), recent_ood_N)
    limit = distance_limit(len(confidence_N), task.reference.cases)
    if of_ood >= of_confidence:
        return Verdict("out-of-distribution score", of_ood, limit, len(confidence_N))
    return Verdict("confidence", of_confidence, limit, len(confidence_N))


def greatest_distance(one_N: NDArray[np.floating], other_N: NDArray[np.floating]) -> float:
    """The Kolmogorov–Smirnov statistic."""
    one_N, other_N = np.round(one_N, _DECIMALS), np.round(other_N, _DECIMALS)
    at_N = np.concatenate([one_N, other_N])
    below_one_N = np.searchsorted(np.sort(one_N), at_N, side="right") / len(one_N)
    below_other_N = np.searchsorted(np.sort(other_N), at_N, side="right") / len(other_N)
    return float(np.abs(below_one_N - below_other_N).max())


def distance_limit(readings: int, cases: int) -> float:
    """Passed by chance in at most FALSE_ALARM of windows, both distributions together."""
    one_sided = FALSE_ALARM / 4  # two statistics, two sides
    return float(np.sqrt(-np.log(one_sided) / 2 * (1 / readings + 1 / cases)))


def _points(values_N: NDArray[np.floating]) -> tuple[float, ...]:
    levels_Q = (np.arange(POINTS) + 0.5) / POINTS
    return tuple(round(float(value), _DECIMALS) for value in np.quantile(np.asarray(values_N, np.float64), levels_Q))


def _check_finite(confidence_N: F64, ood_N: NDArray[np.floating]) -> None:
    if not (np.isfinite(confidence_N).all() and np.isfinite(ood_N).all()):
        raise CaseError("a reading is not finite", advice="see which provider computed it: `edge-agent doctor`")
