"""What every laboratory does once weights are trained: out-of-distribution statistics, calibration, reading, the bundle.

Reads examples in memory and a trained network; writes one bundle file.
Never runs on a box, never draws or reads an image that is to be learned from.
Source: calibration as in models.calibration; out-of-distribution score as Lee 2018 (class means, shared covariance).
Axes: N examples, K labels, D features of a look, B series, S slices, H W pixels.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from models import calibration, drift
from models.bundle import Array, BundleParts, write_bundle
from models.calibration import F64
from models.errors import ModelError
from models.examples import Example
from models.export import other_batch, parity, run_torch, to_onnx
from models.network import FAR, Hybrid
from models.phantoms import LABELS, phantom
from models.predicting import Predicted, looks, predict
from models.preprocess import prepare
from models.restore import load_weights, weights_of
from models.spec import MODALITIES, InputSpec, Manifest, TaskSpec

OOD_SHRINKAGE = 0.1
OOD_QUANTILE = 0.99
KNOWN_SLICES, KNOWN_SEED = 4, 20_999_999  # of the known-answer batch


@dataclass(frozen=True)
class Reading:
    """How one task's examples were read with the manifest's calibration."""

    probabilities_NK: F64
    truth_N: NDArray[np.int64]
    is_covered_N: NDArray[np.bool_]  # the true label is in the conformal set
    is_answered_N: NDArray[np.bool_]  # exactly one label in the conformal set and in distribution

    @property
    def is_right_N(self) -> NDArray[np.bool_]:
        return np.asarray(self.probabilities_NK.argmax(1) == self.truth_N)

    @property
    def accuracy(self) -> float:
        return calibration.accuracy(self.probabilities_NK, self.truth_N)

    @property
    def balanced_accuracy(self) -> float:
        return calibration.balanced_accuracy(self.probabilities_NK, self.truth_N)

    @property
    def calibration_error(self) -> float:
        return calibration.expected_calibration_error(self.probabilities_NK, self.truth_N)

    @property
    def answered(self) -> float:
        return float(self.is_answered_N.mean())

    @property
    def accuracy_answered(self) -> float:
        return float(self.is_right_N[self.is_answered_N].mean()) if self.is_answered_N.any() else 0.0


def check_writable(out: Path) -> None:
    """Raises ModelError for a place where no bundle can be written: before the training, not after it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ModelError(f"{out} cannot be written: {error.strerror}", advice="give --out a file of yours") from error
    if out.is_dir():
        raise ModelError(f"{out} is a folder", advice="give --out the name of a file")


def fit_ood(network: Hybrid, examples: Sequence[Example]) -> None:
    """Freeze what an image looks like; class means and the inverse root of their shared covariance, into the buffers."""
    network.freeze_look()
    look_ND, label_N = looks(network, examples)
    mean_KD = np.full((network.head.out_features, look_ND.shape[1]), FAR)  # a label without examples is near nothing
    for k in np.unique(label_N):
        mean_KD[k] = look_ND[label_N == k].mean(0, np.float64)
    residual_ND = look_ND - mean_KD[label_N]
    scale_D = residual_ND.std(0) + 1e-6
    correlation_DD = (residual_ND / scale_D).T @ (residual_ND / scale_D) / len(residual_ND)
    shrunk_DD = (1 - OOD_SHRINKAGE) * correlation_DD + OOD_SHRINKAGE * np.eye(len(scale_D))
    values_D, vectors_DD = np.linalg.eigh(shrunk_DD)
    whiten_DD = (vectors_DD / np.sqrt(values_D)) @ vectors_DD.T / scale_D[:, None]
    statistics = {"ood_mean_KD": mean_KD.astype(np.float32), "ood_whiten_DD": whiten_DD.astype(np.float32)}
    load_weights(network, weights_of(network) | statistics)


def calibrated(network: Hybrid, draft: Manifest, seen: Mapping[str, Predicted], ood_threshold: float) -> Manifest:
    """The draft with each task's temperature and threshold, fitted on what was seen of examples held back, by task name.

    Every task needs drift.ENOUGH of them. The network's parameters are counted into it too.
    """
    return structs.replace(
        draft,
        tasks=tuple(calibrated_task(task, seen[task.name]) for task in draft.tasks),
        ood_threshold=round(ood_threshold, 4),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
    )


def highest_ood(seen: Mapping[str, Predicted]) -> float:
    """What all but the highest hundredth of the examples stay below."""
    return float(np.quantile(np.concatenate([predicted.ood_N for predicted in seen.values()]), OOD_QUANTILE))


def calibrated_task(task: TaskSpec, seen: Predicted) -> TaskSpec:
    temperature = round(calibration.fit_temperature(seen.logits_NK, seen.truth_N), 4)
    probabilities_NK = calibration.softmax(seen.logits_NK, temperature)
    threshold = calibration.conformal_threshold(probabilities_NK, seen.truth_N)
    reference = drift.reference(seen.logits_NK, seen.ood_N, temperature)
    return structs.replace(task, temperature=temperature, conformal_threshold=threshold, reference=reference)


def reading(network: Hybrid, manifest: Manifest, task: TaskSpec, examples: Sequence[Example]) -> Reading:
    """Read one task's examples with the manifest's calibration; those of other tasks are left out."""
    seen = predict(network, [example for example in examples if example.task.name == task.name])[task.name]
    probabilities_NK = calibration.softmax(seen.logits_NK, task.temperature)
    is_single_N = (probabilities_NK >= task.conformal_threshold).sum(1) == 1
    return Reading(
        probabilities_NK,
        seen.truth_N,
        is_covered_N=calibration.of_truth(probabilities_NK, seen.truth_N) >= task.conformal_threshold,
        is_answered_N=is_single_N & (seen.ood_N <= manifest.ood_threshold),
    )


def known_inputs(inputs: Sequence[InputSpec]) -> dict[str, Array]:
    """A batch of one phantom of each input's modality, KNOWN_SLICES long; what has fewer is padded. Never a real image."""
    ordered = sorted(inputs, key=lambda spec: MODALITIES.index(spec.modality))
    slices_BSHW = np.zeros((len(ordered), KNOWN_SLICES, ordered[0].size, ordered[0].size), np.float32)
    mask_BS = np.zeros((len(ordered), KNOWN_SLICES), bool)
    for b, spec in enumerate(ordered):
        drawn = phantom(spec.modality, LABELS[spec.modality][1], KNOWN_SEED)
        slices_SHW = prepare(drawn.volume, spec).slices_SHW
        slices_SHW = slices_SHW[2:6] if len(slices_SHW) > KNOWN_SLICES else slices_SHW
        slices_BSHW[b, : len(slices_SHW)] = slices_SHW
        mask_BS[b, : len(slices_SHW)] = True
    return {
        "slices_BSHW": slices_BSHW,
        "slice_mask_BS": mask_BS,
        "modality_B": np.array([MODALITIES.index(spec.modality) for spec in ordered], np.int64),
    }


def write(out: Path, network: Hybrid, manifest: Manifest, card_of: Callable[[float], str]) -> str:
    """Export, compare with torch, write; give the digest. The card is told the largest difference.

    Raises BundleError where torch and ONNX Runtime differ by more than models.export allows.
    """
    known = known_inputs(manifest.inputs)
    onnx = to_onnx(network)
    card = card_of(parity(network, onnx, [known, other_batch(known)]))
    return write_bundle(out, BundleParts(manifest, onnx, weights_of(network), known, run_torch(network, known), card))
