"""Intervals of shares by hand; the other scores are tested with the bench."""

import numpy as np
import pytest

from models import scores


def test_a_share_has_wilsons_interval() -> None:
    value, low, high = scores.share(np.array([True] * 8 + [False] * 2))
    assert value == 0.8
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_even_all_hits_leave_doubt() -> None:
    assert scores.share(np.ones(10, bool)) == pytest.approx((1.0, 0.7225, 1.0), abs=1e-4)
    assert scores.share(np.zeros(10, bool)) == pytest.approx((0.0, 0.0, 0.2775), abs=1e-4)
