"""Import: `python -m models import --onnx M.onnx --spec S.toml --out F`; or --monai for a MONAI Bundle.

Reads a network from elsewhere, its spec and, where given, images; writes a bundle and prints a JSON report.
Never writes a bundle whose graph disagrees with the network by more than PARITY, never runs foreign code unasked.
Source: ARCHITECTURE.md, "The network": what a bundle is. Axes as in models.wrapping.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx

from models import import_card, import_check
from models.bundle import BundleParts, check_known_answer, read_bundle, write_bundle
from models.classifier import Classifier, open_classifier
from models.errors import BundleError, ModelError
from models.import_images import Calibration, calibrate, read_images
from models.import_spec import EXAMPLE, read_spec
from models.spec import IMPORTED, Manifest
from models.wrapping import wrap


@dataclass(frozen=True)
class Order:
    spec: Path
    out: Path
    onnx: Path | None = None
    monai: Path | None = None
    images: Path | None = None
    trust_code: bool = False


@dataclass(frozen=True)
class Report:
    digest: str
    bytes: int
    parity: float
    opset: int
    parameters: int
    explanation: bool
    images: int
    temperature: float
    conformal_threshold: float
    ood_threshold: float | None  # None: the score never fires
    accuracy: float | None
    balanced_accuracy: float | None
    calibration_error: float | None
    warnings: tuple[str, ...]


def import_network(order: Order) -> Report:
    """Write the bundle and give the report. Raises ModelError."""
    with tempfile.TemporaryDirectory() as scratch:
        classifier = _opened(order, Path(scratch))
        learned = calibrate(classifier, read_images(order.images, classifier)) if order.images else Calibration()
        graph = wrap(classifier, learned.looks)
        session_run = import_check.runner(graph)
        difference = import_check.check_parity(classifier, session_run)
        manifest = _manifest(classifier, learned)
        warnings = import_card.warnings(classifier, learned)
        known_inputs = import_check.known_batch(classifier)
        parts = BundleParts(
            manifest,
            graph.SerializeToString(deterministic=True),
            {},
            known_inputs,
            session_run(known_inputs),
            import_card.card(classifier, learned, manifest, difference, warnings),
        )
        tried = Path(scratch) / "tried.bundle"
        write_bundle(tried, parts)
        check_known_answer(session_run, read_bundle(tried))
    digest = _written(order.out, parts)
    return Report(
        digest,
        order.out.stat().st_size,
        difference,
        manifest.opset,
        manifest.parameters,
        classifier.activation is not None,
        learned.images,
        learned.temperature,
        learned.conformal_threshold,
        learned.ood_threshold if learned.looks else None,
        learned.accuracy,
        learned.balanced_accuracy,
        learned.calibration_error,
        warnings,
    )


def _opened(order: Order, scratch: Path) -> Classifier:
    if order.onnx is not None:
        return open_classifier(order.onnx, read_spec(order.spec, {}))
    from models import monai_bundle  # torch and MONAI are not needed for a plain graph

    assert order.monai is not None
    found = monai_bundle.open_bundle(order.monai, scratch)
    spec = read_spec(order.spec, found.defaults, found.label_order)
    return open_classifier(monai_bundle.to_onnx(found, spec, scratch, trust_code=order.trust_code), spec)


def _written(out: Path, parts: BundleParts) -> str:
    try:
        return write_bundle(out, parts)
    except OSError as error:
        raise BundleError(
            f"{out} cannot be written: {error.strerror}", advice="check --out, its rights and disk"
        ) from error


def _manifest(classifier: Classifier, learned: Calibration) -> Manifest:
    task = msgspec.structs.replace(
        classifier.spec.task_spec(),
        temperature=learned.temperature,
        conformal_threshold=learned.conformal_threshold,
        reference=learned.reference,
    )
    floats = [t for t in classifier.model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    return Manifest(
        format=1,
        name=classifier.spec.name,
        version=classifier.spec.version,
        network=IMPORTED,
        inputs=(classifier.spec.input_spec(classifier.size),),
        tasks=(task,),
        ood_threshold=learned.ood_threshold,
        parameters=sum(int(np.prod(tensor.dims)) for tensor in floats),
        opset=classifier.opset,
        members={},
    )


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.example:
        print(EXAMPLE.read_text("utf-8"), end="")
        return 0
    if options.spec is None or options.out is None:
        parser.error("--spec and --out are needed")
    order = Order(options.spec, options.out, options.onnx, options.monai, options.images, options.trust_code)
    try:
        report = import_network(order)
    except ModelError as error:
        print(json.dumps({"error": str(error), "advice": error.advice}), file=sys.stderr)
        return 1
    for warning in report.warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    print(json.dumps(asdict(report)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models import", description="Make a bundle of an ONNX classifier or a MONAI Bundle."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--onnx", type=Path, help="the network: one grey image in, one score for each label out")
    source.add_argument("--monai", type=Path, help="a MONAI Bundle, folder or .zip")
    source.add_argument("--example", action="store_true", help="print a spec that explains every key, and end")
    parser.add_argument("--spec", type=Path, help="TOML: input, output, labels with codes")
    parser.add_argument("--out", type=Path, help="the bundle file to write")
    parser.add_argument("--images", type=Path, help="calibrate: folder with a subfolder for each label, or .npz")
    parser.add_argument(
        "--trust-code", action="store_true", help="run the MONAI Bundle's own code: TorchScript or configured classes"
    )
    return parser
