"""Preprocessing: numbers small enough to check by hand, and every refusal."""

import numpy as np
import pytest

from models.errors import VolumeError
from models.preprocess import Volume, inversion_sum, prepare, rescale, spread
from models.spec import InputSpec

WINDOW = InputSpec("CT", size=32, max_slices=3, normalisation="window", window_center=0.0, window_width=200.0)
PERCENTILE = InputSpec("MR", size=32, max_slices=3, normalisation="percentile")


def volume(voxels_ZYX, modality="CT", spacing_mm=(1.0, 1.0, 1.0)) -> Volume:
    return Volume(np.asarray(voxels_ZYX, np.float32), spacing_mm, modality)


def ramp(slices=1, rows=32, columns=32) -> np.ndarray:
    return np.broadcast_to(np.linspace(-100, 100, columns, dtype=np.float32), (slices, rows, columns)).copy()


def test_window_maps_its_ends_to_minus_one_and_one() -> None:
    prepared = prepare(volume(ramp()), WINDOW)
    assert prepared.slices_SHW.dtype == np.float32
    assert prepared.slices_SHW[0, 0, 0] == pytest.approx(-1.0)
    assert prepared.slices_SHW[0, 0, -1] == pytest.approx(1.0)


def test_values_outside_the_window_are_clipped() -> None:
    voxels = ramp()
    voxels[0, 0, 0], voxels[0, 0, 1] = -5000, 5000
    prepared = prepare(volume(voxels), WINDOW)
    assert prepared.slices_SHW[0, 0, :2].tolist() == [-1.0, 1.0]


def test_percentile_does_not_depend_on_the_scanners_gain() -> None:
    first = prepare(volume(ramp(), "MR"), PERCENTILE).slices_SHW
    second = prepare(volume(ramp() * 7 + 300, "MR"), PERCENTILE).slices_SHW
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_one_hot_pixel_does_not_set_the_scale() -> None:
    voxels = ramp()
    without = prepare(volume(voxels, "MR"), PERCENTILE).slices_SHW
    voxels[0, 5, 5] = 1e6
    with_hot = prepare(volume(voxels, "MR"), PERCENTILE).slices_SHW
    assert np.abs(with_hot - without)[0, 10].max() < 0.05


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(1, 3, [0]), (3, 3, [0, 1, 2]), (6, 3, [1, 3, 5]), (100, 4, [12, 37, 62, 87])],
)
def test_slices_are_spread_evenly(count: int, most: int, expected: list[int]) -> None:
    assert spread(count, most).tolist() == expected


def test_prepared_slices_know_where_they_came_from() -> None:
    voxels = ramp(6) + np.arange(6, dtype=np.float32)[:, None, None]
    prepared = prepare(volume(voxels), WINDOW)
    assert prepared.source_index_S.tolist() == [1, 3, 5]
    assert np.all(np.diff(prepared.slices_SHW[:, 0, 5]) > 0)


def test_letterbox_keeps_the_physical_shape_and_fills_with_minus_one() -> None:
    prepared = prepare(volume(ramp(1, 20, 40) + 50), WINDOW)
    box = prepared.letterbox
    assert (box.height, box.width, box.top, box.left) == (16, 32, 8, 0)
    assert np.all(prepared.slices_SHW[0, :8] == -1)
    assert np.all(prepared.slices_SHW[0, 24:] == -1)
    tall = prepare(volume(ramp(1, 20, 40), spacing_mm=(1.0, 2.0, 1.0)), WINDOW).letterbox
    assert (tall.height, tall.width) == (32, 32)  # 40 mm by 40 mm


def test_a_map_returns_to_the_pixels_it_came_from() -> None:
    voxels = np.full((1, 64, 128), -100, np.float32)
    voxels[0, 40:56, 96:112] = 100
    prepared = prepare(volume(voxels), WINDOW)
    back_YX = prepared.letterbox.map_to_source(prepared.slices_SHW[0])
    assert back_YX.shape == (64, 128)
    row, column = np.unravel_index(back_YX.argmax(), back_YX.shape)
    assert 40 <= row < 56
    assert 96 <= column < 112


def test_rescale_and_monochrome1_by_hand() -> None:
    stored = np.array([0, 1, 4095], np.uint16)
    assert rescale(stored, slope=2, intercept=-10, bits_stored=12).tolist() == [-10, -8, 8180]
    assert rescale(stored, bits_stored=12, monochrome1=True).tolist() == [4095, 4094, 0]
    signed = np.array([-128, 0, 127], np.int8)
    assert rescale(signed, bits_stored=8, is_signed=True, monochrome1=True).tolist() == [127, -1, -128]
    assert (inversion_sum(12, False), inversion_sum(12, True)) == (4095, -1)


@pytest.mark.parametrize(
    ("voxels", "reason"),
    [
        (np.zeros((0, 32, 32)), "too small"),
        (np.zeros((1, 1, 1)), "too small"),
        (np.zeros((1, 32, 8)), "too small"),
        (np.zeros((1, 32, 32, 3)), "colour"),
        (np.zeros((32, 32)), "axes"),
        (np.full((1, 32, 32), np.nan), "NaN"),
        (np.full((1, 32, 32), np.inf), "NaN or infinite"),
        (np.full((2, 32, 32), 7.0), "same value"),
    ],
)
def test_what_is_no_image_is_refused(voxels: np.ndarray, reason: str) -> None:
    with pytest.raises(VolumeError, match=reason):
        prepare(volume(voxels), WINDOW)


def test_one_nan_is_enough_to_refuse() -> None:
    voxels = ramp()
    voxels[0, 3, 3] = np.nan
    with pytest.raises(VolumeError, match="NaN"):
        prepare(volume(voxels), WINDOW)


def test_another_modality_is_refused() -> None:
    with pytest.raises(VolumeError, match="MR cannot be prepared for CT"):
        prepare(volume(ramp(), "MR"), WINDOW)


@pytest.mark.parametrize(
    "spacing_mm",
    [
        (1.0, 0.0, 1.0),
        (1.0, -1.0, 1.0),
        (1.0, np.nan, 1.0),
        (1.0, np.inf, np.inf),
        (1.0, 5e-324, 5e-324),
        (1, 1, 1e308),
    ],
)
def test_impossible_spacing_is_refused(spacing_mm: tuple[float, float, float]) -> None:
    with pytest.raises(VolumeError, match="spacing"):
        prepare(volume(ramp(), spacing_mm=spacing_mm), WINDOW)


@pytest.mark.parametrize("spacing_mm", [(1.0, 0.04, 1.0), (1.0, 1.0, 0.04)])
def test_a_strip_in_which_nothing_can_be_read_is_refused(spacing_mm: tuple[float, float, float]) -> None:
    with pytest.raises(VolumeError, match="strips"):
        prepare(volume(ramp(), spacing_mm=spacing_mm), WINDOW)


def test_a_whole_leg_is_read() -> None:
    box = prepare(volume(ramp(1, 320, 64)), WINDOW).letterbox
    assert (box.height, box.width) == (32, 6)
