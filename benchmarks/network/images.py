"""The labelled real images beside the repository, as examples for the network.

Reads ../shared/data/*.npz; gives training, calibration and validation examples in memory.
Never splits at random: neighbouring slices and images of one patient stay on one side (see the folder's README).
Axes: N images, H W pixels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.archives import calibration_part
from models.errors import VolumeError
from models.examples import Example
from models.preprocess import Volume, prepare
from models.spec import Code, InputSpec, Label, TaskSpec

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data"
OTHER_HOSPITAL = "ieee8023-covid-chestxray"


@dataclass(frozen=True)
class Collection:
    """One labelled set at one input size."""

    name: str
    task: TaskSpec
    spec: InputSpec
    training: list[Example]
    calibration: list[Example]
    validation: list[Example]
    other: list[Example]  # of another hospital, where the set holds one and it was asked to be kept apart


@dataclass(frozen=True)
class _Source:
    file: str
    modality: str
    has_groups: bool = False


SETS = {
    "pneumonia": _Source("cxr_pneumoniamnist_28.npz", "XR"),
    "covid": _Source("cxr_covid3_128.npz", "XR", has_groups=True),
    "ct": _Source("ct_lung_224.npz", "CT"),
    "mri": _Source("mri_brain_tumor4_128.npz", "MR"),
}


def are_here() -> bool:
    return all((FOLDER / source.file).is_file() for source in SETS.values())


def collection(name: str, size: int, *, offset: int = 0, keep_apart: str = "") -> Collection:
    """Read one set. `offset` is the task's first logit; images of the source `keep_apart` are neither trained nor judged on.

    Raises FileNotFoundError where the data is not beside the repository.
    """
    source = SETS[name]
    with np.load(FOLDER / source.file, allow_pickle=False) as arrays:
        images_NHW, label_N, split_N = arrays["images"], arrays["labels"], arrays["split"]
        names, source_N = [str(each) for each in arrays["class_names"]], arrays["source"]
        group_N = arrays["group"] if source.has_groups else np.arange(len(label_N))
    task = _task(name, source.modality, names, offset)
    spec = InputSpec(task.modality, size=size, max_slices=1, normalisation="percentile")
    examples = [_example(image_HW, task, spec, int(k)) for image_HW, k in zip(images_NHW, label_N, strict=True)]
    ours_N = source_N != keep_apart
    calibration_N = calibration_part(label_N, group_N, (split_N == "train") & ours_N)
    training_N = (split_N == "train") & ours_N & ~calibration_N

    def chosen(which_N: NDArray[np.bool_]) -> list[Example]:
        return [examples[i] for i in np.flatnonzero(which_N)]

    return Collection(
        name,
        task,
        spec,
        chosen(training_N),
        chosen(calibration_N),
        chosen((split_N == "val") & ours_N),
        chosen(~ours_N),
    )


def _task(name: str, modality: str, labels: list[str], offset: int) -> TaskSpec:
    """Codes of a private scheme: these bundles are measured, never shipped."""
    made = tuple(
        Label(each, Code(each[:16], "99WARDROUND", each), is_finding=not each.startswith("no")) for each in labels
    )
    return TaskSpec(name, modality, offset, made)  # type: ignore[arg-type]  # the modality is one of SETS


def _example(image_HW: NDArray[np.uint8], task: TaskSpec, spec: InputSpec, label: int) -> Example:
    volume = Volume(image_HW[np.newaxis].astype(np.float32), (1.0, 1.0, 1.0), task.modality)
    try:
        return Example(prepare(volume, spec).slices_SHW.astype(np.float16), task, label)
    except VolumeError as error:
        raise ValueError(f"an image of {task.name} cannot be prepared: {error}") from error
