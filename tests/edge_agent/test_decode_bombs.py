"""Images from a broken scanner or an attacker: refused before they fill the memory, hang or mislead."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from edge_agent import decode, encoded, worklist
from edge_agent.decode import DecodeError, NotForUsError
from models.errors import VolumeError
from models.preprocess import prepare
from models.tasks import INPUTS
from tests.edge_agent.dicom_support import ct_slice, write

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
JP2_START = b"\x00\x00\x00\x0cjP  \r\n\x87\n"


def refused(ds: Dataset, folder: Path) -> DecodeError:
    path = write(ds, folder / "x.dcm")
    with pytest.raises(DecodeError) as refusal:
        decode.to_volume([path])
    assert decode.unreadable([path]) == ([] if isinstance(refusal.value, NotForUsError) else [path])
    return refusal.value


def compressed(syntax: str, **extra: Any) -> Dataset:
    ds = ct_slice("1.2", PixelRepresentation=0, **extra)
    ds.compress(syntax, generate_instance_uid=False)
    return ds


def put_raw(ds: Dataset, keyword: str, value: bytes) -> Dataset:
    """As on the wire: pydicom's setters would refuse it."""
    tag = Tag(tag_for_keyword(keyword) or 0)
    ds._dict[tag] = RawDataElement(tag, ds[keyword].VR, len(value), value, 0, False, True)
    return ds


@pytest.mark.parametrize(
    "keyword", ["RescaleSlope", "RescaleIntercept", "WindowWidth", "WindowCenter", "SliceThickness"]
)
@pytest.mark.parametrize("value", [b"NaN ", b"inf ", b"-inf", b"1e39", b"1e308 "])
def test_numbers_that_no_voxel_can_hold(tmp_path: Path, keyword: str, value: bytes) -> None:
    ds = put_raw(ct_slice("1.2", WindowCenter=40, WindowWidth=400), keyword, value)
    refusal = refused(ds, tmp_path)
    assert keyword in str(refusal)
    assert refusal.advice


@pytest.mark.parametrize("keyword", ["Rows", "Columns", "BitsStored", "PixelRepresentation"])
def test_a_header_that_lacks_something_is_told_by_name(tmp_path: Path, keyword: str) -> None:
    ds = ct_slice("1.2", PhotometricInterpretation="MONOCHROME1", WindowCenter=40, WindowWidth=400)
    delattr(ds, keyword)
    assert f"lacks {keyword}" in str(refused(ds, tmp_path))


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"BitsStored": 0}, "Bits Stored"),
        ({"BitsStored": 17}, "Bits Stored"),
        (
            {"BitsStored": 65535, "PhotometricInterpretation": "MONOCHROME1", "WindowWidth": 9, "WindowCenter": 9},
            "Bits",
        ),
        ({"BitsAllocated": 12}, "Bits Allocated"),
        ({"PixelRepresentation": 2}, "Pixel Representation"),
        ({"Rows": 0}, "Rows"),
        ({"Rows": 20_000, "Columns": 20_000}, "less than expected"),
        ({"NumberOfFrames": 2}, "less than expected"),
        ({"NumberOfFrames": 99_999_999}, "too large"),
        ({"SamplesPerPixel": 3}, "colour"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour"),
    ],
)
def test_headers_that_contradict_their_pixels(tmp_path: Path, extra: dict[str, Any], reason: str) -> None:
    assert reason in str(refused(ct_slice("1.2", **extra), tmp_path))


def test_floating_point_pixels_are_not_taken_for_integers(tmp_path: Path) -> None:
    ds = ct_slice("1.2", BitsAllocated=32)
    del ds.PixelData
    ds.FloatPixelData = np.full(32 * 32, np.nan, "<f4").tobytes()
    assert "floating point" in str(refused(ds, tmp_path))


def test_left_justified_values_keep_their_high_bits(tmp_path: Path) -> None:
    stored_YX = np.arange(32 * 32, dtype="<u2").reshape(32, 32) * np.uint16(4)
    ds = ct_slice("1.2", PixelRepresentation=0, BitsStored=12, HighBit=15, PixelData=(stored_YX << 4).tobytes())
    voxels_ZYX = decode.to_volume([write(ds, tmp_path / "x.dcm")]).volume.voxels_ZYX
    assert np.array_equal(voxels_ZYX[0], stored_YX.astype(np.float32) - 1000)


@pytest.mark.parametrize("high_bit", [0, 3, 20, 65535])
def test_an_impossible_high_bit_is_taken_for_the_usual_one(tmp_path: Path, high_bit: int) -> None:
    ds = ct_slice("1.2", PixelRepresentation=0, BitsStored=12, HighBit=high_bit)
    ds.PixelData = np.full(32 * 32, 0x8123, "<u2").tobytes()
    assert decode.to_volume([write(ds, tmp_path / "x.dcm")]).volume.voxels_ZYX.max() == 0x123 - 1000


def test_an_odd_window_costs_the_window_and_not_the_image(tmp_path: Path) -> None:
    for look in ({"WindowWidth": -5}, {"WindowWidth": 0}, {"WindowWidth": None}, {"WindowCenter": None}):
        ds = ct_slice("1.2", **{"WindowCenter": 40, "WindowWidth": 400, **look})
        ds.VOILUTSequence = Sequence([Dataset()])
        assert decode.to_volume([write(ds, tmp_path / "x.dcm")]).volume.window is None


@pytest.mark.parametrize("spacing", [b"0\\0 ", b"-1\\1", b"0\\1 ", b"NaN\\NaN ", b"1 ", b"1\\1\\1 "])
def test_impossible_spacing_is_unknown_spacing(tmp_path: Path, spacing: bytes) -> None:
    ds = put_raw(ct_slice("1.2"), "PixelSpacing", spacing)
    assert decode.to_volume([write(ds, tmp_path / "x.dcm")]).volume.spacing_mm == (2.5, 1.0, 1.0)


@pytest.mark.parametrize(
    ("spacing", "reason"),
    [(b"1e-300\\1", "spacing"), (b"1e308\\1e308 ", "spacing"), (b"5e-324\\5e-324 ", "spacing"), (b"0.01\\1", "strips")],
)
def test_spacing_of_no_scanner_never_reaches_the_network(tmp_path: Path, spacing: bytes, reason: str) -> None:
    volume = decode.to_volume([write(put_raw(ct_slice("1.2"), "PixelSpacing", spacing), tmp_path / "x.dcm")]).volume
    with pytest.raises(VolumeError, match=reason) as refusal:
        prepare(volume, next(spec for spec in INPUTS if spec.modality == "CT"))
    assert refusal.value.advice


def lookup(length: int, depth: int, values: int) -> Dataset:
    item = Dataset()
    item.LUTDescriptor, item.ModalityLUTType = [length, 0, depth], "US"
    item.LUTData = struct.pack(f"<{values}H", *range(values))
    item["LUTData"].VR = "OW"
    return item


@pytest.mark.parametrize(
    "item", [Dataset(), lookup(0, 16, 10), lookup(4000, 16, 3), lookup(10, 0, 10), lookup(10, 99, 10)]
)
def test_a_damaged_modality_lookup_table(tmp_path: Path, item: Dataset) -> None:
    ds = ct_slice("1.2", PhotometricInterpretation="MONOCHROME1", ModalityLUTSequence=Sequence([item]))
    assert "lookup table" in str(refused(ds, tmp_path))


def test_an_unknown_class_is_not_quoted(tmp_path: Path) -> None:
    """An odd value may be a patient's."""
    path = write(ct_slice("1.2"), tmp_path / "x.dcm")
    raw = path.read_bytes()
    at = raw.rindex(b"1.2.840.10008.5.1.4.1.1.2\0")
    path.write_bytes(raw[:at] + b"DOE^JOHN".ljust(26, b"\0") + raw[at + 26 :])
    with pytest.raises(NotForUsError, match="unknown class") as refusal:
        decode.to_volume([path])
    assert "DOE" not in str(refusal.value)


def test_an_unknown_transfer_syntax_is_refused(tmp_path: Path) -> None:
    path = write(ct_slice("1.2"), tmp_path / "x.dcm")
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"DOE^JOHN".ljust(20, b"\0")))
    with pytest.raises(DecodeError, match="transfer syntax") as refusal:
        decode.to_volume([path])
    assert "DOE" not in str(refusal.value)


def _jpeg2000_of(side: int) -> Dataset:
    ds = compressed(JPEG2000Lossless)
    frame = bytearray(ds.PixelData)
    siz = frame.index(b"\xff\x51")
    frame[siz + 6 : siz + 14] = frame[siz + 22 : siz + 30] = struct.pack(">II", side, side)  # image, one tile
    ds.PixelData = bytes(frame)
    return ds


def _jpeg_ls_of(side: int) -> Dataset:
    ds = compressed(JPEGLSLossless)
    frame = bytearray(ds.PixelData)
    sof = frame.index(b"\xff\xf7")
    frame[sof + 5 : sof + 9] = struct.pack(">HH", side, side)
    ds.PixelData = bytes(frame)
    return ds


@pytest.mark.parametrize("bomb", [_jpeg2000_of(30_000), _jpeg_ls_of(30_000), _jpeg2000_of(31)])
def test_frames_of_another_size_than_the_headers_are_not_decoded(
    tmp_path: Path, bomb: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30,000² would take 3.6 GB before the decoder finds that the bytes end."""
    monkeypatch.setattr(decode, "stored_frames", lambda *_: pytest.fail("a decoder was asked"))
    assert "do not have the size" in str(refused(bomb, tmp_path))


def test_every_frame_is_looked_at(tmp_path: Path) -> None:
    sound, other = compressed(JPEG2000Lossless), _jpeg2000_of(64)
    frames = [next(iter(encoded.generate_frames(ds.PixelData, number_of_frames=1))) for ds in (sound, other)]
    sound.NumberOfFrames, sound.PixelData = 2, encapsulate(frames)
    sound.SOPClassUID = sound.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    assert "do not have the size" in str(refused(sound, tmp_path))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "frame",
    [
        JP2_START + b"\0\0\0\0ftyp" + bytes(100),  # pydicom 3.0.2 waits for ever
        JP2_START + b"\0\0\0\1ftyp" + bytes(100),
        JP2_START,
        b"\xff\x4f\xff\x51",
        b"no image at all",
        bytes(64),
    ],
)
def test_frames_that_say_no_size_are_not_decoded(tmp_path: Path, frame: bytes) -> None:
    ds = compressed(JPEG2000Lossless)
    ds.PixelData = encapsulate([frame])
    assert "do not say their size" in str(refused(ds, tmp_path))


def test_run_lengths_that_do_not_fill_the_image(tmp_path: Path) -> None:
    ds = compressed(RLELossless)
    ds.Rows = ds.Columns = 4000
    assert "cannot be decoded" in str(refused(ds, tmp_path))


def test_a_deflated_bomb_is_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = ct_slice("1.2", Rows=1024, Columns=1024, PixelData=bytes(2 << 20))
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = write(ds, tmp_path / "x.dcm")
    assert path.stat().st_size < 10_000
    assert decode.to_volume([path]).volume.voxels_ZYX.shape == (1, 1024, 1024)
    monkeypatch.setattr(decode, "MAX_INFLATED", 2 << 20)
    monkeypatch.setattr(zlib, "decompress", lambda *_: pytest.fail("it was inflated as a whole"))
    assert "too large" in str(refused(ds, tmp_path))


def test_the_worklist_does_not_inflate_a_deflated_bomb_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = ct_slice("1.2", Rows=1024, Columns=1024, PixelData=bytes(2 << 20))
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    write(ds, tmp_path / "x.dcm")
    assert worklist.Headers(tmp_path).patient("x.dcm").PatientID == ds.PatientID
    monkeypatch.setattr(worklist, "MAX_INFLATED", 2 << 20)
    monkeypatch.setattr(zlib, "decompress", lambda *_: pytest.fail("it was inflated as a whole"))
    assert worklist.Headers(tmp_path).patient("x.dcm") == worklist.Patient()


def test_a_file_of_many_frames_is_not_decoded_for_the_one_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = compressed(RLELossless)
    ds.NumberOfFrames = 3
    monkeypatch.setattr(decode, "MAX_VOXELS", 2 * ds.Rows * ds.Columns)
    monkeypatch.setattr(decode, "stored_frames", lambda *_: pytest.fail("a decoder was asked"))
    assert "3 images of" in str(refused(ds, tmp_path))


def test_a_jpeg_says_its_size_behind_fill_bytes_and_other_segments() -> None:
    frame_header = b"\xff\xc3\x00\x0b\x0c" + struct.pack(">HH", 300, 200) + b"\x01\x01\x11\x00"
    application = b"\xff\xe0\x00\x06\xff\xc0ab"  # holds what looks like a frame header
    assert encoded.shape_YX(b"\xff\xd8" + application + b"\xff\xff" + frame_header) == (300, 200)
    assert encoded.shape_YX(b"\xff\xd8" + frame_header.replace(b"\x01\x01", b"\x03\x01")) is None  # three components
    assert encoded.shape_YX(b"\xff\xd8" + application) is None


def test_a_jpeg_2000_area_begins_at_its_offset() -> None:
    siz = struct.pack(">HHHIIIIIIIIH", 0xFF51, 41, 0, 110, 220, 10, 20, 110, 220, 0, 0, 1) + bytes(3)
    assert encoded.shape_YX(b"\xff\x4f" + siz) == (200, 100)
    assert encoded.shape_YX(JP2_START + b"\0\0\0\x09ftyp." + b"\0\0\0\0jp2c\xff\x4f" + siz) == (200, 100)
