"""The preprocessing bench: both ways give one tensor, or it refuses. Not its figures."""

from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from pydicom import dcmread
from pydicom.uid import RLELossless

from benchmarks import preprocess
from benchmarks.preprocess import Case
from benchmarks.processes import HouseError
from models.tasks import INPUTS

XR, CT, _ = INPUTS


def ct_case(folder: Path) -> Case:
    _, ds = preprocess.ct_slice()
    ds.save_as(folder / "ct.dcm", enforce_file_format=True)
    return Case("CT", folder / "ct.dcm", CT)


def test_area_means_of_a_row_that_two_bands_share() -> None:
    image_YX = np.array([[1, 10], [2, 20], [6, 60]], np.float32)
    np.testing.assert_allclose(preprocess.area_means(image_YX, 2), [[4 / 3, 40 / 3], [14 / 3, 140 / 3]], rtol=1e-6)
    assert preprocess.area_means(image_YX, 3).tolist() == image_YX.tolist()


def test_both_ways_give_the_same_tensor(tmp_path: Path) -> None:
    case = ct_case(tmp_path)
    assert preprocess.difference(case) < preprocess.TOLERANCE
    ds = dcmread(case.path)
    ds.PixelSpacing = ["0.5", "0.9"]  # a letterbox with bars
    ds.save_as(case.path)
    assert preprocess.difference(case) < preprocess.TOLERANCE
    assert np.ptp(preprocess.ours(case.path, case.spec)) > 1.0


@pytest.mark.slow
def test_both_ways_give_the_same_tensor_of_a_compressed_radiograph(tmp_path: Path) -> None:
    _, ds = preprocess.radiograph()
    ds.compress(RLELossless, encoding_plugin="gdcm")
    ds.save_as(tmp_path / "dx.dcm", enforce_file_format=True)
    assert preprocess.difference(Case("DX", tmp_path / "dx.dcm", XR)) < preprocess.TOLERANCE


def test_what_differs_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ct_case(tmp_path)
    plainly = preprocess.plainly
    other = structs.replace(CT, window_center=CT.window_center + 1)
    monkeypatch.setattr(preprocess, "plainly", lambda path, spec: plainly(path, other))
    with pytest.raises(HouseError, match="differ"):
        preprocess.difference(case)


def test_the_table_shows_every_image(tmp_path: Path) -> None:
    summary = preprocess._summary(np.array([[1.0, 1.0, 8.0], [3.0, 1.0, 8.0], [1.0, 1.0, 2.0]]))
    assert (summary["ours_ms"], summary["plain_ms"], summary["decode_share"]) == (2.0, 8.0, 0.5)
    rows = [{"image": name, "bytes": 1, "largest_difference": 0.0} | summary for name in ("first", "second")]
    shown = preprocess.table({"repetitions": 3, "cores": 2, "load_average": 0.5, "images": rows})
    assert list(shown.columns[0].cells) == ["first", "second"]
    assert list(shown.columns[-1].cells) == ["4.00", "4.00"]
