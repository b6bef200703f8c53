"""A round's words or values from its plan: what both sides compute alike before anything is sent.

Reads a plan's numbers and the shapes of the weights it moves; gives a Layout or a DrawnCodec. Reads and writes no files.
Never decides a number of a plan: the hub's plan says them, and what cannot be is refused.
Source: ARCHITECTURE.md, "Rounds"; models/addable.py (masked), models/drawn_delta.py (open).
"""

import math
from collections.abc import Mapping
from typing import Protocol

from models import drawn_delta
from models.addable import Layout, value_bits_for
from models.drawn import Drawn
from models.drawn_delta import DrawnCodec
from models.errors import DeltaError
from models.layout import MAX_VALUE_BITS

MOST_RATE_FACTOR = 4.0
OPEN_VALUE_BITS = 3  # of an open round of a share, where nobody says another number


class PlannedValues(Protocol):
    """The fields of a RoundPlan that fix what a box sends."""

    @property
    def trainable(self) -> str: ...
    @property
    def clip_norm(self) -> float: ...
    @property
    def value_bits(self) -> int: ...
    @property
    def share(self) -> float: ...


class PlannedSum(PlannedValues, Protocol):
    """The fields of a RoundPlan that fix the words of its sum."""

    @property
    def boxes_max(self) -> int: ...
    @property
    def word_bits(self) -> int: ...
    @property
    def examples_cap(self) -> int: ...
    @property
    def noise(self) -> float: ...
    @property
    def noise_boxes(self) -> int: ...


def layout_of(plan: PlannedSum, seed: bytes, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """`seed`: sealing.plan_digest(plan). `shapes`: of delta.trainable_names(base weights, plan.trainable).

    Raises DeltaError on a plan whose sum could overflow its words.
    """
    return Layout(
        shapes=shapes,
        seed=seed,
        clip_norm=plan.clip_norm,
        boxes=plan.boxes_max,
        word_bits=plan.word_bits,
        value_bits=plan.value_bits,
        share=plan.share,
        noise=plan.noise,
        noise_boxes=plan.noise_boxes,
    )


def check(plan: PlannedSum, seed: bytes) -> None:
    """Raises DeltaError where no weights whatever could be summed by this plan."""
    _check_share(plan)
    layout_of(plan, seed, {"weight": (1,)})


def codec_of(plan: PlannedValues, seed: bytes, shapes: Mapping[str, tuple[int, ...]]) -> DrawnCodec | None:
    """What an open round's boxes send their updates in; None where it is models.delta's 8 bits for all trained weights.

    `seed` and `shapes` as for `layout_of`. Raises DeltaError on a plan whose values cannot be.
    """
    if plan.share == 1.0 and plan.value_bits == MAX_VALUE_BITS:
        return None
    return DrawnCodec(Drawn(shapes, seed, plan.share), plan.value_bits, plan.clip_norm)


def check_open(plan: PlannedValues, seed: bytes) -> None:
    """Raises DeltaError where no weights whatever could be sent by this plan of an open round."""
    _check_share(plan)
    codec_of(plan, seed, {"weight": (1,)})


def open_value_bits(share: float, value_bits: int | None) -> int:
    """value_bits of a new open plan; the share may be 1."""
    if value_bits is not None:
        return value_bits
    return MAX_VALUE_BITS if share == 1.0 else OPEN_VALUE_BITS


def open_bits(plan: PlannedValues) -> int:
    """Of each value that a box sends in this open round, before they are compressed."""
    return min(plan.value_bits, drawn_delta.MAX_VALUE_BITS)


def _check_share(plan: PlannedValues) -> None:
    if plan.share < 1.0 and plan.trainable != "all":
        raise DeltaError(
            f"a share of {plan.share} of {plan.trainable}: only of all weights a share can be drawn",
            advice="train all, or send a share of 1: heads and norms go whole, and adapters are no single weights",
        )


def weight_share(examples: int, plan: PlannedSum) -> float:
    """A box's weight over the largest allowed: more examples than the cap weigh as many as the cap.

    With noise all weigh the same: else the weights' sum would tell how many examples a box has.
    """
    if examples < 1:
        raise DeltaError(f"{examples} examples have no weight in a sum", advice="train on at least one example")
    return 1.0 if plan.noise else min(examples, plan.examples_cap) / plan.examples_cap


def rate_factor(share: float) -> float:
    """By what the learning rate is raised where a share alone is trained: Adam's steps keep their length up to a limit.

    Measured at shares of 1/28 to 1/16 (benchmarks.bytes): 4 and 6 came near FedAvg, 2 stayed behind, 8 gained nothing.
    """
    return min(MOST_RATE_FACTOR, 1.0 / math.sqrt(share))


def numbers_for(boxes_max: int, noise: float = 0.0) -> tuple[int, int]:
    """word_bits and value_bits of a new plan: words of 16 bits where they leave a value 8 at least, else of 32.

    With noise 32: the noise of a large network's sum leaves its values too few levels in 16.
    Raises DeltaError for more boxes than words of 32 bits can sum.
    """
    try:
        value_bits = value_bits_for(16, boxes_max)
    except DeltaError:
        value_bits = 0
    if value_bits >= _ENOUGH_VALUE_BITS and not noise:
        return 16, value_bits
    return 32, value_bits_for(32, boxes_max)


_ENOUGH_VALUE_BITS = 8
