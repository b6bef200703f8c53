"""Phantom DICOM as strangers see it: dicom3tools finds no error, pydicom reads the phantom's own voxels."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_rescale

from models.phantom_dicom import write_series
from models.phantoms import LABELS, LOOKS, phantom

MODALITIES = {"XR": "CR", "CT": "CT", "MR": "MR"}


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dicom3tools is not installed")
@pytest.mark.parametrize("look", LOOKS.values(), ids=lambda look: look.name)
@pytest.mark.parametrize("modality", LABELS)
def test_dciodvfy_finds_no_error(tmp_path: Path, modality: str, look) -> None:
    for path in write_series(phantom(modality, LABELS[modality][1], 3, look), tmp_path, patient_seed=41):
        found = subprocess.run(["dciodvfy", "-new", path], capture_output=True, text=True)
        lines = (found.stdout + found.stderr).splitlines()
        assert any(line.strip() == f"{MODALITIES[modality]}Image" for line in lines), lines
        assert not [line for line in lines if line.startswith("Error")]


@pytest.mark.parametrize("modality", LABELS)
def test_the_files_hold_the_phantoms_voxels(tmp_path: Path, modality: str) -> None:
    drawn = phantom(modality, LABELS[modality][2], 8)
    datasets = [pydicom.dcmread(path) for path in write_series(drawn, tmp_path, patient_seed=1)]
    voxels_ZYX = np.stack([apply_rescale(ds.pixel_array, ds) for ds in datasets])
    assert np.array_equal(voxels_ZYX, drawn.volume.voxels_ZYX)
    assert {int(ds.ImagesInAcquisition) for ds in datasets} == {len(datasets)}
    assert {int(ds.NumberOfSeriesRelatedInstances) for ds in datasets} == {len(datasets)}
    assert len({ds.SOPInstanceUID for ds in datasets}) == len(datasets)
    assert len({ds.SeriesInstanceUID for ds in datasets}) == 1
    if modality != "XR":
        heights = [float(ds.ImagePositionPatient[2]) for ds in datasets]
        assert np.allclose(np.diff(heights), drawn.volume.spacing_mm[0])
        assert np.allclose([float(mm) for mm in datasets[0].PixelSpacing], drawn.volume.spacing_mm[1:], atol=1e-4)


def test_equal_series_have_equal_uids_and_others_do_not(tmp_path: Path) -> None:
    def first(folder: str, **where: int) -> pydicom.Dataset:
        return pydicom.dcmread(write_series(phantom("XR", "normal", 1), tmp_path / folder, **where)[0])

    once, again = first("a", patient_seed=1), first("b", patient_seed=1)
    other_study, other_series = first("c", patient_seed=1, study=2), first("d", patient_seed=1, series=2)
    other_patient = first("e", patient_seed=2)
    assert once.SOPInstanceUID == again.SOPInstanceUID
    assert once.StudyInstanceUID == other_series.StudyInstanceUID != other_study.StudyInstanceUID
    assert len({ds.SeriesInstanceUID for ds in (once, other_study, other_series, other_patient)}) == 4
    assert once.PatientID == other_study.PatientID != other_patient.PatientID
    assert str(once.PatientName).startswith("PHANTOM^")
