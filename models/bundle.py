"""The bundle: one file holding graph, weights, manifest, known answers and model card.

Reads and writes `*.bundle` files (stored, deterministic ZIP); its digest is the SHA-256 of the file.
Never runs the graph itself, never trusts a member it has not checked against the manifest.
Source: ARCHITECTURE.md, "The network"; every rule of `read_bundle` is numbered there.
"""

import hashlib
import io
import lzma
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from models.errors import BundleError
from models.spec import MODALITIES, Manifest

Array = NDArray[np.generic]
Arrays = dict[str, Array]
SessionRun = Callable[[Arrays], Arrays]  # graph inputs by name -> graph outputs by name

SUFFIX = ".bundle"
MANIFEST = "manifest.json"
GRAPH = "model.onnx"
WEIGHTS = "weights.safetensors"
KNOWN_ANSWER = "known_answer.safetensors"
CARD = "MODEL_CARD.md"
MEMBERS = (MANIFEST, GRAPH, WEIGHTS, KNOWN_ANSWER, CARD)  # in this order
VARIANTS = ("model_int8.onnx", "model_fp16.onnx")  # after them, where the bundle has them
FP32 = "fp32"  # model.onnx itself

INPUT_NAMES = ("slices_BSHW", "slice_mask_BS", "modality_B")
OUTPUT_NAMES = ("logits_BK", "map_BSKhw", "slice_weights_BS", "ood_B")
KNOWN_ANSWER_TOLERANCE = 2e-2  # TF32 and TensorRT kernels round; a wrong graph is off by whole units

MAX_FILE_BYTES = 1 << 30
MAX_TEXT_BYTES = 1 << 20
# What zipfile raises for a file that is none, is cut short, damaged, encrypted or packed in a way it does not know.
ZIP_ERRORS = (
    zipfile.BadZipFile,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    OverflowError,  # a ZIP64 offset beyond what a file can have
    OSError,
    zlib.error,
    lzma.LZMAError,
)
_EPOCH = (1980, 1, 1, 0, 0, 0)
_REFUSED = "do not use this file; fetch the bundle again"

SHIPPED = Path(__file__).parent / "bundles" / "phantom-tiny.bundle"


@dataclass(frozen=True)
class BundleParts:
    """What `write_bundle` needs; the manifest's `members` is filled in by it."""

    manifest: Manifest
    onnx: bytes
    weights: Mapping[str, Array]
    known_inputs: Mapping[str, Array]
    known_outputs: Mapping[str, Array]
    card: str
    variants: Mapping[str, bytes] = field(default_factory=dict)  # graph by precision, one for each of the manifest's


@dataclass(frozen=True)
class Bundle:
    path: Path
    digest: str
    manifest: Manifest
    onnx: bytes
    variants: Mapping[str, bytes]
    card: str
    weights_bytes: bytes
    known_answer_bytes: bytes

    def graph(self, precision: str) -> bytes:
        return self.onnx if precision == FP32 else self.variants[precision]

    @cached_property
    def weights(self) -> dict[str, NDArray[np.float32]]:
        return dict(safetensors_numpy.load(self.weights_bytes))

    @cached_property
    def known_inputs(self) -> Arrays:
        return _with_prefix(self.known_answer_bytes, "input.")

    @cached_property
    def known_outputs(self) -> Arrays:
        return _with_prefix(self.known_answer_bytes, "output.")


def read_bundle(path: Path) -> Bundle:
    """Read and check a bundle file.

    Raises BundleError when (1) it is not a file of sane size, (2) it is not byte for byte what `write_bundle` makes of its
    members, (3) the manifest is not valid, (4) a member's digest differs, (5) tasks and inputs contradict each other,
    (6) a variant has no entry in the manifest or was made from another graph, or an entry has no variant, (7) weights or
    known answers are unreadable or not finite.
    """
    content = _content(path)  # 1
    members = _members(content)  # 2
    manifest = _manifest(members[MANIFEST])  # 3
    _check_digests(manifest, members)  # 4
    _check_tasks(manifest)  # 5
    _check_variants(manifest)  # 6
    bundle = Bundle(
        path=path,
        digest=hashlib.sha256(content).hexdigest(),
        manifest=manifest,
        onnx=members[GRAPH],
        variants={variant.precision: members[variant.member] for variant in manifest.variants},
        card=members[CARD].decode(errors="replace"),
        weights_bytes=members[WEIGHTS],
        known_answer_bytes=members[KNOWN_ANSWER],
    )
    _check_arrays(bundle)  # 7
    return bundle


def read_manifest(path: Path) -> Manifest:
    """What a bundle that was read and checked before says of itself; its other members are not looked at.

    Raises BundleError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _manifest(archive.read(MANIFEST))
    except (KeyError, *ZIP_ERRORS) as error:
        raise BundleError(f"{path.name} cannot be read: {error}", advice=_REFUSED) from error


def write_bundle(path: Path, parts: BundleParts) -> str:
    """Write atomically and durably; give the digest. The same parts give the same bytes."""
    members = {
        GRAPH: parts.onnx,
        WEIGHTS: safetensors_numpy.save(_contiguous(parts.weights)),
        KNOWN_ANSWER: safetensors_numpy.save(
            _contiguous(
                {f"input.{name}": array for name, array in parts.known_inputs.items()}
                | {f"output.{name}": array for name, array in parts.known_outputs.items()}
            )
        ),
        CARD: parts.card.encode(),
        **{f"model_{precision}.onnx": graph for precision, graph in parts.variants.items()},
    }
    digests = {name: hashlib.sha256(member).hexdigest() for name, member in members.items()}
    manifest = msgspec.structs.replace(parts.manifest, members=digests)
    _check_tasks(manifest)
    _check_variants(manifest)
    members[MANIFEST] = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    content = _zip(members)
    write_durably(path, content)
    return hashlib.sha256(content).hexdigest()


def check_known_answer(session_run: SessionRun, bundle: Bundle, precision: str = FP32) -> None:
    """Run the known-answer batch through a session; raise BundleError if any output is not what the exporter got."""
    variant = bundle.manifest.variant_for(precision)
    check_answer(session_run, bundle, KNOWN_ANSWER_TOLERANCE if variant is None else variant.tolerance)


def check_answer(session_run: SessionRun, bundle: Bundle, tolerance: float) -> float:
    """The largest difference of any output, relative to its largest value where that is above 1.

    Raises BundleError where it is above tolerance or an output is missing, of another shape or NaN.
    """
    outputs = session_run(bundle.known_inputs)
    worst = 0.0
    for name, expected in bundle.known_outputs.items():
        got = outputs.get(name)
        if got is None or got.shape != expected.shape:
            raise BundleError(f"the known-answer batch gives no {name} of shape {expected.shape}", advice=_REFUSED)
        difference = float(np.max(np.abs(got.astype(np.float64) - expected.astype(np.float64)), initial=0.0))
        relative = difference / max(1.0, float(np.max(np.abs(expected), initial=0.0)))
        if not relative <= tolerance:
            raise BundleError(
                f"the known-answer batch is wrong: {name} differs by {difference:.3g}",
                advice="the provider computes wrongly or the graph is not that of this bundle; another provider is tried",
            )
        worst = max(worst, relative)
    return worst


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BundleError(f"{path.name} is larger than {MAX_FILE_BYTES} bytes", advice=_REFUSED)
        return path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"{path.name} cannot be read: {error.strerror}", advice="check the path and its mode"
        ) from error


def _members(content: bytes) -> dict[str, bytes]:
    """Only the canonical form passes: no path, comment, extra field, compression, prefix or trailing byte can hide in it."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if names != [*MEMBERS, *(name for name in VARIANTS if name in names)]:
                raise BundleError(
                    f"a bundle holds exactly {', '.join(MEMBERS)}, then maybe {', '.join(VARIANTS)}", advice=_REFUSED
                )
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(content) for entry in entries):
                raise BundleError("a bundle's members are stored, not compressed", advice=_REFUSED)
            members = {entry.filename: archive.read(entry) for entry in entries}
    except ZIP_ERRORS as error:
        raise BundleError(f"not a bundle: {error}", advice=_REFUSED) from error
    if _zip(members) != content:
        raise BundleError("not in canonical form: something was added or changed", advice=_REFUSED)
    return members


def _manifest(text: bytes) -> Manifest:
    if len(text) > MAX_TEXT_BYTES:
        raise BundleError(f"the manifest is larger than {MAX_TEXT_BYTES} bytes", advice=_REFUSED)
    try:
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"the manifest is not valid: {error}", advice=_REFUSED) from error


def _check_digests(manifest: Manifest, members: Mapping[str, bytes]) -> None:
    if set(manifest.members) != set(members) - {MANIFEST}:
        raise BundleError("the manifest does not list exactly the bundle's members", advice=_REFUSED)
    for name, digest in manifest.members.items():
        if hashlib.sha256(members[name]).hexdigest() != digest:
            raise BundleError(f"{name} does not have the digest its manifest gives", advice=_REFUSED)


def _check_variants(manifest: Manifest) -> None:
    entries = [variant.member for variant in manifest.variants]
    if sorted(entries) != sorted(set(manifest.members) - set(MEMBERS)):
        raise BundleError("the manifest does not describe exactly the bundle's variants", advice=_REFUSED)
    for variant in manifest.variants:
        if variant.made_from != manifest.members[GRAPH]:
            raise BundleError(f"{variant.member} was made from another graph than this bundle's", advice=_REFUSED)


def _check_tasks(manifest: Manifest) -> None:
    modalities = [task.modality for task in manifest.tasks]
    if not modalities or len(set(modalities)) != len(modalities):
        raise BundleError("a bundle has one task for each of its modalities, and at least one", advice=_REFUSED)
    if sorted(spec.modality for spec in manifest.inputs) != sorted(modalities):
        raise BundleError("tasks and inputs do not name the same modalities", advice=_REFUSED)
    offset = 0
    for task in manifest.tasks:
        names = [label.name for label in task.labels]
        if task.offset != offset or len(names) < 2 or len(set(names)) != len(names):
            raise BundleError(f"the labels of task {task.name} are not a clean slice of the logits", advice=_REFUSED)
        offset += len(names)
    if not np.isfinite(manifest.ood_threshold):
        raise BundleError("the out-of-distribution threshold is not finite", advice=_REFUSED)


def _check_arrays(bundle: Bundle) -> None:
    try:
        weights, inputs, outputs = bundle.weights, bundle.known_inputs, bundle.known_outputs
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a type that numpy has not, such as BF16
        raise BundleError(f"arrays cannot be read: {error}", advice=_REFUSED) from error
    if set(inputs) != set(INPUT_NAMES) or set(outputs) != set(OUTPUT_NAMES):
        raise BundleError("the known-answer batch does not hold the graph's inputs and outputs", advice=_REFUSED)
    for name, array in (weights | inputs | outputs).items():
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise BundleError(f"{name} holds NaN or infinite values", advice=_REFUSED)
    if bool(weights) != bundle.manifest.is_trainable:
        raise BundleError("an imported bundle has no weights of its own, every other bundle has some", advice=_REFUSED)
    if any(array.dtype != np.float32 for array in weights.values()):
        raise BundleError("weights are float32", advice=_REFUSED)
    labels = sum(len(task.labels) for task in bundle.manifest.tasks)
    if outputs["logits_BK"].shape[-1:] != (labels,):
        raise BundleError(f"the graph does not give one logit for each of {labels} labels", advice=_REFUSED)
    if inputs["modality_B"].max(initial=0) >= len(MODALITIES):
        raise BundleError("the known-answer batch names an unknown modality", advice=_REFUSED)


def _with_prefix(content: bytes, prefix: str) -> Arrays:
    return {
        name.removeprefix(prefix): array
        for name, array in safetensors_numpy.load(content).items()
        if name.startswith(prefix)
    }


def _contiguous(arrays: Mapping[str, Array]) -> Arrays:
    return {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}


def _zip(members: Mapping[str, bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in (name for name in (*MEMBERS, *VARIANTS) if name in members):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system = 3
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, members[name])
    return target.getvalue()


def write_durably(path: Path, content: bytes) -> None:
    """tmp, fsync, rename, fsync of the folder: after a power cut either the old or the new file is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
