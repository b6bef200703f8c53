"""Augmentation: lesion masks stay on their lesions, values stay in range, nothing is nothing, equal seeds are equal."""

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from models.examples import LESION_SIDE, Batch
from models.tasks import TASKS

if TYPE_CHECKING:
    from models.augment import Augmentation

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
pytestmark = pytest.mark.usefixtures("one_thread")

SIDE, SERIES, SLICES = 96, 6, 3


def squares(seed: int = 0) -> Batch:
    """A bright square of 16 pixels somewhere in each series, the same place in all its slices; the mask says where."""
    generator = np.random.default_rng(seed)
    slices_BSHW = np.full((SERIES, SLICES, SIDE, SIDE), -0.8, np.float32)
    lesion_BShw = np.zeros((SERIES, SLICES, LESION_SIDE, LESION_SIDE), np.float32)
    for b in range(SERIES):
        row, column = generator.integers(5, 15, 2)
        slices_BSHW[b, :, row * 4 : row * 4 + 16, column * 4 : column * 4 + 16] = 0.8
        lesion_BShw[b, :, row : row + 4, column : column + 4] = 1.0
    return Batch(
        slices_BSHW,
        np.ones((SERIES, SLICES), bool),
        np.zeros(SERIES, np.int64),
        np.ones(SERIES, np.int64),
        lesion_BShw,
        TASKS[0],
    )


def changed(batch: Batch, by: "Augmentation", seed: int = 0) -> Batch:
    from models.augment import augmented

    return augmented(batch, by, torch.Generator().manual_seed(seed))


def centres(images_BHW: np.ndarray) -> Any:
    """(row, column) of each image's bright pixels, as share of the side."""
    places = [np.argwhere(image_HW).mean(0) + 0.5 for image_HW in images_BHW]
    return np.array(places) / images_BHW.shape[-1]


@pytest.mark.parametrize("seed", range(8))
def test_lesion_masks_move_with_the_image(seed: int) -> None:
    from models.augment import RADIOGRAPH

    before = squares(seed)
    after = changed(before, replace(RADIOGRAPH, erase=0.0), seed)
    assert after.lesion_BShw is not None
    moved_B2 = centres(after.slices_BSHW[:, 0] > 0.0)
    assert np.abs(moved_B2 - centres(after.lesion_BShw[:, 0] > 0.5)).max() < 0.5 / LESION_SIDE
    assert np.abs(moved_B2 - centres(before.slices_BSHW[:, 0] > 0.0)).max() > 1 / LESION_SIDE
    np.testing.assert_array_equal(after.lesion_BShw[:, 0], after.lesion_BShw[:, 2])


@pytest.mark.parametrize("seed", range(4))
def test_it_stays_in_range_and_changes_nothing_else(seed: int) -> None:
    from models.augment import RADIOGRAPH, SITE

    noisy = squares()
    noisy.slices_BSHW[:] = np.random.default_rng(seed).uniform(-1, 1, noisy.slices_BSHW.shape)
    kept = noisy.slices_BSHW.copy()
    for by in (SITE, RADIOGRAPH):
        after = changed(noisy, by, seed)
        assert after.slices_BSHW.dtype == np.float32
        assert after.slices_BSHW.shape == kept.shape
        assert -1.0 <= after.slices_BSHW.min() < after.slices_BSHW.max() <= 1.0
        assert not np.array_equal(after.slices_BSHW, kept)
        assert after.label_B is noisy.label_B
        assert after.slice_mask_BS is noisy.slice_mask_BS
    np.testing.assert_array_equal(noisy.slices_BSHW, kept)


def test_none_changes_not_one_bit() -> None:
    from models.augment import NONE

    odd = squares()
    odd.slices_BSHW[:] = np.random.default_rng(0).normal(0, 3, odd.slices_BSHW.shape)
    kept = odd.slices_BSHW.copy()
    after = changed(odd, NONE)
    np.testing.assert_array_equal(after.slices_BSHW, kept)
    assert after.lesion_BShw is odd.lesion_BShw


def test_equal_seeds_are_equal_and_others_are_not() -> None:
    from models.augment import RADIOGRAPH

    one, again, other = (changed(squares(), RADIOGRAPH, seed).slices_BSHW for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_each_kind_of_change_does_something() -> None:
    from models.augment import Augmentation

    largest: dict[str, Any] = {"mirror": True, "rotate_deg": 10.0}
    for kind in fields(Augmentation):
        alone = Augmentation(**{kind.name: largest.get(kind.name, 0.2)})
        assert not np.array_equal(changed(squares(), alone).slices_BSHW, squares().slices_BSHW), kind.name


def test_what_is_erased_becomes_its_slice_mean_whatever_it_is_padded_with() -> None:
    from models.augment import Augmentation

    batch = squares()
    batch.slices_BSHW[:, 2] = 0.0  # padding
    after = changed(batch, Augmentation(erase=0.25))
    is_new_BHW = np.abs(after.slices_BSHW[:, 0] - batch.slices_BSHW[:, 0]) > 1e-3
    hit_B = np.flatnonzero(is_new_BHW.any((1, 2)))
    assert 0 < len(hit_B) < SERIES
    for b in hit_B:
        assert is_new_BHW[b].sum() == (SIDE // 4) ** 2
        np.testing.assert_allclose(after.slices_BSHW[b, 0][is_new_BHW[b]], batch.slices_BSHW[b, 0].mean(), atol=1e-4)


def test_the_largest_square_still_fits() -> None:
    from models.augment import Augmentation

    after = changed(squares(), Augmentation(erase=1.0))
    assert any(np.ptp(image_HW) < 1e-5 for image_HW in after.slices_BSHW[:, 0])
