"""How a round's changes travel in the bench of bytes: each codec between the sites' training and the next base.

Reads and writes arrays in memory. Masks of masked rounds cancel in the sum and are left out.
Never keeps between rounds anything but what a box would: its memory.
Source: models.addable (masked rounds), models.delta and benchmarks.sparse (open rounds).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from benchmarks import sparse
from benchmarks.network.federated import SITES, Weights
from models import addable, delta
from models.addable import Vector
from models.delta import Trainable
from models.layout import MAX_VALUE_BITS, Layout

# Root mean square of a coordinate at the clip norm, at rate 1: above that of any site here, so that none is clipped.
CLIP_SPREAD = 0.02
Shapes = dict[str, tuple[int, ...]]
Codec = Literal["float32", "int8", "addable", "sparse"]


@dataclass(frozen=True)
class Arm:
    """One way to send what a site learned."""

    codec: Codec
    trainable: Trainable = "all"
    share: float = 1.0
    value_bits: int = 0
    word_bits: int = 0
    has_memory: bool = False
    trains_chosen: bool = False
    norms_whole: bool = False  # heads and norms are moved whole, the share is of the rest
    rate: float = 1.0  # times the plan's

    @property
    def name(self) -> str:
        parts: list[str] = [self.codec, self.trainable]
        if self.share != 1.0:
            parts.append(f"share 1/{1 / self.share:.0f}")
        if self.value_bits:
            parts.append(f"{self.value_bits} bits" + (f" in {self.word_bits}" if self.word_bits else ""))
        parts += ["memory"] * self.has_memory + ["chosen trained"] * self.trains_chosen
        parts += ["norms whole"] * self.norms_whole
        return ", ".join(parts + [f"rate × {self.rate:g}"] * (self.rate != 1.0))


class Exchange(Protocol):
    """What happens between the sites' training and the next base, one round after the other."""

    def begin(self, number: int) -> Weights | None:
        """For each tensor, 1 where sites may move it; None where they may anywhere."""

    def send(self, site: int, change: Weights, weight: float) -> int:
        """Bytes of one site's payload."""

    def mean(self) -> Weights: ...


def exchange_of(arm: Arm, shapes: Shapes, seed: int) -> Exchange:
    if arm.codec == "addable":
        return _Addable(arm, shapes, seed)
    if arm.codec == "sparse" and arm.trains_chosen:
        return _Drawn(arm, shapes, seed)
    if arm.codec == "sparse":
        return _Each(_Sparse(arm, shapes), shapes)
    return _Each(_Int8(shapes) if arm.codec == "int8" else _Float32(), shapes)


class _Each:
    """Open rounds: each site's payload is decoded and added by its weight."""

    def __init__(self, codec: Callable[[int, Weights], tuple[int, Weights]], shapes: Shapes) -> None:
        self._codec, self._shapes = codec, shapes

    def begin(self, number: int) -> Weights | None:
        self._total = {name: np.zeros(shape, np.float32) for name, shape in self._shapes.items()}
        self._weight = 0.0
        return None

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
    """What open rounds send today."""

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
    """Masked rounds: words are added, the sum is decoded. The masks cancel and are left out.

    Where heads and norms are moved whole, they are a sum of their own beside that of the other weights' share.
    """

    def __init__(self, arm: Arm, shapes: Shapes, seed: int) -> None:
        self._arm, self._seed = arm, seed
        self._generator = np.random.default_rng(seed)
        self._parts = _parts(arm, shapes)
        self._memories: list[list[addable.Vector | None]] = [
            [np.zeros(sparse.size_of(part), np.float32) if arm.has_memory else None for part, _ in self._parts]
            for _ in range(SITES)
        ]

    def begin(self, number: int) -> Weights | None:
        self._layouts = _layouts(self._arm, self._parts, self._seed, number)
        self._totals = [np.zeros(layout.word_count, layout.word_type) for layout in self._layouts]
        return _movable(self._layouts) if self._arm.trains_chosen else None

    def send(self, site: int, change: Weights, weight: float) -> int:
        length = 0
        for i, layout in enumerate(self._layouts):
            part = {name: change[name] for name in layout.names}
            words, memory = addable.encode(part, layout, weight, self._generator, self._memories[site][i])
            self._memories[site][i] = memory
            self._totals[i] += words
            length += words.nbytes
        return length

    def mean(self) -> Weights:
        decoded = [addable.decode_sum(*each) for each in zip(self._totals, self._layouts, strict=True)]
        return {name: value for part in decoded for name, value in part.items()}


class _Drawn:
    """Open rounds whose coordinates the round's seed draws: no position travels, and the site trains them alone."""

    def __init__(self, arm: Arm, shapes: Shapes, seed: int) -> None:
        self._arm, self._parts, self._seed = arm, _parts(arm, shapes), seed
        self._sparsity = sparse.Sparsity(1.0, arm.value_bits)

    def begin(self, number: int) -> Weights | None:
        self._layouts = _layouts(self._arm, self._parts, self._seed, number)
        self._total: Weights = {}
        self._weight = 0.0
        return _movable(self._layouts)

    def send(self, site: int, change: Weights, weight: float) -> int:
        length = 0
        for layout in self._layouts:
            vector = np.concatenate([change[name].ravel() for name in layout.names])
            places = addable._places(layout)
            payload, _ = sparse.encode({"drawn": vector[places]}, self._sparsity, layout.clip_norm)
            decoded = np.zeros_like(vector)
            decoded[places] = sparse.decode(payload, {"drawn": (layout.chosen,)}, self._sparsity)["drawn"]
            for name, value in _cut(decoded, layout).items():
                self._total[name] = self._total.get(name, np.zeros_like(value)) + value * np.float32(weight)
            length += len(payload)
        self._weight += weight
        return length

    def mean(self) -> Weights:
        return {name: (total / self._weight).astype(np.float32) for name, total in self._total.items()}


def _parts(arm: Arm, shapes: Shapes) -> list[tuple[Shapes, float]]:
    """Tensors that share a sum, and the share of them that is moved."""
    whole = set(delta.trainable_names(shapes, "norms")) if arm.norms_whole else set()
    rest = {name: shape for name, shape in shapes.items() if name not in whole}
    parts = [(rest, arm.share)] if rest else []
    return [*parts, ({name: shapes[name] for name in whole}, 1.0)] if whole else parts


def _layouts(arm: Arm, parts: Sequence[tuple[Shapes, float]], seed: int, number: int) -> list[Layout]:
    return [
        Layout(
            shapes,
            b"benchmark %d %d" % (seed, number),
            _clip_norm(arm, sparse.size_of(shapes)),
            SITES,
            arm.word_bits or 32,
            arm.value_bits if arm.word_bits else MAX_VALUE_BITS,
            share,
        )
        for shapes, share in parts
    ]


def _movable(layouts: Sequence[Layout]) -> Weights:
    return {name: value for layout in layouts for name, value in chosen_of(layout).items()}


def _clip_norm(arm: Arm, size: int) -> float:
    return CLIP_SPREAD * arm.rate * float(np.sqrt(size))


def chosen_of(layout: Layout) -> Weights:
    """1 at the coordinates that the layout's seed chose."""
    chosen = np.zeros(layout.size, np.float32)
    chosen[addable._places(layout)] = 1.0
    return _cut(chosen, layout)


def _cut(vector: Vector, layout: Layout) -> Weights:
    parts = np.split(vector, np.cumsum([int(np.prod(layout.shapes[name])) for name in layout.names])[:-1])
    return {name: part.reshape(layout.shapes[name]) for name, part in zip(layout.names, parts, strict=True)}
