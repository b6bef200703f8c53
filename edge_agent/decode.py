"""Decode: the files of a series become one volume in modality units, its slices in order, each with its source.

Reads instance files; gives models.preprocess.Volume.
Never guesses: what does not fit together is refused with the reason; never resamples, windows or normalises.
Source: PS3.3 C.7.6.2 (geometry), C.7.6.3 (pixels), C.11.1 (rescale), C.11.2 (window), C.7.6.16 (functional groups).
Axes: Z slice, Y row, X column.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.pixels import apply_modality_lut
from pydicom.uid import UID_dictionary

from edge_agent.encoded import inflates_beyond
from edge_agent.instances import PYDICOM_ERRORS
from edge_agent.pixels import DecodeError as DecodeError  # also for those who call to_volume
from edge_agent.pixels import check_claims, stored_frames
from models.preprocess import Volume, inversion_sum, rescale, spread
from models.spec import DICOM_MODALITY

IMAGE_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.1",  # Computed Radiography
    "1.2.840.10008.5.1.4.1.1.1.1",  # Digital X-Ray, for presentation
    "1.2.840.10008.5.1.4.1.1.1.1.1",  # Digital X-Ray, for processing
    "1.2.840.10008.5.1.4.1.1.2",  # CT
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT
    "1.2.840.10008.5.1.4.1.1.4",  # MR
    "1.2.840.10008.5.1.4.1.1.4.1",  # Enhanced MR
    "1.2.840.10008.5.1.4.1.1.4.4",  # Legacy Converted Enhanced MR
}
MAX_VOXELS = 1 << 29  # 2 GiB as float32: more is a damaged header or nothing this box can hold
MAX_FRAMES = 20_000  # each costs a row of header before the first pixel is read
MAX_INFLATED = 2 * MAX_VOXELS  # bytes of a deflated file: pydicom inflates it as a whole
NEEDED = ("SOPInstanceUID", "Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation")
LARGEST = float(np.finfo(np.float32).max)
ORIENTATION_TOLERANCE = 0.01  # of a direction cosine; scanners round theirs


class MissingImageError(DecodeError):
    """A file of the series is not there; its sender may be bringing it again."""


class NotForUsError(DecodeError):
    """A sound series that no task reads: another modality, a localiser, a screenshot."""


@dataclass(frozen=True)
class SourceImage:
    """Where a slice of the volume came from."""

    path: Path
    SOPInstanceUID: str
    frame_number: int | None  # from 1; None in a single-frame image


@dataclass(frozen=True)
class Decoded:
    volume: Volume
    source: tuple[SourceImage, ...]  # one per Z


@dataclass(frozen=True)
class _Slice:
    """What the header says about one frame, checked."""

    source: SourceImage
    modality: str
    patient: str
    shape_YX: tuple[int, int]
    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None
    spacing_YX_mm: tuple[float, float] | None
    thickness_mm: float | None
    slope: float
    intercept: float
    window: tuple[float, float] | None
    instance_number: int
    is_localizer: bool
    is_frontal: bool


def to_volume(paths: Sequence[Path], *, most_slices: int | None = None) -> Decoded:
    """Build the array of a series, ordered along its normal; of an X-ray series, its first frontal image.

    Gives voxels_ZYX float32 in modality units. With most_slices only that many, evenly spread, are decoded.
    Raises NotForUsError when no task reads such images; DecodeError on mixed orientations or sizes, colour, missing,
    truncated or undecodable pixels, images of more than one patient.
    """
    slices = [piece for path in paths for piece in _read_slices(path)]
    if not slices:
        raise DecodeError("the series has no images")
    slices = _ordered(_of_interest(slices))
    if most_slices is not None:
        slices = [slices[z] for z in spread(len(slices), most_slices)]
    rows, columns = slices[0].shape_YX
    if _count_voxels(slices) > MAX_VOXELS:
        raise DecodeError(f"{len(slices)} images of {rows} x {columns} pixels are too large")
    voxels_ZYX = np.empty((len(slices), rows, columns), np.float32)
    wanted: dict[Path, list[int]] = {}
    for z, piece in enumerate(slices):
        wanted.setdefault(piece.source.path, []).append(z)
    for path, places in wanted.items():
        ds, frames = _frames(path, [slices[z] for z in places])
        for z, stored_YX in zip(places, frames, strict=True):
            _to_modality_units(ds, slices[z], stored_YX, voxels_ZYX[z])
    volume = Volume(voxels_ZYX, _spacing_mm(slices), slices[0].modality, slices[len(slices) // 2].window)
    return Decoded(volume, tuple(piece.source for piece in slices))


def unreadable(paths: Sequence[Path]) -> list[Path]:
    """Those whose header or pixels cannot be decoded, each looked at by itself; costs a decoding of the series."""
    return [path for path in paths if not _is_readable(path)]


def _is_readable(path: Path) -> bool:
    try:
        slices = _read_slices(path)
        if _count_voxels(slices) > MAX_VOXELS:
            return False
        ds, frames = _frames(path, slices)
        image_YX = np.empty(slices[0].shape_YX, np.float32)
        for piece, stored_YX in zip(slices, frames, strict=True):
            _to_modality_units(ds, piece, stored_YX, image_YX)
    except NotForUsError:
        return True
    except DecodeError:
        return False
    return True


def hush_pydicom() -> None:
    """Once per process, at its start: pydicom's warnings quote odd values, and a value may be a patient's."""
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    warnings.filterwarnings("ignore", category=UserWarning)


def _read_slices(path: Path) -> list[_Slice]:
    try:
        if inflates_beyond(path, MAX_INFLATED):
            raise DecodeError("a deflated image is too large", advice="send it again uncompressed if it is sound")
        ds = dcmread(path, stop_before_pixels=True)
        _check_kind(ds)
        frames = int(ds.get("NumberOfFrames") or 1)
        if frames > MAX_FRAMES:
            raise DecodeError(f"an image of {frames} frames is too large")
        if (
            frames * int(ds.get("Rows") or 0) * int(ds.get("Columns") or 0) > MAX_VOXELS
        ):  # GDCM decodes all frames of a file
            raise DecodeError(f"{frames} images of {ds.Rows} x {ds.Columns} pixels are too large")
        if frames > 1 or "PerFrameFunctionalGroupsSequence" in ds:
            return [_slice(path, ds, _groups(ds, index), index + 1) for index in range(max(frames, 1))]
        return [_slice(path, ds, [ds], None)]
    except FileNotFoundError as error:
        raise _missing() from error
    except PYDICOM_ERRORS as error:
        raise DecodeError(f"an image's header cannot be understood: {_complaint(error)}") from error


def _missing() -> MissingImageError:
    return MissingImageError("an image is no longer on this box", advice="send the whole series again")


def _check_kind(ds: Dataset) -> None:
    modality = str(ds.get("Modality") or "")
    if modality not in DICOM_MODALITY:
        raise NotForUsError(f"no task reads modality {modality if modality.isalnum() else 'unknown'}")
    if str(ds.get("SOPClassUID")) not in IMAGE_CLASSES:
        kind = UID_dictionary.get(str(ds.get("SOPClassUID")), ("objects of an unknown class",))
        raise NotForUsError(f"no task reads {kind[0]}")
    photometric = str(ds.get("PhotometricInterpretation") or "missing")
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or int(ds.get("SamplesPerPixel") or 1) != 1:
        raise DecodeError(
            "the images are in colour or do not say (photometric interpretation)",
            advice="send the original monochrome images, not screenshots",
        )
    lacking = [keyword for keyword in NEEDED if ds.get(keyword) in (None, "")]
    if lacking:
        raise DecodeError(f"the header lacks {', '.join(lacking)}", advice="send the original from the scanner again")


def _groups(ds: Dataset, index: int) -> list[Dataset]:
    """Where a frame's attributes may stand, nearest first: its own groups, the shared ones, the data set."""
    places: list[Dataset] = []
    per_frame = ds.get("PerFrameFunctionalGroupsSequence") or []
    for item in [*per_frame[index : index + 1], *(ds.get("SharedFunctionalGroupsSequence") or [])]:
        places += [group[0] for group in (element.value for element in item if element.VR == "SQ") if group]
    return [*places, ds]


def _slice(path: Path, ds: Dataset, places: Sequence[Dataset], frame_number: int | None) -> _Slice:
    image_type = [str(part) for part in _values(ds, "ImageType")]
    slope = _number(places, "RescaleSlope", 1.0)
    if slope == 0:
        raise DecodeError("RescaleSlope is 0")
    intercept = _number(places, "RescaleIntercept", 0.0)
    return _Slice(
        source=SourceImage(path, str(ds.SOPInstanceUID), frame_number),
        modality=DICOM_MODALITY[str(ds.Modality)],
        patient=str(ds.get("PatientID") or ""),
        shape_YX=(int(ds.Rows), int(ds.Columns)),
        orientation=_vector(places, "ImageOrientationPatient", 6),
        position=_vector(places, "ImagePositionPatient", 3),
        spacing_YX_mm=_pixel_spacing_mm(places),
        thickness_mm=_positive(places, "SpacingBetweenSlices") or _positive(places, "SliceThickness"),
        slope=slope,
        intercept=intercept,
        window=_window(ds, places, slope, intercept),
        instance_number=int(ds.get("InstanceNumber") or 0),
        is_localizer="LOCALIZER" in image_type,
        is_frontal=str(ds.get("ViewPosition") or "") in ("PA", "AP"),
    )


def _of_interest(slices: Sequence[_Slice]) -> list[_Slice]:
    """Without localisers; of X-rays, which are not slices of one body, only one."""
    kept = [piece for piece in slices if not piece.is_localizer]
    if not kept:
        raise NotForUsError("no task reads localisers")
    if len({piece.modality for piece in kept}) > 1 or len({piece.patient for piece in kept}) > 1:
        raise DecodeError(
            "the series mixes patients or modalities", advice="the sender reused a SeriesInstanceUID: correct it there"
        )
    if kept[0].modality == "XR":
        return [min(kept, key=lambda piece: (not piece.is_frontal, piece.instance_number))]
    if len({piece.shape_YX for piece in kept}) > 1:
        raise DecodeError("the images of the series have different sizes")
    return kept


def _count_voxels(slices: Sequence[_Slice]) -> int:
    return sum(math.prod(piece.shape_YX) for piece in slices)


def _ordered(slices: Sequence[_Slice]) -> list[_Slice]:
    """Along the normal of the image plane; by instance number where the images do not say where they lie."""
    orientations = [piece.orientation for piece in slices if piece.orientation and piece.position]
    if len(orientations) < len(slices):
        return sorted(slices, key=lambda piece: (piece.instance_number, piece.source.frame_number or 0))
    if not np.allclose(orientations, orientations[0], atol=ORIENTATION_TOLERANCE):
        raise DecodeError("the images of the series have different orientations")
    return sorted(slices, key=lambda piece: (_along_normal_mm(piece), piece.instance_number))


def _frames(path: Path, wanted: Sequence[_Slice]) -> tuple[Dataset, list[NDArray[Any]]]:
    """The file and its stored frames, in the order of `wanted`."""
    try:
        ds = dcmread(path)
    except FileNotFoundError as error:
        raise _missing() from error
    except PYDICOM_ERRORS as error:
        raise DecodeError(f"an image cannot be read: {_complaint(error)}") from error
    check_claims(ds, wanted[0].shape_YX)
    frames = stored_frames(ds, [(piece.source.frame_number or 1) - 1 for piece in wanted])
    if any(stored_YX.shape != wanted[0].shape_YX for stored_YX in frames):
        raise DecodeError("the pixels do not have the size that the header says")
    return ds, frames


def _to_modality_units(ds: Dataset, piece: _Slice, stored_YX: NDArray[Any], image_YX: NDArray[np.float32]) -> None:
    """Fills image_YX."""
    is_signed, bits_stored = bool(ds.get("PixelRepresentation")), int(ds.BitsStored)
    if ds.get("ModalityLUTSequence"):
        try:
            stored_YX = apply_modality_lut(stored_YX, ds)
        except PYDICOM_ERRORS as error:
            raise DecodeError(f"the modality lookup table is damaged: {_complaint(error)}") from error
        is_signed, bits_stored = False, int(ds.ModalityLUTSequence[0].LUTDescriptor[2])
    rescale(
        stored_YX,
        slope=piece.slope,
        intercept=piece.intercept,
        bits_stored=bits_stored,
        is_signed=is_signed,
        monochrome1=ds.PhotometricInterpretation == "MONOCHROME1",
        out=image_YX,
    )


def _window(ds: Dataset, places: Sequence[Dataset], slope: float, intercept: float) -> tuple[float, float] | None:
    """The first VOI window in modality units, mirrored as the voxels of a MONOCHROME1 image are."""
    width = _positive(places, "WindowWidth")
    if width is None or not _values_of(places, "WindowCenter"):
        return None
    center = _number(places, "WindowCenter", 0.0)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        center = slope * inversion_sum(int(ds.BitsStored), bool(ds.PixelRepresentation)) + 2 * intercept - center
    return center, width


def _spacing_mm(slices: Sequence[_Slice]) -> tuple[float, float, float]:
    """z, y, x; z from the positions where there are several, else what the header says; 1.0 where unknown."""
    spacing_YX_mm = slices[0].spacing_YX_mm or (1.0, 1.0)
    z_mm = slices[0].thickness_mm or 1.0
    if all(piece.position and piece.orientation for piece in slices):
        gaps_mm = np.diff(np.unique(np.round([_along_normal_mm(piece) for piece in slices], 3)))
        z_mm = float(np.median(gaps_mm)) if len(gaps_mm) else z_mm
    return z_mm, *spacing_YX_mm


def _along_normal_mm(piece: _Slice) -> float:
    assert piece.orientation is not None
    assert piece.position is not None
    normal = np.cross(piece.orientation[:3], piece.orientation[3:])
    return float(np.dot(normal, piece.position))


def _pixel_spacing_mm(places: Sequence[Dataset]) -> tuple[float, float] | None:
    spacing = _vector(places, "PixelSpacing", 2) or _vector(places, "ImagerPixelSpacing", 2)
    return (spacing[0], spacing[1]) if spacing and min(spacing) > 0 else None


def _values(ds: Dataset, keyword: str) -> list[Any]:
    value = ds.get(keyword)
    return list(value) if isinstance(value, MultiValue) else [] if value in (None, "") else [value]


def _values_of(places: Iterable[Dataset], keyword: str) -> list[Any]:
    return next((values for place in places if (values := _values(place, keyword))), [])


def _vector(places: Iterable[Dataset], keyword: str, length: int) -> tuple[float, ...] | None:
    vector = tuple(float(value) for value in _values_of(places, keyword))
    return vector if len(vector) == length and all(map(math.isfinite, vector)) else None


def _number(places: Iterable[Dataset], keyword: str, default: float) -> float:
    values = _values_of(places, keyword)
    number = float(values[0]) if values else default
    if not abs(number) <= LARGEST:  # NaN as well
        raise DecodeError(f"{keyword} is not a number", advice="look at the sender: it writes a damaged header")
    return number


def _positive(places: Iterable[Dataset], keyword: str) -> float | None:
    number = _number(places, keyword, 0.0)
    return number if number > 0 else None


def _complaint(error: Exception) -> str:
    """The kind of the failure only: the text may quote a value, and a value may be a patient's."""
    return type(error).__name__
