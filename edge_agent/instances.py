"""Instance files: bytes as received, durable before anyone is told, found again by their own content.

Reads and writes data_dir/instances/<2 hex digits>/<sha256>.dcm; reads headers with pydicom.
Never decodes pixels, never changes a byte of a data set, never overwrites a file.
Source: DICOM PS3.10 chapter 7 (file meta information), PS3.5 Annex A (transfer syntaxes).
"""

import errno
import hashlib
import os
import re
import shutil
import sqlite3
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset, read_file_meta_info
from pydicom.tag import BaseTag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from fleet_link.errors import SiteError
from fleet_link.files import sync_folder
from models.spec import DICOM_MODALITY

FOLDER = "instances"
FOLDERS_OF_IMAGES = (FOLDER, "maps", "reports", "examples", "learning")  # for the eyes of this user only
UNFINISHED = ".tmp"
PREFIX_LENGTH = 132  # preamble and "DICM"
MAX_INFLATED_HEADER = 16 << 20
MAX_ELEMENTS = 10_000  # at the top level; the standard defines fewer than 6,000
# What pydicom is known to raise on damaged bytes; nothing of our own runs inside these `try`s.
PYDICOM_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    InvalidDicomError,
    LookupError,
    NotImplementedError,
    OSError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

FIRST_PIXEL_TAG = 0x7FE00008  # float, double and integer pixel data: (7FE0,0008), (7FE0,0009), (7FE0,0010)
LAST_PIXEL_TAG = 0x7FE00010
DIRECTORY_RECORD_SEQUENCE = 0x00041220
SOP_CLASS_UID, SOP_INSTANCE_UID, MODALITY = 0x00080016, 0x00080018, 0x00080060
STUDY_INSTANCE_UID, SERIES_INSTANCE_UID = 0x0020000D, 0x0020000E
IMAGES_IN_ACQUISITION, NUMBER_OF_SERIES_RELATED_INSTANCES, NUMBER_OF_FRAMES = 0x00201002, 0x00201209, 0x00280008


class HeaderError(SiteError):
    """A data set that cannot be understood or does not say to which series it belongs."""


class NotAnImageError(HeaderError):
    """A sound object without pixels: a report, a plan, a waveform, a directory."""


class StorageError(SiteError):
    """The disk is full, below its limit or failing; nothing was kept."""


@dataclass(frozen=True)
class Kept:
    """A file that survives a power cut."""

    path: str  # relative to data_dir
    size: int
    sha256: str


@dataclass(frozen=True)
class Header:
    SOPClassUID: str
    SOPInstanceUID: str
    StudyInstanceUID: str
    SeriesInstanceUID: str
    Modality: str
    TransferSyntaxUID: str
    expected_count: int | None  # instances in the series, where the instance lets us know


def keep(data_dir: Path, parts: Sequence[bytes | memoryview], *, min_free_bytes: int) -> Kept:
    """Write the parts as one file; back only when file and folder entry are on disk. Twice is once.

    Raises StorageError when free disk would fall below min_free_bytes, or the write fails; then nothing is left behind.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    size = sum(len(part) for part in parts)
    sha256 = digest.hexdigest()
    kept = Kept(f"{FOLDER}/{sha256[:2]}/{sha256}.dcm", size, sha256)
    try:
        if shutil.disk_usage(data_dir).free - size < min_free_bytes:
            raise StorageError(
                f"free disk would fall below min_free_bytes ({min_free_bytes})",
                advice="free space on the disk of data_dir, or lower dicom.min_free_bytes",
            )
        path = data_dir / kept.path
        _make_folder(path.parent)
        if not path.exists():
            _write(path, parts)
        sync_folder(path.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageError(
            "the disk is full" if full else f"the disk refused the write: {error.strerror}",
            advice="free space on the disk of data_dir" if full else "look at the disk of data_dir (dmesg, smartctl)",
        ) from error
    return kept


def read_header(body: bytes | memoryview, TransferSyntaxUID: str) -> Header:
    """The few elements that place an instance, read leniently and without its pixels.

    expected_count: NumberOfSeriesRelatedInstances, else ImagesInAcquisition, else 1 for an X-ray or a multi-frame
    image, which is whole by itself. A count that turns out too small costs a second version, never an instance.
    Raises NotAnImageError for an object without pixels, HeaderError when the data set cannot be parsed or lacks a UID.
    """
    ds, has_pixels = _parse(body, UID(TransferSyntaxUID))
    if not has_pixels and (SOP_INSTANCE_UID in ds or DIRECTORY_RECORD_SEQUENCE in ds):
        raise NotAnImageError("not an image")
    modality = _modality(ds)
    is_whole = DICOM_MODALITY.get(modality) == "XR" or (_count(ds, NUMBER_OF_FRAMES) or 1) > 1
    counts = (_count(ds, NUMBER_OF_SERIES_RELATED_INSTANCES), _count(ds, IMAGES_IN_ACQUISITION))
    return Header(
        SOPClassUID=_uid(ds, SOP_CLASS_UID, "SOPClassUID"),
        SOPInstanceUID=_uid(ds, SOP_INSTANCE_UID, "SOPInstanceUID"),
        StudyInstanceUID=_uid(ds, STUDY_INSTANCE_UID, "StudyInstanceUID"),
        SeriesInstanceUID=_uid(ds, SERIES_INSTANCE_UID, "SeriesInstanceUID"),
        Modality=modality,
        TransferSyntaxUID=TransferSyntaxUID,
        expected_count=next((count for count in counts if count), 1 if is_whole else None),
    )


def read_file_header(path: Path) -> Header:
    """The same from one of our own files. Raises HeaderError."""
    try:
        meta = read_file_meta_info(path)
        body = path.read_bytes()[PREFIX_LENGTH + 12 + int(meta.FileMetaInformationGroupLength) :]
        syntax = str(meta.TransferSyntaxUID)
    except PYDICOM_ERRORS as error:
        raise HeaderError("the file meta information cannot be read") from error
    return read_header(body, syntax)


def open(db: sqlite3.Connection, data_dir: Path, series_no: int) -> tuple[Path, ...]:
    """The files of a series, in the order they came; none once they were removed (retention.py)."""
    rows = db.execute(
        "SELECT path FROM instances WHERE series_no = ? AND series_no NOT IN (SELECT series_no FROM removals)"
        " ORDER BY received_at, rowid",
        (series_no,),
    )
    return tuple(data_dir / row["path"] for row in rows)


def make_folders(data_dir: Path) -> None:
    """Every folder that holds images, closed to others whatever the umask and whoever made it."""
    for name in FOLDERS_OF_IMAGES:
        (data_dir / name).mkdir(exist_ok=True)
        (data_dir / name).chmod(0o700)


def remove_unfinished(data_dir: Path) -> int:
    """Delete what a power cut left half-written; nobody was told that it was kept. Only before the port opens."""
    unfinished = list(data_dir.glob(f"{FOLDER}/*/*{UNFINISHED}"))
    for path in unfinished:
        path.unlink()
    return len(unfinished)


def all_files(data_dir: Path) -> Iterator[Path]:
    """Every instance file on disk, cataloged or not."""
    return data_dir.glob(f"{FOLDER}/*/*.dcm")


def _write(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    descriptor, draft = tempfile.mkstemp(dir=path.parent, suffix=UNFINISHED)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)  # the same content: replacing a twin changes nothing
    except OSError:
        os.unlink(draft)
        raise


def _make_folder(folder: Path) -> None:
    for level in (folder.parent, folder):
        if not level.is_dir():
            level.mkdir(mode=0o700, exist_ok=True)
            sync_folder(level.parent)


def _parse(body: bytes | memoryview, syntax: UID) -> tuple[Dataset, bool]:
    """Top-level elements before the pixels, undecoded; and whether pixels follow."""
    tags: list[int] = []

    def at_pixels(tag: BaseTag, VR: str | None, length: int) -> bool:
        tags.append(tag)
        if len(tags) > MAX_ELEMENTS:
            raise ValueError("a header without an end")
        return bool(tag >= FIRST_PIXEL_TAG)

    wanted = [
        DIRECTORY_RECORD_SEQUENCE,
        SOP_CLASS_UID,
        SOP_INSTANCE_UID,
        MODALITY,
        STUDY_INSTANCE_UID,
        SERIES_INSTANCE_UID,
        IMAGES_IN_ACQUISITION,
        NUMBER_OF_SERIES_RELATED_INSTANCES,
        NUMBER_OF_FRAMES,
    ]
    try:
        if syntax == DeflatedExplicitVRLittleEndian:
            body = zlib.decompressobj(-zlib.MAX_WBITS).decompress(body, MAX_INFLATED_HEADER)
        ds = read_dataset(
            BytesIO(body), syntax.is_implicit_VR, syntax.is_little_endian, stop_when=at_pixels, specific_tags=wanted
        )
    except PYDICOM_ERRORS as error:
        raise HeaderError(
            f"the data set cannot be parsed ({type(error).__name__})", advice="look at the sender's transfer syntax"
        ) from error
    return ds, bool(tags) and FIRST_PIXEL_TAG <= tags[-1] <= LAST_PIXEL_TAG


def _text(ds: Dataset, tag: int) -> str:
    """The element's own bytes: pydicom's conversion would judge the value and print it in a warning."""
    if tag not in ds:
        return ""
    value = ds.get_item(tag).value
    return value.decode("latin-1").strip(" \0") if isinstance(value, bytes) else str(value or "").strip(" \0")


def _modality(ds: Dataset) -> str:
    """A code string, or nothing: whatever else stands there must not reach a log or a page."""
    text = _text(ds, MODALITY)
    return text if re.fullmatch(r"[A-Z0-9_]{1,16}", text) else ""


def _uid(ds: Dataset, tag: int, keyword: str) -> str:
    """Digits and dots; lenient on the rest (leading zeros are common). Raises HeaderError."""
    text = _text(ds, tag)
    if not text:
        raise HeaderError(f"no {keyword}", advice="the sender's object is not complete")
    if not re.fullmatch(r"[0-9.]{1,64}", text):
        raise HeaderError(f"{keyword} is not a UID", advice="the sender's object is damaged")
    return text


def _count(ds: Dataset, tag: int) -> int | None:
    text = _text(ds, tag)
    return int(text) if re.fullmatch(r"\+?\d{1,9}", text) else None
