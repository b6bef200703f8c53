"""The bundle file: written the same each time, read only when nothing about it is odd."""

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from models import bundle as bundle_file
from models.bundle import (
    MEMBERS,
    SHIPPED,
    VARIANTS,
    BundleParts,
    check_known_answer,
    file_digest,
    read_bundle,
    write_bundle,
)
from models.errors import BundleError
from models.spec import Manifest, Variant
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


def variant(precision: str = "int8", made_from: bytes = b"graph") -> Variant:
    return Variant(
        precision=precision,
        form="by hand",
        made_from=hashlib.sha256(made_from).hexdigest(),
        providers=("CPUExecutionProvider",),
        tolerance=0.1,
        measured_on="nothing",
        examples=10,
        correct_before=9,
        correct_after=9,
        speed_by_threads={1: 1.5},
    )


@pytest.fixture
def varied(tmp_path: Path, parts: BundleParts) -> Path:
    """A bundle with both variants."""
    manifest = msgspec.structs.replace(parts.manifest, variants=(variant("int8"), variant("fp16")))
    path = tmp_path / "varied.bundle"
    write_bundle(path, replace(parts, manifest=manifest, variants={"int8": b"small graph", "fp16": b"half graph"}))
    return path


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None], **zip_options: int) -> None:
    """Change members and pack them as an attacker would, with correct digests in the manifest."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    manifest = json.loads(members["manifest.json"])
    for name in set(members) & set(manifest.get("members", {})):
        manifest["members"][name] = bundle_file.hashlib.sha256(members[name]).hexdigest()
    members["manifest.json"] = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    if set(members) <= {*MEMBERS, *VARIANTS} and set(members) >= set(MEMBERS) and not zip_options:
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


@pytest.mark.parametrize("member", ["weights.safetensors", "known_answer.safetensors"])
def test_arrays_of_a_type_that_numpy_has_not_are_refused(path: Path, member: str) -> None:
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    rewrite(path, lambda members: members.update({member: content}))
    with pytest.raises(BundleError, match="arrays cannot be read"):
        read_bundle(path)


@pytest.mark.parametrize("offset", [2**63 - 1, 2**63, 2**64 - 1])
def test_a_member_that_lies_beyond_any_file_is_refused(path: Path, offset: int) -> None:
    """ZIP64: the first entry's offset stands in an extra field of 64 bits."""
    content = path.read_bytes()
    begin = content.index(b"PK\x01\x02")
    second, end = content.index(b"PK\x01\x02", begin + 4), content.rindex(b"PK\x05\x06")
    extra = struct.pack("<HHQ", 1, 8, offset)
    entry = content[begin : begin + 30] + struct.pack("<H", len(extra)) + content[begin + 32 : begin + 42]
    entry += b"\xff" * 4 + content[begin + 46 : second] + extra
    directory = entry + content[second:end]
    path.write_bytes(
        content[:begin] + directory + content[end : end + 12] + struct.pack("<LLH", len(directory), begin, 0)
    )
    with pytest.raises(BundleError, match="not a bundle"):
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


# --- variants


def test_a_bundle_with_variants_is_read_whole(varied: Path, parts: BundleParts) -> None:
    bundle = read_bundle(varied)
    assert bundle.variants == {"int8": b"small graph", "fp16": b"half graph"}
    assert (bundle.graph("fp32"), bundle.graph("int8")) == (parts.onnx, b"small graph")
    assert bundle.manifest.variant_for("fp16") == variant("fp16")
    assert zipfile.ZipFile(varied).namelist() == [*MEMBERS, *VARIANTS]


def test_a_bundle_without_variants_is_what_older_software_reads_and_writes(path: Path) -> None:
    manifest = json.loads(zipfile.ZipFile(path).read("manifest.json"))
    assert "variants" not in manifest
    assert read_bundle(path).variants == read_bundle(SHIPPED).variants == {}


def test_a_variant_without_an_entry_is_refused(path: Path) -> None:
    def add(members: dict[str, bytes]) -> None:
        members["model_int8.onnx"] = b"graph"
        manifest = json.loads(members["manifest.json"])
        manifest["members"]["model_int8.onnx"] = ""
        members["manifest.json"] = json.dumps(manifest).encode()

    rewrite(path, add)
    with pytest.raises(BundleError, match="does not describe exactly the bundle's variants"):
        read_bundle(path)


def test_an_unlisted_variant_is_refused(path: Path) -> None:
    rewrite(path, lambda members: members.update({"model_int8.onnx": b"graph"}))
    with pytest.raises(BundleError, match="list exactly"):
        read_bundle(path)


def test_an_unknown_precision_is_refused(path: Path) -> None:
    rewrite(path, lambda members: members.update({"model_int4.onnx": b"graph"}))
    with pytest.raises(BundleError, match="holds exactly"):
        read_bundle(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m["variants"].pop(), "does not describe exactly"),
        (lambda m: m["variants"].append(m["variants"][0]), "does not describe exactly"),
        (lambda m: m["variants"][0].update(precision="int4"), "manifest is not valid"),
        (lambda m: m["variants"][0].update(providers=[]), "manifest is not valid"),
        (lambda m: m["variants"][0].update(tolerance=1e9), "manifest is not valid"),
        (lambda m: m["variants"][0].update(tolerance=0.0), "manifest is not valid"),
        (lambda m: m["variants"][1].update(made_from="0" * 64), r"model_fp16\.onnx was made from another graph"),
    ],
)
def test_a_contradicting_variant_is_refused(varied: Path, change: Callable[[dict], None], reason: str) -> None:
    edit_manifest(varied, change)
    with pytest.raises(BundleError, match=reason):
        read_bundle(varied)


def test_an_entry_without_its_variant_is_refused(varied: Path) -> None:
    def drop(members: dict[str, bytes]) -> None:
        del members["model_fp16.onnx"]
        manifest = json.loads(members["manifest.json"])
        del manifest["members"]["model_fp16.onnx"]
        members["manifest.json"] = json.dumps(manifest).encode()

    rewrite(varied, drop)
    with pytest.raises(BundleError, match="does not describe exactly"):
        read_bundle(varied)


def test_variants_of_another_bundle_are_refused(varied: Path, tmp_path: Path, parts: BundleParts) -> None:
    donor = read_bundle(varied)
    taken = msgspec.structs.replace(parts.manifest, variants=donor.manifest.variants)
    other = replace(parts, onnx=b"another graph", manifest=taken, variants=donor.variants)
    with pytest.raises(BundleError, match="made from another graph"):
        write_bundle(tmp_path / "other.bundle", other)
    assert not (tmp_path / "other.bundle").exists()


def test_a_variant_has_its_own_tolerance_and_no_more(varied: Path) -> None:
    bundle = read_bundle(varied)
    right = bundle.known_outputs
    off = right | {"ood_B": right["ood_B"] + np.float32(0.08)}
    check_known_answer(lambda inputs: off, bundle, "int8")
    with pytest.raises(BundleError, match="ood_B differs by"):
        check_known_answer(lambda inputs: off, bundle)
    for wrong in (
        right | {"ood_B": right["ood_B"] + np.float32(0.2)},
        right | {"ood_B": np.full(1, np.nan, np.float32)},
        right | {"logits_BK": right["logits_BK"][:, :-1]},
    ):
        with pytest.raises(BundleError, match="known-answer"):
            check_known_answer(lambda inputs, wrong=wrong: wrong, bundle, "int8")
