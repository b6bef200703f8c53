"""Phantoms: labelled chest X-rays, chest CT and brain MR series made from a seed, as one hospital's scanner would show them.

Reads nothing; gives arrays in memory.
Never uses unseeded noise: the same call gives the same voxels. Nothing in a phantom comes from a patient.
Axes: Z slice, Y row, X column. Anatomy is drawn in units of half the image (y and x from -1 to 1), tissue in modality units.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from models.preprocess import Volume

F32 = NDArray[np.float32]
Real = NDArray[np.floating]
Bool = NDArray[np.bool_]

LABELS = {
    "XR": ("normal", "nodule", "consolidation"),
    "CT": ("normal", "nodule", "emphysema"),
    "MR": ("normal", "neoplasm", "haemorrhage"),
}
SIZE_PX = {"XR": 256, "CT": 128, "MR": 128}
MIN_SIDE_PX = 64
SLICES = {"XR": 1, "CT": 8, "MR": 8}
FIELD_OF_VIEW_MM = {"XR": 360.0, "CT": 360.0, "MR": 240.0}
SLICE_MM = {"XR": 1.0, "CT": 10.0, "MR": 10.0}


@dataclass(frozen=True)
class SiteLook:
    """What another hospital's scanner and population change in an image."""

    name: str
    gamma: float = 1.0  # of the tissue scale; > 1 darkens the middle
    noise: float = 1.0  # times the base noise
    blur_px: float = 0.0  # at SIZE_PX
    shading: float = 0.0  # strength of a smooth multiplicative field
    grid: float = 0.0  # amplitude of fine stripes (an anti-scatter grid, a coil)
    lesion_contrast: float = 1.0
    lesion_scale: float = 1.0


BASE = SiteLook("base")
# Both sites' tone curves darken the middle, each with something of its own: the shipped network errs one way at both, and
# a mean of what their boxes learned serves each (opposite curves cost one site what the other gained).
LOOKS = {
    "base": BASE,
    "north": SiteLook("north", gamma=1.21, noise=1.2, lesion_contrast=0.92),
    "south": SiteLook("south", gamma=1.2, blur_px=0.4, grid=0.03, lesion_contrast=0.9),
}


@dataclass(frozen=True)
class Phantom:
    volume: Volume
    label: str
    lesion_ZYX: Bool  # where the finding is; empty for normal
    seed: int
    site: SiteLook


@dataclass(frozen=True)
class _Canvas:
    """Coordinates of one drawing, its generator, and how its site draws lesions."""

    rng: np.random.Generator
    z: F32  # Z11, from -1 to 1; one zero for an X-ray
    y: F32  # 1Y1
    x: F32  # 11X
    look: SiteLook

    @property
    def shape_ZYX(self) -> tuple[int, int, int]:
        return (self.z.shape[0], self.y.shape[1], self.x.shape[2])

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))


def phantom(modality: str, label: str, seed: int, site: SiteLook = BASE, size: int | None = None) -> Phantom:
    """One labelled series. Equal arguments give equal voxels; `size` is the side in pixels."""
    side = size or SIZE_PX[modality]
    if label not in LABELS[modality] or side < MIN_SIDE_PX:
        raise ValueError(f"no {modality} phantom of label {label} and {side} pixels")
    canvas = _canvas(modality, label, seed, site, side)
    tissue_ZYX, lesion_ZYX = _DRAW[modality](canvas, label)
    voxels_ZYX = _DETECT[modality](canvas, _scan(canvas, tissue_ZYX))
    return Phantom(_volume(modality, voxels_ZYX), label, lesion_ZYX > 0.5, seed, site)


def _canvas(modality: str, label: str, seed: int, site: SiteLook, size: int) -> _Canvas:
    stream = (seed, zlib.crc32(f"{modality}/{label}/{site.name}".encode()))
    axis = np.linspace(-1.0, 1.0, size, dtype=np.float32)
    count = SLICES[modality]
    z = np.linspace(-1.0, 1.0, count, dtype=np.float32) if count > 1 else np.zeros(1, np.float32)
    return _Canvas(np.random.default_rng(stream), z[:, None, None], axis[None, :, None], axis[None, None, :], site)


def _volume(modality: str, voxels_ZYX: F32) -> Volume:
    spacing = FIELD_OF_VIEW_MM[modality] / voxels_ZYX.shape[1]
    window = {"XR": (2048.0, 4096.0), "CT": (-500.0, 1500.0), "MR": (600.0, 1200.0)}[modality]
    return Volume(voxels_ZYX, (SLICE_MM[modality], spacing, spacing), modality, window)


# --- anatomy: tissue on a scale of 0 (air) to 1 (bone), before any scanner sees it ---------------------


def _chest_xray(c: _Canvas, label: str) -> tuple[F32, F32]:
    dy, dx = c.between(-0.08, 0.08), c.between(-0.06, 0.06)
    y, x = c.y - dy, c.x - dx
    body = _ellipse(y - 0.25, x, 1.5, c.between(0.86, 0.97), 0.05)
    height, width = c.between(0.56, 0.66), c.between(0.27, 0.33)
    lungs = _ellipse(y + 0.05, x + 0.43, height, width, 0.08) + _ellipse(y + 0.05, x - 0.43, height, width, 0.08)
    lungs = np.clip(lungs, 0, 1) * _step(0.46 + 0.25 * (np.abs(x) - 0.43) ** 2 - y, 0.03)
    heart = _ellipse(y - 0.27, x - 0.13, c.between(0.25, 0.32), c.between(0.24, 0.34), 0.08)
    spine = np.exp(-((x / 0.1) ** 2)) * np.ones_like(y)
    tissue = 0.04 + body * (0.52 + 0.14 * spine) - 0.34 * lungs * (1 - 0.75 * heart) + 0.1 * heart
    tissue = tissue + _ribs(c, y, x) * body + lungs * _vessels(c, y, x)
    field = lungs * (1 - heart)
    lesion = np.zeros(c.shape_ZYX, np.float32)
    if label == "nodule":
        lesion = _blob(c, field, radius=c.between(0.075, 0.105), edge=0.3, ruggedness=0.1)
        tissue = tissue + lesion * c.between(0.19, 0.25) * c.look.lesion_contrast
    elif label == "consolidation":
        lesion = _blob(c, field, radius=c.between(0.22, 0.34), edge=0.5, ruggedness=0.45) * lungs
        tissue = tissue + lesion * (c.between(0.17, 0.24) + 0.05 * _smooth(c, 20)) * c.look.lesion_contrast
    return tissue.astype(np.float32), lesion


def _chest_ct(c: _Canvas, label: str) -> tuple[F32, F32]:
    """Tissue 0..1 stands for -1000..500 HU."""
    dy, dx = c.between(-0.06, 0.06), c.between(-0.06, 0.06)
    y, x = c.y - dy, c.x - dx
    body = _ellipse(y, x, c.between(0.66, 0.74), c.between(0.86, 0.94), 0.02)
    muscle = _ellipse(y, x, 0.62, 0.82, 0.03)
    grow = 0.82 + 0.18 * (1 - c.z**2)
    lungs = _ellipse(y + 0.02, x + 0.4, 0.5 * grow, c.between(0.28, 0.33) * grow, 0.05)
    lungs = lungs + _ellipse(y + 0.02, x - 0.4, 0.5 * grow, c.between(0.28, 0.33) * grow, 0.05)
    heart = _ellipse(y + 0.12, x - 0.1, c.between(0.22, 0.28), c.between(0.22, 0.3), 0.05) * _step(c.z + 0.5, 0.5)
    spine = _ellipse(y - 0.47, x, 0.13, 0.12, 0.05)
    lungs = np.clip(lungs - heart - spine, 0, 1)
    tissue = body * 0.6 + muscle * 0.09 + spine * 0.25 - lungs * (0.575 + 0.02 * _smooth(c, 4))
    tissue = tissue + 0.45 * _tubes(c, lungs)
    lesion = np.zeros(c.shape_ZYX, np.float32)
    if label == "nodule":
        lesion = _blob(c, lungs, radius=c.between(0.085, 0.125), edge=0.25, ruggedness=0.12)
        tissue = tissue + lesion * c.between(0.42, 0.52) * c.look.lesion_contrast
    elif label == "emphysema":
        holes = _step(_smooth(c, 22) - c.between(0.45, 0.75) - 0.3 * c.z, 0.25)
        lesion = holes * np.clip(lungs, 0, 1) * (lungs > 0.7)
        tissue = tissue - lesion * c.between(0.09, 0.12) * c.look.lesion_contrast * c.look.lesion_scale
    return tissue.astype(np.float32), lesion.astype(np.float32)


def _brain_mr(c: _Canvas, label: str) -> tuple[F32, F32]:
    """FLAIR-like: fluid dark, grey matter a little brighter than white, fat bright."""
    dy, dx = c.between(-0.06, 0.06), c.between(-0.06, 0.06)
    y, x = c.y - dy, c.x - dx
    grow = np.sqrt(np.clip(1.0 - 0.3 * c.z**2, 0.2, 1))
    height, width = c.between(0.8, 0.88), c.between(0.66, 0.74)
    scalp = _ellipse(y, x, height * grow, width * grow, 0.02)
    skull = _ellipse(y, x, (height - 0.06) * grow, (width - 0.06) * grow, 0.02)
    brain = _ellipse(y, x, (height - 0.13) * grow, (width - 0.13) * grow, 0.03)
    folds = np.tanh(4 * _smooth(c, 11))
    tissue = 0.75 * scalp - 0.65 * skull + brain * (0.36 + 0.05 * folds)
    ventricle = c.between(0.1, 0.15) * np.clip(1.1 - np.abs(c.z), 0.15, 1)
    fluid = _ellipse(y + 0.05, np.abs(x) - 0.11, 2.1 * ventricle, 0.6 * ventricle, 0.12)
    fluid = np.clip(fluid + np.exp(-((x / 0.012) ** 2)) * np.ones_like(y), 0, 1)
    tissue = tissue - 0.26 * fluid * brain
    lesion = np.zeros(c.shape_ZYX, np.float32)
    if label == "neoplasm":
        lesion = _blob(c, brain, radius=c.between(0.15, 0.23), edge=0.45, ruggedness=0.4)
        core = np.clip(lesion * 3 - 2.2, 0, 1)
        tissue = tissue + (lesion * c.between(0.24, 0.32) - 0.12 * core) * c.look.lesion_contrast
    elif label == "haemorrhage":
        lesion = _blob(c, brain, radius=c.between(0.13, 0.2), edge=0.3, ruggedness=0.3)
        rim = 4 * lesion * (1 - lesion)
        tissue = tissue + (0.14 * rim - lesion * c.between(0.24, 0.32)) * c.look.lesion_contrast
    return tissue.astype(np.float32), lesion * brain


def _ribs(c: _Canvas, y: F32, x: F32) -> F32:
    bow, top, gap = c.between(0.25, 0.45), c.between(-0.95, -0.85), c.between(0.17, 0.2)
    down = y - top - bow * x**2
    phase = down / gap
    band = np.exp(-(((phase - np.round(phase)) / 0.2) ** 2)) * (down > -0.05) * (down < 8.5 * gap)
    clavicle = np.exp(-(((y + 0.62 - 0.12 * np.abs(x)) / 0.03) ** 2)) * (np.abs(x) > 0.08) * (np.abs(x) < 0.75)
    return np.asarray(0.055 * band * np.clip(np.abs(x) * 4, 0, 1) + 0.09 * clavicle, np.float32)


def _vessels(c: _Canvas, y: F32, x: F32) -> F32:
    hilum = np.exp(-(((np.abs(x) - 0.2) / 0.13) ** 2) - ((y - 0.02) / 0.22) ** 2)
    return np.asarray(0.12 * hilum + 0.022 * _smooth(c, 24) * (0.5 + hilum) + 0.02 * _smooth(c, 5), np.float32)


def _tubes(c: _Canvas, lungs_ZYX: F32) -> F32:
    """Vessels cut across: small discs that wander from slice to slice."""
    slices, size, _ = c.shape_ZYX
    drawn_ZYX = np.zeros(c.shape_ZYX, np.uint8)
    for _ in range(int(c.rng.integers(24, 40))):
        at = c.rng.uniform(-0.6, 0.6, 2) * (0.75, 1.1)
        drift = c.rng.normal(0, 0.04, 2)
        radius = c.between(0.012, 0.032)
        for z in range(slices):
            row, column = (at + drift * z + 1) * size / 2
            cv2.circle(drawn_ZYX[z], (int(column * 16), int(row * 16)), int(radius * size * 8), 255, -1, cv2.LINE_AA, 4)
    return np.asarray(drawn_ZYX / np.float32(255) * lungs_ZYX, np.float32)


def _blob(c: _Canvas, inside_ZYX: F32, *, radius: float, edge: float, ruggedness: float) -> F32:
    """A soft irregular ball whose centre lies well inside the given tissue; 0..1."""
    radius = radius * c.look.lesion_scale
    inside_ZYX = np.broadcast_to(inside_ZYX, c.shape_ZYX)
    places = np.argwhere(inside_ZYX[:, ::4, ::4] > 0.85)
    if c.shape_ZYX[0] > 2:
        places = places[(places[:, 0] > 0) & (places[:, 0] < c.shape_ZYX[0] - 1)]
    z, row, column = places[c.rng.integers(len(places))]
    centre = (c.z[z, 0, 0], c.y[0, row * 4, 0], c.x[0, 0, column * 4])
    depth = max(radius * 2.5, 0.33)
    squeeze = c.between(0.85, 1.15)
    distance = np.sqrt(
        ((c.z - centre[0]) / depth) ** 2
        + ((c.y - centre[1]) / (radius * squeeze)) ** 2
        + ((c.x - centre[2]) / (radius / squeeze)) ** 2
    )
    return _step(1.0 + ruggedness * 0.5 * _smooth(c, 9) - distance, edge)


def _ellipse(y: Real, x: Real, height: float | Real, width: float | Real, edge: float) -> F32:
    return _step(1.0 - np.sqrt((y / height) ** 2 + (x / width) ** 2), edge)


def _step(value: Real, width: float) -> F32:
    """0 to 1 over `width` around zero."""
    return np.asarray(np.clip(value / width + 0.5, 0.0, 1.0), np.float32)


def _smooth(c: _Canvas, cells: int) -> F32:
    """Smooth noise of unit variance, `cells` bumps across, each slice near its neighbours."""
    slices, rows, columns = c.shape_ZYX
    coarse = c.rng.normal(0, 1, (slices, cells, cells)).astype(np.float32)
    for z in range(1, slices):
        coarse[z] = 0.8 * coarse[z - 1] + 0.6 * coarse[z]
    planes = [cv2.resize(plane, (columns, rows), interpolation=cv2.INTER_CUBIC) for plane in coarse]
    return np.asarray(np.stack(planes) * 1.3, np.float32)


# --- scanner ------------------------------------------------------------------------------------------


def _scan(c: _Canvas, tissue_ZYX: F32) -> F32:
    """What the site's scanner makes of tissue: tone curve, blur, shading, stripes. Noise comes with the detector."""
    look = c.look
    seen: Real = np.clip(tissue_ZYX, 0.0, 1.2)
    if look.gamma != 1.0:
        seen = seen**look.gamma
    if look.blur_px > 0:
        seen = np.stack([cv2.GaussianBlur(plane, (0, 0), look.blur_px) for plane in seen])
    if look.shading > 0:
        seen = seen * (1 + look.shading * (c.y * c.between(0.6, 1.0) + c.x * c.between(-0.5, 0.5)))
    if look.grid > 0:
        seen = seen + look.grid * np.sin(c.y * (np.pi * 20) + c.between(0, 6)) * np.clip(seen, 0, 1)
    return np.asarray(seen, np.float32)


def _noise(c: _Canvas, sigma: float) -> F32:
    return c.rng.normal(0, sigma * c.look.noise, c.shape_ZYX).astype(np.float32)


def _detect_xray(c: _Canvas, seen_ZYX: F32) -> F32:
    exposure = c.between(0.9, 1.1)
    grain = _noise(c, 0.022) * np.sqrt(seen_ZYX + 0.1)
    return _stored((seen_ZYX + grain) * exposure * 3300, 0, 4095)


def _detect_ct(c: _Canvas, seen_ZYX: F32) -> F32:
    grain = np.stack([cv2.GaussianBlur(plane, (0, 0), 0.6) for plane in _noise(c, 90.0)])
    return _stored(seen_ZYX * 1500 - 1000 + grain, -1024, 3071)


def _detect_mr(c: _Canvas, seen_ZYX: F32) -> F32:
    """Magnitude image: Rician noise; the receiver's gain differs from series to series."""
    gain = c.between(700, 1300)
    magnitude = np.hypot(seen_ZYX + _noise(c, 0.028), _noise(c, 0.028))
    return _stored(magnitude * gain, 0, 4095)


def _stored(units_ZYX: Real, low: int, high: int) -> F32:
    """Whole numbers that 12 stored bits can hold, so that DICOM loses nothing."""
    return np.asarray(np.clip(np.rint(units_ZYX), low, high), np.float32)


_DRAW: dict[str, Callable[[_Canvas, str], tuple[F32, F32]]] = {
    "XR": _chest_xray,
    "CT": _chest_ct,
    "MR": _brain_mr,
}
_DETECT: dict[str, Callable[[_Canvas, F32], F32]] = {"XR": _detect_xray, "CT": _detect_ct, "MR": _detect_mr}
