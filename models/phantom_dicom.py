"""Phantoms as DICOM files: computed radiography, CT and MR series as a scanner would send them.

Reads phantoms; writes one file per slice.
Never holds a real person's name: patients are called PHANTOM^… and their IDs begin with WRPH.
Source: PS3.3 A.2 (CR), A.3 (CT), A.4 (MR); Explicit VR Little Endian.
"""

import datetime
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

from models.phantoms import Phantom

CT_INTERCEPT = -1024.0
_STORAGE = {"XR": ComputedRadiographyImageStorage, "CT": CTImageStorage, "MR": MRImageStorage}
_DICOM_MODALITY = {"XR": "CR", "CT": "CT", "MR": "MR"}
_DESCRIPTION = {"XR": "Chest PA", "CT": "Chest CT 10 mm", "MR": "Brain FLAIR"}
_BODY_PART = {"XR": "CHEST", "CT": "CHEST", "MR": "BRAIN"}
_NAMES = ("ADA", "BRUNO", "CLARA", "DAVID", "EDITH", "FELIX", "GRETA", "HUGO", "IRENE", "JAKOB")
_FIRST_DAY = datetime.date(2024, 1, 1)


@dataclass(frozen=True)
class SeriesOptions:
    """Where a series belongs; equal values and an equal phantom give equal UIDs."""

    patient_seed: int
    study: int = 1
    series: int = 1


def write_series(phantom: Phantom, folder: Path, *, patient_seed: int, study: int = 1, series: int = 1) -> list[Path]:
    """Write the series, one file per slice in order of position; give the paths.

    The files' rescaled pixels are the phantom's voxels, exactly for whole numbers.
    """
    options = SeriesOptions(patient_seed, study, series)
    prefix = f"{_DICOM_MODALITY[phantom.volume.modality]}_{patient_seed:06d}_{study}_{series}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for z in range(phantom.volume.voxels_ZYX.shape[0]):
        path = folder / f"{prefix}_{z + 1:03d}.dcm"
        image(phantom, z, options).save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def image(phantom: Phantom, z: int, options: SeriesOptions) -> FileDataset:
    """The instance of slice z."""
    modality = phantom.volume.modality
    entropy = [f"wardround-phantom/{modality}/{phantom.label}/{phantom.seed}/{phantom.site.name}/{options}"]
    ds = _file(_STORAGE[modality], generate_uid(entropy_srcs=[*entropy, f"instance {z}"]))
    _patient_and_study(ds, options)
    _series(ds, phantom, z, entropy[0])
    _pixels(ds, phantom, z)
    {"XR": _radiography, "CT": _ct, "MR": _mr}[modality](ds, phantom)
    if modality != "XR":
        _plane(ds, phantom, z, entropy[0])
    return ds


def _file(sop_class: str, sop_instance: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = sop_instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID = sop_class
    ds.SOPInstanceUID = sop_instance
    ds.SpecificCharacterSet = "ISO_IR 192"
    return ds


def _patient_and_study(ds: Dataset, options: SeriesOptions) -> None:
    seed = options.patient_seed
    day = _FIRST_DAY + datetime.timedelta(days=seed % 700)
    ds.PatientName = f"PHANTOM^{_NAMES[seed % len(_NAMES)]}^{seed}"
    ds.PatientID = f"WRPH{seed:06d}"
    ds.PatientBirthDate = f"{1940 + seed % 60}{1 + seed % 12:02d}{1 + seed % 28:02d}"
    ds.PatientSex = "FM"[seed % 2]
    ds.StudyInstanceUID = generate_uid(entropy_srcs=[f"wardround-phantom/{seed}/{options.study}"])
    ds.StudyID = str(options.study)
    ds.StudyDate = day.strftime("%Y%m%d")
    ds.StudyTime = f"{8 + seed % 9:02d}{seed % 60:02d}00"
    ds.AccessionNumber = f"A{seed % 10**6:06d}{options.study}"
    ds.ReferringPhysicianName = "PHANTOM^REFERRER"
    ds.SeriesNumber = str(options.series)


def _series(ds: Dataset, phantom: Phantom, z: int, entropy: str) -> None:
    modality = phantom.volume.modality
    count = phantom.volume.voxels_ZYX.shape[0]
    ds.Modality = _DICOM_MODALITY[modality]
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[entropy, "series"])
    ds.SeriesDescription = _DESCRIPTION[modality]
    ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = ds.StudyDate
    ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = ds.StudyTime
    ds.BodyPartExamined = _BODY_PART[modality]
    ds.InstitutionName = f"Phantom Hospital {phantom.site.name}"
    ds.Manufacturer = "Wardround"
    ds.ManufacturerModelName = f"Phantom {phantom.site.name}"
    ds.DeviceSerialNumber = "1"
    ds.SoftwareVersions = "1"
    ds.InstanceNumber = str(z + 1)
    ds.AcquisitionNumber = "1"
    ds.ImagesInAcquisition = str(count)
    ds.NumberOfSeriesRelatedInstances = str(count)
    ds.BurnedInAnnotation = "NO"


def _pixels(ds: Dataset, phantom: Phantom, z: int) -> None:
    """16 bits allocated, 12 stored, unsigned; CT is shifted by its rescale intercept."""
    voxels_YX = phantom.volume.voxels_ZYX[z]
    intercept = CT_INTERCEPT if phantom.volume.modality == "CT" else 0.0
    stored_YX: NDArray[np.uint16] = np.clip(np.rint(voxels_YX - intercept), 0, 4095).astype("<u2")
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = stored_YX.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PixelRepresentation = 0
    ds.RescaleSlope, ds.RescaleIntercept = "1", str(int(intercept))
    if phantom.volume.window is not None:
        ds.WindowCenter, ds.WindowWidth = (f"{value:g}" for value in phantom.volume.window)
    ds.PixelData = stored_YX.tobytes()


def _radiography(ds: Dataset, phantom: Phantom) -> None:
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    ds.PatientOrientation = ["L", "F"]
    ds.ViewPosition = "PA"
    ds.ImagerPixelSpacing = [f"{mm:.6g}" for mm in phantom.volume.spacing_mm[1:]]
    ds.KVP = "120"
    ds.RescaleType = "US"


def _ct(ds: Dataset, phantom: Phantom) -> None:
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.RescaleType = "HU"
    ds.KVP = "120"
    ds.XRayTubeCurrent = "100"
    ds.ConvolutionKernel = phantom.site.name.upper()


def _mr(ds: Dataset, phantom: Phantom) -> None:
    del ds.RescaleSlope, ds.RescaleIntercept
    ds.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    ds.ScanningSequence = ["SE", "IR"]
    ds.SequenceVariant = "SK"
    ds.ScanOptions = ""
    ds.MRAcquisitionType = "2D"
    ds.RepetitionTime, ds.EchoTime, ds.InversionTime = "9000", "120", "2500"
    ds.EchoTrainLength = "16"
    ds.MagneticFieldStrength = "1.5"


def _plane(ds: Dataset, phantom: Phantom, z: int, entropy: str) -> None:
    """Axial; slices go from the feet to the head."""
    slice_mm, row_mm, column_mm = phantom.volume.spacing_mm
    rows, columns = phantom.volume.voxels_ZYX.shape[1:]
    position = (-column_mm * (columns - 1) / 2, -row_mm * (rows - 1) / 2, slice_mm * z)
    ds.FrameOfReferenceUID = generate_uid(entropy_srcs=[entropy, "frame of reference"])
    ds.PositionReferenceIndicator = ""
    ds.PatientPosition = "HFS"
    ds.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    ds.ImagePositionPatient = [f"{mm:.6g}" for mm in position]
    ds.SliceLocation = f"{position[2]:.6g}"
    ds.SliceThickness = f"{slice_mm:.6g}"
    ds.SpacingBetweenSlices = f"{slice_mm:.6g}"
    ds.PixelSpacing = [f"{row_mm:.6g}", f"{column_mm:.6g}"]
