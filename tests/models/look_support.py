"""Phantom chest X-rays of each look as the shipped bundle reads them; drawn once, for tests of statistics.

Reads the shipped bundle; writes nothing. Axes: N cases, K labels.
Never asserts; tests do.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.phantoms import LABELS, LOOKS, phantom
from models.preprocess import prepare
from models.spec import MODALITIES, TaskSpec
from tests.models.conftest import SessionRun, one_series

FIRST_SEED = 50_000_000  # far from those of training, calibration and the card
PER_LABEL = 100


@dataclass(frozen=True)
class Readings:
    """Of one task."""

    logits_NK: NDArray[np.floating]
    truth_N: NDArray[np.integer]
    ood_N: NDArray[np.floating]

    def take(self, index_N: NDArray[np.integer]) -> "Readings":
        return Readings(self.logits_NK[index_N], self.truth_N[index_N], self.ood_N[index_N])


_known: dict[tuple[str, str, str], Readings] = {}


def readings(bundle: Bundle, run: SessionRun, task: TaskSpec, look: str) -> Readings:
    """PER_LABEL phantoms of each label, one label after the other."""
    key = (bundle.digest, task.name, look)
    if key not in _known:
        _known[key] = _read(bundle, run, task, look)
    return _known[key]


def _read(bundle: Bundle, run: SessionRun, task: TaskSpec, look: str) -> Readings:
    spec = bundle.manifest.input_for(task.modality)
    assert spec is not None
    logits, truth, ood = [], [], []
    for k, label in enumerate(LABELS[task.modality]):
        for seed in range(FIRST_SEED, FIRST_SEED + PER_LABEL):
            drawn = phantom(task.modality, label, seed, LOOKS[look])
            outputs = run(one_series(prepare(drawn.volume, spec).slices_SHW, MODALITIES.index(task.modality)))
            logits.append(outputs["logits_BK"][0, task.offset : task.offset + len(task.labels)])
            truth.append(k)
            ood.append(outputs["ood_B"][0])
    return Readings(np.array(logits, np.float64), np.array(truth), np.array(ood, np.float64))
