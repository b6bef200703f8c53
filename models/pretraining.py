"""The laboratory: train the shipped bundle on phantoms, calibrate it, measure it, write it with its card.

Reads nothing but seeds; writes one bundle file.
Never runs on a box. Every figure in the model card is measured here, on phantoms of seeds never trained on.
What follows the training is models.laboratory.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch

from models.augment import SITE
from models.bundle import INPUT_NAMES
from models.examples import LESION_SIDE, Example, batches
from models.export import OPSET, run_torch
from models.fitting import Progress, TrainingPlan, train
from models.laboratory import calibrated, check_writable, fit_ood, highest_ood, reading, write
from models.network import NANO, Hybrid
from models.phantoms import BASE, LABELS, LOOKS, Phantom, SiteLook, phantom
from models.predicting import predict
from models.preprocess import Volume, prepare
from models.restore import new_network
from models.spec import MODALITIES, InputSpec, Manifest, TaskSpec
from models.tasks import INPUTS, TASKS

NAME, VERSION = "phantom-tiny", "1"
PHANTOMS_PER_LABEL = {"XR": 900, "CT": 700, "MR": 400}  # an X-ray is one slice: cheap
HELD_BACK_PER_LABEL = 100  # for calibration, and again for each measured look
OOD_TOLERANCE = 2.5  # other scanners are not another organ
CALIBRATION_SEED, TEST_SEED = 10_000_000, 20_000_000  # training counts up from the plan's seed
PLAN = TrainingPlan(
    epochs=8,
    learning_rate=1.5e-3,
    batch=16,
    seed=0,
    weight_decay=0.05,
    augmentation=SITE,
    attention_weight=0.3,
    label_smoothing=0.02,
    most_slices=3,
)
_DRAFT = Manifest(1, NAME, VERSION, NANO, INPUTS, TASKS, ood_threshold=0.0, parameters=0, opset=OPSET, members={})


def pretrain(out: Path, seed: int, scale: float, progress: Progress, checkpoint: Path | None = None) -> None:
    """Train, calibrate, measure, write. With a checkpoint, what stopped goes on after its last epoch."""
    started = time.monotonic()
    check_writable(out)
    examples = [
        example
        for modality, count in PHANTOMS_PER_LABEL.items()
        for example in phantom_examples(modality, max(4, int(count * scale)), seed, BASE)
    ]
    network = new_network(NANO, TASKS, INPUTS, seed)
    train(network, examples, replace(PLAN, seed=seed), progress, checkpoint=checkpoint)
    fit_ood(network, examples[:: max(1, len(examples) // 1500)])
    seen = predict(network, every_task(HELD_BACK_PER_LABEL, CALIBRATION_SEED, BASE))
    manifest = calibrated(network, _DRAFT, seen, highest_ood(seen) * OOD_TOLERANCE)
    trained_on = f"{len(examples)} phantoms, {PLAN.epochs} epochs, seed {seed}"
    digest = write(out, network, manifest, lambda difference: model_card(network, manifest, trained_on, difference))
    print(json.dumps({"digest": digest, "bytes": out.stat().st_size, "seconds": time.monotonic() - started}))


def phantom_examples(modality: str, per_label: int, first_seed: int, look: SiteLook) -> Iterator[Example]:
    task = next(task for task in TASKS if task.modality == modality)
    for k, label in enumerate(LABELS[modality]):
        for seed in range(first_seed, first_seed + per_label):
            yield example_of(phantom(modality, label, seed, look), task, k)


def every_task(per_label: int, first_seed: int, look: SiteLook) -> list[Example]:
    return [example for modality in LABELS for example in phantom_examples(modality, per_label, first_seed, look)]


def example_of(drawn: Phantom, task: TaskSpec, label: int) -> Example:
    prepared = prepare(drawn.volume, input_of(task.modality))
    lesion_Shw = np.stack(
        [
            cv2.resize(drawn.lesion_ZYX[z].astype(np.float32), (LESION_SIDE, LESION_SIDE), interpolation=cv2.INTER_AREA)
            for z in prepared.source_index_S
        ]
    )
    return Example(prepared.slices_SHW.astype(np.float16), task, label, lesion_Shw > 0.3)


def input_of(modality: str) -> InputSpec:
    return next(spec for spec in INPUTS if spec.modality == modality)


def strangers(modality: str, count: int) -> list[Example]:
    """What is not this task's anatomy: another modality's phantoms, noise, clouds."""
    task = next(task for task in TASKS if task.modality == modality)
    generator = np.random.default_rng(TEST_SEED)
    shape = phantom(modality, "normal", 0).volume.voxels_ZYX.shape
    found = []
    for n in range(count):
        other = MODALITIES[(MODALITIES.index(modality) + 1 + n % 2) % len(MODALITIES)]
        drawn = phantom(other, LABELS[other][n % 3], TEST_SEED + n).volume.voxels_ZYX
        scaled = (drawn - drawn.min()) / max(float(np.ptp(drawn)), 1.0)
        noise = generator.random(shape, np.float32)
        smooth = np.stack([cv2.GaussianBlur(plane, (0, 0), 12.0) for plane in noise])
        smooth = (smooth - smooth.min()) / max(float(np.ptp(smooth)), 1e-6)
        for voxels_ZYX in (scaled, noise, smooth):
            units = voxels_ZYX * 1500 - 1250 if modality == "CT" else voxels_ZYX * 1200
            volume = Volume(units.astype(np.float32), (1.0, 1.0, 1.0), modality)
            found.append(Example(prepare(volume, input_of(modality)).slices_SHW.astype(np.float16), task, 0))
    return found


def model_card(network: Hybrid, manifest: Manifest, trained_on: str, difference: float) -> str:
    """Measured here and now; no figure is written by hand."""
    rows = []
    looks = {name: every_task(HELD_BACK_PER_LABEL, TEST_SEED, look) for name, look in LOOKS.items()}
    for task in manifest.tasks:
        odd_N = predict(network, strangers(task.modality, 20))[task.name].ood_N
        for name, examples in looks.items():
            r = reading(network, manifest, task, examples)
            rows.append(
                f"| {task.name} | {name} | {r.accuracy:.3f} | {r.balanced_accuracy:.3f} | {r.calibration_error:.3f} "
                f"| {r.answered:.3f} | {r.accuracy_answered:.3f} |"
            )
        rows.append(
            f"| {task.name} | not this anatomy | – | – | – | {(odd_N <= manifest.ood_threshold).mean():.3f} | – |"
        )
    return _CARD.format(
        name=manifest.name,
        version=manifest.version,
        parameters=manifest.parameters,
        trained_on=trained_on,
        threads=torch.get_num_threads(),
        cases=HELD_BACK_PER_LABEL * 3,
        rows="\n".join(rows),
        pointing=f"{pointing_accuracy(network, looks['base']):.3f}",
        difference=f"{difference:.1e}",
        opset=OPSET,
    )


def pointing_accuracy(network: Hybrid, examples: Sequence[Example]) -> float:
    """Share of findings where the place of most evidence for the true label lies on the lesion, or touches it."""
    hits = []
    for batch in batches([example for example in examples if example.label > 0 and example.lesion_Shw is not None], 16):
        map_BSKhw = run_torch(network, {name: getattr(batch, name) for name in INPUT_NAMES})["map_BSKhw"]
        side = LESION_SIDE // map_BSKhw.shape[-1]
        for b, column in enumerate(batch.label_B + batch.task.offset):
            s, row, left = np.unravel_index(map_BSKhw[b, :, column].argmax(), map_BSKhw[b, :, column].shape)
            assert batch.lesion_BShw is not None
            here = batch.lesion_BShw[b, s, row * side : (row + 1) * side, left * side : (left + 1) * side]
            hits.append(bool(here.any()))
    return float(np.mean(hits))


_CARD = """# {name} {version}

A small demonstration network for Wardround: convolution and transformer stages, {parameters} parameters, one head for three
tasks. **Not a medical device, not for clinical use.** It has seen only synthetic phantoms (`models.phantoms`), no patient.

## Training

`python -m models.training pretrain --out models/bundles/{name}.bundle --threads {threads}` on {trained_on}.
Labels, codes and preprocessing are in manifest.json.

## Measured

On phantoms of seeds never trained on, {cases} for each task and look. `base` is the scanner it was trained on;
`north` and `south` are other hospitals' scanners, which it has not seen: there it is meant to be worse and to be fine-tuned.
Answered: exactly one label in the conformal set (alpha 0.1) and in distribution; otherwise it abstains.

| task | look | accuracy | balanced | calibration error | answered | accuracy when answered |
|---|---|---|---|---|---|---|
{rows}

Place of most evidence on the true lesion, base: {pointing}. Largest difference between torch and ONNX Runtime (opset {opset}): {difference}.

## Limits

Phantoms are drawings with noise; accuracy on them says nothing about patients. Anything but an adult frontal chest X-ray,
axial chest CT or axial FLAIR-like brain MR is outside of what it knows.
"""
