"""Images for calibrating an imported network: read, prepared as the box prepares them, and what follows from them.

Reads a folder of image files or a .npz; gives temperature, conformal threshold, looks, drift reference and figures.
Never calibrates on images without labels, and never on the images it measures the calibration with.
Source: models.calibration. Axes: N images, H W pixels, K labels, D features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import cv2
import numpy as np
from numpy.typing import NDArray

from models import calibration, drift
from models.classifier import F32, Classifier, logits_of
from models.errors import SpecError, VolumeError
from models.preprocess import Volume, prepare
from models.spec import Reference
from models.wrapping import Looks

Indices = NDArray[np.int64]

OOD_QUANTILE, OOD_TOLERANCE = 0.99, 1.5  # the farthest of a hundred known images is still known; another scanner too
FEWEST_FOR_LOOKS = 40
NEVER = 1.0  # threshold where ood_B is always 0
MAX_IMAGE_BYTES = 1 << 30
_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_HOW = "a folder with one subfolder of grey images for each label, or a .npz with images, labels and class_names"


@dataclass(frozen=True)
class LabelledImages:
    slices_NHW: F32  # prepared: [-1, 1]
    label_N: Indices | None


@dataclass(frozen=True)
class Calibration:
    """What images have taught about the imported network; the default is what is safe without any."""

    images: int = 0
    temperature: float = 1.0
    conformal_threshold: float = 0.0  # every label plausible: the box abstains
    accuracy: float | None = None
    balanced_accuracy: float | None = None
    calibration_error: float | None = None
    looks: Looks | None = None
    ood_threshold: float = NEVER
    reference: Reference | None = None


def read_images(source: Path, classifier: Classifier) -> LabelledImages:
    """Raises SpecError on anything that is not grey images of the spec's labels."""
    names = [label.name for label in classifier.spec.labels]
    try:
        images, label_N = _from_folder(source, names) if source.is_dir() else _from_npz(source, names)
        slices_NHW = np.concatenate([_prepared(image, classifier) for image in images])
    except VolumeError as error:
        raise SpecError(f"{source.name}: {error}", advice=error.advice or _HOW) from error
    except OSError as error:
        raise SpecError(f"{source.name} cannot be read: {error.strerror or error}", advice=_HOW) from error
    missing = set(range(len(names))) - set(label_N.tolist()) if label_N is not None else set()
    if missing:
        raise SpecError(f"no image is labelled {names[min(missing)]}", advice="calibration needs images of every label")
    return LabelledImages(slices_NHW, label_N)


def calibrate(classifier: Classifier, given: LabelledImages) -> Calibration:
    """Temperature and looks come from one half; threshold, error, limit and what drift is judged against from the other."""
    scores_NK, features_NDhw = classifier.run(given.slices_NHW)
    if not np.isfinite(scores_NK).all():
        raise SpecError("the graph gives NaN or infinite scores on the images", advice="look at input.range, mean, std")
    logits_NK = logits_of(scores_NK, classifier.spec)
    shuffled_N = np.random.default_rng(0).permutation(len(logits_NK))
    first, second = shuffled_N[::2], shuffled_N[1::2]
    learned = Calibration(len(logits_NK))
    if given.label_N is not None:
        learned = _with_labels(learned, logits_NK, given.label_N, first, second)
    ood_N = np.zeros(len(second), np.float32)
    if features_NDhw is not None and len(logits_NK) >= FEWEST_FOR_LOOKS:
        look_ND = features_NDhw.mean((2, 3))
        looks = _looks(look_ND[first], None if given.label_N is None else given.label_N[first])
        ood_N = _distance(look_ND[second], looks)
        limit = round(float(np.quantile(ood_N, OOD_QUANTILE)) * OOD_TOLERANCE, 4)
        learned = replace(learned, looks=looks, ood_threshold=limit)
    if len(second) < drift.ENOUGH:
        return learned
    return replace(learned, reference=drift.reference(logits_NK[second], ood_N, learned.temperature))


def _with_labels(
    learned: Calibration, logits_NK: F32, label_N: Indices, first: Indices, second: Indices
) -> Calibration:
    temperature = round(calibration.fit_temperature(logits_NK[first], label_N[first]), 4)
    probabilities_NK = calibration.softmax(logits_NK, temperature)
    return replace(
        learned,
        temperature=temperature,
        conformal_threshold=calibration.conformal_threshold(probabilities_NK[second], label_N[second]),
        accuracy=calibration.accuracy(probabilities_NK, label_N),
        balanced_accuracy=calibration.balanced_accuracy(probabilities_NK, label_N),
        calibration_error=calibration.expected_calibration_error(probabilities_NK[second], label_N[second]),
    )


def _looks(look_ND: F32, label_N: Indices | None) -> Looks:
    group_N = np.zeros(len(look_ND), np.int64) if label_N is None else label_N
    groups, place_N = np.unique(group_N, return_inverse=True)
    mean_KD = np.stack([look_ND[place_N == k].mean(0) for k in range(len(groups))])
    spread_D = (look_ND - mean_KD[place_N]).std(0)
    floor = max(float(spread_D.max()) * 1e-2, 1e-6)  # a feature that never fired must not blow up one that once does
    return Looks(mean_KD.astype(np.float32), np.maximum(spread_D, floor).astype(np.float32))


def _distance(look_ND: F32, looks: Looks) -> NDArray[np.float32]:
    offset_NKD = (look_ND[:, np.newaxis] - looks.mean_KD) / looks.spread_D
    return np.asarray(np.sqrt(np.square(offset_NKD).mean(2)).min(1))


def _prepared(image: NDArray[Any], classifier: Classifier) -> F32:
    voxels_ZYX = np.asarray(image, np.float32)[np.newaxis]
    volume = Volume(voxels_ZYX, (1.0, 1.0, 1.0), classifier.spec.modality)
    return prepare(volume, classifier.spec.input_spec(classifier.size)).slices_SHW


def _from_folder(folder: Path, names: Sequence[str]) -> tuple[list[NDArray[Any]], Indices | None]:
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir())
    for unknown in subfolders:
        if unknown.name not in names:
            raise SpecError(f"{unknown.name} is no label of the spec: {', '.join(names)}", advice=_HOW)
    found = [(path, names.index(sub.name)) for sub in subfolders for path in _files(sub)]
    if found:
        return [_image(path) for path, _ in found], np.array([label for _, label in found], np.int64)
    flat = _files(folder)
    if not flat:
        raise SpecError(f"{folder.name} holds no images ({', '.join(_SUFFIXES)})", advice=_HOW)
    return [_image(path) for path in flat], None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)


def _image(path: Path) -> NDArray[Any]:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise SpecError(f"{path.name} is no image", advice=_HOW)
    return np.asarray(image)


def _from_npz(path: Path, names: Sequence[str]) -> tuple[list[NDArray[Any]], Indices | None]:
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise SpecError(f"{path.name} is larger than {MAX_IMAGE_BYTES} bytes", advice="give fewer images")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["images"]
            labels_N = arrays.get("labels")
            class_names = [str(name) for name in arrays["class_names"]] if "class_names" in arrays else []
    except (KeyError, ValueError, EOFError, BadZipFile) as error:
        raise SpecError(f"{path.name} is no .npz with images: {error}", advice=_HOW) from error
    if images.ndim != 3 or len(images) == 0 or not np.issubdtype(images.dtype, np.number):
        raise SpecError(f"images are {images.dtype} {images.shape}, not N × H × W numbers", advice=_HOW)
    if labels_N is None:
        return list(images), None
    if labels_N.shape != (len(images),):
        raise SpecError(f"{labels_N.shape} labels for {len(images)} images", advice=_HOW)
    return list(images), _indices(labels_N, class_names, names)


def _indices(labels_N: NDArray[Any], class_names: Sequence[str], names: Sequence[str]) -> Indices:
    """Numbers mean what class_names says; the spec's order may be another."""
    given = [str(label) for label in labels_N]
    if np.issubdtype(labels_N.dtype, np.integer):
        if not class_names or labels_N.min() < 0 or labels_N.max() >= len(class_names):
            raise SpecError("labels are numbers that class_names does not name", advice=_HOW)
        given = [class_names[int(label)] for label in labels_N]
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise SpecError(f"{unknown[0]} is no label of the spec: {', '.join(names)}", advice="rename one of them")
    return np.array([names.index(label) for label in given], np.int64)


def coverage_floor() -> int:
    """So few labelled images give no threshold: half of them calibrate it."""
    return 2 * math.ceil(1 / calibration.ALPHA - 1)
