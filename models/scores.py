"""Scores of predictions with their uncertainty.

Reads and writes arrays in memory.
Never judges the examples that something was fitted on.
Source: AUC as the Mann-Whitney statistic (Hanley 1982); percentile bootstrap (Efron 1979); share (Wilson 1927).
Axes: N cases, K labels.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from models import calibration
from models.calibration import F64

BOOTSTRAPS = 1000
Score = Callable[[F64, NDArray[np.int64]], float]
Interval = tuple[float, float, float]  # value, 2.5 %, 97.5 %
_Z = 1.959964  # of the normal distribution, 97.5 %


def auc(score_N: NDArray[np.floating], is_positive_N: NDArray[np.bool_]) -> float:
    """Probability that a positive case scores above a negative one; ties count half."""
    rank_N = _average_ranks(score_N)
    positives, negatives = int(is_positive_N.sum()), int((~is_positive_N).sum())
    return float((rank_N[is_positive_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def macro_auc(probabilities_NK: F64, truth_N: NDArray[np.int64]) -> float:
    """Mean over the labels of one against the rest."""
    labels = [k for k in range(probabilities_NK.shape[1]) if 0 < (truth_N == k).sum() < len(truth_N)]
    return float(np.mean([auc(probabilities_NK[:, k], truth_N == k) for k in labels]))


def interval(score: Score, probabilities_NK: F64, truth_N: NDArray[np.int64]) -> Interval:
    """Cases are drawn again within each label, so that none is missing."""
    generator = np.random.default_rng(0)
    strata = [np.flatnonzero(truth_N == k) for k in np.unique(truth_N)]
    values = []
    for _ in range(BOOTSTRAPS):
        drawn_N = np.concatenate([generator.choice(stratum, len(stratum)) for stratum in strata])
        values.append(score(probabilities_NK[drawn_N], truth_N[drawn_N]))
    low, high = np.percentile(values, (2.5, 97.5))
    return score(probabilities_NK, truth_N), float(low), float(high)


def share(is_hit_N: NDArray[np.bool_]) -> Interval:
    """The share of hits; at least one case. Unlike a bootstrap it gives no interval of width 0 for 0 or N hits."""
    count, value = len(is_hit_N), float(is_hit_N.mean())
    middle = (value + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z * float(np.sqrt(value * (1 - value) / count + _Z**2 / (4 * count**2))) / (1 + _Z**2 / count)
    return value, max(0.0, middle - half), min(1.0, middle + half)


def coverage(probabilities_NK: F64, truth_N: NDArray[np.int64], threshold: float) -> float:
    """Share of cases whose true label is in the conformal set."""
    return float((calibration.of_truth(probabilities_NK, truth_N) >= threshold).mean())


SCORES: dict[str, Score] = {
    "accuracy": calibration.accuracy,
    "balanced": calibration.balanced_accuracy,
    "auc": macro_auc,
    "ece": calibration.expected_calibration_error,
}


def _average_ranks(value_N: NDArray[np.floating]) -> F64:
    _, inverse_N, count_U = np.unique(value_N, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count_U) - (count_U - 1) / 2.0)[inverse_N], np.float64)
