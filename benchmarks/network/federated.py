"""The experiment of the seeds: many hospitals with different cases, trained together, alone and federated.

Trains one network per arm with the same number of images seen; accuracy after each round and the bytes that travelled.
Never moves an image between sites in a federated arm: only what `models.delta` encodes.
Source: FedAvg (McMahan 2017), FedProx (Li 2020), FedAdam (Reddi 2021), FedBN (Li 2021: norms stay at the site);
label skew by a Dirichlet distribution (Hsu 2019).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.network import images
from benchmarks.network.results import Results, Row
from models import delta
from models.augment import RADIOGRAPH
from models.examples import Example
from models.fitting import TrainingPlan, train
from models.network import TINY, Hybrid, HybridConfig, config_of
from models.predicting import predict
from models.restore import load_weights, weights_of

SIZE_PX = 64
SITES = 8
DIRICHLET = 0.3
ONE_MODALITY = ("XR", "XR", "CT", "CT", "CT", "MR", "MR", "MR")  # of each site in the second scene
LOCAL = TrainingPlan(epochs=1, learning_rate=1e-3, batch=16, seed=0, weight_decay=0.05, augmentation=RADIOGRAPH)
PROXIMAL = 0.01
ADAM_RATE, ADAM_BETAS, ADAM_TAU = 3e-3, (0.9, 0.99), 1e-3

Weights = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Scene:
    """Who holds what."""

    name: str
    config: HybridConfig
    sites: list[list[Example]]
    validation: list[Example]

    @property
    def training(self) -> list[Example]:
        return [example for site in self.sites for example in site]


@dataclass(frozen=True)
class Arm:
    """One way to learn together."""

    name: str
    proximal: float = 0.0
    keeps_norms: bool = False
    server: Callable[[], "Server"] = field(default=lambda: Server())


class Server:
    """FedAvg: the base plus the mean change, sites weighted by their images."""

    def step(self, base: Weights, mean: Weights) -> Weights:
        return delta.apply(base, mean)


class AdamServer(Server):
    """FedAdam: the mean change is a gradient that Adam steps along."""

    def __init__(self) -> None:
        self._first: Weights = {}
        self._second: Weights = {}

    def step(self, base: Weights, mean: Weights) -> Weights:
        beta_1, beta_2 = ADAM_BETAS
        change: Weights = {}
        for name, value in mean.items():
            first = beta_1 * self._first.get(name, np.zeros_like(value)) + (1 - beta_1) * value
            second = beta_2 * self._second.get(name, np.full_like(value, ADAM_TAU**2)) + (1 - beta_2) * value**2
            self._first[name], self._second[name] = first, second
            change[name] = (ADAM_RATE * first / (np.sqrt(second) + ADAM_TAU)).astype(np.float32)
        return delta.apply(base, change)


ARMS = (
    Arm("FedAvg"),
    Arm("FedProx", proximal=PROXIMAL),
    Arm("FedAdam", server=AdamServer),
    Arm("FedBN-style", keeps_norms=True),
)


def rows(results: Results, rounds: int, share: float) -> list[Row]:
    """Both scenes, every arm. `share` of the training images is used, for a quick look."""
    found = []
    for scene_of in (label_skew, one_modality):
        settings = {"scene": scene_of.__name__, "rounds": rounds, "share": share, "threads": torch.get_num_threads()}
        for name, measure in _arms(rounds, scene_of is one_modality):
            found.append(
                results.row("federated", {"arm": name} | settings, partial(_measured, measure, scene_of, share))
            )
    return found


def _arms(rounds: int, has_modalities: bool) -> list[tuple[str, Callable[[Scene], Row]]]:
    each = [("FedAvg, one network each", partial(one_network_each, rounds=rounds))] if has_modalities else []
    return [
        ("central", partial(central, rounds=rounds)),
        ("local only", partial(local_only, rounds=rounds)),
        *each,
        *((arm.name, partial(federated, arm=arm, rounds=rounds)) for arm in ARMS),
    ]


def _measured(measure: Callable[[Scene], Row], scene_of: Callable[[float], Scene], share: float) -> Row:
    return measure(scene_of(share))


def label_skew(share: float) -> Scene:
    """Brain MR at eight sites: each label is spread over them by Dirichlet(0.3)."""
    collection = images.collection("mri", SIZE_PX)
    generator = np.random.default_rng(0)
    sites: list[list[Example]] = [[] for _ in range(SITES)]
    for k in range(len(collection.task.labels)):
        members = _fewer([e for e in collection.training if e.label == k], share)
        cuts = (np.cumsum(generator.dirichlet([DIRICHLET] * SITES))[:-1] * len(members)).astype(int)
        for site, part in zip(sites, np.split(np.arange(len(members)), cuts), strict=True):
            site += [members[i] for i in part]
    config = config_of(TINY, [collection.task], [collection.spec])
    return Scene("label skew", config, [site for site in sites if site], collection.validation)


def one_modality(share: float) -> Scene:
    """Chest X-ray, lung CT and brain MR in one network; each site has the images of one modality only."""
    offset, collections = 0, []
    for name in ("covid", "ct", "mri"):
        collections.append(images.collection(name, SIZE_PX, offset=offset))
        offset += len(collections[-1].task.labels)
    sites: list[list[Example]] = []
    for collection in collections:
        count = ONE_MODALITY.count(collection.task.modality)
        members = _fewer(collection.training, share)
        sites += [members[start::count] for start in range(count)]
    config = config_of(TINY, [c.task for c in collections], [c.spec for c in collections])
    return Scene("one modality", config, sites, [e for c in collections for e in c.validation])


def central(scene: Scene, rounds: int) -> Row:
    """All images in one place: what federated learning is measured against."""
    network = _new(scene)
    accuracies: list[float] = []
    plan = replace(LOCAL, epochs=rounds)
    train(network, scene.training, plan, lambda epoch, loss: accuracies.append(_accuracy(network, scene.validation)))
    return _row(accuracies, sent=0)


def local_only(scene: Scene, rounds: int) -> Row:
    """Each site alone, for as many epochs; the mean over the sites, weighted by their images."""
    found = []
    for site in scene.sites:
        network = _new(scene)
        train(network, site, replace(LOCAL, epochs=rounds), lambda epoch, loss: None)
        found.append(_accuracy(network, _like(site, scene.validation)))
    return _row([float(np.average(found, weights=[len(site) for site in scene.sites]))], sent=0)


def one_network_each(scene: Scene, rounds: int) -> Row:
    """FedAvg among the sites of each modality, without the others: what a shared backbone is measured against."""
    found = []
    for modality in dict.fromkeys(site[0].task.modality for site in scene.sites):
        sites = [site for site in scene.sites if site[0].task.modality == modality]
        part = replace(scene, sites=sites, validation=_like(sites[0], scene.validation))
        found.append(federated(part, ARMS[0], rounds))
    by_round = [float(np.mean(values)) for values in zip(*(row["accuracy_by_round"] for row in found), strict=True)]
    return _row(by_round, sent=sum(row["bytes_sent"] for row in found))


def federated(scene: Scene, arm: Arm, rounds: int) -> Row:
    network = _new(scene)
    base = weights_of(network)
    names = [name for name in delta.trainable_names(base, "all") if not (arm.keeps_norms and delta.is_norm(name))]
    shapes = {name: base[name].shape for name in names}
    server, norms = arm.server(), [_norms(base) if arm.keeps_norms else {} for _ in scene.sites]
    accuracies, sent = [], 0
    for number in range(rounds):
        total: Weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        for i, site in enumerate(scene.sites):
            start = base | norms[i]
            after = _trained(network, start, site, arm, number, rounds, seed=number * SITES + i)
            payload = delta.encode(delta.subtract(after, start, names), seed=number * SITES + i)
            sent += len(payload)
            for name, change in delta.decode(payload, shapes).items():
                total[name] += change * np.float32(len(site) / len(scene.training))
            norms[i] = _norms(after) if arm.keeps_norms else {}
        base = server.step(base, total)
        accuracies.append(_judged(network, base, norms, scene))
    return _row(accuracies, sent)


def _trained(
    network: Hybrid, start: Weights, site: Sequence[Example], arm: Arm, number: int, rounds: int, seed: int
) -> Weights:
    """One epoch at a site, the rate falling over the rounds as it does over central training's epochs."""
    load_weights(network, start)
    rate = LOCAL.learning_rate * 0.5 * (1.0 + float(np.cos(np.pi * number / rounds)))
    plan = replace(LOCAL, learning_rate=rate, proximal=arm.proximal, seed=seed, schedule="constant")
    train(network, site, plan, lambda epoch, loss: None)
    return weights_of(network)


def _judged(network: Hybrid, base: Weights, norms: Sequence[Weights], scene: Scene) -> float:
    """Where norms stay at the sites, each site's own network is judged: the mean, weighted by their images."""
    if not any(norms):
        load_weights(network, base)
        return _accuracy(network, scene.validation)
    found = []
    for own, site in zip(norms, scene.sites, strict=True):
        load_weights(network, base | own)
        found.append(_accuracy(network, _like(site, scene.validation)))
    return float(np.average(found, weights=[len(site) for site in scene.sites]))


def _accuracy(network: Hybrid, examples: Sequence[Example]) -> float:
    """Mean over the tasks, each as many as its images: a task with many images does not hide the others."""
    network.eval()
    found = [float((task.logits_NK.argmax(1) == task.truth_N).mean()) for task in predict(network, examples).values()]
    network.train()
    return float(np.mean(found))


def _like(site: Sequence[Example], examples: Sequence[Example]) -> list[Example]:
    """Those of the tasks that the site has."""
    tasks = {example.task.name for example in site}
    return [example for example in examples if example.task.name in tasks]


def _row(accuracies: Sequence[float], sent: int) -> Row:
    return {"accuracy": accuracies[-1], "accuracy_by_round": list(accuracies), "bytes_sent": sent}


def _norms(weights: Mapping[str, NDArray[np.float32]]) -> Weights:
    return {name: value for name, value in weights.items() if delta.is_norm(name)}


def _new(scene: Scene) -> Hybrid:
    torch.manual_seed(0)
    return Hybrid(scene.config)


def _fewer(examples: Sequence[Example], share: float) -> list[Example]:
    """Evenly spread over the file order."""
    count = max(SITES, round(len(examples) * share))
    return [examples[i] for i in np.linspace(0, len(examples) - 1, min(count, len(examples))).astype(int)]
