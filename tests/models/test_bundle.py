"""The bundle file: written the same each time, read only when nothing about it is odd."""

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from models import bundle as bundle_file
from models.bundle import MEMBERS, BundleParts, check_known_answer, file_digest, read_bundle, write_bundle
from models.errors import BundleError
from models.spec import Manifest
from models.tasks import INPUTS, TASKS

LABELS = sum(len(task.labels) for task in TASKS)


@pytest.fixture
def parts() -> BundleParts:
    """Not a network: only its file format matters here."""
    known_inputs = {
        "slices_BSHW": np.zeros((1, 2, 96, 96), np.float32),
        "slice_mask_BS": np.ones((1, 2), bool),
        "modality_B": np.zeros(1, np.int64),
    }
    known_outputs = {
        "logits_BK": np.arange(LABELS, dtype=np.float32)[None],
        "map_BSKhw": np.zeros((1, 2, LABELS, 12, 12), np.float32),
        "slice_weights_BS": np.full((1, 2), 0.5, np.float32),
        "ood_B": np.ones(1, np.float32),
    }
    manifest = Manifest(
        format=1,
        name="test",
        version="1",
        network="hybrid-nano",
        inputs=INPUTS,
        tasks=TASKS,
        ood_threshold=2.0,
        parameters=2,
        opset=18,
        members={},
    )
    return BundleParts(manifest, b"graph", {"w": np.ones(2, np.float32)}, known_inputs, known_outputs, "# card")


@pytest.fixture
def path(tmp_path: Path, parts: BundleParts) -> Path:
    write_bundle(tmp_path / "a.bundle", parts)
    return tmp_path / "a.bundle"


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None], **zip_options: int) -> None:
    """Change members and pack them as an attacker would, with correct digests in the manifest."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in MEMBERS}
    change(members)
    manifest = json.loads(members["manifest.json"])
    for name in set(members) & set(manifest.get("members", {})):
        manifest["members"][name] = bundle_file.hashlib.sha256(members[name]).hexdigest()
    members["manifest.json"] = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    if set(members) == set(MEMBERS) and not zip_options:
        path.write_bytes(bundle_file._zip(members))
        return
    with zipfile.ZipFile(path, "w", **zip_options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def edit_manifest(path: Path, change: Callable[[dict], None]) -> None:
    def edit(members: dict[str, bytes]) -> None:
        manifest = json.loads(members["manifest.json"])
        change(manifest)
        members["manifest.json"] = json.dumps(manifest).encode()

    rewrite(path, edit)


def test_equal_parts_give_equal_bytes(tmp_path: Path, parts: BundleParts) -> None:
    first = write_bundle(tmp_path / "a.bundle", parts)
    second = write_bundle(tmp_path / "folder" / "b.bundle", parts)
    assert first == second == file_digest(tmp_path / "a.bundle")
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_is_written_is_read(path: Path, parts: BundleParts) -> None:
    bundle = read_bundle(path)
    assert bundle.digest == file_digest(path)
    assert (bundle.onnx, bundle.card, bundle.manifest.tasks) == (parts.onnx, parts.card, TASKS)
    assert bundle.weights["w"].tolist() == [1.0, 1.0]
    assert bundle.known_inputs["slice_mask_BS"].dtype == bool
    assert bundle.known_outputs["logits_BK"].shape == (1, LABELS)


def test_an_old_bundle_is_replaced_whole(path: Path, parts: BundleParts) -> None:
    digest = write_bundle(path, replace(parts, card="# new"))
    assert read_bundle(path).digest == digest
    assert read_bundle(path).card == "# new"


def test_every_single_damaged_byte_is_noticed(path: Path) -> None:
    content = path.read_bytes()
    for position in range(0, len(content), len(content) // 60):
        damaged = bytearray(content)
        damaged[position] ^= 0x41
        path.write_bytes(damaged)
        with pytest.raises(BundleError):
            read_bundle(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: b"",
        lambda c: b"PK",
        lambda c: c[:-1],
        lambda c: c[: len(c) // 2],
        lambda c: c + b"x",
        lambda c: b"x" + c,
    ],
)
def test_cut_or_longer_files_are_refused(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BundleError):
        read_bundle(path)


def test_a_missing_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"gone\.bundle cannot be read"):
        read_bundle(tmp_path / "gone.bundle")


def test_a_member_too_many_or_a_path_trick_is_refused(path: Path) -> None:
    rewrite(path, lambda members: members.update({"../evil": b"x"}))
    with pytest.raises(BundleError, match="exactly"):
        read_bundle(path)


def test_a_missing_member_is_refused(path: Path) -> None:
    rewrite(path, lambda members: members.pop("MODEL_CARD.md") and None)
    with pytest.raises(BundleError, match="exactly"):
        read_bundle(path)


def test_compression_is_refused(path: Path) -> None:
    rewrite(path, lambda members: None, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(BundleError, match="stored"):
        read_bundle(path)


def test_another_packer_is_refused(path: Path) -> None:
    rewrite(path, lambda members: None, compression=zipfile.ZIP_STORED)
    with pytest.raises(BundleError, match="canonical"):
        read_bundle(path)


def test_a_member_that_does_not_match_its_digest_is_refused(path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        members = {name: archive.read(name) for name in MEMBERS}
    members["model.onnx"] = b"other"
    path.write_bytes(bundle_file._zip(members))
    with pytest.raises(BundleError, match=r"model\.onnx does not have the digest"):
        read_bundle(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(format=2), "manifest is not valid"),
        (lambda m: m.update(surprise=1), "manifest is not valid"),
        (lambda m: m["tasks"].clear(), "at least one"),
        (lambda m: m["tasks"][1].update(offset=0), "clean slice"),
        (lambda m: m["tasks"][0].update(modality="CT"), "one task for each"),
        (lambda m: m["inputs"].pop(), "same modalities"),
        (lambda m: m["tasks"][0]["labels"][1].update(name="normal"), "clean slice"),
        (lambda m: m["tasks"][0].update(temperature=0.0), "manifest is not valid"),
        (lambda m: m["members"].pop("model.onnx"), "exactly the bundle's members"),
        (lambda m: m["tasks"][2]["labels"].pop(), "one logit for each"),
    ],
)
def test_a_contradicting_manifest_is_refused(path: Path, change: Callable[[dict], None], reason: str) -> None:
    edit_manifest(path, change)
    with pytest.raises(BundleError, match=reason):
        read_bundle(path)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"w": np.array([1, np.nan], np.float32)}, "w holds NaN"),
        ({"w": np.ones(2, np.float64)}, "float32"),
        (None, "cannot be read"),
    ],
)
def test_bad_weights_are_refused(path: Path, arrays: dict | None, reason: str) -> None:
    content = b"not safetensors" if arrays is None else safetensors_numpy.save(arrays)
    rewrite(path, lambda members: members.update({"weights.safetensors": content}))
    with pytest.raises(BundleError, match=reason):
        read_bundle(path)


def test_a_manifest_that_cannot_be_written_back_is_never_written(tmp_path: Path, parts: BundleParts) -> None:
    wrong = msgspec.structs.replace(parts.manifest, tasks=TASKS[1:])
    with pytest.raises(BundleError):
        write_bundle(tmp_path / "a.bundle", replace(parts, manifest=wrong))
    assert not (tmp_path / "a.bundle").exists()


def test_known_answers(path: Path) -> None:
    bundle = read_bundle(path)
    right = bundle.known_outputs
    check_known_answer(lambda inputs: right, bundle)
    for wrong in (
        right | {"logits_BK": right["logits_BK"] + 1},
        right | {"ood_B": np.full(1, np.nan, np.float32)},
        right | {"ood_B": right["ood_B"][:0]},
        {name: array for name, array in right.items() if name != "map_BSKhw"},
    ):
        with pytest.raises(BundleError, match="known-answer"):
            check_known_answer(lambda inputs, wrong=wrong: wrong, bundle)
