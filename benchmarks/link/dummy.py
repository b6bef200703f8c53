"""The dummy network and its made-up training, alike for ours and the peers: 160 tensors, noise on every one.

Reads the shipped bundle; writes a bundle whose graph is the shipped one and whose weights are made up.
Never trains: the change is drawn from a seed, so that whoever knows the seed knows the exact mean.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.bundle import SHIPPED, BundleParts, read_bundle, write_bundle

TENSORS = 160
SMALLEST, LARGEST = 64, 64 * 4000  # before scaling: as the tensors of a hybrid grow

Arrays = dict[str, NDArray[np.float32]]


def shapes(parameters: int) -> dict[str, tuple[int]]:
    """Exactly `parameters` in all, in geometric steps; the peers' apps compute the same."""
    raw = np.geomspace(SMALLEST, LARGEST, TENSORS)
    sizes = np.maximum(1, raw / raw.sum() * parameters).astype(int)
    sizes[-1] += parameters - sizes.sum()
    return {f"layer{number:03}.w": (int(size),) for number, size in enumerate(sizes)}


def write_dummy_bundle(path: Path, parameters: int) -> Path:
    shipped = read_bundle(SHIPPED)
    generator = np.random.default_rng(parameters)
    weights = {name: 0.1 * generator.standard_normal(shape, np.float32) for name, shape in shapes(parameters).items()}
    manifest = msgspec.structs.replace(shipped.manifest, name="dummy", parameters=parameters, variants=())
    parts = BundleParts(
        manifest=manifest,
        onnx=shipped.onnx,
        weights=weights,
        known_inputs=shipped.known_inputs,
        known_outputs=shipped.known_outputs,
        card="Weights of the link's bench: noise.",
    )
    write_bundle(path, parts)
    return path


def change(device: str, round_seed: int, of: Mapping[str, tuple[int, ...]], clip_norm: float) -> Arrays:
    """What this box learns in this round: noise of half the clip norm."""
    digest = hashlib.sha256(f"{device}|{round_seed}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    scale = np.float32(0.5 * clip_norm / np.sqrt(sum(int(np.prod(shape)) for shape in of.values())))
    return {name: scale * generator.standard_normal(of[name], np.float32) for name in sorted(of)}


def error_of_mean(after: Arrays, before: Arrays, devices: Sequence[str], round_seed: int, clip_norm: float) -> float:
    """How far after - before is from the exact mean of the changes, relative to it (L2)."""
    of = {name: value.shape for name, value in before.items()}
    exact = {name: np.zeros(shape, np.float32) for name, shape in of.items()}
    for device in devices:
        for name, value in change(device, round_seed, of, clip_norm).items():
            exact[name] += value / np.float32(len(devices))
    off = sum(float(np.sum(np.square(after[name] - before[name] - exact[name], dtype=np.float64))) for name in of)
    size = sum(float(np.sum(np.square(value, dtype=np.float64))) for value in exact.values())
    return float(np.sqrt(off / size))
