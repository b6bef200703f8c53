"""Calibration: temperature, conformal threshold, calibration error, accuracy.

Reads and writes arrays in memory.
Never trains weights.
Source: temperature scaling (Guo 2017), split conformal prediction (Vovk 2005; Angelopoulos 2021, section 1). Axes: N cases, K labels.
"""

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
ALPHA = 0.1  # the true label is in the set for at least 1 - ALPHA of cases like those calibrated on
MAX_THRESHOLD = 0.5  # above it a confident label could miss its own set; lower only adds coverage
_TEMPERATURES = np.geomspace(0.25, 8.0, 201)


def softmax(logits_NK: NDArray[np.floating], temperature: float = 1.0) -> F64:
    scaled_NK = np.asarray(logits_NK, np.float64) / temperature
    powers_NK = np.exp(scaled_NK - scaled_NK.max(-1, keepdims=True))
    return np.asarray(powers_NK / powers_NK.sum(-1, keepdims=True))


def fit_temperature(logits_NK: NDArray[np.floating], truth_N: NDArray[np.integer]) -> float:
    """The temperature with the least negative log-likelihood, by search over a fixed grid."""
    losses = [negative_log_likelihood(softmax(logits_NK, float(t)), truth_N) for t in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmin(losses))])


def negative_log_likelihood(probabilities_NK: F64, truth_N: NDArray[np.integer]) -> float:
    return float(-np.log(np.clip(of_truth(probabilities_NK, truth_N), 1e-12, 1.0)).mean())


def conformal_threshold(probabilities_NK: F64, truth_N: NDArray[np.integer], alpha: float = ALPHA) -> float:
    """Label k belongs to the set where p_k >= threshold; coverage 1 - alpha by split conformal prediction.

    0 (every label in every set) where there are too few cases for the promise.
    """
    return threshold_of(of_truth(probabilities_NK, truth_N), alpha)


def threshold_of(scores_N: NDArray[np.floating], alpha: float) -> float:
    """The same, from the probabilities that the true labels were given."""
    order_N = np.sort(scores_N)
    left_out = int(np.floor((len(order_N) + 1) * alpha))  # how many of the lowest may fall outside
    return min(float(order_N[left_out - 1]), MAX_THRESHOLD) if left_out >= 1 else 0.0


def expected_calibration_error(probabilities_NK: F64, truth_N: NDArray[np.integer], bins: int = 10) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of confidence."""
    confidence_N = probabilities_NK.max(1)
    right_N = probabilities_NK.argmax(1) == truth_N
    bin_N = np.minimum((confidence_N * bins).astype(int), bins - 1)
    gaps = [
        (bin_N == b).mean() * abs(confidence_N[bin_N == b].mean() - right_N[bin_N == b].mean())
        for b in np.unique(bin_N)
    ]
    return float(np.sum(gaps))


def accuracy(probabilities_NK: F64, truth_N: NDArray[np.integer]) -> float:
    return float((probabilities_NK.argmax(1) == truth_N).mean())


def balanced_accuracy(probabilities_NK: F64, truth_N: NDArray[np.integer]) -> float:
    """Mean recall of the labels that occur."""
    right_N = probabilities_NK.argmax(1) == truth_N
    return float(np.mean([right_N[truth_N == k].mean() for k in np.unique(truth_N)]))


def of_truth(probabilities_NK: F64, truth_N: NDArray[np.integer]) -> F64:
    return np.asarray(probabilities_NK[np.arange(len(truth_N)), truth_N])
