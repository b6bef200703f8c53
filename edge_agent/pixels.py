"""Stored values: the pixels of a file as its decoder gives them, after a look at what decoding would take.

Reads a data set in memory, and its file where only GDCM can decode it.
Never rescales, never lets a decoder reserve more than the header says.
Source: PS3.5 8.1.1 (bits), 8.2 (encapsulation). Axes: F frame, Y row, X column.
"""

from collections.abc import Sequence
from typing import Any

import gdcm  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels import get_decoder
from pydicom.uid import UID, JPEGExtended12Bit

from edge_agent.encoded import claimed_shapes_YX
from edge_agent.instances import PYDICOM_ERRORS
from fleet_link.errors import SiteError

# Tried in this order, the faster first. Left out: Pillow for JPEG 2000, which scales 14-bit images by 4; pylibjpeg-rle,
# whose panic on damaged bytes is no Exception (0.6 ms against pydicom's 4.9 for a 512 x 512 CT).
PLUGINS = {
    "1.2.840.10008.1.2.4.50": ("pillow", "gdcm"),
    "1.2.840.10008.1.2.4.51": ("gdcm",),
    "1.2.840.10008.1.2.4.57": ("gdcm",),
    "1.2.840.10008.1.2.4.70": ("gdcm",),
    "1.2.840.10008.1.2.4.80": ("pyjpegls", "gdcm"),
    "1.2.840.10008.1.2.4.81": ("pyjpegls", "gdcm"),
    "1.2.840.10008.1.2.4.90": ("pylibjpeg", "gdcm"),
    "1.2.840.10008.1.2.4.91": ("pylibjpeg", "gdcm"),
    "1.2.840.10008.1.2.4.201": ("pylibjpeg",),
    "1.2.840.10008.1.2.4.202": ("pylibjpeg",),
    "1.2.840.10008.1.2.4.203": ("pylibjpeg",),
    "1.2.840.10008.1.2.5": ("pydicom",),
}


class DecodeError(SiteError):
    """A series that cannot become one volume; the reason is for the operator."""


def check_claims(ds: Dataset, shape_YX: tuple[int, int]) -> None:
    """Refuse pixels that are no integers, and encoded frames of another size than the header's, before decoding.

    A decoder reserves what a frame claims (gigabytes), and pydicom 3.0.2 never comes back from a JP2 box of length 0.
    Raises DecodeError.
    """
    if "PixelData" not in ds:
        kind = "floating point" if {"FloatPixelData", "DoubleFloatPixelData"} & set(ds.dir()) else "no"
        raise DecodeError(f"the image has {kind} pixel data", advice="send the original from the scanner again")
    syntax = _syntax(ds)
    if not syntax.is_compressed or syntax not in PLUGINS:
        return
    try:
        claimed_YX = set(claimed_shapes_YX(ds))
    except PYDICOM_ERRORS as error:
        raise DecodeError(f"pixels in {syntax.name} cannot be decoded: {type(error).__name__}") from error
    if None in claimed_YX:
        raise DecodeError(
            f"pixels in {syntax.name} cannot be decoded: they do not say their size",
            advice="send the images again, uncompressed",
        )
    if claimed_YX - {shape_YX}:
        raise DecodeError(
            "the pixels do not have the size that the header says", advice="send the images again, uncompressed"
        )


def stored_frames(ds: Dataset, frame_indices: Sequence[int]) -> list[NDArray[Any]]:
    """Stored values of the frames (from 0), YX, maybe read-only; the first plugin that can decode them, does.

    Raises DecodeError when none can.
    """
    syntax = _syntax(ds)
    complaints = []
    for plugin in PLUGINS.get(syntax, ("",)):
        try:
            if syntax == JPEGExtended12Bit and ds.BitsStored > 8:
                return _twelve_bit_frames(ds, frame_indices)
            frames = get_decoder(syntax).iter_array(
                ds,
                indices=frame_indices,
                decoding_plugin=plugin,
                raw=True,
                view_only=True,
                correct_unused_bits=syntax.is_compressed,  # pydicom does not look at HighBit: see _used_bits
            )
            stored = [np.asarray(frame_YX) for frame_YX, _ in frames]
            return stored if syntax.is_compressed else [_used_bits(ds, stored_YX) for stored_YX in stored]
        except PYDICOM_ERRORS as error:
            complaints.append(" ".join(str(error).split()))  # about the pixel module, which holds nothing of a patient
    raise DecodeError(
        f"pixels in {syntax.name} cannot be decoded: {'; '.join(complaints)[:300]}",
        advice="send the images again, uncompressed or in another transfer syntax"
        if syntax.is_compressed
        else "its header and its pixels disagree: send the original from the scanner again",
    )


def _syntax(ds: Dataset) -> UID:
    syntax = UID(str(ds.file_meta.get("TransferSyntaxUID") or ""))
    if not (syntax.is_transfer_syntax and not syntax.is_private):
        raise DecodeError("the file does not say in which transfer syntax it is", advice="send the image again")
    return syntax


def _twelve_bit_frames(ds: Dataset, frame_indices: Sequence[int]) -> list[NDArray[Any]]:
    """GDCM on the whole file, which pydicom's plugin does not offer; equals libjpeg-turbo bit by bit."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(ds.filename))
    if not reader.Read():
        raise ValueError("GDCM cannot read the image")
    buffer = reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape")
    frames_FYX = np.frombuffer(buffer, np.uint16).reshape(-1, ds.Rows, ds.Columns)
    return [frames_FYX[index] for index in frame_indices]


def _used_bits(ds: Dataset, stored_YX: NDArray[Any]) -> NDArray[Any]:
    """Only the bits from HighBit down: older images keep overlays in the others. Source: PS3.5 8.1.1."""
    if stored_YX.dtype.kind == "f":
        return stored_YX
    unused = int(ds.BitsAllocated) - int(ds.BitsStored)
    above = int(ds.BitsAllocated) - 1 - int(ds.get("HighBit") or ds.BitsStored - 1)
    above = above if 0 <= above <= unused else unused
    if above == unused and _fits(stored_YX, int(ds.BitsStored)):
        return stored_YX
    return np.asarray((stored_YX << above) >> unused)


def _fits(stored_YX: NDArray[Any], bits: int) -> bool:
    """Whether shifting would change nothing: looking costs a tenth of it."""
    is_signed = stored_YX.dtype.kind == "i"
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)
    return bool(low <= int(stored_YX.min()) and int(stored_YX.max()) <= high)
