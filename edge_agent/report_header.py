"""Patient, study and series of the source images, cleaned so that a report built on them is valid.

Reads the elements before the pixel data of the first image, and the file meta of the others.
Never changes what identifies patient and study; an identifier that cannot be written again is refused.
Source: PS3.3 C.7.1.1 (Patient), C.7.2.1 (General Study); PS3.5 6.2 for lengths; character set PS3.3 C.12.1.1.2.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.multival import MultiValue

from edge_agent.decode import SourceImage
from fleet_link.errors import SiteError

UTF8 = "ISO_IR 192"
_UID = re.compile(r"[0-9.]{1,64}")
_TIME = re.compile(r"([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)?")
_CODE_STRING = re.compile(r"[A-Z0-9_ ]{1,16}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")
_LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")


@dataclass(frozen=True)
class Header:
    """What the reports take over. `patient_study` holds only elements that are valid in any IOD."""

    patient_study: Dataset
    SeriesInstanceUID: str
    image: Dataset  # of the first image: body part, laterality, history of lossy compression
    SOPClassUID: dict[str, str]  # of each source instance


def read_header(sources: Sequence[SourceImage]) -> Header:
    """Raises SiteError when an image is unreadable or its identifiers cannot be written again."""
    first = _read(sources[0].path)
    header = Dataset()
    for keyword, clean in _CLEAN.items():
        setattr(header, keyword, clean(_text(first, keyword), keyword))
    header.SpecificCharacterSet = UTF8
    return Header(
        patient_study=header,
        SeriesInstanceUID=_uid(_text(first, "SeriesInstanceUID"), "SeriesInstanceUID"),
        image=_image(first),
        SOPClassUID=_sop_classes(sources),
    )


def _read(path: Path) -> Dataset:
    wanted = [*_CLEAN, "SeriesInstanceUID", "BodyPartExamined", "Laterality", *_LOSSY]
    try:
        return dcmread(path, stop_before_pixels=True, specific_tags=wanted)
    except (OSError, InvalidDicomError, ValueError, TypeError, AttributeError, KeyError, EOFError) as error:
        raise _unreadable() from error


def _sop_classes(sources: Iterable[SourceImage]) -> dict[str, str]:
    classes: dict[str, str] = {}
    for source in sources:
        if source.SOPInstanceUID not in classes:
            try:
                classes[source.SOPInstanceUID] = str(read_file_meta_info(source.path).MediaStorageSOPClassUID)
            except (OSError, InvalidDicomError, ValueError, AttributeError, KeyError, EOFError) as error:
                raise _unreadable() from error
    return classes


def _text(ds: Dataset, keyword: str) -> str:
    """One element's first value as text; empty where it is absent or cannot be understood."""
    try:
        value = ds.get(keyword)
    except (ValueError, TypeError, LookupError, OverflowError):
        return ""
    if isinstance(value, MultiValue):
        value = value[0] if value else None
    return "" if value is None else str(value).strip(" \0")


def _image(ds: Dataset) -> Dataset:
    image = Dataset()
    body_part, laterality = _text(ds, "BodyPartExamined"), _text(ds, "Laterality")
    if _CODE_STRING.fullmatch(body_part):
        image.BodyPartExamined = body_part
    if laterality in ("L", "R") or not body_part:  # empty says "not known"
        image.Laterality = laterality if laterality in ("L", "R") else ""
    if _text(ds, "LossyImageCompression") == "01":
        for keyword in _LOSSY:
            if value := _text(ds, keyword):
                setattr(image, keyword, value)
    return image


def _uid(text: str, keyword: str) -> str:
    if not _UID.fullmatch(text):
        raise SiteError(
            f"the images have no usable {keyword}", advice="the sender must set it; the series is kept unread"
        )
    return text


def _patient_id(text: str, keyword: str) -> str:
    if len(text) > 64 or _CONTROL.search(text):
        raise SiteError(f"the images' {keyword} breaks DICOM's rules", advice="correct it at the sender and send again")
    return text


def _name(text: str, _: str) -> str:
    """Up to three groups (alphabetic, ideographic, phonetic) of 64 characters."""
    return "=".join(group[:64].strip() for group in _CONTROL.sub(" ", text).split("=")[:3]).rstrip("=")


def _date(text: str, _: str) -> str:
    try:
        return (
            date(int(text[:4]), int(text[4:6]), int(text[6:])).strftime("%Y%m%d")
            if re.fullmatch(r"\d{8}", text)
            else ""
        )
    except ValueError:
        return ""


def _time(text: str, _: str) -> str:
    return text if _TIME.fullmatch(text) else ""


def _sex(text: str, _: str) -> str:
    return text if text in ("M", "F", "O") else ""


def _upto(length: int) -> Callable[[str, str], str]:
    """A text that DICOM lets be empty: left out where it is too long, since half a number names something else."""
    return lambda text, _: text if len(text) <= length and not _CONTROL.search(text) else ""


def _unreadable() -> SiteError:
    return SiteError("a stored image of the series cannot be read", advice="check the disk; send the series again")


_CLEAN: dict[str, Callable[[str, str], str]] = {
    "PatientName": _name,
    "PatientID": _patient_id,
    "IssuerOfPatientID": _upto(64),
    "PatientBirthDate": _date,
    "PatientSex": _sex,
    "StudyInstanceUID": _uid,
    "StudyDate": _date,
    "StudyTime": _time,
    "AccessionNumber": _upto(16),
    "StudyID": _upto(16),
    "StudyDescription": _upto(64),
    "ReferringPhysicianName": _name,
}
