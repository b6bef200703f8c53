"""A classifier of single images from elsewhere: its ONNX file opened, checked and run.

Reads one .onnx file; runs it with ONNX Runtime on the CPU.
Never trusts what a graph declares of its output: it looks at what comes out.
Source: ONNX IR specification. Axes: N images, C channels, H W pixels, D features, h w places, K labels.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from models.errors import SpecError
from models.import_spec import ImportSpec
from models.onnx_file import EXPORT_AGAIN, OLDEST_OPSET, first_line, load_model
from models.runtime import RUNTIME_ERRORS, checking_session

F32 = NDArray[np.float32]

SMALLEST_PROBABILITY = 1e-7  # its logarithm still has a place in float32
_SHOWN = 6
_CAM_TOLERANCE = 1e-3
_IMAGES_AT_ONCE = 16


@dataclass(frozen=True)
class Activation:
    """Class activation map: what of the last feature map speaks for which label."""

    features: str
    weights_KD: F32
    side_hw: tuple[int, int]


@dataclass(frozen=True)
class Classifier:
    model: onnx.ModelProto
    spec: ImportSpec
    image: str
    scores: str
    channels: int | None  # None: images are N×H×W
    size: int
    opset: int
    session: Any  # gives scores, and features where the spec names them
    activation: Activation | None = None

    def images(self, slices_NHW: F32) -> F32:
        """What the network is shown of slices of [-1, 1]."""
        low, high = self.spec.input.range
        ranged_N1HW = (slices_NHW[:, np.newaxis].astype(np.float64) + 1) / 2 * (high - low) + low
        mean_C11, std_C11 = (
            np.array(v)[:, np.newaxis, np.newaxis] for v in (self.spec.input.mean, self.spec.input.std)
        )
        images = np.broadcast_to(
            (ranged_N1HW - mean_C11) / std_C11, (len(slices_NHW), self.channels or 1, *slices_NHW.shape[1:])
        )
        return np.ascontiguousarray(images if self.channels else images[:, 0], np.float32)

    def run(self, slices_NHW: F32) -> tuple[F32, F32 | None]:
        """scores_NK and, where the spec names them, features_NDhw. Raises SpecError."""
        wanted = [self.scores] + ([self.spec.explanation.features] if self.spec.explanation else [])
        parts = []
        for first in range(0, len(slices_NHW), _IMAGES_AT_ONCE):
            images = self.images(slices_NHW[first : first + _IMAGES_AT_ONCE])
            try:
                parts.append(self.session.run(wanted, {self.image: images}))
            except RUNTIME_ERRORS as error:
                raise SpecError(
                    f"the graph does not run on {len(images)} images: {first_line(error)}", advice=EXPORT_AGAIN
                ) from error
        joined = [np.concatenate([np.atleast_1d(part) for part in column]) for column in zip(*parts, strict=True)]
        return joined[0], joined[1] if len(joined) > 1 else None


def open_classifier(path: Path, spec: ImportSpec) -> Classifier:
    """Raises SpecError naming what is not as the spec says, or cannot become part of a bundle."""
    model = load_model(path)
    opset = _opset(model)
    image, scores = _input(model), _output(model, spec)
    channels, size = _image_shape(image, spec)
    session = _session(_with_output(model, spec))
    found = Classifier(model, spec, image.name, scores, channels, size, opset, session)
    slices_NHW = np.random.default_rng(0).uniform(-1, 1, (5, size, size)).astype(np.float32)
    scores_NK, features_NDhw = found.run(slices_NHW)
    _check_scores(scores_NK, len(slices_NHW), spec)
    if features_NDhw is None or spec.explanation is None:
        return found
    weights_KD = _activation_weights(model, spec, scores_NK, features_NDhw)
    activation = Activation(spec.explanation.features, weights_KD, features_NDhw.shape[2:])
    return replace(found, activation=activation)


def logits_of(scores_NK: F32, spec: ImportSpec) -> F32:
    return scores_NK if spec.output.kind == "logits" else np.log(np.clip(scores_NK, SMALLEST_PROBABILITY, 1.0))


def _opset(model: onnx.ModelProto) -> int:
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < OLDEST_OPSET:
        raise SpecError(f"the graph has opset {opset}, older than {OLDEST_OPSET}", advice=EXPORT_AGAIN)
    return opset


def _input(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise SpecError(
            f"the graph has {len(inputs)} inputs: {_listed(value.name for value in inputs)}",
            advice="only networks that read one image are taken",
        )
    return inputs[0]


def _output(model: onnx.ModelProto, spec: ImportSpec) -> str:
    names = [value.name for value in model.graph.output]
    if spec.output.tensor in names:
        return spec.output.tensor
    if spec.output.tensor or len(names) != 1:
        raise SpecError(
            f"the graph gives {_listed(names)}; the spec says {spec.output.tensor or 'nothing'}",
            advice="name one of them in output.tensor",
        )
    return str(names[0])


def _image_shape(image: onnx.ValueInfoProto, spec: ImportSpec) -> tuple[int | None, int]:
    """Channels (None: no such axis) and side."""
    tensor = image.type.tensor_type
    if tensor.elem_type != onnx.TensorProto.FLOAT:
        raise SpecError(f"the input {image.name} is not float32", advice=EXPORT_AGAIN)
    dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
    if len(dims) not in (3, 4):
        raise SpecError(
            f"the input {image.name} has {len(dims)} axes: not one image N×C×H×W or N×H×W",
            advice="only networks that read 2-D images are taken; volumes are read slice by slice",
        )
    if dims[0] is not None:
        raise SpecError(f"the batch of the input {image.name} is fixed at {dims[0]}", advice=EXPORT_AGAIN)
    channels = dims[1] if len(dims) == 4 else None
    if len(dims) == 4 and channels not in (1, 3):
        raise SpecError(f"the input {image.name} has {channels or 'open'} channels, not 1 or 3", advice=EXPORT_AGAIN)
    if len(spec.input.mean) not in (1, channels or 1):
        raise SpecError(
            f"input.mean has {len(spec.input.mean)} numbers, the image has {channels or 1} channels",
            advice="give one number, or one for each channel",
        )
    return channels, _side(image.name, dims[-2:], spec)


def _side(name: str, dims_HW: list[int | None], spec: ImportSpec) -> int:
    fixed = {side for side in (*dims_HW, spec.input.size) if side is not None}
    if not fixed:
        raise SpecError(f"the input {name} takes images of any size", advice="say input.size: that of the training")
    if len(fixed) != 1:
        raise SpecError(
            f"the input {name} takes {dims_HW[0] or 'any'} x {dims_HW[1] or 'any'} pixels, input.size is {spec.input.size}",
            advice="only square images are taken; leave input.size out or make it that of the graph",
        )
    size = fixed.pop()
    if not 16 <= size <= 1024:
        raise SpecError(f"the input {name} takes {size} x {size} pixels", advice="16 to 1024 are taken")
    return size


def _with_output(model: onnx.ModelProto, spec: ImportSpec) -> onnx.ModelProto:
    """The same graph; the spec's feature map is one of its outputs."""
    if spec.explanation is None or spec.explanation.features in {value.name for value in model.graph.output}:
        return model
    wanted = spec.explanation.features
    if wanted not in {name for node in model.graph.node for name in node.output}:
        raise SpecError(
            f"the graph has no tensor {wanted}", advice=f"maps are, last first: {_listed(_feature_maps(model))}"
        )
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.graph.output.append(onnx.helper.make_tensor_value_info(wanted, onnx.TensorProto.FLOAT, None))
    return changed


def _feature_maps(model: onnx.ModelProto) -> list[str]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    return [value.name for value in reversed(inferred.value_info) if len(value.type.tensor_type.shape.dim) == 4]


def _session(model: onnx.ModelProto) -> Any:
    try:
        return checking_session(model.SerializeToString())
    except RUNTIME_ERRORS as error:
        raise SpecError(f"ONNX Runtime does not take the graph: {first_line(error)}", advice=EXPORT_AGAIN) from error


def _check_scores(scores_NK: F32, images: int, spec: ImportSpec) -> None:
    labels = len(spec.labels)
    if scores_NK.ndim != 2 or scores_NK.shape[0] != images:
        raise SpecError(
            f"{images} images give scores of shape {scores_NK.shape}, not {images} × labels",
            advice="only classifiers are taken: one row of scores for each image",
        )
    if scores_NK.shape[1] != labels:
        raise SpecError(
            f"the graph gives {scores_NK.shape[1]} scores, the spec has {labels} labels",
            advice="list one label for each score, in the scores' order",
        )
    if scores_NK.dtype != np.float32:
        raise SpecError(f"the scores are {scores_NK.dtype}, not float32", advice=EXPORT_AGAIN)
    if not np.isfinite(scores_NK).all():
        raise SpecError("the graph gives NaN or infinite scores on noise", advice="look at input.range, mean and std")
    sums_to_one = bool(np.allclose(scores_NK.sum(1), 1.0, atol=1e-3) and scores_NK.min() >= 0)
    if sums_to_one != (spec.output.kind == "probabilities"):
        raise SpecError(
            f"the scores of noise are from {scores_NK.min():.3g} to {scores_NK.max():.3g}"
            f"{' and sum to 1' if sums_to_one else ''}: those are not {spec.output.kind}",
            advice="probabilities sum to 1, logits do not; labels that may be true together (sigmoid) are not taken",
        )


def _activation_weights(model: onnx.ModelProto, spec: ImportSpec, scores_NK: F32, features_NDhw: F32) -> F32:
    """The linear layer, K×D. Raises SpecError where the map would not be the decision."""
    assert spec.explanation is not None
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    tensor = initializers.get(spec.explanation.weights)
    if tensor is None:
        matrices = [name for name, found in initializers.items() if len(found.dims) == 2]
        raise SpecError(f"there is no initializer {spec.explanation.weights}", advice=f"matrices: {_listed(matrices)}")
    if features_NDhw.ndim != 4:
        raise SpecError(
            f"{spec.explanation.features} has shape {features_NDhw.shape}: no feature map N×D×h×w",
            advice=f"maps are, last first: {_listed(_feature_maps(model))}",
        )
    weights = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    logits_NK = logits_of(scores_NK, spec)
    for weights_KD in (weights, weights.T):
        if weights_KD.shape != (logits_NK.shape[1], features_NDhw.shape[1]):
            continue
        rest_NK = logits_NK - features_NDhw.mean((2, 3)) @ weights_KD.T
        rest_NK = rest_NK - rest_NK.mean(1, keepdims=True)  # what moves all logits alike decides nothing
        if np.ptp(rest_NK, axis=0).max() <= _CAM_TOLERANCE * max(1.0, float(np.abs(logits_NK).max())):
            return np.ascontiguousarray(weights_KD)
    raise SpecError(
        f"the mean of {spec.explanation.features} times {spec.explanation.weights} is not what the network decides by",
        advice="name the map that is averaged over all places, after its activation; or leave [explanation] out",
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(itertools.islice(names, _SHOWN)) or "nothing"
