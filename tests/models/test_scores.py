"""Scores against known values, intervals of shares by hand."""

import numpy as np
import pytest

from models import scores


def test_auc_of_known_scores() -> None:
    positive_N = np.array([False, False, True, True])
    assert scores.auc(np.array([0.1, 0.4, 0.35, 0.8]), positive_N) == 0.75
    assert scores.auc(np.array([1.0, 2.0, 3.0, 4.0]), positive_N) == 1.0
    assert scores.auc(np.zeros(4), positive_N) == 0.5  # ties count half


def test_interval_holds_its_value_and_narrows_with_more_cases() -> None:
    def width(cases: int) -> float:
        truth_N = np.arange(cases) % 2
        right_N = np.arange(cases) % 5 > 0
        probabilities_NK = np.eye(2)[np.where(right_N, truth_N, 1 - truth_N)]
        value, low, high = scores.interval(scores.SCORES["accuracy"], probabilities_NK, truth_N)
        assert low <= value <= high
        assert value == pytest.approx(right_N.mean())
        return high - low

    assert width(1000) < width(50)


def test_coverage_counts_the_true_label_alone() -> None:
    probabilities_NK = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    assert scores.coverage(probabilities_NK, np.array([0, 1, 1]), 0.5) == pytest.approx(2 / 3)


def test_a_share_has_wilsons_interval() -> None:
    value, low, high = scores.share(np.array([True] * 8 + [False] * 2))
    assert value == 0.8
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_even_all_hits_leave_doubt() -> None:
    assert scores.share(np.ones(10, bool)) == pytest.approx((1.0, 0.7225, 1.0), abs=1e-4)
    assert scores.share(np.zeros(10, bool)) == pytest.approx((0.0, 0.0, 0.2775), abs=1e-4)
