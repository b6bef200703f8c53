"""The laboratory for real images: train on labelled archives, calibrate, measure, write the bundle with its card.

Reads a task file and the archives it names; writes one bundle file.
Never runs on a box, and never trains or calibrates on the split 'val', on which every figure in the card is measured.
What follows the training is models.laboratory.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from models.archive_card import Measured, Trained, card
from models.archives import Archive, Parts, parts_of, read_archive
from models.augment import RADIOGRAPH
from models.errors import ModelError
from models.examples import Example
from models.export import OPSET
from models.fitting import Progress, TrainingPlan, train
from models.laboratory import OOD_QUANTILE, calibrated, check_writable, fit_ood, highest_ood, reading, write
from models.network import STRIDE, Hybrid
from models.predicting import Predicted, predict
from models.restore import new_network
from models.spec import Manifest, TaskSpec
from models.task_file import TaskFile, read_task_file

PLAN = TrainingPlan(
    epochs=10_000,  # the budget ends it
    learning_rate=1e-3,
    batch=32,
    seed=0,
    weight_decay=0.05,
    augmentation=RADIOGRAPH,
    label_smoothing=0.05,
    averaging=0.995,
)
MOST_PX = 1024  # as models.spec.InputSpec has it
STRANGERS = 100  # of each kind, about
CALIBRATION_SEED, TEST_SEED = 10_000_000, 20_000_000  # of noise


@dataclass(frozen=True)
class Course:
    """What is trained, at which size and for how long."""

    network: str  # names the sizes in models.network
    size_px: int
    budget_s: float  # CPU time of each thread
    seed: int = 0


def train_images(
    task_file: Path, folder: Path, out: Path, course: Course, progress: Progress, checkpoint: Path | None = None
) -> None:
    """Train, calibrate, measure, write. With a checkpoint, what stopped goes on after its last epoch.

    Raises ModelError, before the training, for a task file, an archive or a size that cannot be used.
    """
    started = time.monotonic()
    asked = read_task_file(task_file)
    check_writable(out)
    draft = _draft(asked, course)
    network = new_network(course.network, draft.tasks, draft.inputs, course.seed)
    archives = [read_archive(folder / source.archive) for source in asked.tasks]
    parts = [parts_of(*each) for each in zip(archives, asked.tasks, draft.tasks, draft.inputs, strict=True)]
    plan = replace(PLAN, seed=course.seed, budget_s=course.budget_s)
    fitted = train(network, evened([part.training for part in parts]), plan, progress, checkpoint=checkpoint)
    fit_ood(network, [example for part in parts for example in part.training])
    seen = predict(network, [example for part in parts for example in part.calibration])
    manifest = calibrated(network, draft, seen, ood_limit(network, draft, seen, parts))
    measured = [_measured(network, manifest, n, archives, parts) for n in range(len(parts))]
    trained = Trained(task_file.name, course.network, course.size_px, course.seed, fitted.steps, fitted.examples_seen)
    digest = write(out, network, manifest, lambda difference: card(asked, manifest, measured, trained, difference))
    report = {"digest": digest, "bytes": out.stat().st_size, "epochs": fitted.epochs, "steps": fitted.steps}
    print(json.dumps(report | {"images_seen": fitted.examples_seen, "seconds": time.monotonic() - started}))


def evened(training: Sequence[Sequence[Example]]) -> list[Example]:
    """Each task's examples, repeated whole until there are about as many as of the largest task: as many steps for each."""
    most = max(len(examples) for examples in training)
    return [example for examples in training for example in list(examples) * round(most / len(examples))]


def ood_limit(network: Hybrid, draft: Manifest, seen: Mapping[str, Predicted], parts: Sequence[Parts]) -> float:
    """Half-way between the tasks' own held-back images, as `seen`, and strangers, where these lie apart.

    Strangers are the other tasks' held-back images and noise. Where they do not lie apart the limit lets through what the
    highest hundredth of the own images allows; the card then says how many strangers are answered.
    """
    odd = []
    for task, spec, part in zip(draft.tasks, draft.inputs, parts, strict=True):
        others = [other.calibration for other in parts if other is not part]
        strangers = _given_to(task, others) + noise(task, spec.size, CALIBRATION_SEED)
        odd.append(predict(network, strangers)[task.name].ood_N)
    highest, nearest = highest_ood(seen), float(np.quantile(np.concatenate(odd), 1.0 - OOD_QUANTILE))
    return max(highest, (highest + nearest) / 2)


def noise(task: TaskSpec, size_px: int, seed: int) -> list[Example]:
    values_N1HW = np.random.default_rng(seed).uniform(-1.0, 1.0, (STRANGERS, 1, size_px, size_px))
    return [Example(values_1HW.astype(np.float16), task, 0) for values_1HW in values_N1HW]


def _draft(asked: TaskFile, course: Course) -> Manifest:
    """Raises ModelError for a size that the network cannot read."""
    if course.size_px % STRIDE or not STRIDE <= course.size_px <= MOST_PX:
        raise ModelError(
            f"images of {course.size_px} pixels cannot be read", advice=f"give a multiple of {STRIDE} up to {MOST_PX}"
        )
    return Manifest(
        format=1,
        name=asked.name,
        version=asked.version,
        network=course.network,
        inputs=asked.input_specs(course.size_px),
        tasks=asked.task_specs(),
        ood_threshold=0.0,
        parameters=0,
        opset=OPSET,
        members={},
    )


def _measured(
    network: Hybrid, manifest: Manifest, n: int, archives: Sequence[Archive], parts: Sequence[Parts]
) -> Measured:
    task, part = manifest.tasks[n], parts[n]
    as_own = _given_to(task, [other.validation for other in parts if other is not part])
    return Measured(
        archives[n],
        training=len(part.training),
        calibration=len(part.calibration),
        read=reading(network, manifest, task, part.validation),
        other_anatomy=reading(network, manifest, task, as_own) if as_own else None,
        noise=reading(network, manifest, task, noise(task, manifest.inputs[n].size, TEST_SEED)),
    )


def _given_to(task: TaskSpec, others: Sequence[Sequence[Example]]) -> list[Example]:
    """About STRANGERS images of other tasks, as if they were this one's."""
    found = [example for examples in others for example in examples]
    return [replace(example, task=task, label=0) for example in found[:: max(1, len(found) // STRANGERS)]]
