"""Quantise: a bundle gets int8 and fp16 variants where they pay. `python -m models.quantise --bundle B --phantoms N --out F`.

Reads a bundle and an example folder or draws phantoms; writes the bundle with its variants and prints a JSON report.
Never ships an int8 graph that is not faster by FASTER, nor any that loses more than LOST, unless it is forced to.
Source: issue 3, "Quantisation". Axes: M examples and their negatives, K labels.
"""

import argparse
import hashlib
import json
import logging
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.bundle import (
    KNOWN_ANSWER_TOLERANCE,
    OUTPUT_NAMES,
    Arrays,
    Bundle,
    BundleParts,
    SessionRun,
    check_answer,
    read_bundle,
    write_bundle,
)
from models.errors import BundleError, ModelError, VolumeError
from models.examples import Example, batches, read_examples
from models.latency import cpu_session, medians_s
from models.phantoms import LABELS, phantom
from models.preprocess import prepare
from models.runtime import RUNTIME_ERRORS
from models.spec import Manifest, TaskSpec, Variant
from models.variants import FORMS, to_fp16, to_int8

log = logging.getLogger(__name__)

Precision = Literal["int8", "fp16"]

FASTER = 1.3  # what int8 must be over fp32, on one thread and on two
LOST = 0.005  # share of the examples that a variant may lose
THREADS = (1, 2)
ROUNDS = 31
CALIBRATION_EXAMPLES = 48
MARGIN = 2.0  # another processor rounds elsewhere: how far its known answers may be off, over what was measured here
_BATCH = 16
_CALIBRATION_SEED, _MEASURING_SEED = 40_000_000, 41_000_000
_LARGEST_TOLERANCE = 0.5


@dataclass(frozen=True)
class Material:
    """Calibrated on one part, measured on the other."""

    calibration: Sequence[Example]
    measuring: Sequence[Example]
    origin: str


@dataclass(frozen=True)
class Reading:
    """What a graph says of the examples, and which of them, and of their negatives, it calls strange."""

    correct: int
    is_strange_M: NDArray[np.bool_]


@dataclass(frozen=True)
class Trial:
    """What each form is held against."""

    bundle: Bundle
    material: Material
    before: Reading  # by fp32


@dataclass(frozen=True)
class Measured:
    """One form of one precision. `strange_changed`: examples and negatives now on the other side of the distribution limit."""

    precision: Precision
    form: str
    examples: int
    correct_before: int
    correct_after: int
    strange_changed: int
    known_answer_difference: float | None  # none: no answer at all, or one of no use
    speed_by_threads: dict[int, float]
    left_out: str  # why; "" where it is fit to ship


def quantise(bundle: Bundle, material: Material, precisions: Sequence[Precision], out: Path, *, force: bool) -> Any:
    """Write the bundle with the variants that are fit to ship, and give the report. Raises BundleError."""
    before = read_all(bundle.manifest, session_run(bundle.onnx, 1), material.measuring)
    trial = Trial(bundle, material, before)
    made = [attempt for precision in precisions for attempt in _attempts(trial, precision)]
    chosen = {precision: best(made, precision, force=force) for precision in precisions}
    shipped = {precision: attempt for precision, attempt in chosen.items() if attempt is not None}
    entries = tuple(_entry(bundle, material, measured) for measured, _ in shipped.values())
    parts = BundleParts(
        msgspec.structs.replace(bundle.manifest, variants=entries),
        bundle.onnx,
        bundle.weights,
        bundle.known_inputs,
        bundle.known_outputs,
        bundle.card,
        {precision: graph for precision, (_, graph) in shipped.items()},
    )
    digest = write_bundle(out, parts)
    read_bundle(out)
    return {
        "digest": digest,
        "base": bundle.digest,
        "bytes": out.stat().st_size,
        "measured_on": measured_on(material),
        "shipped": {precision: measured.form for precision, (measured, _) in shipped.items()},
        "measured": [asdict(measured) for measured, _ in made],
    }


def best(made: Sequence[tuple[Measured, bytes]], precision: str, *, force: bool) -> tuple[Measured, bytes] | None:
    """The fastest that is fit to ship; forced, the fastest that gives an answer at all."""
    own = [attempt for attempt in made if attempt[0].precision == precision]
    fit = [attempt for attempt in own if not attempt[0].left_out]
    if not fit and force:
        fit = [attempt for attempt in own if attempt[0].known_answer_difference is not None]
    return max(fit, key=lambda attempt: min(attempt[0].speed_by_threads.values(), default=0.0), default=None)


def why_left_out(measured: Measured) -> str:
    """Empty where the variant is fit to ship."""
    may_lose = math.floor(LOST * measured.examples)
    if measured.known_answer_difference is None:
        return "its known answers are missing, of another shape, not finite or too far off"
    if measured.correct_before - measured.correct_after > may_lose:
        return f"it loses {measured.correct_before - measured.correct_after} of {measured.examples} examples"
    if measured.strange_changed > may_lose:
        return f"it takes {measured.strange_changed} examples or negatives to the other side of the distribution limit"
    if measured.precision == "int8" and min(measured.speed_by_threads.values()) < FASTER:
        return f"it is not {FASTER} times as fast as fp32"
    return ""


def phantom_material(manifest: Manifest, per_label: int) -> Material:
    """Raises BundleError where no phantom has one of the bundle's labels."""
    calibration = [e for task in manifest.tasks for e in _phantoms(manifest, task, _CALIBRATION_SEED, 6)]
    measuring = [e for task in manifest.tasks for e in _phantoms(manifest, task, _MEASURING_SEED, per_label)]
    return Material(calibration, measuring, "phantoms")


def folder_material(manifest: Manifest, folder: Path) -> Material:
    """Raises VolumeError where the folder lacks one of the two splits."""
    training, heldout = read_examples(folder, manifest)
    if not training or not heldout:
        raise VolumeError(
            "quantising needs examples of both splits", advice="calibration takes `train`, measuring `heldout`"
        )
    order = np.random.default_rng(0).permutation(len(training))[:CALIBRATION_EXAMPLES]
    return Material([training[i] for i in order], heldout, "held-out examples")


def measured_on(material: Material) -> str:
    return f"{len(material.measuring)} {material.origin}, {platform.processor() or platform.machine()}"


def session_run(graph: bytes, threads: int) -> SessionRun:
    """Raises BundleError where ONNX Runtime does not take the graph."""
    try:
        session = cpu_session(graph, threads)
    except RUNTIME_ERRORS as error:
        raise BundleError(f"the graph is not taken: {error}") from error
    return partial(_run, session)


def _attempts(trial: Trial, precision: Precision) -> Iterator[tuple[Measured, bytes]]:
    graph = trial.bundle.onnx
    if precision == "fp16":
        yield _measured(trial, precision, "all but the distribution score", to_fp16(graph))
        return
    for form in FORMS:
        calibration = (_of_batch(batch) for batch in batches(trial.material.calibration, 1))
        try:
            made = to_int8(graph, form, calibration)
        except BundleError as error:
            log.warning("int8: %s", error)
            continue
        yield _measured(trial, precision, form.name, made)


def _measured(trial: Trial, precision: Precision, form: str, graph: bytes) -> tuple[Measured, bytes]:
    bundle, examples, before = trial.bundle, trial.material.measuring, trial.before
    run = session_run(graph, 1)
    after = read_all(bundle.manifest, run, examples)
    measured = Measured(
        precision,
        form,
        len(examples),
        before.correct,
        after.correct,
        int((before.is_strange_M != after.is_strange_M).sum()),
        _known_answer_difference(run, bundle),
        speed_ratios(bundle.onnx, graph, examples) if precision == "int8" else {},
        "",
    )
    return replace(measured, left_out=why_left_out(measured)), graph


def _known_answer_difference(run: SessionRun, bundle: Bundle) -> float | None:
    try:
        return check_answer(run, bundle, (_LARGEST_TOLERANCE - KNOWN_ANSWER_TOLERANCE) / MARGIN)
    except BundleError:
        return None


def read_all(manifest: Manifest, run: SessionRun, examples: Sequence[Example]) -> Reading:
    """A negative is what a forgotten MONOCHROME1 gives: strange, yet not far off."""
    correct, strange = 0, []
    for batch in batches(examples, _BATCH):
        inputs = _of_batch(batch)
        outputs, of_negatives = run(inputs), run(inputs | {"slices_BSHW": -batch.slices_BSHW})
        own_K = slice(batch.task.offset, batch.task.offset + len(batch.task.labels))
        correct += int((outputs["logits_BK"][:, own_K].argmax(1) == batch.label_B).sum())
        for ood_B in (outputs["ood_B"], of_negatives["ood_B"]):
            strange.append(~(ood_B.astype(np.float64) <= manifest.ood_threshold))  # so that NaN is strange
    return Reading(correct, np.concatenate(strange))


def speed_ratios(base: bytes, graph: bytes, examples: Sequence[Example]) -> dict[int, float]:
    """By threads, latency of base over that of graph, for one series of each task at a time."""
    firsts = {example.task.name: example for example in reversed(examples)}
    inputs = [_of_batch(batch) for batch in batches(list(firsts.values()), 1)]
    ratios = {}
    for threads in THREADS:
        ways = {name: session_run(way, threads) for name, way in (("base", base), ("own", graph))}
        seconds = medians_s({name: partial(_run_each, way, inputs) for name, way in ways.items()}, ROUNDS)
        ratios[threads] = round(seconds["base"] / seconds["own"], 3)
    return ratios


def _run_each(run: SessionRun, batches_of_one: Sequence[Arrays]) -> None:
    for inputs in batches_of_one:
        run(inputs)


def _run(session: Any, inputs: Arrays) -> Arrays:
    return dict(zip(OUTPUT_NAMES, session.run(list(OUTPUT_NAMES), inputs), strict=True))


def _of_batch(batch: Any) -> Arrays:
    return {
        "slices_BSHW": batch.slices_BSHW,
        "slice_mask_BS": batch.slice_mask_BS,
        "modality_B": batch.modality_B,
    }


def _entry(bundle: Bundle, material: Material, measured: Measured) -> Variant:
    assert measured.known_answer_difference is not None
    return Variant(
        precision=measured.precision,
        form=measured.form,
        made_from=hashlib.sha256(bundle.onnx).hexdigest(),
        # TensorRT takes no unsigned integers; a CPU runs float16 by casting each operator
        providers=("CPUExecutionProvider",)
        if measured.precision == "int8"
        else ("CUDAExecutionProvider", "TensorrtExecutionProvider"),
        tolerance=KNOWN_ANSWER_TOLERANCE + MARGIN * measured.known_answer_difference,
        measured_on=measured_on(material),
        examples=measured.examples,
        correct_before=measured.correct_before,
        correct_after=measured.correct_after,
        speed_by_threads=measured.speed_by_threads,
    )


def _phantoms(manifest: Manifest, task: TaskSpec, seed: int, count: int) -> Iterator[Example]:
    spec = manifest.input_for(task.modality)
    assert spec is not None
    for k, label in enumerate(task.labels):
        if label.name not in LABELS[task.modality]:
            raise BundleError(f"no {task.modality} phantom shows {label.name}", advice="give examples with --examples")
        for drawn in (phantom(task.modality, label.name, seed + i) for i in range(count)):
            yield Example(prepare(drawn.volume, spec).slices_SHW.astype(np.float16), task, k)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m models.quantise", description="Give a bundle int8 and fp16 graphs."
    )
    parser.add_argument("--bundle", type=Path, required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--examples", type=Path, help="calibrated on its `train`, measured on its `heldout` examples")
    source.add_argument("--phantoms", type=int, help="that many of each label")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precision", nargs="+", choices=("int8", "fp16"), default=["int8", "fp16"])
    parser.add_argument("--force", action="store_true", help="also ship what does not pay")
    options = parser.parse_args(arguments)
    if options.phantoms is not None and options.phantoms < 1:
        parser.error("--phantoms takes 1 or more")
    try:
        bundle = read_bundle(options.bundle)
        material = (
            folder_material(bundle.manifest, options.examples)
            if options.examples
            else phantom_material(bundle.manifest, options.phantoms)
        )
        report = quantise(bundle, material, list(dict.fromkeys(options.precision)), options.out, force=options.force)
    except ModelError as error:
        print(json.dumps({"error": str(error), "advice": error.advice}), file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
