"""Labelled examples for training: from a box's example folder or from phantoms, in batches of one modality.

Reads examples.json and its npz files; gives arrays in memory.
Never reads DICOM and never keeps which patient an example came from.
Axes: B series, S slices, H W pixels, h w places of the supervised attention, K labels of one task.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from zipfile import BadZipFile

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from models.errors import VolumeError
from models.spec import MODALITIES, InputSpec, Manifest, TaskSpec

LESION_SIDE = 24  # lesion masks are kept at this resolution


@dataclass(frozen=True)
class Example:
    slices_SHW: NDArray[np.float16]
    task: TaskSpec
    label: int  # index within the task
    lesion_Shw: NDArray[np.bool_] | None = None  # known for phantoms only


@dataclass(frozen=True)
class Batch:
    """Series of one modality, padded to the longest."""

    slices_BSHW: NDArray[np.float32]
    slice_mask_BS: NDArray[np.bool_]
    modality_B: NDArray[np.int64]
    label_B: NDArray[np.int64]
    lesion_BShw: NDArray[np.float32] | None
    task: TaskSpec


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: Annotated[str, Meta(min_length=1, max_length=255)]
    modality: Literal["XR", "CT", "MR"]
    label: str
    split: Literal["train", "heldout"]


def read_examples(folder: Path, manifest: Manifest) -> tuple[list[Example], list[Example]]:
    """(train, held-out) of a folder. Raises VolumeError naming the row that does not fit the bundle."""
    try:
        rows = msgspec.json.decode((folder / "examples.json").read_bytes(), type=list[_Row])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise VolumeError(
            f"examples.json cannot be used: {error}", advice="the box writes it anew for each round"
        ) from error
    examples = [(row.split, _read(folder, row, manifest)) for row in rows]
    return [e for split, e in examples if split == "train"], [e for split, e in examples if split == "heldout"]


def batches(
    examples: Sequence[Example],
    size: int,
    generator: np.random.Generator | None = None,
    *,
    most_slices: int | None = None,
) -> Iterator[Batch]:
    """Batches of one modality each; with a generator shuffled and cut to most_slices."""
    groups = []
    for modality in MODALITIES:
        members = [example for example in examples if example.task.modality == modality]
        order = generator.permutation(len(members)) if generator else np.arange(len(members))
        groups += [[members[i] for i in order[start : start + size]] for start in range(0, len(members), size)]
    for index in generator.permutation(len(groups)) if generator else range(len(groups)):
        members = groups[index]
        if generator is not None:
            members = [_fewer(example, most_slices, generator) for example in members]
        yield _collate(members)


def class_weights(examples: Sequence[Example]) -> dict[str, NDArray[np.float32]]:
    """By task name: weights_K, inverse to how often each label occurs, at most 4:1, mean 1 over the examples."""
    weights = {}
    for task in {example.task.name: example.task for example in examples}.values():
        count_K = np.bincount([e.label for e in examples if e.task == task], minlength=len(task.labels))
        weight_K = np.minimum(count_K.max() / np.maximum(count_K, 1), 4.0)
        weights[task.name] = (weight_K / (weight_K @ count_K / count_K.sum())).astype(np.float32)
    return weights


def _read(folder: Path, row: _Row, manifest: Manifest) -> Example:
    task, spec = manifest.task_for(row.modality), manifest.input_for(row.modality)
    if task is None or spec is None:
        raise VolumeError(f"{row.path}: the bundle has no task for {row.modality}")
    names = [label.name for label in task.labels]
    if row.label not in names:
        raise VolumeError(f"{row.path}: task {task.name} has no label {row.label}")
    if Path(row.path).name != row.path:
        raise VolumeError(f"{row.path}: an example lies in the example folder itself")
    try:
        with np.load(folder / row.path, allow_pickle=False) as arrays:
            slices_SHW = arrays["slices_SHW"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise VolumeError(f"{row.path}: cannot be read: {error}") from error
    _check_slices(row.path, slices_SHW, spec)
    return Example(slices_SHW.astype(np.float16), task, names.index(row.label))


def _check_slices(path: str, slices_SHW: NDArray[np.generic], spec: InputSpec) -> None:
    fits = slices_SHW.ndim == 3 and 1 <= slices_SHW.shape[0] <= spec.max_slices
    if not fits or slices_SHW.shape[1:] != (spec.size, spec.size) or slices_SHW.dtype.kind != "f":
        raise VolumeError(f"{path}: slices of shape {slices_SHW.shape} do not fit the bundle's input")
    if not np.isfinite(slices_SHW).all():
        raise VolumeError(f"{path}: holds NaN or infinite values")


def _fewer(example: Example, most: int | None, generator: np.random.Generator) -> Example:
    """At most `most` slices, in order, always with the one that shows the lesion best where that is known."""
    count = example.slices_SHW.shape[0]
    if most is None or count <= most:
        return example
    kept_S = generator.permutation(count)[:most]
    if example.lesion_Shw is not None and example.lesion_Shw.any():
        best = int(example.lesion_Shw.sum((1, 2)).argmax())
        if best not in kept_S:
            kept_S[0] = best
    kept_S.sort()
    lesion_Shw = None if example.lesion_Shw is None else example.lesion_Shw[kept_S]
    return Example(example.slices_SHW[kept_S], example.task, example.label, lesion_Shw)


def _collate(members: Sequence[Example]) -> Batch:
    task = members[0].task
    longest = max(example.slices_SHW.shape[0] for example in members)
    height, width = members[0].slices_SHW.shape[1:]
    slices_BSHW = np.zeros((len(members), longest, height, width), np.float32)
    mask_BS = np.zeros((len(members), longest), bool)
    has_lesions = all(example.lesion_Shw is not None for example in members)
    lesion_BShw = np.zeros((len(members), longest, LESION_SIDE, LESION_SIDE), np.float32)
    for b, example in enumerate(members):
        count = example.slices_SHW.shape[0]
        slices_BSHW[b, :count] = example.slices_SHW
        mask_BS[b, :count] = True
        if example.lesion_Shw is not None:
            lesion_BShw[b, :count] = example.lesion_Shw
    return Batch(
        slices_BSHW=slices_BSHW,
        slice_mask_BS=mask_BS,
        modality_B=np.full(len(members), MODALITIES.index(task.modality), np.int64),
        label_B=np.array([example.label for example in members], np.int64),
        lesion_BShw=lesion_BShw if has_lesions else None,
        task=task,
    )
