"""How a round's changes travel in the bench of bytes: each codec between the sites' training and the next base.

Reads and writes arrays in memory. Masks of masked rounds cancel in the sum and are left out.
Never keeps between rounds anything but what a box would: its memory.
Source: models.addable (masked rounds), models.drawn_delta and models.delta (open rounds); benchmarks.sparse is of this bench alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from benchmarks import sparse
from benchmarks.network.federated import SITES, Weights
from models import addable, delta
from models.delta import Trainable
from models.drawn import Drawn
from models.drawn_delta import DrawnCodec
from models.layout import Layout

# Root mean square of a moved coordinate at the clip norm, at rate 1: above that of any site here, so that none is clipped.
CLIP_SPREAD = 0.02
Shapes = dict[str, tuple[int, ...]]
Codec = Literal["float32", "int8", "addable", "drawn", "sparse"]


@dataclass(frozen=True)
class Arm:
    """One way to send what a site learned."""

    codec: Codec
    trainable: Trainable = "all"
    share: float = 1.0
    value_bits: int = 0
    word_bits: int = 0
    has_memory: bool = False
    trains_chosen: bool = False  # heads, norms and the drawn share, as boxes do; else the share is taken afterwards
    rate: float = 1.0  # times the plan's

    @property
    def name(self) -> str:
        parts: list[str] = [self.codec, self.trainable]
        if self.share != 1.0:
            parts.append(f"share 1/{1 / self.share:.0f}")
        if self.value_bits:
            parts.append(f"{self.value_bits} bits" + (f" in {self.word_bits}" if self.word_bits else ""))
        parts += ["memory"] * self.has_memory + ["chosen trained"] * self.trains_chosen
        return ", ".join(parts + [f"rate × {self.rate:g}"] * (self.rate != 1.0))


class Exchange(Protocol):
    """What happens between the sites' training and the next base, one round after the other."""

    def begin(self, number: int) -> bytes:
        """The seed of what the sites train; empty where they train everything."""

    def send(self, site: int, change: Weights, weight: float) -> int:
        """Bytes of one site's payload."""

    def mean(self) -> Weights: ...


def exchange_of(arm: Arm, shapes: Shapes, seed: int) -> Exchange:
    if arm.codec == "addable":
        return _Addable(arm, shapes, seed)
    if arm.codec == "drawn":
        return _Drawn(arm, shapes, seed)
    if arm.codec == "sparse":
        return _Each(_Sparse(arm, shapes), shapes)
    return _Each(_Int8(shapes) if arm.codec == "int8" else _Float32(), shapes)


class _Each:
    """Open rounds: each site's payload is decoded and added by its weight."""

    def __init__(self, codec: Callable[[int, Weights], tuple[int, Weights]], shapes: Shapes) -> None:
        self._codec, self._shapes = codec, shapes

    def begin(self, number: int) -> bytes:
        self._total = {name: np.zeros(shape, np.float32) for name, shape in self._shapes.items()}
        self._weight = 0.0
        return b""

    def send(self, site: int, change: Weights, weight: float) -> int:
        length, decoded = self._codec(site, change)
        self._weight += weight
        for name, value in decoded.items():
            self._total[name] += value * np.float32(weight)
        return length

    def mean(self) -> Weights:
        return {name: (total / self._weight).astype(np.float32) for name, total in self._total.items()}


class _Float32:
    def __call__(self, site: int, change: Weights) -> tuple[int, Weights]:
        return sum(value.nbytes for value in change.values()), change


class _Int8:
    """What open rounds of all weights send."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes, self._sent = shapes, 0

    def __call__(self, site: int, change: Weights) -> tuple[int, Weights]:
        self._sent += 1
        payload = delta.encode(change, self._sent)
        return len(payload), delta.decode(payload, self._shapes)


class _Sparse:
    def __init__(self, arm: Arm, shapes: Shapes) -> None:
        self._shapes, self._sparsity = shapes, sparse.Sparsity(arm.share, arm.value_bits)
        size = sparse.size_of(shapes)
        self._clip_norm = _clip_norm(arm, size)
        self._memories: list[sparse.Vector | None] = [
            np.zeros(size, np.float32) if arm.has_memory else None for _ in range(SITES)
        ]

    def __call__(self, site: int, change: Weights) -> tuple[int, Weights]:
        payload, self._memories[site] = sparse.encode(change, self._sparsity, self._clip_norm, self._memories[site])
        return len(payload), sparse.decode(payload, self._shapes, self._sparsity)


class _Addable:
    """Masked rounds: words are added, the sum is decoded. The masks cancel and are left out."""

    def __init__(self, arm: Arm, shapes: Shapes, seed: int) -> None:
        self._arm, self._shapes, self._seed = arm, shapes, seed
        self._generator = np.random.default_rng(seed)
        self._memories: list[addable.Vector | None] = [
            np.zeros(sparse.size_of(shapes), np.float32) if arm.has_memory else None for _ in range(SITES)
        ]

    def begin(self, number: int) -> bytes:
        drawn = _drawn(self._arm, self._shapes, self._seed, number)
        moved = drawn.chosen if self._arm.trains_chosen else drawn.size
        self._layout = Layout(
            self._shapes,
            drawn.seed,
            _clip_norm(self._arm, moved),
            SITES,
            self._arm.word_bits,
            self._arm.value_bits,
            self._arm.share,
        )
        self._total = np.zeros(self._layout.word_count, self._layout.word_type)
        return drawn.seed if self._arm.trains_chosen else b""

    def send(self, site: int, change: Weights, weight: float) -> int:
        if self._arm.trains_chosen:
            self._layout.drawn.check_alone(change)
        words, self._memories[site] = addable.encode(
            change, self._layout, weight, self._generator, self._memories[site]
        )
        self._total += words
        return words.nbytes

    def mean(self) -> Weights:
        return addable.decode_sum(self._total, self._layout)


class _Drawn:
    """Open rounds of a share, as boxes send them."""

    def __init__(self, arm: Arm, shapes: Shapes, seed: int) -> None:
        self._arm, self._shapes, self._seed, self._sent = arm, shapes, seed, 0

    def begin(self, number: int) -> bytes:
        drawn = _drawn(self._arm, self._shapes, self._seed, number)
        self._codec = DrawnCodec(drawn, self._arm.value_bits, _clip_norm(self._arm, drawn.chosen))
        self._mean = _Each(self._through_codec, self._shapes)
        self._mean.begin(number)
        return drawn.seed

    def send(self, site: int, change: Weights, weight: float) -> int:
        return self._mean.send(site, change, weight)

    def mean(self) -> Weights:
        return self._mean.mean()

    def _through_codec(self, site: int, change: Weights) -> tuple[int, Weights]:
        self._sent += 1
        clipped, _ = delta.clip(change, self._codec.clip_norm)
        payload = self._codec.encode(clipped, self._sent)
        return len(payload), self._codec.decode(payload)


def _drawn(arm: Arm, shapes: Shapes, seed: int, number: int) -> Drawn:
    return Drawn(shapes, b"benchmark %d %d" % (seed, number), arm.share)


def _clip_norm(arm: Arm, moved: int) -> float:
    return CLIP_SPREAD * arm.rate * float(np.sqrt(moved))
