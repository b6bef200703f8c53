"""Decoding: real files against their manifest, small ones against arithmetic, each refusal by its reason."""

import csv
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import RLELossless, generate_uid

from edge_agent import decode, pixels
from edge_agent.decode import DecodeError, NotForUsError
from tests.edge_agent.dicom_support import SHARED_DICOM, ct_slice, write

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
needs_shared = pytest.mark.skipif(not SHARED_DICOM.is_dir(), reason="the shared DICOM files are not here")


def manifest() -> list[dict[str, str]]:
    if not SHARED_DICOM.is_dir():
        return []
    with (SHARED_DICOM / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def series(folder: Path, count: int, **extra: Any) -> list[Path]:
    """Written in an order that is neither that of position nor of name."""
    folder.mkdir(exist_ok=True)
    order = sorted(range(count), key=lambda z: (z * 7) % count)
    return [write(ct_slice("1.2.3.4", position=z, **extra), folder / f"{n}.dcm") for n, z in enumerate(order)]


GREY = [
    row
    for row in manifest()
    if row["pixel_sha256"]
    and row["photometric"].startswith("MONOCHROME")
    and row["preamble"] == "1"
    and row["file"] != "pyd_JPGExtended.dcm"  # lossy: decoders round differently, see below
]


@needs_shared
@pytest.mark.parametrize("row", GREY, ids=[row["file"] for row in GREY])
def test_stored_values_equal_the_manifest(row: dict[str, str]) -> None:
    ds = dcmread(SHARED_DICOM / row["file"])
    frames = pixels.stored_frames(ds, range(int(row["frames"])))
    stored = np.stack(frames) if len(frames) > 1 else frames[0]
    as_listed = np.ascontiguousarray(stored, dtype=row["pixel_dtype_shape"].split()[0])
    assert np.array_equal(as_listed, stored)
    assert hashlib.sha256(as_listed.tobytes()).hexdigest() == row["pixel_sha256"]


@needs_shared
@pytest.mark.parametrize("name", ["pyd_JPGExtended.dcm", "pyd_JPEG-lossy.dcm"])
def test_twelve_bit_jpeg_is_close_to_the_lossless_copy_of_the_same_image(name: str) -> None:
    (lossy_YX,) = pixels.stored_frames(dcmread(SHARED_DICOM / name), [0])
    (lossless_YX,) = pixels.stored_frames(dcmread(SHARED_DICOM / "pyd_JPEG-LL.dcm"), [0])
    difference = np.abs(lossy_YX.astype(float) - lossless_YX)
    assert difference.mean() < 3.0  # of values up to 278; lossy JPEG 2000 of the same image differs by 4.2
    assert np.corrcoef(lossy_YX.ravel(), lossless_YX.ravel())[0, 1] > 0.98


@needs_shared
@pytest.mark.parametrize("row", manifest(), ids=[row["file"] for row in manifest()])
def test_every_file_becomes_a_volume_or_a_refusal_with_a_reason(row: dict[str, str]) -> None:
    """None crashes, none of a modality without a task is taken for one that has a task."""
    path = SHARED_DICOM / row["file"]
    if row["modality"] not in ("CT", "MR", "CR") or row["pydicom_decode"] != "ok":
        with pytest.raises(DecodeError, match=r"\w") as refusal:
            decode.to_volume([path])
        assert decode.unreadable([path]) == ([] if isinstance(refusal.value, NotForUsError) else [path])
        return
    assert decode.unreadable([path]) == []
    decoded = decode.to_volume([path])
    voxels_ZYX = decoded.volume.voxels_ZYX
    assert voxels_ZYX.shape == (int(row["frames"]), int(row["rows"]), int(row["cols"]))
    assert np.isfinite(voxels_ZYX).all()
    assert len(decoded.source) == len(voxels_ZYX)


@needs_shared
def test_a_real_ct_series_in_hounsfield_units() -> None:
    paths = sorted(SHARED_DICOM.glob("qii_ct3_0*.dcm"))
    decoded = decode.to_volume(paths[::-1])
    assert decoded.volume.voxels_ZYX.shape == (3, 512, 512)
    assert decoded.volume.modality == "CT"
    positions = [float(dcmread(image.path).ImagePositionPatient[2]) for image in decoded.source]
    assert positions == sorted(positions)
    assert decoded.volume.spacing_mm == pytest.approx((np.diff(positions).mean(), 0.810547, 0.810547))
    for image, image_YX in zip(decoded.source, decoded.volume.voxels_ZYX, strict=True):
        ds = dcmread(image.path)
        assert image.SOPInstanceUID == ds.SOPInstanceUID
        assert np.array_equal(image_YX, ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept))


@needs_shared
def test_all_encodings_of_one_mr_image_give_the_same_volume() -> None:
    names = ["", "_RLE", "_bigendian", "_implicit", "_jp2klossless", "_jpeg_ls_lossless", "_padded"]
    volumes = [decode.to_volume([SHARED_DICOM / f"pyd_MR_small{name}.dcm"]).volume.voxels_ZYX for name in names]
    assert all(np.array_equal(volume, volumes[0]) for volume in volumes)


@needs_shared
def test_the_frames_of_an_enhanced_mr_are_sources_with_numbers() -> None:
    decoded = decode.to_volume([SHARED_DICOM / "pyd_emri_small.dcm"])
    assert sorted(image.frame_number or 0 for image in decoded.source) == list(range(1, 11))
    assert len({image.SOPInstanceUID for image in decoded.source}) == 1
    few = decode.to_volume([SHARED_DICOM / "pyd_emri_small.dcm"], most_slices=3)
    where = [decoded.source.index(image) for image in few.source]
    assert where == [1, 5, 8]
    assert np.array_equal(few.volume.voxels_ZYX, decoded.volume.voxels_ZYX[where])


@needs_shared
def test_monochrome1_is_bright_where_the_bone_is() -> None:
    path = SHARED_DICOM / "pyd_RG3_J2KR.dcm"
    (stored_YX,) = pixels.stored_frames(dcmread(path), [0])
    volume = decode.to_volume([path]).volume
    assert volume.modality == "XR"
    assert np.array_equal(volume.voxels_ZYX[0], 1023.0 - stored_YX)


def test_a_series_is_ordered_along_its_normal_and_rescaled(tmp_path: Path) -> None:
    decoded = decode.to_volume(series(tmp_path / "s", 5))
    voxels_ZYX = decoded.volume.voxels_ZYX
    assert voxels_ZYX.shape == (5, 32, 32)
    assert voxels_ZYX.dtype == np.float32
    assert [voxels_ZYX[z, 3, 0] for z in range(5)] == [z + 3 - 1000 for z in range(5)]
    assert decoded.volume.spacing_mm == (2.5, 0.5, 0.75)
    assert [image.frame_number for image in decoded.source] == [None] * 5


def test_only_some_slices_are_decoded_when_asked(tmp_path: Path) -> None:
    decoded = decode.to_volume(series(tmp_path / "s", 9), most_slices=3)
    assert [float(image_YX[0, 0]) for image_YX in decoded.volume.voxels_ZYX] == [-999.0, -996.0, -993.0]
    assert decoded.volume.spacing_mm[0] == 7.5
    assert len(decoded.source) == 3


def test_without_positions_the_instance_number_orders(tmp_path: Path) -> None:
    paths = series(tmp_path / "s", 4, ImagePositionPatient=None)
    assert [image_YX[0, 0] for image_YX in decode.to_volume(paths).volume.voxels_ZYX] == [-1000, -999, -998, -997]


def test_localisers_among_slices_are_left_out(tmp_path: Path) -> None:
    paths = series(tmp_path / "s", 3)
    scout = ct_slice(
        "1.2.3.4", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], ImageOrientationPatient=[1, 0, 0, 0, 0, -1]
    )
    assert len(decode.to_volume([*paths, write(scout, tmp_path / "scout.dcm")]).source) == 3
    with pytest.raises(NotForUsError, match="localisers"):
        decode.to_volume([tmp_path / "scout.dcm"])


def test_of_several_x_rays_the_frontal_one_is_read(tmp_path: Path) -> None:
    kind = {"Modality": "DX", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1", "RescaleIntercept": 0}
    lateral = write(ct_slice("1.2", position=0, ViewPosition="LL", **kind), tmp_path / "a.dcm")
    frontal = write(ct_slice("1.2", position=9, ViewPosition="PA", **kind), tmp_path / "b.dcm")
    decoded = decode.to_volume([lateral, frontal])
    assert [image.path for image in decoded.source] == [frontal]
    assert decoded.volume.modality == "XR"


def test_the_window_follows_a_mirrored_image(tmp_path: Path) -> None:
    look = {"WindowCenter": [300, 1], "WindowWidth": [200, 1], "PixelRepresentation": 0, "RescaleIntercept": -1000}
    look |= {"BitsStored": 12, "HighBit": 11}
    plain = decode.to_volume([write(ct_slice("1.2", **look), tmp_path / "2.dcm")]).volume
    mirrored = decode.to_volume(
        [write(ct_slice("1.2", PhotometricInterpretation="MONOCHROME1", **look), tmp_path / "1.dcm")]
    ).volume
    assert plain.window == (300.0, 200.0)
    assert mirrored.window is not None
    # a value at the window's centre stays at it: stored 1300 -> 4095 - 1300 - 1000
    assert mirrored.window == (1795.0, 200.0)
    assert np.array_equal(mirrored.voxels_ZYX, 4095.0 - 2000.0 - plain.voxels_ZYX)


def test_overlays_in_unused_bits_are_no_part_of_the_image(tmp_path: Path) -> None:
    ds = ct_slice("1.2", BitsStored=12, HighBit=11, PixelRepresentation=0)
    stored = np.frombuffer(ds.PixelData, np.uint16)
    ds.PixelData = (stored | 0x8000).tobytes()
    assert decode.to_volume([write(ds, tmp_path / "x.dcm")]).volume.voxels_ZYX.max() == 31 - 1000


def test_negative_values_survive_the_unused_bits(tmp_path: Path) -> None:
    ds = ct_slice("1.2", BitsStored=12, HighBit=11)
    ds.PixelData = np.full(32 * 32, -7, np.int16).tobytes()
    assert decode.to_volume([write(ds, tmp_path / "x.dcm")]).volume.voxels_ZYX.min() == -1007


def _colour(ds: Dataset) -> None:
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.PixelData = ds.PixelData * 3


def _without_pixels(ds: Dataset) -> None:
    del ds.PixelData


def _cut_short(ds: Dataset) -> None:
    ds.PixelData = ds.PixelData[:-100]


def _damaged_rle(ds: Dataset) -> None:
    ds.compress(RLELossless)
    ds.PixelData = ds.PixelData[:40] + b"\xff" * (len(ds.PixelData) - 40)


def _huge(ds: Dataset) -> None:
    ds.Rows = ds.Columns = 65535


def _no_slope(ds: Dataset) -> None:
    ds.RescaleSlope = 0


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_colour, "colour"),
        (_without_pixels, "no pixel data"),
        (_cut_short, "less than expected"),
        (_damaged_rle, "cannot be decoded"),
        (_huge, "too large"),
        (_no_slope, "RescaleSlope is 0"),
    ],
)
def test_a_damaged_image_is_refused_with_its_reason(tmp_path: Path, damage: Any, reason: str) -> None:
    ds = ct_slice("1.2")
    damage(ds)
    with pytest.raises(DecodeError, match=reason) as refusal:
        decode.to_volume([write(ds, tmp_path / "x.dcm")])
    assert not isinstance(refusal.value, NotForUsError)


@pytest.mark.parametrize(
    ("odd_one", "reason"),
    [
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "different orientations"),
        ({"Rows": 16}, "different sizes"),
        ({"PatientID": "TEST-2"}, "mixes patients"),
        ({"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, "mixes patients or modalities"),
    ],
)
def test_images_that_do_not_fit_together_are_refused(tmp_path: Path, odd_one: dict[str, Any], reason: str) -> None:
    paths = [*series(tmp_path / "s", 3), write(ct_slice("1.2.3.4", position=3, **odd_one), tmp_path / "odd.dcm")]
    with pytest.raises(DecodeError, match=reason):
        decode.to_volume(paths)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"Modality": "US"}, "no task reads modality US"),
        ({"Modality": "CT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "Secondary Capture"),
        ({"Modality": ""}, "modality unknown"),
    ],
)
def test_what_no_task_reads(tmp_path: Path, extra: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotForUsError, match=reason):
        decode.to_volume([write(ct_slice("1.2", **extra), tmp_path / "x.dcm")])


def test_a_lost_file_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match="no longer on this box") as refusal:
        decode.to_volume([tmp_path / "gone.dcm"])
    assert refusal.value.advice
    with pytest.raises(DecodeError, match="no images"):
        decode.to_volume([])


def test_which_images_of_a_series_cannot_be_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = series(tmp_path / "s", 2)
    damaged = []
    for damage in (_colour, _cut_short, _no_slope):
        ds = ct_slice("1.2.3.4")
        damage(ds)
        damaged.append(write(ds, tmp_path / f"{damage.__name__}.dcm"))
    other = write(ct_slice("1.2.3.4", Modality="US"), tmp_path / "us.dcm")
    assert decode.unreadable([sound[0], *damaged, other, sound[1], tmp_path / "gone.dcm"]) == [
        *damaged,
        tmp_path / "gone.dcm",
    ]
    monkeypatch.setattr(decode, "MAX_VOXELS", 1000)  # before its pixels fill the memory
    assert decode.unreadable(sound) == sound


def test_a_refusal_does_not_quote_the_patient(tmp_path: Path) -> None:
    path = write(ct_slice("1.2"), tmp_path / "x.dcm")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"DS\x04\x002.5 ", b"DS\x04\x00DOE^"))
    with pytest.raises(DecodeError) as refusal:
        decode.to_volume([path])
    assert "DOE" not in str(refusal.value)


def test_every_truncation_of_a_file_is_an_image_or_a_refusal(tmp_path: Path) -> None:
    raw = write(ct_slice("1.2"), tmp_path / "x.dcm").read_bytes()
    path = tmp_path / "cut.dcm"
    for length in range(0, len(raw) - 1, 41):
        path.write_bytes(raw[:length])
        with pytest.raises(DecodeError):
            decode.to_volume([path])


def test_an_enhanced_image_takes_each_frames_own_geometry(tmp_path: Path) -> None:
    ds = ct_slice("1.2", SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1", NumberOfFrames=3)
    for keyword in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        delattr(ds, keyword)
    ds.PixelData = ds.PixelData * 3
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [0.5, 0.75]
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([orientation])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    ds.PerFrameFunctionalGroupsSequence = Sequence(
        [_frame_groups(z_mm, intercept) for z_mm, intercept in [(4, 1), (0, 2), (8, 3)]]
    )
    decoded = decode.to_volume([write(ds, tmp_path / "x.dcm")])
    assert [image.frame_number for image in decoded.source] == [2, 1, 3]
    assert [float(image_YX[0, 0]) for image_YX in decoded.volume.voxels_ZYX] == [2.0, 1.0, 3.0]
    assert decoded.volume.spacing_mm == (4.0, 0.5, 0.75)


def _frame_groups(z_mm: float, intercept: float) -> Dataset:
    groups, position, values = Dataset(), Dataset(), Dataset()
    position.ImagePositionPatient = [0, 0, z_mm]
    values.RescaleSlope, values.RescaleIntercept = 1, intercept
    groups.PlanePositionSequence = Sequence([position])
    groups.PixelValueTransformationSequence = Sequence([values])
    return groups


@needs_shared
@pytest.mark.slow
def test_damaged_bytes_in_any_place_are_refused_or_read_but_never_crash(tmp_path: Path) -> None:
    """Each compressed syntax with bytes overwritten at many places: the decoders are C code."""
    random = np.random.default_rng(1)
    path = tmp_path / f"{generate_uid()}.dcm"
    for name in ("pyd_MR_small_RLE", "pyd_MR_small_jp2klossless", "pyd_MR_small_jpeg_ls_lossless", "pyd_bad_sequence"):
        raw = (SHARED_DICOM / f"{name}.dcm").read_bytes()
        for _ in range(60):
            damaged = bytearray(raw)
            at = int(random.integers(len(raw) // 2, len(raw) - 64))
            damaged[at : at + 64] = random.bytes(64)
            path.write_bytes(damaged)
            try:
                decode.to_volume([path])
            except DecodeError:
                continue
    assert os.path.exists(path)
