"""Open rounds with poisoned updates: accuracy by rule and attack, and what each rule costs beside numpy's mean.

Ten boxes train a small convolutional network from its first weights on real brain MR, two of them hostile; reads
../shared/data, all in one process.
Never limits or quantises an update, as a real round's plan does: the rules stand alone here. Attackers know every honest update.
Source: a little is enough Baruch 2019; rules as in cloud_hub/robust.py.
"""

import os
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from torch import nn
from torch.nn import functional

from benchmarks.network import images
from cloud_hub.aggregation import RunningSum, Shapes
from cloud_hub.robust import RULES, Delta, Read, Updates, aggregate
from models import delta
from models.delta import Arrays
from models.examples import Example

SIZE_PX = 32
WIDTHS = (8, 16, 32)  # of the network's convolutions
BOXES, HOSTILE = 10, 2
DIRICHLET = 1.0  # of each label over the boxes
ROUNDS, QUICK_ROUNDS = 10, 2
SEEDS, QUICK_SEEDS = 2, 1
RATE, MOMENTUM, BATCH = 0.05, 0.9, 16
LITTLE = 1.5  # standard deviations
LOUD = 10.0  # times an honest update

PARAMETERS = 5_000_000
COST_BOXES = (8, 32)
TENSORS = 10

Measured = dict[str, Any]
Deltas = list[Arrays]


def measure(*, quick: bool) -> Measured:
    """Raises SystemExit where the real images are not beside the repository."""
    if not images.are_here():
        sys.exit(f"the labelled images are not at {images.FOLDER}: this bench needs them (see README, Measure)")
    torch.set_num_threads(1)
    rounds, repetitions = (QUICK_ROUNDS, 1) if quick else (ROUNDS, 3)
    cost = [row for boxes in COST_BOXES for row in _costs(boxes, repetitions)]
    scenes = list(_scenes(QUICK_SEEDS if quick else SEEDS))
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
        "cost": cost,
    }


def table(result: Measured) -> Group:
    seeds = len(result["accuracy"][0]["accuracy_by_seed"])
    shown = Table(
        title=f"Accuracy after {result['rounds']} rounds of {BOXES} boxes, {HOSTILE} of them hostile: mean of {seeds} seeds (lowest)",
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
    return Group(shown, costs)


# --- the rules side by side -----------------------------------------------------------------------


def _fedavg(updates: Updates) -> Arrays:
    total = RunningSum(updates.shapes)
    for change, weight in updates.read():
        total.add(change, weight)
    return total.mean()


_MEANS: dict[str, Callable[[Updates], Arrays]] = {
    "fedavg": _fedavg,
    **{name: partial(aggregate, rule) for name, rule in RULES.items()},
}


# --- accuracy -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """The images of one box."""

    images_N1HW: torch.Tensor
    label_N: torch.Tensor


@dataclass(frozen=True)
class Scene:
    """Who holds what; the last boxes are the hostile ones."""

    sites: list[Site]
    validation: Site
    labels: int
    network: nn.Module
    base: Arrays


@dataclass(frozen=True)
class Turn:
    """One round as an attacker sees it."""

    scene: Scene
    weights: Arrays
    seed: int
    honest: Deltas

    @property
    def hostile(self) -> list[Site]:
        return self.scene.sites[-HOSTILE:]

    def mean(self) -> Arrays:
        return {name: np.mean([change[name] for change in self.honest], axis=0) for name in self.weights}

    def spread(self) -> Arrays:
        return {name: np.std([change[name] for change in self.honest], axis=0) for name in self.weights}

    def norms(self) -> list[float]:
        return [delta.norm(change) for change in self.honest]


def _no_attack(turn: Turn) -> Deltas:
    return _learned(turn.scene, turn.weights, turn.hostile, turn.seed)


def _label_flip(turn: Turn) -> Deltas:
    """Trained as told, each label taken for the next one."""
    flipped = [replace(site, label_N=(site.label_N + 1) % turn.scene.labels) for site in turn.hostile]
    return _learned(turn.scene, turn.weights, flipped, turn.seed)


def _sign_flip(turn: Turn) -> Deltas:
    return [_scaled(turn.mean(), -LOUD)] * HOSTILE


def _quiet_sign_flip(turn: Turn) -> Deltas:
    """As long as the longest honest update: a plan's clip norm lets it pass."""
    mean = turn.mean()
    return [_scaled(mean, -max(turn.norms()) / delta.norm(mean))] * HOSTILE


def _noise(turn: Turn) -> Deltas:
    generator = np.random.default_rng(turn.seed)
    drawn = [
        {name: generator.standard_normal(value.shape, np.float32) for name, value in turn.weights.items()}
        for _ in range(HOSTILE)
    ]
    return [_scaled(noise, LOUD * float(np.mean(turn.norms())) / delta.norm(noise)) for noise in drawn]


def _a_little(turn: Turn) -> Deltas:
    """The honest mean less some standard deviations, in each coordinate: it hides among the honest (Baruch 2019)."""
    mean, spread = turn.mean(), turn.spread()
    return [{name: mean[name] - np.float32(LITTLE) * spread[name] for name in mean}] * HOSTILE


ATTACKS: dict[str, Callable[[Turn], Deltas]] = {
    "none": _no_attack,
    f"sign flip ×{LOUD:.0f}": _sign_flip,
    "sign flip, honest norm": _quiet_sign_flip,
    f"noise ×{LOUD:.0f}": _noise,
    "label flip": _label_flip,
    f"a little: {LITTLE} sigma": _a_little,
}


def _scenes(seeds: int) -> Iterator[Scene]:
    """The same images dealt to the boxes in several ways, with other first weights."""
    collection = images.collection("mri", SIZE_PX)
    training, labels = _site(collection.training), len(collection.task.labels)
    for seed in range(seeds):
        torch.manual_seed(seed)
        network = _network(labels)
        sites = _dealt(training, labels, np.random.default_rng(seed))
        yield Scene(sites, _site(collection.validation), labels, network, _weights(network))


def _site(examples: Sequence[Example]) -> Site:
    images_NSHW = np.stack([example.slices_SHW for example in examples]).astype(np.float32)
    return Site(torch.from_numpy(images_NSHW), torch.tensor([example.label for example in examples]))


def _network(labels: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((1, *WIDTHS)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(4, outputs), nn.GELU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(WIDTHS[-1] * (SIZE_PX >> len(WIDTHS)) ** 2, labels))


def _weights(network: nn.Module) -> Arrays:
    return {name: value.numpy().copy() for name, value in network.state_dict().items()}


def _load(network: nn.Module, weights: Arrays) -> None:
    network.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})


def _dealt(all_N: Site, labels: int, generator: np.random.Generator) -> list[Site]:
    """Each label is spread over the boxes by a Dirichlet distribution."""
    parts: list[list[int]] = [[] for _ in range(BOXES)]
    for label in range(labels):
        members = generator.permutation(np.flatnonzero(all_N.label_N.numpy() == label))
        cuts = (np.cumsum(generator.dirichlet([DIRICHLET] * BOXES))[:-1] * len(members)).astype(int)
        for part, own in zip(parts, np.split(members, cuts), strict=True):
            part += own.tolist()
    return [Site(all_N.images_N1HW[part], all_N.label_N[part]) for part in parts]


def _attacked(scene: Scene, attack: str, rule: str, rounds: int) -> float:
    weights, examples = scene.base, [len(site.label_N) for site in scene.sites]
    shapes = {name: value.shape for name, value in weights.items()}
    for number in range(rounds):
        honest = _learned(scene, weights, scene.sites[:-HOSTILE], number)
        changes = honest + ATTACKS[attack](Turn(scene, weights, number, honest))
        weights = delta.apply(weights, _MEANS[rule](Updates(_reader(changes, examples), BOXES, shapes)))
    return _accuracy(scene, weights)


def _reader(changes: Sequence[Delta], examples: Sequence[int]) -> Read:
    def read() -> Iterator[tuple[Delta, int]]:
        yield from zip(changes, examples, strict=True)

    return read


def _learned(scene: Scene, weights: Arrays, sites: Sequence[Site], seed: int) -> Deltas:
    """What one epoch changed at each site."""
    found = []
    for site in sites:
        _load(scene.network, weights)
        _epoch(scene.network, site, np.random.default_rng(seed))
        found.append(delta.subtract(_weights(scene.network), weights, weights))
    return found


def _epoch(network: nn.Module, site: Site, generator: np.random.Generator) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=MOMENTUM)
    order_N = torch.from_numpy(generator.permutation(len(site.label_N)))
    for chosen_B in order_N.split(BATCH):
        optimizer.zero_grad()
        functional.cross_entropy(network(site.images_N1HW[chosen_B]), site.label_N[chosen_B]).backward()
        optimizer.step()


def _scaled(change: Delta, factor: float) -> Arrays:
    return {name: (value * factor).astype(np.float32) for name, value in change.items()}


def _accuracy(scene: Scene, weights: Arrays) -> float:
    _load(scene.network, weights)
    with torch.no_grad():
        found_N = scene.network(scene.validation.images_N1HW).argmax(1)
    return float((found_N == scene.validation.label_N).float().mean())


# --- cost -----------------------------------------------------------------------------------------


def _costs(boxes: int, repetitions: int) -> list[Measured]:
    x_BC = np.random.default_rng(0).standard_normal((boxes, PARAMETERS), np.float32)
    numpy_s = min(_cpu_s(lambda: x_BC.mean(0)) for _ in range(repetitions))
    rows: list[Measured] = [{"rule": "numpy mean", "cpu_s": numpy_s, "passes": 1}]
    rows[0]["peak_mib"] = _peak_mib(lambda: x_BC.mean(0))
    for name, mean in _MEANS.items():
        read, passes = _counted(x_BC)
        over = partial(mean, Updates(read, boxes, _shapes()))
        rows.append({"rule": name, "peak_mib": _peak_mib(over), "passes": len(passes)})
        rows[-1]["cpu_s"] = min(_cpu_s(over) for _ in range(repetitions))
    return [row | {"boxes": boxes, "times_numpy": row["cpu_s"] / numpy_s} for row in rows]


def _shapes() -> Shapes:
    return {f"tensor-{number}": (PARAMETERS // TENSORS,) for number in range(TENSORS)}


def _counted(x_BC: NDArray[np.float32]) -> tuple[Read, list[int]]:
    """Updates that are views of x_BC, and a list that grows by one for each pass over them."""
    passes: list[int] = []

    def read() -> Iterator[tuple[Delta, int]]:
        passes.append(len(x_BC))
        for row_C in x_BC:
            yield dict(zip(_shapes(), np.split(row_C, TENSORS), strict=True)), 1

    return read, passes


def _cpu_s(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def _peak_mib(call: Callable[[], object]) -> float:
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / (1 << 20)
