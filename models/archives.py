"""Archives of labelled grey images: checked, split and prepared as the box prepares its own.

Reads NPZ files (images uint8 NHW, labels, class_names, split, optionally group); gives examples in memory.
Never splits at random and never unpickles: neighbouring slices and images of one patient stay on one side.
Axes: N images, H W pixels.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.bundle import ZIP_ERRORS
from models.drift import ENOUGH
from models.errors import ModelError, VolumeError
from models.examples import Example
from models.preprocess import MIN_SIDE_PX, Volume, prepare
from models.spec import InputSpec, TaskSpec
from models.task_file import GREY_LEVELS, ArchiveTask

CALIBRATION_SHARE = 0.15  # of the training split; never of the validation split
TRAIN, VALIDATION = "train", "val"
Bools = NDArray[np.bool_]
_FORM = (
    "an archive holds images (uint8, N x H x W), labels (integers), class_names, split ('train' or 'val'), maybe group"
)


@dataclass(frozen=True)
class Archive:
    name: str
    images_NHW: NDArray[np.uint8]
    label_N: NDArray[np.int64]  # index into class_names
    class_names: tuple[str, ...]
    split_N: NDArray[np.str_]
    group_N: NDArray[np.generic]  # images that must stay together; each its own where the archive has none
    digest: str  # SHA-256 of the file


@dataclass(frozen=True)
class Parts:
    """One task's examples; labels are indices into the task's own."""

    training: list[Example]
    calibration: list[Example]
    validation: list[Example]


def read_archive(path: Path) -> Archive:
    """Raises ModelError on a missing or damaged file, pickled arrays, and arrays that are not what the form says."""
    arrays = _arrays(path)
    if missing := {"images", "labels", "class_names", "split"} - arrays.keys():
        raise ModelError(f"{path.name} holds no {sorted(missing)[0]}", advice=_FORM)
    count = len(arrays["images"]) if arrays["images"].ndim else 0
    arrays.setdefault("group", np.arange(count))
    for name, is_right in _RULES.items():
        array = arrays[name]
        if not is_right(array) or (name in _OF_EACH_IMAGE and len(array) != count):
            raise ModelError(f"{path.name}: {name} is {array.dtype} {array.shape}, of {count} images", advice=_FORM)
    archive = Archive(
        name=path.name,
        images_NHW=arrays["images"].astype(np.uint8, copy=False),
        label_N=arrays["labels"].astype(np.int64),
        class_names=tuple(str(each) for each in arrays["class_names"]),
        split_N=arrays["split"].astype(np.str_, copy=False),
        group_N=arrays["group"],
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    _check_values(archive)
    return archive


def parts_of(archive: Archive, source: ArchiveTask, task: TaskSpec, spec: InputSpec) -> Parts:
    """Prepared examples of each part; every class is in each of them.

    Raises ModelError where the task file's classes are not the archive's, or a part has too few images.
    """
    _check_classes(archive, source)
    in_training_N = archive.split_N == TRAIN
    held_back_N = calibration_part(archive.label_N, archive.group_N, in_training_N)
    chosen = {
        "training": in_training_N & ~held_back_N,
        "calibration": held_back_N,
        "validation": archive.split_N == VALIDATION,
    }
    for part, which_N in chosen.items():
        _check_part(archive, part, which_N)
    label_of_class = [list(source.classes).index(name) for name in archive.class_names]

    def examples(which_N: Bools) -> list[Example]:
        return [
            Example(_slices(archive, n, source, spec), task, label_of_class[archive.label_N[n]])
            for n in np.flatnonzero(which_N).tolist()
        ]

    return Parts(**{part: examples(which_N) for part, which_N in chosen.items()})


def calibration_part(label_N: NDArray[np.int64], group_N: NDArray[np.generic], among_N: Bools) -> Bools:
    """The last share of each label in file order (neighbours lie together), with all that shares a group with it."""
    picked_N = np.zeros(len(label_N), bool)
    for run_N in _runs(label_N, among_N):
        picked_N[run_N[int(len(run_N) * (1 - CALIBRATION_SHARE)) :]] = True
    return np.isin(group_N, group_N[picked_N]) & among_N


def repeated(archive: Archive) -> int:
    """How many images of 'val' are pixel for pixel in 'train' too."""
    known = {image_HW.tobytes() for image_HW in archive.images_NHW[archive.split_N == TRAIN]}
    return sum(image_HW.tobytes() in known for image_HW in archive.images_NHW[archive.split_N == VALIDATION])


def _runs(label_N: NDArray[np.int64], among_N: Bools) -> Iterator[NDArray[np.int64]]:
    for k in np.unique(label_N[among_N]):
        yield np.flatnonzero((label_N == k) & among_N)


def _arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ModelError(f"{path.name} is no archive of several arrays", advice=_FORM)
            arrays = {name: loaded[name] for name in loaded.files if name in _RULES}
    except OSError as error:
        raise ModelError(
            f"{path.name} cannot be read: {error.strerror or error}", advice="check --data: the archives lie there"
        ) from error
    except ValueError as error:
        raise ModelError(
            f"{path.name} holds pickled or damaged arrays, which are not loaded: {error}",
            advice="save plain arrays with numpy.savez; text as dtype str, not object",
        ) from error
    except MemoryError as error:
        raise ModelError(
            f"{path.name} claims more than fits into memory: {error}", advice="write a smaller one"
        ) from error
    except (KeyError, OverflowError, *ZIP_ERRORS) as error:
        raise ModelError(f"{path.name} is damaged: {error}", advice="fetch or write the archive again") from error
    if odd := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise ModelError(f"{path.name}: {odd[0]} is no array", advice=_FORM)
    return arrays


def _is_text(array: NDArray[np.generic]) -> bool:
    return array.ndim == 1 and array.dtype.kind == "U"


_RULES: Mapping[str, Callable[[NDArray[np.generic]], bool]] = {
    "images": lambda array: array.ndim == 3 and array.dtype == np.uint8 and min(array.shape[1:]) >= MIN_SIDE_PX,
    "labels": lambda array: array.ndim == 1 and array.dtype.kind in "iu",
    "class_names": _is_text,
    "split": _is_text,
    "group": lambda array: array.ndim == 1 and array.dtype.kind in "iuU",
}
_OF_EACH_IMAGE = ("labels", "split", "group")


def _check_values(archive: Archive) -> None:
    names = archive.class_names
    if len(set(names)) != len(names):
        raise ModelError(f"{archive.name}: two classes have the same name", advice=_FORM)
    odd = sorted(set(archive.label_N.tolist()) - set(range(len(names))))
    if odd:
        raise ModelError(
            f"{archive.name}: label {odd[0]} is none of the {len(names)} classes",
            advice="labels are indices into class_names, from 0",
        )
    if not set(archive.split_N.tolist()) <= {TRAIN, VALIDATION}:
        raise ModelError(f"{archive.name}: split is '{TRAIN}' or '{VALIDATION}' for each image", advice=_FORM)
    in_training_N = archive.split_N == TRAIN
    shared = np.intersect1d(archive.group_N[in_training_N], archive.group_N[~in_training_N])
    if len(shared):
        raise ModelError(
            f"{archive.name}: {len(shared)} groups lie in both splits, which flatters every figure",
            advice="keep all images of a group in one split",
        )


def _check_classes(archive: Archive, source: ArchiveTask) -> None:
    odd = sorted(set(archive.class_names) ^ set(source.classes))
    if odd:
        where = "the archive" if odd[0] in source.classes else f"task {source.name}"
        raise ModelError(
            f"{archive.name}: class {odd[0]} is not in {where}",
            advice=f"name exactly the archive's classes: {', '.join(archive.class_names)}",
        )


def _check_part(archive: Archive, part: str, which_N: Bools) -> None:
    for k, name in enumerate(archive.class_names):
        if not (archive.label_N[which_N] == k).any():
            raise ModelError(
                f"{archive.name}: no image of class {name} is left for {part}",
                advice=f"both splits need every class; the last {CALIBRATION_SHARE:.0%} of '{TRAIN}' calibrate",
            )
    if part == "calibration" and which_N.sum() < ENOUGH:
        raise ModelError(
            f"{archive.name}: {which_N.sum()} images are too few to calibrate on",
            advice=f"'{TRAIN}' needs {int(np.ceil(ENOUGH / CALIBRATION_SHARE))} images or more",
        )


def _slices(archive: Archive, n: int, source: ArchiveTask, spec: InputSpec) -> NDArray[np.float16]:
    """The image as one slice, in the modality units that its grey stands for, prepared."""
    black, white = source.units
    voxels_ZYX = archive.images_NHW[n : n + 1].astype(np.float32) * np.float32((white - black) / GREY_LEVELS) + black
    try:
        prepared = prepare(Volume(voxels_ZYX.astype(np.float32), (1.0, 1.0, 1.0), source.modality), spec)
    except VolumeError as error:
        raise ModelError(f"{archive.name}: image {n}: {error}", advice=error.advice or "leave it out") from error
    return prepared.slices_SHW.astype(np.float16)
