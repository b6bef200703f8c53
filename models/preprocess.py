"""Preprocessing: a volume in modality units becomes the slices the network reads. Used by training and inference alike.

Reads and writes arrays in memory.
Never opens DICOM, never logs, never guesses what it cannot know: it refuses with VolumeError.
Source: rescale PS3.3 C.11.1, MONOCHROME1 PS3.3 C.7.6.3.1.2. Axes: Z slice, Y row, X column; S, H, W the same after preparing.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from models.errors import VolumeError
from models.spec import InputSpec

MIN_SIDE_PX = 16  # smaller images are localisers' thumbnails or test objects; nothing can be read in them
MIN_RANGE = 1e-6
MIN_SPACING_MM, MAX_SPACING_MM = 1e-3, 1e3  # what no scanner goes beyond
MAX_ASPECT = 16.0  # of height and width in mm; a whole leg has 4
_PERCENTILES = (0.5, 99.5)  # of the resized slices, so that a hot pixel does not set the scale


@dataclass(frozen=True)
class Volume:
    voxels_ZYX: NDArray[np.float32]  # modality units, MONOCHROME1 already inverted, Z=1 for an X-ray
    spacing_mm: tuple[float, float, float]  # z, y, x; 1.0 where unknown
    modality: str  # XR | CT | MR
    window: tuple[float, float] | None = None  # the image's own VOI window (centre, width), for display


@dataclass(frozen=True)
class Letterbox:
    """Where the source image lies inside the network's square input."""

    size: int
    height: int  # of the resized image inside the square
    width: int
    top: int
    left: int
    source_YX: tuple[int, int]

    def map_to_source(self, map_hw: NDArray[np.floating]) -> NDArray[np.float32]:
        """A map over the square input, of any resolution, at the source's pixels."""
        square_HW = cv2.resize(
            np.ascontiguousarray(map_hw, np.float32), (self.size, self.size), interpolation=cv2.INTER_LINEAR
        )
        inside_HW = square_HW[self.top : self.top + self.height, self.left : self.left + self.width]
        rows, columns = self.source_YX
        return np.asarray(cv2.resize(inside_HW, (columns, rows), interpolation=cv2.INTER_LINEAR), np.float32)


@dataclass(frozen=True)
class Prepared:
    slices_SHW: NDArray[np.float32]  # normalised to [-1, 1]; S <= spec.max_slices
    source_index_S: NDArray[np.int64]  # which Z each came from
    letterbox: Letterbox


def prepare(volume: Volume, spec: InputSpec) -> Prepared:
    """Build the array the network was trained on.

    Picks at most spec.max_slices evenly spaced slices, letterboxes each to spec.size², normalises as the spec says.
    Raises VolumeError on a wrong modality, colour, too small or empty volumes, NaN or infinity, no contrast.
    """
    check(volume, spec)
    source_index_S = spread(volume.voxels_ZYX.shape[0], spec.max_slices)
    letterbox = fit_letterbox(volume, spec.size)
    slices_SHW = np.stack([_resize(volume.voxels_ZYX[z], letterbox) for z in source_index_S])
    return Prepared(_normalise(slices_SHW, letterbox, spec), source_index_S, letterbox)


def rescale(
    stored: NDArray[np.integer],
    *,
    slope: float = 1.0,
    intercept: float = 0.0,
    bits_stored: int,
    is_signed: bool = False,
    monochrome1: bool = False,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Stored values to modality units, float32, in `out` where given; MONOCHROME1 is inverted within bits_stored first.

    Source: PS3.3 C.11.1.1.2 (rescale), C.7.6.3.1.2 (photometric interpretation).
    """
    values = np.empty(stored.shape, np.float32) if out is None else out
    values[...] = stored
    if monochrome1:
        np.subtract(np.float32(inversion_sum(bits_stored, is_signed)), values, out=values)
    if slope != 1.0 or intercept != 0.0:
        values *= np.float32(slope)
        values += np.float32(intercept)
    return values


def inversion_sum(bits_stored: int, is_signed: bool) -> int:
    """Smallest plus largest stored value: `sum - v` mirrors v; decode mirrors a VOI window's centre with it too."""
    return -1 if is_signed else (1 << bits_stored) - 1


def check(volume: Volume, spec: InputSpec) -> None:
    voxels_ZYX = volume.voxels_ZYX
    if volume.modality != spec.modality:
        raise VolumeError(f"a volume of modality {volume.modality} cannot be prepared for {spec.modality}")
    if voxels_ZYX.ndim != 3:
        raise VolumeError(
            f"expected slices, rows and columns; the array has {voxels_ZYX.ndim} axes (colour is not read)",
            advice="send the original monochrome images, not screenshots",
        )
    if voxels_ZYX.shape[0] == 0 or min(voxels_ZYX.shape[1:]) < MIN_SIDE_PX:
        raise VolumeError(f"images of {voxels_ZYX.shape[1]} x {voxels_ZYX.shape[2]} pixels are too small to be read")
    low, high = float(voxels_ZYX.min()), float(voxels_ZYX.max())  # NaN where a voxel is; no array of their size
    if not (math.isfinite(low) and math.isfinite(high)):
        raise VolumeError("the volume holds NaN or infinite values", advice="look at its rescale slope and intercept")
    if high - low < MIN_RANGE:
        raise VolumeError("every voxel has the same value: there is no image", advice="look at the detector")
    _check_spacing(volume)


def _check_spacing(volume: Volume) -> None:
    if not all(MIN_SPACING_MM <= mm <= MAX_SPACING_MM for mm in volume.spacing_mm):  # NaN as well
        raise VolumeError(
            f"spacing must be {MIN_SPACING_MM} to {MAX_SPACING_MM} mm, it is {volume.spacing_mm}",
            advice="look at the sender: no scanner has such pixels",
        )
    height_mm, width_mm = (n * mm for n, mm in zip(volume.voxels_ZYX.shape[1:], volume.spacing_mm[1:], strict=True))
    if max(height_mm, width_mm) > MAX_ASPECT * min(height_mm, width_mm):
        raise VolumeError(
            f"images of {height_mm:.4g} x {width_mm:.4g} mm are strips in which nothing can be read",
            advice="look at their pixel spacing",
        )


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Indices of at most `most` slices out of `count`, evenly spaced, each the middle of its share."""
    if count <= most:
        return np.arange(count, dtype=np.int64)
    return ((np.arange(most) + 0.5) * count / most).astype(np.int64)


def fit_letterbox(volume: Volume, size: int) -> Letterbox:
    """The largest centred rectangle of the image's physical shape in a square of `size`."""
    rows, columns = volume.voxels_ZYX.shape[1:]
    height_mm, width_mm = rows * volume.spacing_mm[1], columns * volume.spacing_mm[2]
    scale = size / max(height_mm, width_mm)
    height, width = max(1, round(height_mm * scale)), max(1, round(width_mm * scale))
    return Letterbox(size, height, width, (size - height) // 2, (size - width) // 2, (rows, columns))


def _resize(image_YX: NDArray[np.float32], letterbox: Letterbox) -> NDArray[np.float32]:
    """Area averaging when shrinking, NaN outside the image (filled after normalising)."""
    shrinks = image_YX.shape[0] > letterbox.height
    resized = cv2.resize(
        np.ascontiguousarray(image_YX, np.float32),
        (letterbox.width, letterbox.height),
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
    )
    square_HW = np.full((letterbox.size, letterbox.size), np.nan, np.float32)
    square_HW[letterbox.top : letterbox.top + letterbox.height, letterbox.left : letterbox.left + letterbox.width] = (
        resized
    )
    return square_HW


def _normalise(slices_SHW: NDArray[np.float32], letterbox: Letterbox, spec: InputSpec) -> NDArray[np.float32]:
    if spec.normalisation == "window":
        low = spec.window_center - spec.window_width / 2
        high = spec.window_center + spec.window_width / 2
    else:
        inside = slices_SHW[
            :, letterbox.top : letterbox.top + letterbox.height, letterbox.left : letterbox.left + letterbox.width
        ]
        low, high = (float(value) for value in np.percentile(inside, _PERCENTILES))
    scaled = (slices_SHW - np.float32(low)) * np.float32(2.0 / max(high - low, MIN_RANGE)) - np.float32(1.0)
    return np.asarray(np.nan_to_num(np.clip(scaled, -1.0, 1.0), nan=-1.0), np.float32)
