"""What device-level noise in masked rounds costs in accuracy, and what it gives as (epsilon, delta).

Reads ../shared/data; keeps each row under .bench/privacy as soon as it is measured. One thread.
Never masks: masks cancel to the last bit, so the words are added as they are. Never charges the choice of the clip norm.
Source: the accountant is models.accountant; FedAvg McMahan 2017; label skew by Dirichlet(0.3), Hsu 2019.

Every arm starts from weights trained on two other public sets, as a fleet starts from the shipped bundle, and every site
weighs the same. All eight boxes stand in each sum, all add their noise, and no round is left out: no amplification.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Group
from rich.table import Table

from benchmarks.network import federated, images
from benchmarks.network.federated import LOCAL, SITES, Scene, Weights
from benchmarks.network.results import Results, Row
from models import accountant, addable, delta
from models.delta import Trainable
from models.examples import Example
from models.fitting import train
from models.layout import Layout
from models.network import TINY, Hybrid, config_of
from models.predicting import predict
from models.restore import load_weights, weights_of

FOLDER = Path(".bench") / "privacy"
DELTA = 1e-5
# What a site trains, its clip norm and the noise multipliers. A head's delta is about as long as its clip, one of all
# weights much longer: there the noise of a longer clip would grow with it.
ARMS: tuple[tuple[Trainable, float, tuple[float, ...]], ...] = (
    ("heads", 0.25, (0.0, 0.3, 1.0, 3.0)),
    ("all", 1.0, (0.0, 0.3)),
)
RATE = 3e-3
LAST_ROUNDS = 3  # whose accuracies are averaged
LEDGER_ROUNDS = (1, 10, 50, 200)
LEDGER_MULTIPLIERS = (0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Extent:
    rounds: int
    share: float  # of the sites' images
    public_images: int
    public_epochs: int


FULL = Extent(rounds=10, share=0.5, public_images=1000, public_epochs=6)
QUICK = Extent(rounds=2, share=0.1, public_images=64, public_epochs=1)


def measure(*, quick: bool) -> dict[str, Any]:
    """Raises SystemExit where the real images are not beside the repository."""
    if not images.are_here():
        sys.exit(f"the labelled images are not at {images.FOLDER}: this bench needs them (see README, Measure)")
    torch.set_num_threads(1)
    extent = QUICK if quick else FULL
    results = Results(FOLDER, lambda text: print(text, file=sys.stderr, flush=True))
    return {"rounds": extent.rounds, "delta": DELTA, "rows": _rows(results, extent), "ledger": _ledger()}


def _rows(results: Results, extent: Extent) -> list[Row]:
    found = []
    for trainable, clip_norm, multipliers in ARMS:
        for multiplier in multipliers:
            settings = {"trainable": trainable, "clip": clip_norm, "noise": multiplier} | vars(extent)
            measured = partial(federate, extent, trainable, clip_norm, multiplier)
            found.append(results.row("privacy", settings, measured))
    return found


def federate(extent: Extent, trainable: Trainable, clip_norm: float, multiplier: float) -> Row:
    """One federation: accuracy before it and over its last rounds, and what its rounds cost."""
    scene = _scene(extent.share)
    network = _new(scene, extent)
    base = weights_of(network)
    names = delta.trainable_names(base, trainable)
    accuracies, norms, costs, before = [], [], [], _accuracy(network, scene.validation)
    for number in range(extent.rounds):
        layout = _layout(base, names, clip_norm, multiplier, number)
        total = np.zeros(layout.word_count, layout.word_type)
        for i, site in enumerate(scene.sites):
            change = _change(network, base, site, trainable, names, seed=number * SITES + i)
            norms.append(delta.norm(change))
            total += addable.encode(change, layout, 1.0, np.random.default_rng(number * SITES + i))[0]
        base = delta.apply(base, addable.decode_sum(total, layout))
        costs += [cost for cost in [accountant.cost_of(layout)] if cost is not None]
        load_weights(network, base)
        accuracies.append(_accuracy(network, scene.validation))
    return {
        "weights": layout.size,
        "before": before,
        "accuracy": float(np.mean(accuracies[-LAST_ROUNDS:])),
        "accuracy_by_round": accuracies,
        "validation": len(scene.validation),
        "median_norm": float(np.median(norms)),
        "epsilon": accountant.epsilon(costs, DELTA) if costs else None,
    }


def _layout(base: Weights, names: Sequence[str], clip_norm: float, multiplier: float, number: int) -> Layout:
    return Layout(
        shapes={name: base[name].shape for name in names},
        seed=b"bench of privacy %d" % number,
        clip_norm=clip_norm,
        boxes=SITES,
        noise=multiplier,
        noise_boxes=SITES if multiplier else 0,
    )


def _change(
    network: Hybrid, base: Weights, site: Sequence[Example], trainable: Trainable, names: Sequence[str], seed: int
) -> Weights:
    load_weights(network, base)
    plan = replace(LOCAL, learning_rate=RATE, seed=seed, schedule="constant", trainable=trainable)
    train(network, site, plan, _quiet)
    return delta.subtract(weights_of(network), base, names)


@cache
def _scene(share: float) -> Scene:
    return federated.label_skew(share)


def _new(scene: Scene, extent: Extent) -> Hybrid:
    """The public weights with a head, and what belongs to it, of the scene's own."""
    torch.manual_seed(0)
    network = Hybrid(scene.config)
    own = weights_of(network)
    public = _public_weights(extent.public_images, extent.public_epochs)
    kept = {
        name: value
        for name, value in public.items()
        if not name.startswith((delta.HEAD_PREFIX, delta.FIXED_PREFIX)) and own[name].shape == value.shape
    }
    load_weights(network, own | kept)
    return network


@cache
def _public_weights(count: int, epochs: int) -> Weights:
    """Of a network trained on children's chest X-rays and lung CT: what a laboratory would ship."""
    first = images.collection("pneumonia", federated.SIZE_PX)
    second = images.collection("ct", federated.SIZE_PX, offset=len(first.task.labels))
    torch.manual_seed(0)
    network = Hybrid(config_of(TINY, [first.task, second.task], [first.spec, second.spec]))
    examples = [
        collection.training[i]
        for collection in (first, second)
        for i in np.linspace(0, len(collection.training) - 1, min(count // 2, len(collection.training))).astype(int)
    ]
    train(network, examples, replace(LOCAL, epochs=epochs), _quiet)
    return weights_of(network)


def _accuracy(network: Hybrid, examples: Sequence[Example]) -> float:
    network.eval()
    (seen,) = predict(network, examples).values()
    network.train()
    return float((seen.logits_NK.argmax(1) == seen.truth_N).mean())


def _quiet(epoch: int, loss: float | None) -> None:
    pass


def _ledger() -> list[Row]:
    """What rounds cost a box. Of 1,000 weights here; the number of weights hardly changes it."""
    found = []
    for multiplier in LEDGER_MULTIPLIERS:
        layout = Layout({"head": (1000,)}, b"bench of privacy", 1.0, SITES, noise=multiplier, noise_boxes=SITES)
        cost = accountant.cost_of(layout)
        assert cost is not None
        epsilons = {str(rounds): accountant.epsilon([cost] * rounds, DELTA) for rounds in LEDGER_ROUNDS}
        found.append({"noise": multiplier, "epsilon": epsilons})
    return found


def table(result: dict[str, Any]) -> Group:
    return Group(_accuracies(result), _costs(result))


def _accuracies(result: dict[str, Any]) -> Table:
    rows: list[Row] = result["rows"]
    shown = Table(
        title=f"Brain MR at {SITES} sites, {result['rounds']} rounds: accuracy over the last {LAST_ROUNDS} of them",
        caption=f"{rows[0]['validation']} validation images, so ±{_half_interval(rows):.0f} points; "
        f"{rows[0]['before']:.1%} before the first round; epsilon at delta {result['delta']:g}",
    )
    for column in ("trained", "weights", "clip", "median norm", "noise", "epsilon", "accuracy"):
        shown.add_column(column, justify="left" if column == "trained" else "right")
    for row in rows:
        shown.add_row(
            row["trainable"],
            f"{row['weights']:,}",
            f"{row['clip']:g}",
            f"{row['median_norm']:.2f}",
            f"{row['noise']:g}",
            "no limit" if row["epsilon"] is None else f"{row['epsilon']:.1f}",
            f"{row['accuracy']:.1%}",
        )
    return shown


def _half_interval(rows: Sequence[Row]) -> float:
    """95 %, in points, of the most accurate row."""
    best = max(row["accuracy"] for row in rows)
    return float(196.0 * np.sqrt(best * (1.0 - best) / rows[0]["validation"]))


def _costs(result: dict[str, Any]) -> Table:
    shown = Table(title=f"Epsilon of a box after so many rounds, at delta {result['delta']:g}")
    shown.add_column("noise", justify="right")
    for rounds in LEDGER_ROUNDS:
        shown.add_column(str(rounds), justify="right")
    for row in result["ledger"]:
        shown.add_row(f"{row['noise']:g}", *(f"{value:.1f}" for value in row["epsilon"].values()))
    return shown
