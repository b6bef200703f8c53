"""What the tests of training share: a few phantoms, a small network, a bundle whose network has learned nothing."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.examples import Example
from models.phantoms import LABELS, LOOKS, phantom
from models.tasks import INPUTS, TASKS

if TYPE_CHECKING:
    from models.network import Hybrid

NETWORK = "hybrid-nano"


@cache
def cases(modality: str, per_label: int, first_seed: int = 80_000_000, look: str = "north") -> tuple[Example, ...]:
    from models.pretraining import example_of

    task = next(task for task in TASKS if task.modality == modality)
    return tuple(
        replace(example_of(phantom(modality, label, first_seed + n, LOOKS[look]), task, k), lesion_Shw=None)
        for n in range(per_label)
        for k, label in enumerate(LABELS[modality])
    )


def fresh(seed: int = 0) -> "Hybrid":
    from models.restore import new_network

    return new_network(NETWORK, TASKS, INPUTS, seed)


def quiet(epoch: int, loss: float | None) -> None:
    pass


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def write_fresh_bundle(path: Path) -> Path:
    """A whole bundle, in seconds."""
    from models.bundle import BundleParts, write_bundle
    from models.export import OPSET, run_torch, to_onnx
    from models.laboratory import known_inputs
    from models.restore import weights_of
    from models.spec import Manifest

    network = fresh().eval()
    known = known_inputs(INPUTS)
    manifest = Manifest(1, "fresh", "1", NETWORK, INPUTS, TASKS, 1.0, 1, OPSET, {})
    parts = BundleParts(manifest, to_onnx(network), weights_of(network), known, run_torch(network, known), "fresh")
    write_bundle(path, parts)
    return path
