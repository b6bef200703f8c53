"""Symmetric Skellam noise: whole numbers that each box adds to its words, so that their sum alone is private.

Reads random bytes of a source it is given; gives arrays of integers, and the bounds that go with them.
Never draws from what can be predicted: outside tests the source is the operating system's, `os.urandom`.
Source: the mechanism Agarwal, Kairouz, Liu 2021; the norm after rounding Kairouz, Liu, Steinke 2021, Theorem 1.

The difference of two Poisson numbers of half the variance each. A sum of such noises is one again, of the sum of their
variances: what the boxes add apart is exactly what one trusted party would have added to the sum.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RandomBytes = Callable[[int], bytes]

MAX_VARIANCE = 1 << 30  # of one draw: its table has 328,000 numbers
OVERFLOW = 1e-9  # chance that any value of a sum goes beyond `reach`
_TABLE_BITS = 63  # of a threshold; the last bit of a drawn word is the sign
_FIRST = 1 << 128  # where the recurrence begins: the error of a step is below one of it
_BEYOND = 50.0  # natural logarithm: what the table leaves out has a chance below 2^-71


def reach(variance: int, count: int) -> int:
    """What none of `count` noises of this variance exceeds, but with a chance of OVERFLOW.

    P(|X| > x) <= 2·exp(-x² / (2·(variance + x/3))): Bernstein, as cosh t - 1 <= t²/2 / (1 - t/3).
    """
    return _reach(variance, math.log(2.0 * count / OVERFLOW))


def rounded_norm_squared(norm: float, count: int) -> int:
    """Bound of the squared L2 norm of `count` values of this norm, each rounded up or down at random, mean kept.

    One draw in three stays within it at least: with a chance of 1 - exp(-1/2), whatever the values are.
    """
    return math.floor(norm**2 + count / 4.0 + norm + math.sqrt(count) / 2.0)


class Skellam:
    """Draws of one variance, from a table of their distribution in whole numbers.

    The chance of a number is right to 2^-63, so `count` draws differ from true ones by a total variation of less than
    count · 2^-44 at the largest variance. A sampler in floating point has no such bound.
    """

    def __init__(self, variance: int) -> None:
        if not 1 <= variance <= MAX_VARIANCE:
            raise ValueError(f"a variance of {variance}, not 1 to {MAX_VARIANCE}")
        self._thresholds = _thresholds(variance)

    def draw(self, count: int, random_bytes: RandomBytes) -> NDArray[np.int64]:
        drawn = np.frombuffer(random_bytes(8 * count), np.dtype("<u8"))
        below = np.searchsorted(self._thresholds, drawn >> np.uint64(1), side="right")
        magnitudes = self._thresholds.size - below.astype(np.int64)
        return np.where(drawn & np.uint64(1), -magnitudes, magnitudes)


def _thresholds(variance: int) -> NDArray[np.uint64]:
    """2^63 · P(|X| >= k), rising: for k from the largest that is worth a place down to 1.

    P(X = k) = exp(-v)·I_k(v). Bessel's recurrence I_{k-1} = I_{k+1} + 2k/v · I_k is stable downwards (Miller), and all
    chances add to 1.
    """
    last = _reach(variance, _BEYOND)
    above, here, weights = 0, _FIRST, []
    for k in range(last, 0, -1):
        weights.append(here)
        above, here = here, above + 2 * k * here // variance
    total, tail, thresholds = here + 2 * sum(weights), 0, np.empty(last, np.uint64)
    for place, weight in enumerate(weights):
        tail += weight
        thresholds[place] = (tail << (_TABLE_BITS + 1)) // total
    return thresholds


def _reach(variance: int, log_chance: float) -> int:
    return math.ceil(math.sqrt(2.0 * log_chance * variance) + 2.0 * log_chance / 3.0)
