"""Rules that a minority cannot move far, whatever they send: of boxes in open rounds, of groups' means in masked ones.

Reads the updates anew in each pass, as the files on disk are the truth; gives one float32 array per tensor. Memory is
O(model) plus `memory_bytes`, whatever the number of boxes.
Never lets a box weigh more by claiming more examples: order and choice count each box once, and clipping counts a weight
above the median weight as the median, so that f of n boxes hold at most 2f/n of its mean.
Source: median and trimmed mean Yin 2018; Krum Blanchard 2017, its mean of several Damaskinos 2019; centred clipping
Karimireddy 2021; group means Karimireddy 2022; sorting network Batcher 1968.
Axes: B boxes, C coordinates (all tensors one after the other, by name).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, prod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cloud_hub.aggregation import Shapes, check_update
from fleet_link.errors import LinkError, SiteError, TrustError

Arrays = dict[str, NDArray[np.float32]]
Delta = Mapping[str, NDArray[np.floating]]
Matrix = NDArray[np.float64]
Read = Callable[[], Iterator[tuple[Delta, int]]]  # each update and its weight, from the first; the same each time

MEMORY_BYTES = 256 << 20
ROBUST_MIN = 3  # updates or groups: with two no rule can tell who is off
_BLOCK = 1 << 14  # coordinates handled at once: 32 boxes of them stay in the processor's cache
_PLAN = "correct the round's plan"


@dataclass(frozen=True)
class Updates:
    """The counted updates of one round."""

    read: Read
    boxes: int  # as many as `read` gives
    shapes: Shapes
    memory_bytes: int = MEMORY_BYTES  # of all boxes' coordinates held at once; fewer bytes are more passes

    @property
    def coordinates(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())


class Rule(Protocol):
    def over(self, updates: Updates) -> Arrays: ...


def aggregate(rule: Rule, updates: Updates) -> Arrays:
    """Raises TrustError on an update that is not sound and where there is none, LinkError where the rule needs more
    boxes, SiteError where other updates can be read than were counted.
    """
    if updates.boxes == 0:
        raise TrustError("no update to average", advice="wait for devices to deliver")
    return rule.over(updates)


def bucketed(rule: Rule, means: Sequence[tuple[Delta, int]], shapes: Shapes) -> Arrays:
    """A rule over groups' means, where a masked round opens the sum of each group alone: each mean, and its boxes.

    A box spoils the mean of its own group and no other: f boxes are at most f bad groups, which is what the rule must
    withstand, of the groups and not of the boxes. Memory: the means are held, O(model) for each group.
    Raises as aggregate does.
    """
    return aggregate(rule, Updates(lambda: iter(means), len(means), shapes))


class Deferred:
    """Stands where RunningSum does: checks and counts updates as they come, and reads them all again for the mean."""

    def __init__(self, rule: Rule, shapes: Shapes, read: Read) -> None:
        self._rule, self._shapes, self._read = rule, shapes, read
        self.updates = 0

    def add(self, delta: Delta, weight: int) -> None:
        """Raises TrustError as check_update does."""
        check_update(delta, weight, self._shapes)
        self.updates += 1

    def mean(self) -> Arrays:
        """Raises as aggregate does."""
        return aggregate(self._rule, Updates(self._read, self.updates, self._shapes))


# --- rules by coordinate --------------------------------------------------------------------------


@dataclass(frozen=True)
class Median:
    """Of each coordinate; the mean of the two in the middle where the boxes are even. Withstands fewer than half."""

    def over(self, updates: Updates) -> Arrays:
        return _middle_mean(updates, (updates.boxes - 1) // 2)


@dataclass(frozen=True)
class TrimmedMean:
    """Of each coordinate, without the lowest and the highest `trim` of the boxes: at least one each, from three on."""

    trim: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 < self.trim < 0.5:
            raise SiteError(f"trim is {self.trim}, not between 0 and 0.5", advice=_PLAN)

    def over(self, updates: Updates) -> Arrays:
        cut = ceil(self.trim * updates.boxes - 1e-9)  # 0.2 · 15 is a little above 3
        return _middle_mean(updates, min(cut, (updates.boxes - 1) // 2))


def _middle_mean(updates: Updates, cut: int) -> Arrays:
    """Mean of each coordinate without the `cut` lowest and the `cut` highest."""
    flat_C = np.empty(updates.coordinates, np.float32)
    for window in _windows(updates):
        for start, block_BC in _blocks(window.x_BC):
            _sort_columns(block_BC)
            begin = window.first + start
            flat_C[begin : begin + block_BC.shape[1]] = block_BC[cut : len(block_BC) - cut].mean(0, dtype=np.float64)
    return _as_tensors(flat_C, updates.shapes)


def _sort_columns(x_BC: NDArray[np.float32]) -> None:
    """In place. Whole rows are compared at once: 3 times as fast as numpy's sort for 8 boxes and for 32."""
    low_C = np.empty(x_BC.shape[1], np.float32)
    for i, j in _comparators(len(x_BC)):
        np.minimum(x_BC[i], x_BC[j], out=low_C)
        np.maximum(x_BC[i], x_BC[j], out=x_BC[j])
        x_BC[i] = low_C


@cache
def _comparators(rows: int) -> tuple[tuple[int, int], ...]:
    """Batcher's odd-even merge sort of any number of rows: (i, j) puts the lower into i."""
    found, merged = [], 1
    while merged < rows:
        step = merged
        while step:
            for start in range(step % merged, rows - step, 2 * step):
                for i in range(start, min(start + step, rows - step)):
                    if i // (2 * merged) == (i + step) // (2 * merged):
                        found.append((i, i + step))
            step //= 2
        merged *= 2
    return tuple(found)


# --- rules by distance: each result is Σ a_i·Δ_i, and the a_i follow from the updates' inner products ----------------


@dataclass(frozen=True)
class Krum:
    """The update whose n - f - 2 nearest others are nearest; or the mean of the `keep` best of them.

    byzantine: f; None is as many as the boxes allow, (n - 3) // 2. keep: None is n - f - 2.
    """

    byzantine: int | None = None
    keep: int | None = 1

    def __post_init__(self) -> None:
        if self.byzantine is not None and self.byzantine < 0:
            raise SiteError(f"Krum against {self.byzantine} boxes: there is no such number", advice=_PLAN)
        if self.keep is not None and self.keep < 1:
            raise SiteError(f"Krum keeps {self.keep} updates: it must keep one", advice=_PLAN)

    def over(self, updates: Updates) -> Arrays:
        near = self._near(updates.boxes)
        products_BB, _ = _products(updates)
        best_B = _by_score(products_BB, near)[: near if self.keep is None else self.keep]
        part_B = np.zeros(updates.boxes)
        part_B[best_B] = 1.0 / len(best_B)
        return _combined(updates, part_B)

    def _near(self, boxes: int) -> int:
        byzantine = max(0, (boxes - 3) // 2) if self.byzantine is None else self.byzantine
        near = boxes - byzantine - 2
        if boxes <= 2 * byzantine + 2:
            raise LinkError(
                f"Krum against {byzantine} boxes needs more than {2 * byzantine + 2} updates, not {boxes}",
                advice="wait for more boxes or start a round with the median",
            )
        if self.keep is not None and self.keep > near:
            raise LinkError(
                f"Krum against {byzantine} boxes may keep {near} of {boxes} updates, not {self.keep}",
                advice="wait for more boxes or keep fewer",
            )
        return near


def _by_score(products_BB: Matrix, near: int) -> NDArray[np.intp]:
    """Boxes, best first. Of two that are each other's nearest the one with the smaller norm comes first."""
    square_B = np.diag(products_BB)
    distance_BB = np.maximum(square_B[:, None] + square_B[None, :] - 2 * products_BB, 0.0)
    np.fill_diagonal(distance_BB, np.inf)
    return np.lexsort((square_B, np.sort(distance_BB, axis=1)[:, :near].sum(1)))


@dataclass(frozen=True)
class CentredClip:
    """From no change on, `iterations` times: the centre plus the mean of what each update differs from it, that clipped.

    radius: L2; None is the median of the updates' distances to the centre, anew each time.
    """

    radius: float | None = None
    iterations: int = 5

    def __post_init__(self) -> None:
        if self.iterations < 1 or (self.radius is not None and not 0.0 < self.radius < np.inf):
            raise SiteError(f"clipping to {self.radius}, {self.iterations} times: there is no such rule", advice=_PLAN)

    def over(self, updates: Updates) -> Arrays:
        products_BB, weight_B = _products(updates)
        weight_B = np.minimum(weight_B, np.median(weight_B))
        weight_B /= weight_B.sum()
        part_B = np.zeros(updates.boxes)
        for _ in range(self.iterations):
            part_B = self._step(part_B, products_BB, weight_B)
        return _combined(updates, part_B)

    def _step(self, part_B: Matrix, products_BB: Matrix, weight_B: Matrix) -> Matrix:
        """v + Σ w_i·s_i·(Δ_i - v), where v = Σ a_i·Δ_i, so ‖Δ_i - v‖² = G_ii - 2(Ga)_i + aᵀGa."""
        to_centre_B = products_BB @ part_B
        square_B = np.maximum(np.diag(products_BB) - 2 * to_centre_B + part_B @ to_centre_B, 0.0)
        distance_B = np.sqrt(square_B)
        radius = np.median(distance_B) if self.radius is None else self.radius
        kept_B = np.divide(radius, distance_B, out=np.ones_like(distance_B), where=distance_B > radius)
        pull_B = weight_B * kept_B
        return np.asarray((1.0 - pull_B.sum()) * part_B + pull_B, np.float64)


def _products(updates: Updates) -> tuple[Matrix, Matrix]:
    """⟨Δ_i, Δ_j⟩ over all coordinates, and the boxes' weights."""
    products_BB, weight_B = np.zeros((updates.boxes, updates.boxes)), np.ones(updates.boxes)
    for window in _windows(updates):
        weight_B = window.weight_B
        for _, block_BC in _blocks(window.x_BC):
            precise_BC = block_BC.astype(np.float64)
            products_BB += precise_BC @ precise_BC.T
    return products_BB, weight_B


def _combined(updates: Updates, part_B: Matrix) -> Arrays:
    """Σ a_i·Δ_i in one pass."""
    total = {name: np.zeros(shape, np.float64) for name, shape in updates.shapes.items()}
    for part, (delta, _) in zip(part_B, _checked(updates), strict=True):
        for name, values in delta.items() if part else ():
            total[name] += np.multiply(values, part, dtype=np.float64)
    return {name: values.astype(np.float32) for name, values in total.items()}


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Window:
    """Every box's values of some coordinates at once."""

    first: int
    x_BC: NDArray[np.float32]
    weight_B: Matrix


def _windows(updates: Updates) -> Iterator[_Window]:
    """One pass over the updates for each; the next one takes its memory."""
    passes = max(1, ceil(updates.coordinates * updates.boxes * 4 / updates.memory_bytes))
    width = ceil(updates.coordinates / passes)
    x_BC, weight_B = np.empty((updates.boxes, width), np.float32), np.ones(updates.boxes)
    for first in range(0, updates.coordinates, width or 1):
        here_BC = x_BC[:, : updates.coordinates - first]
        for b, (delta, weight) in enumerate(_checked(updates)):
            weight_B[b] = weight
            _fill(here_BC[b], delta, first)
        yield _Window(first, here_BC, weight_B)


def _blocks(x_BC: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for start in range(0, x_BC.shape[1], _BLOCK):
        yield start, x_BC[:, start : start + _BLOCK]


def _checked(updates: Updates) -> Iterator[tuple[Delta, int]]:
    found = 0
    for delta, weight in updates.read():
        check_update(delta, weight, updates.shapes)
        found += 1
        if found <= updates.boxes:
            yield delta, weight
    if found != updates.boxes:
        raise SiteError(f"{updates.boxes} updates were counted, {found} can be read", advice="check the hub's disk")


def _fill(row_C: NDArray[np.float32], delta: Delta, first: int) -> None:
    """The row's coordinates, from `first` on."""
    begin = -first  # of the tensor, within the row
    for name in sorted(delta):
        end = begin + delta[name].size
        if begin < len(row_C) and end > 0:
            low, high = max(begin, 0), min(end, len(row_C))
            row_C[low:high] = delta[name].reshape(-1)[low - begin : high - begin]
        begin = end


def _as_tensors(flat_C: NDArray[np.float32], shapes: Shapes) -> Arrays:
    found, begin = {}, 0
    for name in sorted(shapes):
        end = begin + prod(shapes[name])
        found[name] = flat_C[begin:end].reshape(shapes[name])
        begin = end
    return found


RULES: Mapping[str, Rule] = {  # as a round's plan names them
    "median": Median(),
    "trimmed_mean": TrimmedMean(),
    "krum": Krum(),
    "multi_krum": Krum(keep=None),
    "centred_clip": CentredClip(),
}
