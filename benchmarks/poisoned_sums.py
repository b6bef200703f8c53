"""Masked rounds with poisoned words: one sum, or a rule over the means of groups, which a hub takes as far as it can tell.

Reads scenes (poisoned_scenes.py) in memory.
Never masks: masks cancel. All else is what boxes and hub compute: the words, the deal, the sums, what is refused, the rule.
Source: groups as in cloud_hub/secure_sum.py, their sums as in cloud_hub/intake.py.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.poisoned_scenes import (
    HOSTILE,
    LOUD,
    Scene,
    Turn,
    accuracy,
    label_flip,
    learned,
    no_attack,
    scaled,
    sign_flip,
)
from cloud_hub import secure_sum
from cloud_hub.robust import ROBUST_MIN, RULES, Delta, bucketed
from fleet_link.cohort import Roster, RoundOf
from models import addable, delta, round_layout
from models.addable import Layout, Words
from models.delta import Arrays
from models.errors import DeltaError

BOXES, GROUPS = 21, 7  # of which two hostile boxes spoil two at most, as many as each rule withstands
CLIP = 2.0  # the masked plan's clip norm, over the longest honest update of the first round
BOUND = 0.9  # of what the hub takes for an honest sum
ARMS = ("one sum", *RULES)

Measured = dict[str, Any]
Attack = Callable[[Turn, Layout, float], list[Words]]  # what each hostile box's words are, in sums of this weight


def _taught(turn: Turn, layout: Layout, weight: float) -> list[Words]:
    return [_encoded(change, layout) for change in no_attack(turn)]


def _taught_wrong(turn: Turn, layout: Layout, weight: float) -> list[Words]:
    return [_encoded(change, layout) for change in label_flip(turn)]


def _loud_words(turn: Turn, layout: Layout, weight: float) -> list[Words]:
    change = sign_flip(turn)[0]
    return [_times(_encoded(change, layout), delta.norm(change) / layout.clip_norm)] * HOSTILE


def _any_words(turn: Turn, layout: Layout, weight: float) -> list[Words]:
    generator = np.random.default_rng(turn.seed)
    most = 1 << layout.word_bits
    return [generator.integers(0, most, layout.word_count, layout.word_type) for _ in range(HOSTILE)]


def _words_at_the_bound(turn: Turn, layout: Layout, weight: float) -> list[Words]:
    """Turn the mean of the sum round, as far as honest boxes could: in one sum both do it together, in groups each alone."""
    mean = turn.mean()
    change = scaled(mean, -layout.clip_norm / delta.norm(mean))
    together = HOSTILE if layout.boxes == BOXES else 1
    return [_times(_encoded(change, layout), BOUND * weight / together)] * HOSTILE


ATTACKS: dict[str, Attack] = {
    "none": _taught,
    "label flip": _taught_wrong,
    f"sign flip ×{LOUD:.0f}": _loud_words,
    "any words": _any_words,
    "sign flip, as far as the hub takes it": _words_at_the_bound,
}


def measured(scenes: Sequence[Scene], attack: str, arm: str, rounds: int) -> Measured:
    ends = [_attacked_masked(scene, attack, arm, rounds) for scene in scenes]
    return {"accuracy_by_seed": [end for end, _ in ends], "rounds_lost_by_seed": [lost for _, lost in ends]}


def _attacked_masked(scene: Scene, attack: str, arm: str, rounds: int) -> tuple[float, int]:
    weights, lost, clip_norm = scene.base, 0, 0.0
    most = max(len(site.label_N) for site in scene.sites)
    for number in range(rounds):
        honest = learned(scene, weights, scene.sites[:-HOSTILE], number)
        turn = Turn(scene, weights, number, honest)
        clip_norm = clip_norm or CLIP * max(turn.norms())
        dealt = _groups(number, 1 if arm == "one sum" else GROUPS)
        layout = _layout(weights, clip_norm, number, len(dealt[0]))
        shares = [len(site.label_N) / most for site in scene.sites]
        words = [_encoded(change, layout, share) for change, share in zip(honest, shares, strict=False)]
        words += ATTACKS[attack](turn, layout, (sum(shares[:-HOSTILE]) + HOSTILE) / len(dealt))
        mean = _opened([[words[box] for box in group] for group in dealt], layout, arm)
        lost += mean is None
        weights = weights if mean is None else delta.apply(weights, mean)
    return accuracy(scene, weights), lost


def _opened(groups: Sequence[Sequence[Words]], layout: Layout, arm: str) -> Arrays | None:
    """As cloud_hub/intake.py does it; None where too few sums can be honest boxes'."""
    means: list[tuple[Arrays, int]] = []
    for group in groups:
        total = np.sum(group, axis=0, dtype=layout.word_type)
        with suppress(DeltaError):
            means.append((addable.decode_sum(total, layout, boxes=len(group)), len(group)))
    if arm == "one sum":
        return means[0][0] if means else None
    return bucketed(RULES[arm], means, layout.shapes) if len(means) >= ROBUST_MIN else None


def _groups(number: int, count: int) -> list[list[int]]:
    """Dealt as a hub deals them, by keys that are drawn anew in each round."""
    names = tuple(f"box-{box:02}" for box in range(BOXES))
    keys = tuple(hashlib.sha256(f"{number} {name}".encode()).digest() for name in names)
    everyone = Roster(RoundOf(f"round-{number}", bytes(32)), names, keys)
    return [[names.index(name) for name in group] for group in secure_sum.deal(everyone, count)]


def _layout(weights: Arrays, clip_norm: float, number: int, boxes: int) -> Layout:
    word_bits, value_bits = round_layout.numbers_for(boxes)
    shapes = {name: value.shape for name, value in weights.items()}
    seed = hashlib.sha256(f"plan {number}".encode()).digest()
    return Layout(shapes, seed, clip_norm, boxes, word_bits=word_bits, value_bits=value_bits)


def _encoded(change: Delta, layout: Layout, share: float = 1.0) -> Words:
    return addable.encode(change, layout, share, np.random.default_rng(0))[0]


def _times(words: Words, factor: float) -> Words:
    """What no honest box sends: its values are as many times its clipped change, modulo the word."""
    values = words[1:].astype(words.dtype.str.replace("u", "i")).astype(np.float64)
    words[1:] = np.rint(values * factor).astype(np.int64).astype(words.dtype)
    return words


def table(result: Measured) -> Table:
    shown = Table(
        title=f"The same in masked rounds of {BOXES} boxes, {HOSTILE} of them hostile: one sum, or a rule over the means of {GROUPS} groups",
        caption="−n: of all rounds so many gave no sum, because the hub saw that honest boxes cannot have made it.",
    )
    shown.add_column("attack")
    for arm in ARMS:
        shown.add_column(arm, justify="right")
    for attack in ATTACKS:
        rows = [row for row in result["masked"] if row["attack"] == attack]
        cells = [(row["accuracy_by_seed"], sum(row["rounds_lost_by_seed"])) for row in rows]
        shown.add_row(
            attack, *(f"{np.mean(found):.3f} ({min(found):.3f}){(lost and f' −{lost}') or ''}" for found, lost in cells)
        )
    return shown
