"""Bytes of a box and round beside float32 FedAvg, and the accuracy they buy, on two real sets.

Reads ../shared/data; keeps each row under .bench/bytes as soon as it is measured. One thread.
Never compares other than at equal rounds, images, seeds and first weights; never averages over less than the last rounds.
Source: FedAvg (McMahan 2017); the codecs are models.addable (masked rounds), models.drawn_delta and models.delta (open
rounds), and benchmarks.sparse, which no round has.

Every arm starts from weights trained on two other public sets, as a fleet starts from the shipped bundle. One epoch at a
site and round, the rate falling over the rounds; `rate` is the arm's own factor on it. An arm that `trains_chosen` moves
at the site only heads, norms and the coordinates that the round's seed draws (models.drawn), as a box does. Bytes are those
of the sealed update: payload, signature, certificate, encapsulated key.

The arms of the claim come first, in all seeds; each row is kept as soon as it is there, so that a run that was stopped goes
on where it was. Progress goes to stderr.
"""

import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import count, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.table import Table
from safetensors import numpy as safetensors_numpy

from benchmarks.exchanges import Arm, Codec, exchange_of
from benchmarks.link import updates
from benchmarks.network import federated, images
from benchmarks.network.federated import LOCAL, SITES, Scene, Weights
from benchmarks.network.results import Results, Row, code_digest
from fleet_link import sealing
from models import delta
from models.bundle import write_durably
from models.examples import Example
from models.fitting import train
from models.network import NANO, Hybrid, config_of
from models.predicting import predict
from models.restore import load_weights, weights_of
from models.round_layout import OPEN_VALUE_BITS, rate_factor

FOLDER = Path(".bench") / "bytes"
SIZE_PX = 64
LAST_ROUNDS = 5  # whose accuracies are averaged
GOAL_POINTS = 0.5
GOAL_FACTORS = {"masked": 50.0, "open": 200.0}
PUBLIC_EPOCHS, PUBLIC_IMAGES = 8, 1500
SITE_PLAN = replace(LOCAL, batch=8, learning_rate=2e-3)  # small steps of few images: a site has 4 to 140 of them

_ROUNDS: dict[Codec, str] = {"float32": "open", "int8": "open", "addable": "masked", "drawn": "open", "sparse": "open"}


@dataclass(frozen=True)
class Extent:
    rounds: int
    share: dict[str, float]  # of each scene's training images
    seeds: int
    arms: tuple[Arm, ...]


FEDAVG = Arm("float32")
OPEN_SHARE = Arm("drawn", share=0.034, value_bits=OPEN_VALUE_BITS, trains_chosen=True, rate=rate_factor(0.034))
MASKED_SHARE = replace(OPEN_SHARE, codec="addable", value_bits=12, word_bits=16)
CLAIM = (FEDAVG, MASKED_SHARE, OPEN_SHARE)
ARMS = (
    *CLAIM,
    replace(FEDAVG, rate=2.0),
    replace(OPEN_SHARE, value_bits=4),
    replace(OPEN_SHARE, rate=6.0),
    Arm("sparse", share=0.01, value_bits=2, has_memory=True),
    Arm("addable", "norms", value_bits=12, word_bits=16, rate=4.0),
    Arm("addable", share=1 / 25, value_bits=12, word_bits=16),
    Arm("sparse", share=0.003, value_bits=2, has_memory=True),
    Arm("addable", value_bits=8, word_bits=16),
    Arm("int8", "norms", rate=4.0),
    Arm("int8"),
    Arm("sparse", share=0.01, value_bits=2),
    Arm("addable", share=1 / 25, value_bits=12, word_bits=16, has_memory=True),
    Arm("addable", "heads", value_bits=12, word_bits=16, rate=4.0),
)
FULL = Extent(rounds=10, share={"covid, alike": 0.5, "mri, Dirichlet 0.3": 0.2}, seeds=3, arms=ARMS)
QUICK = Extent(rounds=2, share={"covid, alike": 0.2, "mri, Dirichlet 0.3": 0.1}, seeds=1, arms=ARMS)


def measure(*, quick: bool) -> dict[str, Any]:
    """Raises SystemExit where the real images are not beside the repository."""
    if not images.are_here():
        sys.exit(f"the labelled images are not at {images.FOLDER}: this bench needs them (see README, Measure)")
    torch.set_num_threads(1)
    extent = QUICK if quick else FULL
    numbers, total = count(1), extent.seeds * len(extent.share) * len(extent.arms)
    results = Results(FOLDER, lambda text: print(f"{next(numbers)} of {total} {text}", file=sys.stderr, flush=True))
    return {"rounds": extent.rounds, "seeds": extent.seeds, "rows": rows(results, extent)}


def rows(results: Results, extent: Extent) -> list[Row]:
    found = []
    for seed, (name, share), arm in _order(extent):
        settings = {"scene": name, "arm": arm.name, "seed": seed, "rounds": extent.rounds, "images": share}
        settings["code"] = _own_code()
        found.append(results.row("bytes", settings, partial(_measured, name, share, arm, extent.rounds, seed)))
    shown = [arm.name for arm in extent.arms]
    return sorted(found, key=lambda row: (list(extent.share).index(row["scene"]), shown.index(row["arm"])))


def _order(extent: Extent) -> Iterator[tuple[int, tuple[str, float], Arm]]:
    """The claim's arms in all seeds before any other."""
    claimed = [arm for arm in extent.arms if arm in CLAIM]
    others = [arm for arm in extent.arms if arm not in CLAIM]
    for arms in (claimed, others):
        yield from product(range(extent.seeds), extent.share.items(), arms)


def _own_code() -> str:
    """Results knows the code of the networks; figures depend on this module and its exchanges too."""
    files = (Path(__file__).with_name(name) for name in (Path(__file__).name, "exchanges.py", "sparse.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def _measured(scene: str, share: float, arm: Arm, rounds: int, seed: int) -> Row:
    return asdict(arm) | run(scene_of(scene, share), arm, rounds, seed)


@cache
def scene_of(name: str, share: float) -> Scene:
    """Brain MR whose labels are spread unevenly over eight sites, or chest X-rays dealt out evenly."""
    if name.startswith("mri"):
        skewed = federated.label_skew(share)
        example = skewed.training[0]
        spec = images.collection("mri", SIZE_PX).spec
        return replace(skewed, name=name, config=config_of(NANO, [example.task], [spec]))
    collection = images.collection("covid", SIZE_PX)
    members = _fewer(collection.training, share)
    config = config_of(NANO, [collection.task], [collection.spec])
    return Scene(name, config, [members[site::SITES] for site in range(SITES)], collection.validation)


@cache
def public_weights() -> Weights:
    """Of a network trained on children's chest X-rays and lung CT: what a laboratory would ship."""
    path = FOLDER / f"public-{code_digest()}-{_own_code()}.safetensors"
    if path.exists():
        kept: Weights = safetensors_numpy.load_file(path)
        return kept
    first = images.collection("pneumonia", SIZE_PX)
    second = images.collection("ct", SIZE_PX, offset=len(first.task.labels))
    torch.manual_seed(0)
    network = Hybrid(config_of(NANO, [first.task, second.task], [first.spec, second.spec]))
    examples = _fewer(first.training, PUBLIC_IMAGES / len(first.training)) + second.training
    train(network, examples, replace(LOCAL, epochs=PUBLIC_EPOCHS), lambda epoch, loss: None)
    weights = weights_of(network)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, safetensors_numpy.save(weights))
    return weights


def run(scene: Scene, arm: Arm, rounds: int, seed: int) -> Row:
    """One federation."""
    network = _new(scene)
    base = weights_of(network)
    names = delta.trainable_names(base, arm.trainable)
    exchange = exchange_of(arm, {name: base[name].shape for name in names}, seed)
    accuracies, sent, largest = [], 0, 0.0
    for number in range(rounds):
        drawn_by = exchange.begin(number)
        for i, site in enumerate(scene.sites):
            after = _trained(network, base, site, arm, drawn_by, number / rounds, (seed * rounds + number) * SITES + i)
            change = delta.subtract(after, base, names)
            largest = max(largest, delta.norm(change))
            sent += exchange.send(i, change, len(site) / max(len(each) for each in scene.sites))
        base = delta.apply(base, exchange.mean())
        if number >= rounds - LAST_ROUNDS:
            load_weights(network, base)
            accuracies.append(_accuracy(network, scene.validation))
    return {
        "accuracy": float(np.mean(accuracies)),
        "accuracy_by_round": accuracies,
        "validation": len(scene.validation),
        "bytes": sent / rounds / len(scene.sites) + sealing_bytes(),
        "payload_bytes": sent / rounds / len(scene.sites),
        "largest_norm": largest,
    }


def _trained(
    network: Hybrid, base: Weights, site: Sequence[Example], arm: Arm, drawn_by: bytes, done: float, seed: int
) -> Weights:
    load_weights(network, base)
    rate = SITE_PLAN.learning_rate * arm.rate * 0.5 * (1.0 + float(np.cos(np.pi * done)))
    plan = replace(SITE_PLAN, learning_rate=rate, seed=seed, schedule="constant", trainable=arm.trainable)
    if drawn_by:
        plan = replace(plan, share=arm.share, share_seed=drawn_by)
    train(network, site, plan, lambda epoch, loss: None)
    return weights_of(network)


@cache
def sealing_bytes() -> int:
    """What sealing adds to a payload, whatever it is."""
    with TemporaryDirectory() as folder:
        made = updates.written(Path(folder), "unsafe_open", parameters=10_000, boxes=1)
        name = updates.NAMES[0]
        sealed = made.update(name).read_bytes()
        opened = sealing.open_update(
            sealed, private_key=made.sealing_key, trust=made.trust, sender=name, plan=made.plan, now=time.time()
        )
    return len(sealed) - len(opened.payload)


def _new(scene: Scene) -> Hybrid:
    """The public weights with a head, and what belongs to it, of the scene's own."""
    torch.manual_seed(0)
    network = Hybrid(scene.config)
    own = weights_of(network)
    kept = {
        name: value
        for name, value in public_weights().items()
        if not name.startswith((delta.HEAD_PREFIX, delta.FIXED_PREFIX)) and own[name].shape == value.shape
    }
    load_weights(network, own | kept)
    return network


def _accuracy(network: Hybrid, examples: Sequence[Example]) -> float:
    network.eval()
    (seen,) = predict(network, examples).values()
    network.train()
    return float((seen.logits_NK.argmax(1) == seen.truth_N).mean())


def _fewer(examples: Sequence[Example], share: float) -> list[Example]:
    """Evenly spread over the file order."""
    number = min(len(examples), max(SITES, round(len(examples) * share)))
    return [examples[i] for i in np.linspace(0, len(examples) - 1, number).astype(int)]


def table(result: dict[str, Any]) -> Table:
    shown = Table(
        title=f"Bytes of a box and round, and accuracy: mean of the last {LAST_ROUNDS} of {result['rounds']} rounds and of "
        f"{result['seeds']} seeds. Goal: within {GOAL_POINTS} points of float32 FedAvg"
    )
    for column in ("set", "arm", "round", "bytes", "fewer by", "accuracy, %", "less FedAvg's", "± seeds", "n", "goal"):
        shown.add_column(column, justify="left" if column in ("set", "arm", "round", "goal") else "right")
    for one in summary(result["rows"]):
        shown.add_row(
            one["scene"],
            one["arm"],
            one["round"],
            f"{one['bytes']:,.0f}",
            f"{one['factor']:.0f} ×",
            f"{one['accuracy'] * 100:.1f}",
            f"{one['points']:+.1f}",
            "" if one["seeds"] < 2 else f"{one['spread']:.1f}",
            str(one["validation"]),
            one["goal"],
        )
    return shown


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row for each set and arm; differences from FedAvg are taken seed by seed."""
    found: list[Row] = []
    for scene, arm in dict.fromkeys((row["scene"], row["arm"]) for row in rows):
        own = {row["seed"]: row for row in rows if (row["scene"], row["arm"]) == (scene, arm)}
        base = {row["seed"]: row for row in rows if (row["scene"], row["arm"]) == (scene, FEDAVG.name)}
        points = [100 * (row["accuracy"] - base[seed]["accuracy"]) for seed, row in own.items()]
        first = next(iter(own.values()))
        factor = next(iter(base.values()))["bytes"] / float(np.mean([row["bytes"] for row in own.values()]))
        kind = _ROUNDS[first["codec"]]
        found.append(
            {
                "scene": scene,
                "arm": arm,
                "round": kind,
                "bytes": float(np.mean([row["bytes"] for row in own.values()])),
                "factor": factor,
                "accuracy": float(np.mean([row["accuracy"] for row in own.values()])),
                "points": float(np.mean(points)),
                "spread": float(np.std(points, ddof=1)) if len(points) > 1 else 0.0,
                "seeds": len(own),
                "validation": first["validation"],
                "goal": _judged(factor, float(np.mean(points)), kind) if arm != FEDAVG.name else "",
            }
        )
    return found


def _judged(factor: float, points: float, kind: str) -> str:
    missed = []
    if factor < GOAL_FACTORS[kind]:
        missed.append(f"bytes: below {GOAL_FACTORS[kind]:.0f} ×")
    if points < -GOAL_POINTS:
        missed.append("accuracy")
    return "missed: " + ", ".join(missed) if missed else "met"
