"""Rounds with poisoned updates, open and masked: accuracy by rule and attack, and what each rule costs beside numpy's mean.

Ten boxes of an open round, twenty-one of a masked one, train a small convolutional network from its first weights on real brain
MR, two of them hostile; reads ../shared/data, all in one process.
Never limits or quantises an update of an open round, as its plan does: the rules stand alone there. Attackers know every honest
update. Of a masked round the words are those a hub adds and opens; the masks, which cancel, are left out.
Source: a little is enough Baruch 2019; rules as in cloud_hub/robust.py; groups as in cloud_hub/secure_sum.py.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from rich.console import Group
from rich.table import Table

from benchmarks import poisoned_sums, rule_costs
from benchmarks.network import images
from benchmarks.poisoned_scenes import ATTACKS, DIRICHLET, HOSTILE, Scene, Turn, accuracy, learned, scenes_of
from benchmarks.rule_costs import PARAMETERS, Measured
from cloud_hub.aggregation import RunningSum
from cloud_hub.robust import RULES, Delta, Read, Updates, aggregate
from models import delta
from models.delta import Arrays

BOXES = 10
ROUNDS, QUICK_ROUNDS = 10, 2
SEEDS, QUICK_SEEDS = 2, 1

COST_BOXES = (8, 32)


def measure(*, quick: bool) -> Measured:
    """Raises SystemExit where the real images are not beside the repository."""
    if not images.are_here():
        sys.exit(f"the labelled images are not at {images.FOLDER}: this bench needs them (see README, Measure)")
    torch.set_num_threads(1)
    rounds, repetitions = (QUICK_ROUNDS, 1) if quick else (ROUNDS, 3)
    cost = [row for boxes in COST_BOXES for row in rule_costs.costs(_MEANS, boxes, repetitions)]
    scenes = list(scenes_of(QUICK_SEEDS if quick else SEEDS, BOXES))
    masked = list(scenes_of(QUICK_SEEDS if quick else SEEDS, poisoned_sums.BOXES))
    return {
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "rounds": rounds,
        "images": sum(len(site.label_N) for site in scenes[0].sites),
        "validation_images": len(scenes[0].validation.label_N),
        "accuracy": [
            {
                "attack": attack,
                "rule": rule,
                "accuracy_by_seed": [_attacked(scene, attack, rule, rounds) for scene in scenes],
            }
            for attack in ATTACKS
            for rule in _MEANS
        ],
        "masked": [
            {"attack": attack, "arm": arm, **poisoned_sums.measured(masked, attack, arm, rounds)}
            for attack in poisoned_sums.ATTACKS
            for arm in poisoned_sums.ARMS
        ],
        "cost": cost,
    }


def table(result: Measured) -> Group:
    seeds = len(result["accuracy"][0]["accuracy_by_seed"])
    shown = Table(
        title=f"Accuracy after {result['rounds']} open rounds of {BOXES} boxes, {HOSTILE} of them hostile: mean of {seeds} seeds (lowest)",
        caption=f"Brain MR, four labels, a small convolutional network; {result['images']} images over the boxes "
        f"(Dirichlet {DIRICHLET:.0f} by label), {result['validation_images']} judged.",
    )
    shown.add_column("attack")
    for rule in _MEANS:
        shown.add_column(rule, justify="right")
    for attack in ATTACKS:
        cells = [row["accuracy_by_seed"] for row in result["accuracy"] if row["attack"] == attack]
        shown.add_row(attack, *(f"{np.mean(found):.3f} ({min(found):.3f})" for found in cells))
    costs = Table(
        title=f"Cost at {PARAMETERS / 1e6:.0f} M parameters, processor time (load {result['load_average']:.1f})",
        caption="Updates lie in memory: opening a sealed one comes on top, in every pass. Numpy's mean is of one array in memory.",
    )
    for column in ("rule", "boxes", "s", "× numpy", "passes", "peak MiB"):
        costs.add_column(column, justify="left" if column == "rule" else "right")
    for row in result["cost"]:
        measured = (f"{row['cpu_s']:.2f}", f"{row['times_numpy']:.1f}", str(row["passes"]), f"{row['peak_mib']:.0f}")
        costs.add_row(row["rule"], str(row["boxes"]), *measured)
    return Group(shown, poisoned_sums.table(result), costs)


# --- the rules side by side -----------------------------------------------------------------------


def _fedavg(updates: Updates) -> Arrays:
    total = RunningSum(updates.shapes)
    for change, weight in updates.read():
        total.add(change, weight)
    return dict(total.mean())


_MEANS: dict[str, Callable[[Updates], Arrays]] = {
    "fedavg": _fedavg,
    **{name: partial(aggregate, rule) for name, rule in RULES.items()},
}


# --- accuracy ---------------------------------------------------------------------------------------


def _attacked(scene: Scene, attack: str, rule: str, rounds: int) -> float:
    weights, examples = scene.base, [len(site.label_N) for site in scene.sites]
    shapes = {name: value.shape for name, value in weights.items()}
    for number in range(rounds):
        honest = learned(scene, weights, scene.sites[:-HOSTILE], number)
        changes = honest + ATTACKS[attack](Turn(scene, weights, number, honest))
        weights = delta.apply(weights, _MEANS[rule](Updates(_reader(changes, examples), BOXES, shapes)))
    return accuracy(scene, weights)


def _reader(changes: Sequence[Delta], examples: Sequence[int]) -> Read:
    def read() -> Iterator[tuple[Delta, int]]:
        yield from zip(changes, examples, strict=True)

    return read
