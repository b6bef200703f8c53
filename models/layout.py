"""The layout of a masked round's words: how many, how wide, how fine, and with how much noise; the same on both sides.

Reads the numbers of a plan and the shapes of the weights it moves; gives the numbers that follow.
Never leaves room for doubt: a sum that could overflow its words is refused with DeltaError.
Source: as models.addable; the room for noise is that of models.noise.

With noise the levels are as fine as the noise leaves room for, never finer than without.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from models import noise
from models.drawn import PLAN_ADVICE, Drawn
from models.errors import DeltaError

WEIGHT_LEVELS = 255  # a weight share is a whole number of 255ths, at least one
MIN_VALUE_BITS, MAX_VALUE_BITS = 4, 16
MIN_CLIP_NORM, MAX_CLIP_NORM = 1e-9, 1e9  # a step stays a normal float32
MAX_NOISE = 1000.0
FLOAT32_ERROR = 4e-6  # of the clip norm: rotating there and back, relative error of sums of 2^12 terms
_FINER = 0.95  # levels are made coarser by so much at a time until the noise fits
_NOISE_ROOM = 0.75  # of a word: a mask that did not cancel shows as a value beyond


def value_bits_for(word_bits: int, boxes: int) -> int:
    """Largest number of bits of one box's value, at most 16, with which the sum of `boxes` cannot overflow a word.

    Raises DeltaError where not even 4 bits fit, or the sum of the weights does not.
    """
    if word_bits not in (16, 32) or boxes < 1:
        raise DeltaError(f"{boxes} boxes in words of {word_bits} bits: there is no such sum", advice=PLAN_ADVICE)
    most = ((1 << (word_bits - 1)) - 1) // boxes  # levels + 1 is the power of two next below or at most + 1
    bits = min(MAX_VALUE_BITS, (most + 1).bit_length())
    if bits < MIN_VALUE_BITS or boxes * WEIGHT_LEVELS > (1 << word_bits) - 1:
        raise DeltaError(
            f"the sum of {boxes} boxes does not fit words of {word_bits} bits",
            advice="use words of 32 bits or a smaller cohort",
        )
    return bits


@dataclass(frozen=True)
class Layout:
    """What both sides know of a round's words. Raises DeltaError where it cannot be.

    seed: the round's own and public, e.g. its plan's digest. clip_norm: L2 limit of one box's delta.
    boxes: at most so many in one sum. share: of the weights but heads and norms, those this round moves (models.drawn).
    noise: standard deviation of what `noise_boxes` boxes add to a value of the sum, over the largest norm of one box's
    values. More boxes add more, and the sum still fits: all but a chance of noise.OVERFLOW, where it decodes to nonsense.
    """

    shapes: Mapping[str, tuple[int, ...]]
    seed: bytes
    clip_norm: float
    boxes: int
    word_bits: int = 32
    value_bits: int = MAX_VALUE_BITS
    share: float = 1.0
    noise: float = 0.0
    noise_boxes: int = 0

    def __post_init__(self) -> None:
        fits = value_bits_for(self.word_bits, self.boxes)
        if not MIN_VALUE_BITS <= self.value_bits <= fits:
            raise DeltaError(f"values of {self.value_bits} bits, not {MIN_VALUE_BITS} to {fits}", advice=PLAN_ADVICE)
        if not MIN_CLIP_NORM <= self.clip_norm <= MAX_CLIP_NORM:
            raise DeltaError(f"clip norm {self.clip_norm}, not {MIN_CLIP_NORM} to {MAX_CLIP_NORM}", advice=PLAN_ADVICE)
        _ = self.drawn  # refuses a share, a seed or shapes that cannot be
        if not 0.0 <= self.noise <= MAX_NOISE or not bool(self.noise) <= self.noise_boxes <= self.boxes:
            raise DeltaError(f"noise {self.noise} of {self.noise_boxes} among {self.boxes} boxes", advice=PLAN_ADVICE)
        if self.noise and self.clip_levels**2 < self.padded:
            raise DeltaError(
                f"noise {self.noise} leaves words of {self.word_bits} bits too coarse for {self.padded} values",
                advice="use words of 32 bits, a smaller share or cohort, or less noise",
            )

    @cached_property
    def drawn(self) -> Drawn:
        return Drawn(self.shapes, self.seed, self.share)

    @property
    def names(self) -> tuple[str, ...]:
        return self.drawn.names

    @property
    def size(self) -> int:
        """Coordinates of the delta, and of the memory."""
        return self.drawn.size

    @property
    def chosen(self) -> int:
        """Coordinates this round moves."""
        return self.drawn.chosen

    @property
    def places(self) -> NDArray[np.int64] | slice:
        return self.drawn.places

    @cached_property
    def block(self) -> int:
        """Length of one Hadamard transform: the smallest power of two whose square holds all chosen coordinates."""
        return 1 << ((self.chosen - 1).bit_length() + 1) // 2

    @cached_property
    def padded(self) -> int:
        """Values in one box's words: the chosen coordinates in whole blocks."""
        return -(-self.chosen // self.block) * self.block

    @property
    def word_count(self) -> int:
        return 1 + self.padded

    @property
    def word_type(self) -> np.dtype[np.unsignedinteger]:
        return np.dtype(np.uint16 if self.word_bits == 16 else np.uint32)

    @property
    def levels(self) -> int:
        """Highest of one box's values, before its noise."""
        most = (1 << (self.value_bits - 1)) - 1
        return min(most, self._levels_at(self.clip_levels)) if self.noise else most

    @property
    def spreads(self) -> float:
        """Standard deviations of a rotated coordinate that the levels reach.

        3 for 4 bits, 4 for 8, 5 for 12, 6 for 16: what clamping costs stays below what rounding does (measured).
        """
        return 2.0 + self.value_bits / 4.0

    @property
    def step(self) -> float:
        """Value of one level."""
        return self.clip_norm / self.clip_levels

    @cached_property
    def clip_levels(self) -> float:
        """The clip norm in levels: the highest level is `spreads` spreads of a delta at the clip norm, or noise has that room."""
        norm = ((1 << (self.value_bits - 1)) - 1) / (self.spreads * self._spread)
        while self.noise and norm**2 >= self.padded and not self._has_room(norm):
            norm *= _FINER
        return norm

    @property
    def most_norm_squared(self) -> int:
        """Squared L2 norm of one box's values, at most: the sensitivity of the sum, in levels. Only with noise."""
        return self._norm_squared_at(self.clip_levels)

    @property
    def noise_variance(self) -> int:
        """Of what one box adds to each value, in levels squared."""
        return self._variance_at(self.clip_levels)

    @property
    def most_in_sum(self) -> int:
        """What no value of a sum exceeds; with noise, but with a chance of noise.OVERFLOW over all values."""
        return self._most_at(self.clip_levels) if self.noise else self.boxes * self.levels

    @property
    def _spread(self) -> float:
        """Of a rotated coordinate of a delta at the clip norm, over that norm: all of it is in the chosen coordinates."""
        return math.sqrt(1.0 / self.padded)

    def _levels_at(self, norm: float) -> int:
        return math.ceil(self.spreads * self._spread * norm)

    def _norm_squared_at(self, norm: float) -> int:
        return noise.rounded_norm_squared(norm * (1.0 + 2.0 * FLOAT32_ERROR), self.padded)

    def _variance_at(self, norm: float) -> int:
        return max(1, math.ceil(self.noise**2 * self._norm_squared_at(norm) / self.noise_boxes))

    def _most_at(self, norm: float) -> int:
        return self.boxes * self._levels_at(norm) + noise.reach(self.boxes * self._variance_at(norm), self.padded)

    def _has_room(self, norm: float) -> bool:
        fits = self._most_at(norm) <= _NOISE_ROOM * ((1 << (self.word_bits - 1)) - 1)
        return fits and self._variance_at(norm) <= noise.MAX_VARIANCE

    @property
    def feedback_rate(self) -> float:
        """By what a delta is shrunk before it joins the memory: share / (2 - share), so 1 where everything is sent.

        A coordinate waits a geometric number of rounds a, with E[a] = 1/share and E[a²] = (2 - share)/share². One box,
        a quadratic loss and a local step of η: waiting multiplies the squared distance by E[(1 - aηr)²] on average, which
        is below 1 for rates r < 2·share/(2 - share)/η and smallest at half of that. Stich 2018 and Karimireddy 2019 ask
        for steps of that order too. The norm that waits stays at most clip_norm/√(2 - share).
        """
        return self.share / (2.0 - self.share)
