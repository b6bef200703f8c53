"""An imported bundle's graph against the network alone, and the known answers that go with it.

Reads and writes arrays in memory; runs both with ONNX Runtime on the CPU.
Never passes a graph that is off by more than PARITY.
Source: ARCHITECTURE.md, "Releases": export parity. Axes as in models.wrapping.
"""

import numpy as np
import onnx
from numpy.typing import NDArray

from models.bundle import INPUT_NAMES, OUTPUT_NAMES, Arrays, SessionRun
from models.classifier import F32, Classifier, logits_of
from models.errors import SpecError
from models.phantoms import LABELS, phantom
from models.preprocess import prepare
from models.runtime import RUNTIME_ERRORS, checking_session
from models.spec import MODALITIES

PARITY = 1e-4  # largest difference, relative to the output's largest value where that is above 1
_KNOWN_SLICES = 3
_REPORT_IT = "export the network with another opset; if that does not help, report it with the graph"
_PHANTOM_SEED = 30_000_000


def check_parity(classifier: Classifier, session_run: SessionRun) -> float:
    """Largest relative difference between the bundle's graph and the network alone; raises SpecError above PARITY."""
    generator = np.random.default_rng(1)
    worst = 0.0
    for batch, slices in ((1, 1), (2, 3), (1, 5)):
        inputs = _random_batch(classifier, generator, batch, slices)
        got, expected = session_run(inputs), _expected(classifier, inputs)
        for name, value in expected.items():
            scale = max(1.0, float(np.abs(value).max()))
            worst = max(worst, float(np.abs(np.asarray(got[name], np.float64) - value).max()) / scale)
    if not worst <= PARITY:
        raise SpecError(
            f"the bundle's graph and the network differ by {worst:.2g}, allowed is {PARITY:.0e}",
            advice="the network draws random numbers or looks at its batch as a whole: export it for inference",
        )
    return worst


def known_batch(classifier: Classifier) -> Arrays:
    """Two phantoms of the modality; the second is one slice long where the first has more."""
    spec = classifier.spec.input_spec(classifier.size)
    drawn = [phantom(spec.modality, LABELS[spec.modality][k], _PHANTOM_SEED + k).volume for k in (0, 1)]
    slices = min(_KNOWN_SLICES, spec.max_slices, drawn[0].voxels_ZYX.shape[0])
    slices_BSHW = np.zeros((2, slices, spec.size, spec.size), np.float32)
    mask_BS = np.zeros((2, slices), bool)
    for b, (volume, length) in enumerate(zip(drawn, (slices, 1), strict=True)):
        slices_BSHW[b, :length] = prepare(volume, spec).slices_SHW[:length]
        mask_BS[b, :length] = True
    return _inputs(classifier, slices_BSHW, mask_BS)


def runner(graph: onnx.ModelProto) -> SessionRun:
    """Runs the bundle's graph on one CPU thread. Raises SpecError where ONNX Runtime does not take it."""
    try:
        session = checking_session(graph.SerializeToString())
    except RUNTIME_ERRORS as error:
        raise SpecError(f"ONNX Runtime does not take the bundle's graph: {error}", advice=_REPORT_IT) from error

    def run(inputs: Arrays) -> Arrays:
        try:
            return dict(zip(OUTPUT_NAMES, session.run(list(OUTPUT_NAMES), inputs), strict=True))
        except RUNTIME_ERRORS as error:
            raise SpecError(f"the bundle's graph does not run: {error}", advice=_REPORT_IT) from error

    return run


def _expected(classifier: Classifier, inputs: Arrays) -> dict[str, NDArray[np.floating]]:
    """What the network alone says of each series' real slices, put together in numpy."""
    mask_BS = inputs["slice_mask_BS"]
    weights_BS = mask_BS / mask_BS.sum(1, keepdims=True)
    logits = []
    for slices_SHW, mask_S in zip(inputs["slices_BSHW"], mask_BS, strict=True):
        scores_SK, _ = classifier.run(np.asarray(slices_SHW[mask_S], np.float32))
        logits.append(logits_of(scores_SK, classifier.spec).mean(0))
    return {"logits_BK": np.stack(logits), "slice_weights_BS": weights_BS}


def _random_batch(classifier: Classifier, generator: np.random.Generator, batch: int, slices: int) -> Arrays:
    """The last series is one slice shorter, where it can be."""
    slices_BSHW = generator.uniform(-1, 1, (batch, slices, classifier.size, classifier.size)).astype(np.float32)
    mask_BS = np.ones((batch, slices), bool)
    mask_BS[-1, 1:][-1:] = False
    return _inputs(classifier, slices_BSHW, mask_BS)


def _inputs(classifier: Classifier, slices_BSHW: F32, mask_BS: NDArray[np.bool_]) -> Arrays:
    modality_B = np.full(len(slices_BSHW), MODALITIES.index(classifier.spec.modality), np.int64)
    return dict(zip(INPUT_NAMES, (slices_BSHW, mask_BS, modality_B), strict=True))
