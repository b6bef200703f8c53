"""What encoded pixels will take once decoded: looked at before a decoder reserves memory for it.

Reads instance files and bytes in memory.
Never decodes, never trusts a length; gives facts, decode.py decides.
Source: JPEG ISO/IEC 10918-1 B.2.2, JPEG-LS ISO/IEC 14495-1 C.2.2, JPEG 2000 ISO/IEC 15444-1 A.5.1 and I.4.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.filereader import read_file_meta_info
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, RLELossless

PREAMBLE_LENGTH = 132
_PIECE = 1 << 20
_JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  "
_START_OF_FRAME = {0xF7, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the others: tables and an extension
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a segment


def inflates_beyond(path: Path, limit: int) -> bool:
    """Whether a deflated file holds more than `limit` bytes; False for other transfer syntaxes.

    Raises zlib.error and what pydicom raises on damaged bytes.
    """
    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return False
    inflater, length = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as file:
        file.seek(PREAMBLE_LENGTH + 12 + int(meta.FileMetaInformationGroupLength))
        rest = file.read(_PIECE)
        while rest and not inflater.eof and length <= limit:
            length += len(inflater.decompress(rest, _PIECE))
            rest = inflater.unconsumed_tail or file.read(_PIECE)
    return length > limit


def claimed_shapes_YX(ds: Dataset) -> Iterator[tuple[int, int] | None]:
    """Rows and columns that each encoded frame says it has; None where it does not say. Nothing for RLE, which has no say.

    Raises what pydicom raises on damaged encapsulation.
    """
    if UID(ds.file_meta.TransferSyntaxUID) == RLELossless:
        return
    offsets = None
    if "ExtendedOffsetTable" in ds and "ExtendedOffsetTableLengths" in ds:
        offsets = (ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths)
    frames = int(ds.get("NumberOfFrames") or 1)
    for frame in generate_frames(ds.PixelData, number_of_frames=frames, extended_offsets=offsets):
        yield shape_YX(frame)


def shape_YX(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns of a monochrome JPEG, JPEG-LS or JPEG 2000 frame; None where they cannot be read."""
    if frame[:2] == b"\xff\xd8":
        return _jpeg_shape_YX(frame)
    at = _codestream_at(frame) if frame[: len(_JP2_SIGNATURE)] == _JP2_SIGNATURE else 0
    return None if at is None else _jpeg2000_shape_YX(frame[at : at + 43])


def _jpeg_shape_YX(frame: bytes) -> tuple[int, int] | None:
    """From the frame header; as libjpeg does, what stands between segments is passed over."""
    at = 2
    while (at := frame.find(b"\xff", at)) >= 0 and at + 10 <= len(frame):
        marker = frame[at + 1]
        if marker in (0x00, 0xFF) or marker in _ALONE:
            at += 1 if marker == 0xFF else 2
        elif marker in _START_OF_FRAME:
            return (_number(frame, at + 5, 2), _number(frame, at + 7, 2)) if frame[at + 9] == 1 else None
        else:
            at += 2 + max(2, _number(frame, at + 2, 2))
    return None


def _jpeg2000_shape_YX(header: bytes) -> tuple[int, int] | None:
    """From the SIZ segment: the image's area on the reference grid."""
    if header[:4] != b"\xff\x4f\xff\x51" or len(header) < 43 or _number(header, 40, 2) != 1:
        return None
    right, bottom, left, top = (_number(header, at, 4) for at in (8, 12, 16, 20))
    return bottom - top, right - left


def _codestream_at(frame: bytes) -> int | None:
    """Where the codestream begins in a JP2 file; a box that is shorter than its own header ends the search."""
    at = 0
    while at + 8 <= len(frame):
        length = _number(frame, at, 4)
        if frame[at + 4 : at + 8] == b"jp2c":
            return at + 8
        if length < 8:
            return None
        at += length
    return None


def _number(raw: bytes, at: int, length: int) -> int:
    return int.from_bytes(raw[at : at + length], "big")
