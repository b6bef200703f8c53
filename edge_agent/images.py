"""Pictures for the review page: a slice as a grey PNG, the evidence over it as a transparent PNG.

Reads instance files (through decode) and the npz of a result; keeps a few decoded series in memory.
Never changes pixels on disk; what it shows is for review, scaled to at most 1600 pixels a side.
Source: VOI LUT function LINEAR PS3.3 C.11.2.1.2. Axes: Z slice, Y row, X column; S the slices the network read.
"""

import math
import sqlite3
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_agent import catalog, decode, instances
from edge_agent.recent import Recent
from fleet_link.errors import SiteError
from models.preprocess import Volume

MAX_SIDE_PX = 1600
MAX_HEATMAP_SIDE_PX = 512  # the network saw less; the browser stretches it over the image
_STACKS_BYTES = 512 << 20
_MAPS_BYTES = 64 << 20
_LEVELS = 65535
# A noisy 1600 x 1600 slice: 43 ms, 1.6 MB; with the default strategy 62 ms, 1.8 MB.
_PNG = (cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE)
_CT_WINDOWS = (("Soft tissue", 40.0, 400.0), ("Lung", -600.0, 1500.0), ("Bone", 450.0, 1800.0), ("Brain", 40.0, 80.0))
_FAINTEST = 0.08  # weaker evidence is not drawn


class ImageError(SiteError):
    """A slice or map that is not there."""


@dataclass(frozen=True)
class Window:
    name: str
    center: float
    width: float


@dataclass(frozen=True)
class Stack:
    """A decoded series at 16 bits, half the size of its float32 volume: a level is `low + level * step` units."""

    levels_ZYX: NDArray[np.uint16]
    low: float
    step: float
    spacing_mm: tuple[float, float, float]
    windows: tuple[Window, ...]  # the first is shown at the start

    @property
    def slices(self) -> int:
        return int(self.levels_ZYX.shape[0])

    @property
    def display_YX(self) -> tuple[int, int]:
        """Pixels square on the screen, no side above MAX_SIDE_PX."""
        rows, columns = self.levels_ZYX.shape[1:]
        height, width = rows * self.spacing_mm[1], columns * self.spacing_mm[2]
        scale = min(max(rows / height, columns / width), MAX_SIDE_PX / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))


@dataclass(frozen=True)
class Maps:
    map_SHW: NDArray[np.float16]
    slice_weights_S: NDArray[np.float32]
    source_index_S: NDArray[np.int64]

    def weights(self) -> list[tuple[int, float]]:
        """(slice in the series, share of the attention) of every slice that was read."""
        return [(int(z), float(w)) for z, w in zip(self.source_index_S, self.slice_weights_S, strict=True)]


class Images:
    """The box's decoded series and heatmaps, as many as fit in memory's share."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._stacks: Recent[Sequence[Path], Stack] = Recent(_STACKS_BYTES, lambda stack: stack.levels_ZYX.nbytes)
        self._maps: Recent[str, Maps] = Recent(_MAPS_BYTES, lambda maps: maps.map_SHW.nbytes)

    def stack(self, db: sqlite3.Connection, series_no: int) -> Stack:
        """Raises DecodeError or ImageError."""
        paths = instances.open(db, self._data_dir, series_no)
        if catalog.images_removed_at(db, series_no) is not None:
            raise ImageError(
                f"the images of series {series_no} were removed from this box", advice="look at them in the PACS"
            )
        if not paths:
            raise ImageError(f"series {series_no} has no images on this box")
        return self._stacks.get(paths, lambda: to_stack(decode.to_volume(paths).volume))

    def maps(self, maps_path: str) -> Maps:
        """Raises ImageError when the file is gone or damaged."""
        return self._maps.get(maps_path, lambda: read_maps(self._data_dir / maps_path))


def to_stack(volume: Volume) -> Stack:
    voxels_ZYX = np.nan_to_num(volume.voxels_ZYX, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(voxels_ZYX.min()), float(voxels_ZYX.max())
    step = max((high - low) / _LEVELS, 1e-12)
    levels_ZYX = np.empty(voxels_ZYX.shape, np.uint16)
    for z, voxels_YX in enumerate(voxels_ZYX):
        levels_ZYX[z] = np.rint((voxels_YX - low) / step).clip(0, _LEVELS)
    return Stack(levels_ZYX, low, step, volume.spacing_mm, _windows(volume, low, high))


def grey_png(stack: Stack, z: int, window: tuple[float, float] | None = None) -> bytes:
    """Slice z through a window (center, width) in modality units; None takes the stack's first.

    Raises ImageError where there is no such slice.
    """
    if not 0 <= z < stack.slices:
        raise ImageError(f"there is no slice {z}: the series has {stack.slices}, counted from 0")
    center, width = window or (stack.windows[0].center, stack.windows[0].width)
    units = stack.low + np.arange(_LEVELS + 1) * stack.step
    grey = ((units - center) / max(width, stack.step) + 0.5) * 255.0
    return _png(grey.clip(0, 255).astype(np.uint8)[_resized(stack.levels_ZYX[z], stack.display_YX)])


def heatmap_png(maps: Maps, stack: Stack, z: int) -> bytes:
    """The evidence on slice z in colour, transparent where weak, and everywhere on a slice that was not read.

    Of the image's shape, on at most MAX_HEATMAP_SIDE_PX a side.

    Raises ImageError where there is no such slice.
    """
    if not 0 <= z < stack.slices:
        raise ImageError(f"there is no slice {z}: the series has {stack.slices}, counted from 0")
    read = np.flatnonzero(maps.source_index_S == z)
    if read.size == 0:
        return _png(np.zeros((1, 1, 4), np.uint8))
    shrink = min(1.0, MAX_HEATMAP_SIDE_PX / max(stack.display_YX))
    rows, columns = (max(1, round(side * shrink)) for side in stack.display_YX)
    map_YX = cv2.resize(maps.map_SHW[read[0]].astype(np.float32), (columns, rows), interpolation=cv2.INTER_LINEAR)
    return _png(_COLOURS[np.rint(np.nan_to_num(map_YX).clip(0.0, 1.0) * 255.0).astype(np.uint8)])


def read_maps(path: Path) -> Maps:
    """Raises ImageError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            maps = Maps(arrays["map_SHW"].astype(np.float16), arrays["slice_weights_S"], arrays["source_index_S"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ImageError("the heatmap of this result cannot be read", advice="check the disk of data_dir") from error
    if maps.map_SHW.ndim != 3 or not len(maps.map_SHW) == len(maps.slice_weights_S) == len(maps.source_index_S):
        raise ImageError("the heatmap of this result has a wrong shape")
    return maps


def _windows(volume: Volume, low: float, high: float) -> tuple[Window, ...]:
    own = _own_window(volume)
    if volume.modality == "CT":
        return (*own, *(Window(*preset) for preset in _CT_WINDOWS))
    stride = max(1, volume.voxels_ZYX.size // 200_000)
    dark, bright = (float(v) for v in np.nanpercentile(volume.voxels_ZYX.reshape(-1)[::stride], (1.0, 99.5)))
    center, width = (dark + bright) / 2, max(bright - dark, 1e-6)
    full = Window("Full range", (low + high) / 2, max(high - low, 1e-6))
    return (*own, Window("Balanced", center, width), Window("High contrast", center, width * 0.6), full)


def _own_window(volume: Volume) -> tuple[Window, ...]:
    if volume.window is None or not all(map(math.isfinite, volume.window)) or volume.window[1] <= 0:
        return ()
    return (Window("Image", *volume.window),)


def _resized(levels_YX: NDArray[np.uint16], display_YX: tuple[int, int]) -> NDArray[np.uint16]:
    rows, columns = display_YX
    if levels_YX.shape == (rows, columns):
        return levels_YX
    shrinks = rows < levels_YX.shape[0] or columns < levels_YX.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(levels_YX, (columns, rows), interpolation=method), np.uint16)


def _png(picture: NDArray[np.uint8]) -> bytes:
    return bytes(cv2.imencode(".png", picture, _PNG)[1])


def _colours() -> NDArray[np.uint8]:
    """256 colours (blue, green, red, alpha) from clear over violet and orange to yellow."""
    evidence = np.arange(256, dtype=np.float32) / 255.0
    alpha = ((evidence - _FAINTEST) / (1.0 - _FAINTEST)).clip(0.0, 1.0) ** 0.6
    ramp = cv2.applyColorMap(np.arange(256, dtype=np.uint8), cv2.COLORMAP_INFERNO).reshape(256, 3)
    return np.concatenate([ramp, np.rint(alpha * 255.0).astype(np.uint8)[:, np.newaxis]], axis=1)


_COLOURS = _colours()
