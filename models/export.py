"""Export: trained weights become a bundle. `python -m models.export --bundle BASE --weights W --name N --version V --out F`.

Reads a base bundle and a weights file; writes the new bundle and prints a JSON report.
Never writes a bundle whose graph and torch disagree by more than PARITY, or whose weights do not fit the base.
Source: ARCHITECTURE.md, "Releases": export parity with torch.
"""

import argparse
import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from models.bundle import INPUT_NAMES, OUTPUT_NAMES, Array, Arrays, Bundle, BundleParts, read_bundle, write_bundle
from models.errors import BundleError, ModelError
from models.network import Hybrid
from models.restore import load_weights, network_of
from models.spec import MODALITIES

OPSET = 18
_CARD_RULE = "\n---\n\n"
PARITY = 1e-4  # largest difference, relative to the output's largest value where that is above 1


def export(
    base: Bundle, weights: Mapping[str, NDArray[np.float32]], name: str, version: str, out: Path
) -> dict[str, object]:
    """Write the bundle of these weights; labels, preprocessing and calibration are the base's.

    The base's int8 and fp16 graphs are dropped: they hold its weights. `python -m models.quantise` makes new ones.
    Raises BundleError.
    """
    check_weights(base, weights)
    network = network_of(base)
    load_weights(network, dict(weights))
    onnx = to_onnx(network)
    known_inputs = base.known_inputs
    difference = parity(network, onnx, [known_inputs, other_batch(known_inputs)])
    manifest = msgspec.structs.replace(base.manifest, name=name, version=version, variants=())
    parts = BundleParts(
        manifest, onnx, weights, known_inputs, run_torch(network, known_inputs), _card(base, name, version)
    )
    digest = write_bundle(out, parts)
    return {
        "digest": digest,
        "bytes": out.stat().st_size,
        "parity": difference,
        "opset": OPSET,
        "base": base.digest,
        "variants_dropped": sorted(base.variants),
    }


def check_weights(base: Bundle, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Exactly the base's tensors, finite. Raises BundleError."""
    if set(weights) != set(base.weights):
        odd = sorted(set(weights) ^ set(base.weights))[0]
        raise BundleError(f"the weights are not those of the base's network: {odd}", advice="use the round's own base")
    for key, value in weights.items():
        if value.shape != base.weights[key].shape or value.dtype != np.float32:
            raise BundleError(f"{key} is {value.dtype} {value.shape}, not float32 {base.weights[key].shape}")
        if not np.isfinite(value).all():
            raise BundleError(f"{key} is not finite", advice="drop the round")


def to_onnx(network: Hybrid) -> bytes:
    """The graph with dynamic B and S, one file, opset OPSET; equal weights give equal bytes, wherever the source lies."""
    size = network.input_px
    slices_BSHW = torch.zeros(2, 3, size, size)
    batch, slices = torch.export.Dim("B", min=1, max=1024), torch.export.Dim("S", min=1, max=1024)
    with quiet():
        program = torch.onnx.export(
            network.eval(),
            (slices_BSHW, torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)),
            input_names=list(INPUT_NAMES),
            output_names=list(OUTPUT_NAMES),
            dynamic_shapes=({0: batch, 1: slices}, {0: batch, 1: slices}, {0: batch}),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    ClearMetadataAndDocStringPass()(program.model)  # torch writes where its source lies into each node
    written: bytes = program.model_proto.SerializeToString(deterministic=True)
    return written


def parity(network: Hybrid, onnx: bytes, batches: list[Arrays]) -> float:
    """The largest relative difference of any output between torch and ONNX Runtime; raises BundleError above PARITY."""
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    worst = 0.0
    for inputs in batches:
        expected = run_torch(network, inputs)
        for name, got in zip(OUTPUT_NAMES, session.run(list(OUTPUT_NAMES), inputs), strict=True):
            scale = max(1.0, float(np.abs(expected[name]).max()))
            worst = max(worst, float(np.abs(got - expected[name]).max()) / scale)
    if not worst <= PARITY:
        raise BundleError(
            f"torch and ONNX Runtime differ by {worst:.2g}, allowed is {PARITY:.0e}", advice="drop the round"
        )
    return worst


def run_torch(network: Hybrid, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
    with torch.no_grad():
        outputs = network(*(torch.from_numpy(inputs[name]) for name in INPUT_NAMES))
    return dict(zip(OUTPUT_NAMES, (output.numpy() for output in outputs), strict=True))


def other_batch(inputs: Arrays) -> Arrays:
    """One series of another length than the known-answer batch's: the graph's B and S must really be dynamic."""
    slices_1SHW = np.ascontiguousarray(np.concatenate([inputs["slices_BSHW"][:1]] * 2, 1)[:, 1:])
    return {
        "slices_BSHW": slices_1SHW,
        "slice_mask_BS": np.ones(slices_1SHW.shape[:2], bool),
        "modality_B": np.array([len(MODALITIES) - 1]),
    }


def _card(base: Bundle, name: str, version: str) -> str:
    """What this release is, above the card of the bundle that was first trained."""
    return (
        f"# {name} {version}\n\nFine-tuned from {base.manifest.name} {base.manifest.version} (bundle {base.digest}) on "
        "reviewed studies of several hospitals. Labels, preprocessing, calibration and out-of-distribution statistics are\n"
        "the base's. The figures below are those of the first training, not of this model: each site measures it on its\n"
        f"own held-out reviews before it activates it.\n{_CARD_RULE}{base.card.split(_CARD_RULE)[-1]}"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter reports its progress on stdout, which carries our JSON."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.export", description="Make a bundle from trained weights.")
    parser.add_argument("--bundle", type=Path, required=True, help="the base the weights were trained from")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        report = export(
            read_bundle(options.bundle), _weights(options.weights), options.name, options.version, options.out
        )
    except ModelError as error:
        print(json.dumps({"error": str(error), "advice": error.advice}), file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 0


def _weights(path: Path) -> dict[str, NDArray[np.float32]]:
    try:
        return dict(safetensors_numpy.load(path.read_bytes()))
    except (OSError, SafetensorError) as error:
        raise BundleError(f"the weights cannot be read: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
