"""Phantoms: the same seed the same image, labels that show, looks that differ."""

import numpy as np
import pytest

from models.phantoms import BASE, LABELS, LOOKS, SIZE_PX, SLICES, phantom
from models.preprocess import prepare
from models.tasks import INPUTS, TASKS

EVERY = [(modality, label) for modality, labels in LABELS.items() for label in labels]


@pytest.mark.parametrize(("modality", "label"), EVERY)
def test_equal_seeds_give_equal_voxels(modality: str, label: str) -> None:
    first, second, other = (phantom(modality, label, seed) for seed in (5, 5, 6))
    assert np.array_equal(first.volume.voxels_ZYX, second.volume.voxels_ZYX)
    assert np.array_equal(first.lesion_ZYX, second.lesion_ZYX)
    assert not np.array_equal(first.volume.voxels_ZYX, other.volume.voxels_ZYX)


@pytest.mark.parametrize("look", LOOKS.values(), ids=lambda look: look.name)
@pytest.mark.parametrize(("modality", "label"), EVERY)
def test_every_phantom_can_be_read_and_its_lesion_is_known(modality: str, label: str, look) -> None:
    for seed in range(5):
        drawn = phantom(modality, label, seed, look)
        voxels_ZYX = drawn.volume.voxels_ZYX
        assert voxels_ZYX.shape == (SLICES[modality], SIZE_PX[modality], SIZE_PX[modality])
        assert voxels_ZYX.dtype == np.float32
        assert np.array_equal(voxels_ZYX, np.rint(voxels_ZYX)), "DICOM could not hold it"
        assert drawn.lesion_ZYX.any() == (label != "normal")
        prepared = prepare(drawn.volume, next(spec for spec in INPUTS if spec.modality == modality))
        assert prepared.slices_SHW.shape == (SLICES[modality], 96, 96)
        assert np.abs(prepared.slices_SHW).max() <= 1.0


@pytest.mark.parametrize(
    ("modality", "label", "brighter"),
    [("XR", "nodule", True), ("CT", "nodule", True), ("CT", "emphysema", False), ("MR", "haemorrhage", False)],
)
def test_the_lesion_shows_where_it_is_said_to_be(modality: str, label: str, brighter: bool) -> None:
    shown = 0
    for seed in range(10):
        drawn = phantom(modality, label, seed)
        lesion_ZYX = drawn.lesion_ZYX
        ring_ZYX = np.zeros_like(lesion_ZYX)
        for shift in (-8, 8):
            for axis in (1, 2):
                ring_ZYX |= np.roll(lesion_ZYX, shift, axis)
        ring_ZYX &= ~lesion_ZYX
        inside, around = drawn.volume.voxels_ZYX[lesion_ZYX].mean(), np.median(drawn.volume.voxels_ZYX[ring_ZYX])
        shown += bool(inside > around) == brighter
    assert shown >= 8


def test_labels_are_those_of_the_tasks() -> None:
    assert {task.modality: tuple(label.name for label in task.labels) for task in TASKS} == LABELS


def test_a_look_changes_the_image() -> None:
    for look in LOOKS.values():
        if look != BASE:
            assert not np.array_equal(
                phantom("MR", "normal", 1, look).volume.voxels_ZYX, phantom("MR", "normal", 1).volume.voxels_ZYX
            )


def test_another_size() -> None:
    assert phantom("CT", "nodule", 1, size=64).volume.voxels_ZYX.shape == (8, 64, 64)


@pytest.mark.parametrize(("modality", "label", "size"), [("XR", "neoplasm", None), ("CT", "nodule", 32)])
def test_what_cannot_be_drawn_is_refused(modality: str, label: str, size: int | None) -> None:
    with pytest.raises(ValueError, match=r"no .* phantom"):
        phantom(modality, label, 1, size=size)
