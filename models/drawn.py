"""The coordinates a round moves: heads and norms whole, and of all other weights the share that the round's seed draws.

Reads shapes, a share and a seed; gives places in the weights laid end to end. Reads and writes no files.
Never draws from anything but the seed: each box draws the same before it trains, and the hub before it adds.
Source: random mask of Konečný 2016 (a structured update: trained within the mask, not cut to it afterwards).
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from models.delta import trainable_names
from models.errors import DeltaError

MIN_SEED_BYTES = 8
PLAN_ADVICE = "correct the round's plan"
Item = TypeVar("Item", bound=np.generic)


@dataclass(frozen=True)
class Drawn:
    """Raises DeltaError where there is nothing to draw from.

    shapes: of the weights the round trains. seed: the round's own and public, e.g. its plan's digest. share: of the
    weights that are neither head nor norm, 0 < share <= 1.
    """

    shapes: Mapping[str, tuple[int, ...]]
    seed: bytes
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise DeltaError(f"a share of {self.share}, not above 0 and at most 1", advice=PLAN_ADVICE)
        if len(self.seed) < MIN_SEED_BYTES:
            raise DeltaError(f"a seed of {len(self.seed)} bytes, not {MIN_SEED_BYTES}", advice=PLAN_ADVICE)
        if any(length < 0 for shape in self.shapes.values() for length in shape) or self.size < 1:
            raise DeltaError("there is no weight to send", advice=PLAN_ADVICE)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.shapes))

    @cached_property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @cached_property
    def whole(self) -> frozenset[str]:
        """Heads and norms: few values, and what a site's images change first."""
        return frozenset(trainable_names(self.names, "norms"))

    @cached_property
    def chosen(self) -> int:
        """Coordinates this round moves."""
        rest = self._rest
        return self.size - rest + (max(1, round(self.share * rest)) if rest else 0)

    @cached_property
    def places(self) -> NDArray[np.int64] | slice:
        """Of the chosen coordinates, in the tensors laid end to end by name; each once, in an order both sides share."""
        if self.chosen == self.size:
            return slice(None)
        begins = np.cumsum([0, *self._counts])[:-1]
        is_whole = np.array([name in self.whole for name in self.names])
        whole = [
            np.arange(begin, begin + count)
            for begin, count in zip(begins[is_whole], np.array(self._counts)[is_whole], strict=True)
        ]
        ends = np.cumsum(np.array(self._counts)[~is_whole])
        shifts = begins[~is_whole] - np.concatenate([[0], ends[:-1]])
        drawn = self._drawn_of_rest()
        return np.concatenate([*whole, drawn + shifts[np.searchsorted(ends, drawn, side="right")]])

    def cut(self, vector: NDArray[Item]) -> dict[str, NDArray[Item]]:
        """The tensors of a vector of `size` coordinates."""
        parts = np.split(vector, np.cumsum(self._counts)[:-1])
        return {name: part.reshape(self.shapes[name]) for name, part in zip(self.names, parts, strict=True)}

    def masks(self) -> dict[str, NDArray[np.bool_]]:
        """True where a coordinate is chosen."""
        is_chosen = np.zeros(self.size, np.bool_)
        is_chosen[self.places] = True
        return self.cut(is_chosen)

    def check_alone(self, delta: Mapping[str, NDArray[np.floating]]) -> None:
        """Raises DeltaError where another coordinate moved: what was learned there would be lost without a word."""
        if self.chosen == self.size:
            return
        for name, mask in self.masks().items():
            if np.any(delta[name][~mask]):
                raise DeltaError(
                    f"{name} moved where the round does not move it",
                    advice="the training child's software differs from this one's; install one version",
                )

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shapes[name]) for name in self.names)

    @cached_property
    def _rest(self) -> int:
        return sum(math.prod(shape) for name, shape in self.shapes.items() if name not in self.whole)

    def _drawn_of_rest(self) -> NDArray[np.int64]:
        """One coordinate at random of each of equal runs of the rest, which start at a random coordinate.

        Every coordinate is as likely as any other, and all tensors are hit in proportion to their size. SHAKE-256,
        because numpy does not promise its draws across versions (NEP 19).
        """
        rest, count = self._rest, self.chosen - (self.size - self._rest)
        stream = hashlib.shake_256(b"wardround drawn 1|%s" % self.seed).digest(8 + 4 * count)
        begin = int.from_bytes(stream[:8], "little") % rest
        edges = np.arange(count + 1, dtype=np.int64) * rest // count
        places = np.frombuffer(stream, "<u4", offset=8) * np.diff(edges) >> 32
        places += edges[:-1]
        places += begin
        places[places >= rest] -= rest
        return places
