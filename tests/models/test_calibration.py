"""Calibration on numbers that can be checked by hand, and the conformal promise on drawn ones."""

import numpy as np
import pytest

from models import calibration


def test_softmax_by_hand() -> None:
    np.testing.assert_allclose(calibration.softmax(np.log([[1.0, 3.0]])), [[0.25, 0.75]])
    np.testing.assert_allclose(calibration.softmax(np.log([[1.0, 9.0]]), temperature=2.0), [[0.25, 0.75]])
    assert np.isfinite(calibration.softmax(np.array([[1e4, -1e4]]))).all()


def test_the_threshold_by_hand() -> None:
    """19 cases at alpha 0.1: floor(20 · 0.1) = 2, so the second lowest probability of a true label is the threshold."""
    of_truth = np.array([0.05, 0.2, *([0.4] * 17)])
    probabilities_NK = np.stack([of_truth, 1 - of_truth], 1)
    assert calibration.conformal_threshold(probabilities_NK, np.zeros(19, int)) == pytest.approx(0.2)


def test_the_threshold_never_leaves_a_confident_label_out_and_needs_enough_cases() -> None:
    sure_NK = np.tile([0.99, 0.01], (50, 1))
    assert calibration.conformal_threshold(sure_NK, np.zeros(50, int)) == calibration.MAX_THRESHOLD
    assert calibration.conformal_threshold(sure_NK[:5], np.zeros(5, int)) == 0.0


def test_the_set_holds_the_truth_as_often_as_promised() -> None:
    generator = np.random.default_rng(0)
    logits_NK = generator.normal(0, 1.5, (4000, 3))
    probabilities_NK = calibration.softmax(logits_NK)
    truth_N = np.array([generator.choice(3, p=p) for p in probabilities_NK])
    threshold = calibration.conformal_threshold(probabilities_NK[:2000], truth_N[:2000])
    held_N = probabilities_NK[np.arange(2000, 4000), truth_N[2000:]] >= threshold
    assert 0.88 <= held_N.mean() <= 0.93


def test_temperature_undoes_overconfidence() -> None:
    generator = np.random.default_rng(1)
    logits_NK = generator.normal(0, 1, (5000, 3))
    truth_N = np.array([generator.choice(3, p=p) for p in calibration.softmax(logits_NK)])
    temperature = calibration.fit_temperature(logits_NK * 3, truth_N)
    assert temperature == pytest.approx(3.0, rel=0.1)
    before = calibration.expected_calibration_error(calibration.softmax(logits_NK * 3), truth_N)
    after = calibration.expected_calibration_error(calibration.softmax(logits_NK * 3, temperature), truth_N)
    assert after < 0.03 < before


def test_accuracies_and_calibration_error_by_hand() -> None:
    probabilities_NK = np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.2, 0.8]])
    truth_N = np.array([0, 0, 1, 1])
    assert calibration.accuracy(probabilities_NK, truth_N) == 0.75
    assert calibration.balanced_accuracy(probabilities_NK, truth_N) == pytest.approx((1.0 + 0.5) / 2)
    expected = 0.75 * (0.9 - 2 / 3) + 0.25 * (1 - 0.8)
    assert calibration.expected_calibration_error(probabilities_NK, truth_N) == pytest.approx(expected)
