"""The tensor bit by bit: shipped weights were trained on it, so no faster way may change it.

Digests where every sum is exact (whole shrink factors), so that they hold on any processor; elsewhere against the rule
written out plainly, in the same process.
"""

import hashlib

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from models.preprocess import Prepared, Volume, prepare, rescale
from models.spec import InputSpec
from models.tasks import INPUTS

XR, CT, MR = INPUTS


def noise(shape_ZYX: tuple[int, int, int], low: int, high: int) -> NDArray[np.float32]:
    ramp_X = np.linspace(low, high, shape_ZYX[2]).astype(int)
    random = np.random.default_rng(sum(shape_ZYX))
    return (ramp_X // 2 + random.integers(low, high, shape_ZYX) // 2).astype(np.float32)


def plainly(volume: Volume, prepared: Prepared, spec: InputSpec) -> NDArray[np.float32]:
    """Each step over whole arrays, with the letterbox and the slices that `prepared` has."""
    box, squares = prepared.letterbox, []
    for z in prepared.source_index_S:
        image_YX = np.ascontiguousarray(volume.voxels_ZYX[z], np.float32)
        how = cv2.INTER_AREA if image_YX.shape[0] > box.height else cv2.INTER_LINEAR
        square_HW = np.full((spec.size, spec.size), np.nan, np.float32)
        inside = (slice(box.top, box.top + box.height), slice(box.left, box.left + box.width))
        square_HW[inside] = cv2.resize(image_YX, (box.width, box.height), interpolation=how)
        squares.append(square_HW)
    slices_SHW = np.stack(squares)
    low, high = spec.window_center - spec.window_width / 2, spec.window_center + spec.window_width / 2
    if spec.normalisation == "percentile":
        low, high = (float(v) for v in np.percentile(slices_SHW[:, inside[0], inside[1]], (0.5, 99.5)))
    scaled = (slices_SHW - np.float32(low)) * np.float32(2.0 / max(high - low, 1e-6)) - np.float32(1.0)
    return np.nan_to_num(np.clip(scaled, -1.0, 1.0), nan=-1.0)


@pytest.mark.parametrize(
    ("shape_ZYX", "spacing_mm", "low", "high", "spec"),
    [
        ((1, 700, 500), (1.0, 0.14, 0.14), 0, 16384, XR),  # shrinks, tall
        ((1, 411, 903), (1.0, 0.2, 0.1), 0, 4096, XR),  # shrinks, pixels that are not square
        ((1, 40, 900), (1.0, 2.0, 0.1), 0, 256, XR),  # taller and narrower
        ((14, 512, 512), (5.0, 0.7, 0.7), -1024, 3000, CT),  # more slices than are read
        ((3, 64, 48), (5.0, 1.0, 1.0), 0, 800, MR),  # grows
        ((2, 96, 96), (5.0, 1.0, 1.0), 0, 800, MR),  # as it is
    ],
)
def test_equals_the_rule_written_out(shape_ZYX, spacing_mm, low, high, spec) -> None:
    for voxels_ZYX in (noise(shape_ZYX, low, high), noise(shape_ZYX, low, high) * np.float32(0.37) - np.float32(11.3)):
        volume = Volume(voxels_ZYX, spacing_mm, spec.modality)
        before = hashlib.sha256(voxels_ZYX.tobytes()).digest()
        prepared = prepare(volume, spec)
        assert np.array_equal(prepared.slices_SHW, plainly(volume, prepared, spec))
        assert prepared.slices_SHW.dtype == np.float32
        assert hashlib.sha256(voxels_ZYX.tobytes()).digest() == before  # what was given stays as it was


def test_a_view_with_strides_gives_the_same_as_its_copy() -> None:
    voxels_ZYX = noise((4, 300, 400), -1024, 2000)
    view = voxels_ZYX[::2, ::-1, 1:-3]
    first = prepare(Volume(view, (1.0, 1.0, 1.0), "CT"), CT).slices_SHW
    second = prepare(Volume(view.copy(), (1.0, 1.0, 1.0), "CT"), CT).slices_SHW
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("shape_ZYX", "low", "high", "spec", "digest"),
    [
        ((1, 384, 384), 0, 4096, XR, "d11ab1c64187980f"),
        ((14, 192, 192), -1024, 3000, CT, "2db3fb76ba6bcca3"),
        ((5, 288, 192), 0, 800, MR, "0bbe70f76468ac74"),
    ],
)
def test_equals_what_the_shipped_network_was_trained_on(shape_ZYX, low, high, spec, digest) -> None:
    prepared = prepare(Volume(noise(shape_ZYX, low, high), (1.0, 1.0, 1.0), spec.modality), spec)
    assert hashlib.sha256(prepared.slices_SHW.astype("<f4").tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32])
@pytest.mark.parametrize("monochrome1", [False, True])
@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.37, 0.0), (1.0, -1024.0), (-2.5, 11.3)])
def test_rescale_equals_its_formula_in_float32(dtype, monochrome1: bool, slope: float, intercept: float) -> None:
    bounds = np.iinfo(dtype)
    stored = np.random.default_rng(1).integers(bounds.min, bounds.max, (7, 5), dtype, endpoint=True)
    expected = stored.astype(np.float32)
    if monochrome1:
        expected = np.float32(-1 if bounds.min < 0 else bounds.max) - expected
    if (slope, intercept) != (1.0, 0.0):
        expected = expected * np.float32(slope) + np.float32(intercept)
    settings = {"slope": slope, "intercept": intercept, "bits_stored": bounds.bits, "is_signed": bounds.min < 0}
    got = rescale(stored, monochrome1=monochrome1, **settings)
    assert got.tobytes() == expected.tobytes()
    into = np.full((7, 5), np.nan, np.float32)
    rescale(stored, monochrome1=monochrome1, out=into, **settings)
    assert into.tobytes() == expected.tobytes()
