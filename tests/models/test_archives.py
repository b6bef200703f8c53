"""Archives of labelled images: what is read, how it is split, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest

from models.archives import calibration_part, parts_of, read_archive
from models.bundle import SHIPPED
from models.errors import ModelError
from models.preprocess import Volume, prepare
from models.task_file import TaskFile, read_task_file
from tests.models.archive_support import ONE_TASK, OTHER_TASK, SIDE_PX, squares, write_archives, write_tasks

LICENSED = SHIPPED.parent / "chest-small.toml"
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture
def asked(tmp_path: Path) -> TaskFile:
    return read_task_file(write_tasks(tmp_path, ONE_TASK))


def parts(folder: Path, asked: TaskFile, **changed: Any) -> Any:
    arrays = {name: array for name, array in (squares() | changed).items() if array is not None}
    np.savez(folder / "squares.npz", **arrays)
    task, spec = asked.task_specs()[0], asked.input_specs(SIDE_PX)[0]
    return parts_of(read_archive(folder / "squares.npz"), asked.tasks[0], task, spec)


def test_the_last_of_each_label_calibrate_and_groups_stay_together() -> None:
    label_N = np.array([0] * 20 + [1] * 20 + [0])
    among_N = np.arange(41) < 40  # the last one is of the other split
    alone_N = calibration_part(label_N, np.arange(41), among_N)
    assert np.flatnonzero(alone_N).tolist() == [17, 18, 19, 37, 38, 39]
    group_N = np.arange(41)
    group_N[[2, 17, 40]] = 2
    assert np.flatnonzero(calibration_part(label_N, group_N, among_N)).tolist() == [2, 17, 18, 19, 37, 38, 39]


def test_parts_are_whole_and_labels_are_the_task_files(tmp_path: Path, asked: TaskFile) -> None:
    found = parts(tmp_path, asked)
    assert (len(found.training), len(found.calibration), len(found.validation)) == (186, 34, 40)
    assert [example.label for example in found.validation] == [
        1,
        0,
    ] * 20  # the archive says 0, 1: square comes first there
    assert found.validation[0].slices_SHW.max() > found.validation[1].slices_SHW.max() + 0.5


def test_a_box_sees_in_hounsfield_units_what_the_archive_shows_in_grey(tmp_path: Path, asked: TaskFile) -> None:
    images_NHW = squares()["images"]
    spec = asked.input_specs(SIDE_PX)[0]
    hounsfield_ZYX = (-1000.0 + images_NHW[-1:].astype(np.float32) / 255 * 1500).astype(np.float32)
    on_a_box_SHW = prepare(Volume(hounsfield_ZYX, (1.0, 1.0, 1.0), "CT"), spec).slices_SHW
    trained_SHW = parts(tmp_path, asked).validation[-1].slices_SHW
    np.testing.assert_allclose(trained_SHW, on_a_box_SHW, atol=1e-3)
    assert np.allclose(trained_SHW[0], images_NHW[-1] / 127.5 - 1, atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"images": None}, "holds no images"),
        ({"split": None}, "holds no split"),
        ({"images": squares()["images"].astype(np.float32)}, "images is float32"),
        ({"images": squares()["images"][..., None]}, r"images is uint8 \(260, 32, 32, 1\)"),
        ({"images": squares()["images"][:, :8]}, "images is uint8"),
        ({"labels": squares()["labels"].astype(float)}, "labels is float64"),
        ({"labels": squares()["labels"][:-1]}, r"labels is int64 \(259,\), of 260 images"),
        ({"labels": squares()["labels"] + 1}, "label 2 is none of the 2 classes"),
        ({"labels": squares()["labels"] - 1}, "label -1 is none"),
        ({"labels": squares()["labels"].astype(object)}, "pickled"),
        ({"class_names": np.array(["square", "square"])}, "same name"),
        ({"class_names": np.array(["square", "dark", "round"])}, "class round is not in task chest-ct"),
        ({"class_names": np.array(["square", "dim"])}, "class dark is not in the archive"),
        ({"split": np.array(["train"] * 260)}, "no image of class square is left for validation"),
        ({"split": np.array(["train"] * 259 + ["test"])}, "split is"),
        ({"split": np.array(["train"] * 100 + ["val"] * 160)}, "16 images are too few to calibrate on"),
        ({"group": np.arange(260) % 200}, "40 groups lie in both splits"),
        ({"group": np.repeat([0, 1], [220, 40])}, "no image of class square is left for training"),
        ({"images": np.zeros((260, 32, 32), np.uint8)}, "image 0: every voxel has the same value"),
    ],
)
def test_an_archive_that_cannot_be_trained_on_is_refused_with_the_reason(
    tmp_path: Path, asked: TaskFile, changed: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason) as refused:
        parts(tmp_path, asked, **changed)
    assert refused.value.advice


def header(shape: tuple[int, ...]) -> bytes:
    """An array's head, without its content."""
    said = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + len(said).to_bytes(2, "little") + said


def packed(path: Path, member: bytes, encrypted: bool = False) -> None:
    with ZipFile(path, "w") as archive:
        archive.writestr("images.npy", member)
    if encrypted:  # the flag alone, in the member's head and in the list at the end
        content = bytearray(path.read_bytes())
        for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            content[content.index(signature) + offset] |= 1
        path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: None, "cannot be read"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(b"PK\3\4 not a zip"), "damaged"),
        (lambda path: path.write_bytes(b"no array at all"), "pickled or damaged"),
        (lambda path: np.save(path.open("wb"), np.zeros(3)), "no archive of several arrays"),
        (lambda path: packed(path, header((10**9, 512, 512))), "claims more than fits into memory"),
        (lambda path: packed(path, header((10**30,))), "damaged"),
        (lambda path: packed(path, b"no array"), "images is no array"),
        (lambda path: packed(path, header((1, 32, 32)), encrypted=True), "damaged"),
    ],
)
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, write: Callable[[Path], object], reason: str) -> None:
    write(tmp_path / "squares.npz")
    with pytest.raises(ModelError, match=reason) as refused:
        read_archive(tmp_path / "squares.npz")
    assert refused.value.advice


@pytest.mark.parametrize(
    ("old", "new", "reason", "advice"),
    [
        ('licence = "CC0, for the taking"', "", "licence", "passed on"),
        ('licence = "CC0, for the taking"', 'licence = " "', "licence", "passed on"),
        ('attribution = "Drawn by the test\'s author."', "", "attribution", "passed on"),
        ('sct = "17621005"', "sct = 17621005", "sct", "SNOMED CT"),
        ('sct = "17621005"', 'sct = "normal"', "sct", "SNOMED CT"),
        ('sct = "17621005"', 'sct = "17621005\\n"', "sct", "SNOMED CT"),
        ('meaning = "Normal"', f'meaning = "{"N" * 65}"', "meaning", "compare"),
        ('modality = "CT"', 'modality = "US"', "modality", "compare"),
        ("max_slices = 2", "slices = 2", "slices", "compare"),
        ("max_slices = 2", "max_slices = 0", "max_slices", "compare"),
        ('archive = "squares.npz"', 'archive = "../squares.npz"', "archive", "compare"),
        ("black = -1000.0", "", "black below white", "grey 0"),
        ("black = -1000.0", "black = 500.0", "black below white", "grey 0"),
        ("white = 500.0", "white = inf", "black below white", "grey 0"),
        ('normalisation = "window"', 'normalisation = "percentile"', "are for normalisation", "leave them out"),
        ('label = "nodule"', 'label = "normal"', "same label", "its own"),
        ('name = "drawn"', "name = drawn", "is not TOML", "compare"),
        ('limits = "Squares only."', 'limits = "Squares only."\nsource = "x"', "source", "compare"),
    ],
)
def test_a_task_file_with_a_fault_is_refused_with_advice(
    tmp_path: Path, old: str, new: str, reason: str, advice: str
) -> None:
    assert old in ONE_TASK
    with pytest.raises(ModelError, match=reason) as refused:
        read_task_file(write_tasks(tmp_path, ONE_TASK.replace(old, new)))
    assert advice in refused.value.advice


def test_two_tasks_of_one_modality_are_refused(tmp_path: Path) -> None:
    twice = ONE_TASK + OTHER_TASK.replace('"XR"', '"CT"')
    with pytest.raises(ModelError, match="same modality"):
        read_task_file(write_tasks(tmp_path, twice))
    with pytest.raises(ModelError, match="cannot be read"):
        read_task_file(tmp_path / "gone.toml")


def test_tasks_share_the_logits_in_order(tmp_path: Path) -> None:
    write_archives(tmp_path)
    first, second = read_task_file(write_tasks(tmp_path)).task_specs()
    assert (first.offset, second.offset) == (0, 2)
    assert [label.name for label in second.labels] == ["normal", "pneumonia"]


@pytest.mark.skipif(not DATA.is_dir(), reason="the labelled images are not beside the repository")
def test_the_shipped_task_file_names_what_may_be_passed_on_and_fits_it() -> None:
    asked = read_task_file(LICENSED)
    for source, task, spec in zip(asked.tasks, asked.task_specs(), asked.input_specs(SIDE_PX), strict=True):
        assert source.licence.startswith("CC BY 4.0")
        archive = read_archive(DATA / source.archive)
        found = parts_of(archive, source, task, spec)
        assert len(found.training) + len(found.calibration) + len(found.validation) == len(archive.label_N)
        assert len(found.validation) == (archive.split_N == "val").sum()
