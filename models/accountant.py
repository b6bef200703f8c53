"""The privacy accountant of masked rounds: what the sums a box stood in have cost it, as (epsilon, delta).

Reads the numbers of each round's noise; gives the privacy loss of all rounds together.
Never counts on chance or on the hub: no amplification by subsampling, and no noise but that of the boxes taken as honest.
Source: Agarwal, Kairouz, Liu 2021, Corollary 3.6; Rényi composition Mironov 2017; conversion Balle et al. 2020, Theorem 21.

Neighbours are two rounds that differ in one box's update: the one it sent, or zeros. That it stood in the round, its
number of examples and what it says to the hub in words are not protected.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from models.layout import Layout

# Whole numbers: for others the mechanism's bound is not proved. Opacus' own between 2 and 63, and some above for a
# small loss. The best order of a loss so large that it lies below 2 is left to 2.
ORDERS = (*range(2, 64), *range(64, 257, 16), 512, 1024)


@dataclass(frozen=True)
class Cost:
    """One round, in levels of its words. Costs add up in Rényi divergence, not in epsilon."""

    l2_squared: int  # the most that one box's values may be
    l1: int
    variance: int  # of the noise in the sum, that of the honest boxes alone


def cost_of(layout: Layout) -> Cost | None:
    """None for a round without noise: nothing bounds what it tells."""
    if not layout.noise:
        return None
    l2_squared = layout.most_norm_squared
    # whole numbers: |x| <= x²
    l1 = min(l2_squared, math.isqrt(layout.padded * l2_squared) + 1)
    return Cost(l2_squared, l1, layout.noise_boxes * layout.noise_variance)


def epsilon(costs: Iterable[Cost], delta: float) -> float:
    """Of all these rounds together, at this delta; 0.0 of none."""
    if not 0.0 < delta < 1.0:
        raise ValueError(f"a delta of {delta}, not between 0 and 1")
    listed = list(costs)
    if not listed:
        return 0.0
    return max(0.0, min(_converted(sum(divergence(cost, order) for cost in listed), order, delta) for order in ORDERS))


def divergence(cost: Cost, order: int) -> float:
    """Bound of the Rényi divergence of this order between a sum with the box's values and one without."""
    l2_squared, l1, variance = cost.l2_squared, cost.l1, cost.variance
    fine = ((2 * order - 1) * l2_squared + 6 * l1) / (4 * variance**2)
    coarse = 3 * l1 / (2 * variance)
    return order * l2_squared / (2 * variance) + min(fine, coarse)


def _converted(divergence_sum: float, order: int, delta: float) -> float:
    return divergence_sum - (math.log(delta) + math.log(order)) / (order - 1) + math.log1p(-1 / order)
