"""A masked round's words from its plan: what both sides compute alike before they add anything.

Reads a plan's numbers and the shapes of the weights it moves; gives a Layout. Reads and writes no files.
Never decides a number: the hub's plan says them, and the layout refuses what cannot be.
Source: ARCHITECTURE.md, "Rounds"; models/addable.py.
"""

import math
from collections.abc import Mapping
from typing import Protocol

from models.addable import Layout, value_bits_for
from models.errors import DeltaError

MOST_RATE_FACTOR = 4.0


class PlannedSum(Protocol):
    """The fields of a RoundPlan that fix the words of its sum."""

    @property
    def trainable(self) -> str: ...
    @property
    def clip_norm(self) -> float: ...
    @property
    def boxes_max(self) -> int: ...
    @property
    def word_bits(self) -> int: ...
    @property
    def value_bits(self) -> int: ...
    @property
    def share(self) -> float: ...
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
    if plan.share < 1.0 and plan.trainable != "all":
        raise DeltaError(
            f"a share of {plan.share} of {plan.trainable}: only of all weights a share can be drawn",
            advice="train all, or send a share of 1: heads and norms go whole, and adapters are no single weights",
        )
    layout_of(plan, seed, {"weight": (1,)})


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
