"""Boxes that train a small network on real brain MR, some of them hostile, and what those send instead of their updates.

Reads ../shared/data; all in one process.
Never draws without a seed: the same scene is attacked under each rule.
Source: a little is enough Baruch 2019.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.network import images
from cloud_hub.robust import Delta
from models import delta
from models.delta import Arrays
from models.examples import Example

SIZE_PX = 32
WIDTHS = (8, 16, 32)  # of the network's convolutions
DIRICHLET = 1.0  # of each label over the boxes
RATE, MOMENTUM, BATCH = 0.05, 0.9, 16
LITTLE = 1.5  # standard deviations
LOUD = 10.0  # times an honest update
HOSTILE = 2  # of the boxes, the last ones

Deltas = list[Arrays]


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


# --- training --------------------------------------------------------------------------------------


def scenes_of(seeds: int, boxes: int) -> Iterator[Scene]:
    """The same images dealt to the boxes in several ways, with other first weights."""
    collection = images.collection("mri", SIZE_PX)
    training, labels = site_of(collection.training), len(collection.task.labels)
    for seed in range(seeds):
        torch.manual_seed(seed)
        network = network_of(labels)
        sites = dealt(training, labels, np.random.default_rng(seed), boxes)
        yield Scene(sites, site_of(collection.validation), labels, network, weights_of(network))


def site_of(examples: Sequence[Example]) -> Site:
    images_NSHW = np.stack([example.slices_SHW for example in examples]).astype(np.float32)
    return Site(torch.from_numpy(images_NSHW), torch.tensor([example.label for example in examples]))


def network_of(labels: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((1, *WIDTHS)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(4, outputs), nn.GELU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(WIDTHS[-1] * (SIZE_PX >> len(WIDTHS)) ** 2, labels))


def weights_of(network: nn.Module) -> Arrays:
    return {name: value.numpy().copy() for name, value in network.state_dict().items()}


def _load(network: nn.Module, weights: Arrays) -> None:
    network.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})


def dealt(all_N: Site, labels: int, generator: np.random.Generator, boxes: int) -> list[Site]:
    """Each label is spread over the boxes by a Dirichlet distribution."""
    parts: list[list[int]] = [[] for _ in range(boxes)]
    for label in range(labels):
        members = generator.permutation(np.flatnonzero(all_N.label_N.numpy() == label))
        cuts = (np.cumsum(generator.dirichlet([DIRICHLET] * boxes))[:-1] * len(members)).astype(int)
        for part, own in zip(parts, np.split(members, cuts), strict=True):
            part += own.tolist()
    return [Site(all_N.images_N1HW[part], all_N.label_N[part]) for part in parts]


def learned(scene: Scene, weights: Arrays, sites: Sequence[Site], seed: int) -> Deltas:
    """What one epoch changed at each site."""
    found = []
    for site in sites:
        _load(scene.network, weights)
        _epoch(scene.network, site, np.random.default_rng(seed))
        found.append(delta.subtract(weights_of(scene.network), weights, weights))
    return found


def _epoch(network: nn.Module, site: Site, generator: np.random.Generator) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=MOMENTUM)
    order_N = torch.from_numpy(generator.permutation(len(site.label_N)))
    for chosen_B in order_N.split(BATCH):
        optimizer.zero_grad()
        functional.cross_entropy(network(site.images_N1HW[chosen_B]), site.label_N[chosen_B]).backward()
        optimizer.step()


def scaled(change: Delta, factor: float) -> Arrays:
    return {name: (value * factor).astype(np.float32) for name, value in change.items()}


def accuracy(scene: Scene, weights: Arrays) -> float:
    _load(scene.network, weights)
    with torch.no_grad():
        found_N = scene.network(scene.validation.images_N1HW).argmax(1)
    return float((found_N == scene.validation.label_N).float().mean())


# --- attacks ---------------------------------------------------------------------------------------


def no_attack(turn: Turn) -> Deltas:
    return learned(turn.scene, turn.weights, turn.hostile, turn.seed)


def label_flip(turn: Turn) -> Deltas:
    """Trained as told, each label taken for the next one."""
    flipped = [replace(site, label_N=(site.label_N + 1) % turn.scene.labels) for site in turn.hostile]
    return learned(turn.scene, turn.weights, flipped, turn.seed)


def sign_flip(turn: Turn) -> Deltas:
    return [scaled(turn.mean(), -LOUD)] * HOSTILE


def quiet_sign_flip(turn: Turn) -> Deltas:
    """As long as the longest honest update: a plan's clip norm lets it pass."""
    mean = turn.mean()
    return [scaled(mean, -max(turn.norms()) / delta.norm(mean))] * HOSTILE


def noise(turn: Turn) -> Deltas:
    generator = np.random.default_rng(turn.seed)
    drawn = [
        {name: generator.standard_normal(value.shape, np.float32) for name, value in turn.weights.items()}
        for _ in range(HOSTILE)
    ]
    return [scaled(noise, LOUD * float(np.mean(turn.norms())) / delta.norm(noise)) for noise in drawn]


def a_little(turn: Turn) -> Deltas:
    """The honest mean less some standard deviations, in each coordinate: it hides among the honest (Baruch 2019)."""
    mean, spread = turn.mean(), turn.spread()
    return [{name: mean[name] - np.float32(LITTLE) * spread[name] for name in mean}] * HOSTILE


ATTACKS: dict[str, Callable[[Turn], Deltas]] = {
    "none": no_attack,
    f"sign flip ×{LOUD:.0f}": sign_flip,
    "sign flip, honest norm": quiet_sign_flip,
    f"noise ×{LOUD:.0f}": noise,
    "label flip": label_flip,
    f"a little: {LITTLE} sigma": a_little,
}
