"""The model card of a bundle trained on image archives.

Reads what the laboratory measured; gives text.
Never holds a figure written by hand: words about the images come from the task file, numbers from the measurement.
Source: intervals as in models.scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models import scores
from models.archives import Archive, repeated
from models.calibration import ALPHA
from models.laboratory import Reading
from models.scores import Interval
from models.spec import Manifest
from models.task_file import ArchiveTask, TaskFile


@dataclass(frozen=True)
class Measured:
    """One task: what it was trained on, and how it was read."""

    archive: Archive
    training: int
    calibration: int
    read: Reading  # of the split 'val'
    other_anatomy: Reading | None  # of the other tasks' images as if they were its own; None: there is no other task
    noise: Reading


@dataclass(frozen=True)
class Trained:
    """How the training went."""

    task_file: str
    network: str
    size_px: int
    seed: int
    steps: int
    images_seen: int


def card(asked: TaskFile, manifest: Manifest, measured: Sequence[Measured], trained: Trained, difference: float) -> str:
    """`difference` is the largest between torch and ONNX Runtime."""
    tasks = list(zip(asked.tasks, measured, strict=True))
    return _CARD.format(
        name=manifest.name,
        version=manifest.version,
        parameters=manifest.parameters,
        trained=trained,
        sources="\n\n".join(_source(task, each) for task, each in tasks),
        labels="\n".join(_labels(task) for task in asked.tasks),
        alpha=ALPHA,
        scores="\n".join(_scores(task.name, each.read) for task, each in tasks),
        by_label="\n".join(_by_label(task, each.read) for task, each in tasks),
        answers="\n".join(_answers(task.name, each) for task, each in tasks),
        difference=f"{difference:.1e}",
        opset=manifest.opset,
        limits="\n".join(f"- {task.name}: {task.limits.strip()}" for task in asked.tasks),
    )


def _source(task: ArchiveTask, measured: Measured) -> str:
    return (
        f"**{task.name}** ({task.modality}): `{task.archive}`, SHA-256 `{measured.archive.digest}`; {measured.training} images "
        f"trained on, {measured.calibration} of the same split held back to calibrate, {len(measured.read.truth_N)} of the split "
        f"'val' to measure, {repeated(measured.archive)} of these pixel for pixel the same as one of the first.\n{task.attribution.strip()}\nLicence: {task.licence.strip()}"
    )


def _labels(task: ArchiveTask) -> str:
    return "\n".join(
        f"| {task.name} | {each.label} | SCT {each.sct} | {each.meaning} |" for each in task.classes.values()
    )


def _scores(name: str, read: Reading) -> str:
    found = [scores.interval(score, read.probabilities_NK, read.truth_N) for score in scores.SCORES.values()]
    return f"| {name} | {' | '.join(map(_text, found))} |"


def _by_label(task: ArchiveTask, read: Reading) -> str:
    rows = []
    for k, label in enumerate(task.classes.values()):
        is_it_N = read.truth_N == k
        hits = [read.is_right_N, read.is_covered_N, read.is_answered_N]
        shares = [f"{hit_N[is_it_N].mean():.3f}" for hit_N in hits]
        answered_N = is_it_N & read.is_answered_N
        right = f"{int(read.is_right_N[answered_N].sum())} of {int(answered_N.sum())}"
        rows.append(f"| {task.name} | {label.label} | {int(is_it_N.sum())} | {' | '.join(shares)} | {right} |")
    return "\n".join(rows)


def _answers(name: str, measured: Measured) -> str:
    read, other = measured.read, measured.other_anatomy
    hits = [
        read.is_covered_N,
        read.is_answered_N,
        read.is_right_N[read.is_answered_N],
        np.zeros(0, bool) if other is None else other.is_answered_N,
        measured.noise.is_answered_N,
    ]
    return f"| {name} | {' | '.join(_text(scores.share(hit_N)) if len(hit_N) else '–' for hit_N in hits)} |"


def _text(value: Interval) -> str:
    return f"{value[0]:.3f} ({value[1]:.3f}–{value[2]:.3f})"


_CARD = """# {name} {version}

A network for Wardround that has seen real images: convolution and transformer stages ({trained.network}, {parameters} parameters),
one head for all its tasks. **Not a medical device, not for clinical use**: no figure here proves clinical performance.

## Trained on

`python -m models.training images --tasks {trained.task_file} --network {trained.network} --size {trained.size_px} --seed {trained.seed} …`: {trained.steps} steps,
{trained.images_seen} images seen. A task with fewer images had them repeated until each task had about as many steps.

{sources}

The images were scaled, normalised and augmented for training; none of them is in this bundle.

| task | label | code | meaning |
|---|---|---|---|
{labels}

## Measured

On the split 'val', with 95 % intervals as if each image were a case of its own: where several are of one patient, the true
intervals are wider. Expect a drop at other hospitals.

| task | accuracy | balanced | macro AUC | calibration error |
|---|---|---|---|---|
{scores}

Covered: the true label is in the conformal set (alpha {alpha}). Answered: exactly one label is in the set and the image is in
distribution; otherwise the box abstains.

| task | label | images | right | covered | answered | right when answered |
|---|---|---|---|---|---|---|
{by_label}

Of the other tasks' images given to this one, and of noise, none should be answered.

| task | covered | answered | accuracy when answered | other anatomy answered | noise answered |
|---|---|---|---|---|---|
{answers}

Largest difference between torch and ONNX Runtime (opset {opset}): {difference}. The known-answer batch holds phantoms.

## Limits

{limits}
- Trained and measured on single images; how a whole series is read was not measured.
"""
