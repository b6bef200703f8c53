"""Instance files: durable or not there, found by content, read leniently, refused with a reason."""

import os
import random
import zlib
from pathlib import Path

import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from edge_agent import instances
from edge_agent.instances import HeaderError, NotAnImageError, StorageError
from tests.edge_agent.dicom_support import ct_slice, encoded, write

BODY = encoded(ct_slice("1.2.3.4", count=7))


def _files(data_dir: Path) -> list[Path]:
    return [path for path in data_dir.rglob("*") if path.is_file()]


def test_keep_writes_the_parts_as_one_file_and_twice_is_once(tmp_path: Path) -> None:
    kept = instances.keep(tmp_path, (b"head", memoryview(b"body")), min_free_bytes=0)
    again = instances.keep(tmp_path, (b"headbody",), min_free_bytes=0)
    assert kept == again
    assert (tmp_path / kept.path).read_bytes() == b"headbody"
    assert kept.size == 8
    assert _files(tmp_path) == [tmp_path / kept.path]
    assert (tmp_path / kept.path).stat().st_mode & 0o077 == 0  # patients' images: this user only


def test_file_and_folder_are_synced_before_keep_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        order.append("folder" if os.path.isdir(target) else "file")
        fsync(descriptor)

    def watched_replace(source: str, target: Path) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    instances.keep(tmp_path, (b"x",), min_free_bytes=0)
    assert order[-3:] == ["file", "rename", "folder"]


def test_below_the_limit_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="min_free_bytes") as refusal:
        instances.keep(tmp_path, (b"x",), min_free_bytes=1 << 60)
    assert refusal.value.advice
    assert _files(tmp_path) == []


def test_a_full_disk_leaves_a_clean_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    instances.keep(tmp_path, (b"first",), min_free_bytes=0)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        instances.keep(tmp_path, (b"second",), min_free_bytes=0)
    assert [path.read_bytes() for path in _files(tmp_path)] == [b"first"]


def test_a_header_without_its_pixels() -> None:
    header = instances.read_header(BODY[: BODY.index(b"\xe0\x7f\x10\x00") + 12], ExplicitVRLittleEndian)
    assert (header.StudyInstanceUID, header.SeriesInstanceUID) == ("1.2.3", "1.2.3.4")
    assert (header.Modality, header.expected_count) == ("CT", 7)


def test_a_deflated_header() -> None:
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    deflated = deflate.compress(BODY) + deflate.flush()
    assert instances.read_header(deflated, DeflatedExplicitVRLittleEndian).SeriesInstanceUID == "1.2.3.4"
    with pytest.raises(HeaderError, match="cannot be parsed"):
        instances.read_header(b"\xff" + deflated[1:], DeflatedExplicitVRLittleEndian)


def test_an_inflating_bomb_ends() -> None:
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = b"".join(deflate.compress(b"\0" * (1 << 20)) for _ in range(200)) + deflate.flush()
    with pytest.raises(HeaderError):
        instances.read_header(bomb, DeflatedExplicitVRLittleEndian)
    with pytest.raises(HeaderError):
        instances.read_header(b"\0" * (64 << 20), ImplicitVRLittleEndian)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, None),
        ({"ImagesInAcquisition": 4}, 4),
        ({"ImagesInAcquisition": 4, "NumberOfSeriesRelatedInstances": 9}, 9),
        ({"ImagesInAcquisition": 0}, None),
        ({"Modality": "DX"}, 1),
        ({"Modality": "DX", "ImagesInAcquisition": 2}, 2),
        ({"NumberOfFrames": 10}, 1),
    ],
)
def test_how_many_belong_to_the_series(extra: dict[str, object], expected: int | None) -> None:
    header = instances.read_header(encoded(ct_slice("1.2.3.4", **extra)), ExplicitVRLittleEndian)
    assert header.expected_count == expected


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID"])
def test_an_image_without_a_uid_is_refused_by_name(keyword: str) -> None:
    ds = ct_slice("1.2.3.4")
    delattr(ds, keyword)
    body = encoded_leniently(ds)
    with pytest.raises(HeaderError, match=f"no {keyword}"):
        instances.read_header(body, ExplicitVRLittleEndian)


def test_a_uid_that_is_none_is_refused_without_showing_it() -> None:
    body = BODY.replace(b"1.2.3.4\0", b"DOE^JOHN")
    with pytest.raises(HeaderError, match=r"^SeriesInstanceUID is not a UID$"):
        instances.read_header(body, ExplicitVRLittleEndian)


def test_an_object_without_pixels_is_not_an_image() -> None:
    ds = ct_slice("1.2.3.4")
    del ds.PixelData
    with pytest.raises(NotAnImageError):
        instances.read_header(encoded(ds), ExplicitVRLittleEndian)


@pytest.mark.parametrize(
    "junk", [b"", b"\0" * 500, b"not DICOM at all, but long enough to be looked at", random.Random(1).randbytes(4096)]
)
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_junk_is_refused(junk: bytes, syntax: str) -> None:
    with pytest.raises(HeaderError):
        instances.read_header(junk, syntax)


def test_every_truncation_is_a_header_or_a_refusal() -> None:
    for length in range(0, len(BODY), 7):
        try:
            instances.read_header(BODY[:length], ExplicitVRLittleEndian)
        except HeaderError:
            continue


def test_a_file_of_ours_gives_the_same_header(tmp_path: Path) -> None:
    path = write(ct_slice("1.2.3.4", count=7), tmp_path / "x.dcm")
    assert instances.read_file_header(path).SeriesInstanceUID == "1.2.3.4"
    path.write_bytes(b"\0" * 300)
    with pytest.raises(HeaderError):
        instances.read_file_header(path)


def encoded_leniently(ds: object) -> bytes:
    from io import BytesIO

    from pydicom import dcmwrite

    buffer = BytesIO()
    dcmwrite(buffer, ds, implicit_vr=False, little_endian=True)  # type: ignore[arg-type]
    raw = buffer.getvalue()
    offset = 144 + int.from_bytes(raw[140:144], "little") if raw[128:132] == b"DICM" else 0
    return raw[offset:]
