"""An imported classifier becomes the bundle's graph: slices in; logits, map, slice weights and strangeness out.

Reads and writes ONNX models in memory, with onnx's own helpers.
Never changes the network's own nodes; only standard operators of its own opset surround it.
Source: class activation maps, Zhou 2016. Axes: B series, S slices, H W pixels, N = B·S images, K labels, D features, h w places.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper, numpy_helper

from models.bundle import INPUT_NAMES, OUTPUT_NAMES
from models.classifier import F32, SMALLEST_PROBABILITY, Classifier

_NETWORK, _AROUND = "network/", "around/"
_AXES = {"scores": 2, "features": 4}


@dataclass(frozen=True)
class Looks:
    """What images of the calibration look like to the network: mean of each label's features, spread of each feature."""

    mean_KD: F32
    spread_D: F32


def wrap(classifier: Classifier, looks: Looks | None) -> onnx.ModelProto:
    """One graph of the bundle's contract. `looks` needs the classifier's features; without it ood_B is 0."""
    network = compose.add_prefix(_with_features(classifier), _NETWORK)
    before, after = _before(classifier), _after(classifier, looks)
    joined = compose.merge_models(before, network, io_map=[(_AROUND + "images", _NETWORK + classifier.image)])
    links = [(_NETWORK + name, _AROUND + role) for name, role in _taken(classifier).items()]
    whole = compose.merge_models(joined, after, io_map=links, outputs=list(OUTPUT_NAMES))
    inputs = {value.name: value for value in whole.graph.input}
    del whole.graph.input[:]
    whole.graph.input.extend(inputs[name] for name in INPUT_NAMES)
    whole.producer_name = "wardround"
    onnx.checker.check_model(whole)
    return whole


def _taken(classifier: Classifier) -> dict[str, str]:
    """The network's tensors that the part after it reads, and what they are called there."""
    features = {classifier.activation.features: "features"} if classifier.activation else {}
    return {classifier.scores: "scores"} | features


def _with_features(classifier: Classifier) -> onnx.ModelProto:
    """A copy whose outputs are just those taken; the domain "ai.onnx" is called by its short name."""
    model = onnx.ModelProto()
    model.CopyFrom(classifier.model)
    domains = {entry.domain: entry.version for entry in model.opset_import if entry.domain not in ("", "ai.onnx")}
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(d, v) for d, v in {"": classifier.opset, **domains}.items())
    del model.graph.output[:]
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * _AXES[role])
        for name, role in _taken(classifier).items()
    )
    return model


def _before(classifier: Classifier) -> onnx.ModelProto:
    """slices_BSHW -> images: each channel its own scale and offset."""
    given, side, channels = classifier.spec.input, classifier.size, classifier.channels
    low, high = given.range
    std_C, mean_C = np.array(given.std), np.array(given.mean)
    scale_C, offset_C = (high - low) / 2 / std_C, ((high + low) / 2 - mean_C) / std_C
    part = _Part("before")
    if channels is None:
        shape_N = [-1, side, side]
        scale_C, offset_C = scale_C.reshape(1, 1, 1), offset_C.reshape(1, 1, 1)
    else:
        shape_N = [-1, 1, side, side]
        scale_C, offset_C = (np.broadcast_to(v, channels).reshape(1, channels, 1, 1) for v in (scale_C, offset_C))
    grey = part.add("Reshape", "slices_BSHW", part.axes(*shape_N))
    scaled = part.add("Mul", grey, part.floats(scale_C))
    part.add("Add", scaled, part.floats(offset_C), gives=_AROUND + "images")
    slices_BSHW = helper.make_tensor_value_info("slices_BSHW", TensorProto.FLOAT, ["B", "S", side, side])
    images = helper.make_tensor_value_info(_AROUND + "images", TensorProto.FLOAT, [None] * len(shape_N))
    return part.model(classifier, [slices_BSHW], [images])


def _after(classifier: Classifier, looks: Looks | None) -> onnx.ModelProto:
    """scores, features and slice_mask_BS -> the bundle's outputs; every real slice counts the same."""
    part, labels = _Part("after"), len(classifier.spec.labels)
    shape_BS = part.add("Shape", "slice_mask_BS")
    mask_BS = part.add("Cast", "slice_mask_BS", to=TensorProto.FLOAT)
    count_B1 = part.add("ReduceSum", mask_BS, part.axes(1), keepdims=1)
    part.add("Div", mask_BS, part.add("Max", count_B1, part.floats(1.0)), gives="slice_weights_BS")
    weights_BS1 = part.add("Unsqueeze", "slice_weights_BS", part.axes(2))
    scores_BSK = part.add("Reshape", _logits(part, classifier), part.shape(shape_BS, labels))
    weighted_BSK = part.add("Mul", scores_BSK, weights_BS1)
    part.add("ReduceSum", weighted_BSK, part.axes(1), keepdims=0, gives="logits_BK")
    _map(part, classifier, shape_BS)
    _strangeness(part, classifier, looks, shape_BS, weights_BS1)
    return part.model(classifier, _after_inputs(classifier), _after_outputs(classifier))


def _logits(part: "_Part", classifier: Classifier) -> str:
    scores = _AROUND + "scores"
    if classifier.spec.output.kind == "logits":
        return scores
    return part.add("Log", part.add("Clip", scores, part.floats(SMALLEST_PROBABILITY), part.floats(1.0)))


def _map(part: "_Part", classifier: Classifier, shape_BS: str) -> None:
    """Summed over slices and places, plus the linear layer's bias, it is the logit; zeros where there is no map."""
    labels, activation = len(classifier.spec.labels), classifier.activation
    if activation is None:
        part.add("Expand", part.floats(0.0), part.shape(shape_BS, labels, 1, 1), gives="map_BSKhw")
        return
    h, w = activation.side_hw
    weights_KD11 = activation.weights_KD[:, :, np.newaxis, np.newaxis] / (h * w)
    map_NKhw = part.add("Conv", _AROUND + "features", part.floats(weights_KD11))
    map_BSKhw = part.add("Reshape", map_NKhw, part.shape(shape_BS, labels, h, w))
    weights_BS111 = part.add("Unsqueeze", "slice_weights_BS", part.axes(2, 3, 4))
    part.add("Mul", map_BSKhw, weights_BS111, gives="map_BSKhw")


def _strangeness(part: "_Part", classifier: Classifier, looks: Looks | None, shape_BS: str, weights_BS1: str) -> None:
    """Distance of the mean feature to the nearest label's mean, in spreads; modality_B gives the shape of "never"."""
    never_B = part.add("Mul", part.add("Cast", "modality_B", to=TensorProto.FLOAT), part.floats(0.0))
    if looks is None or classifier.activation is None:
        part.add("Identity", never_B, gives="ood_B")
        return
    features = classifier.activation.weights_KD.shape[1]
    mean_ND11 = part.add("GlobalAveragePool", _AROUND + "features")
    mean_BSD = part.add("Reshape", mean_ND11, part.shape(shape_BS, features))
    look_B1D = part.add("ReduceSum", part.add("Mul", mean_BSD, weights_BS1), part.axes(1), keepdims=1)
    offset_BKD = part.add("Sub", look_B1D, part.floats(looks.mean_KD[np.newaxis]))
    spreads_BKD = part.add("Div", offset_BKD, part.floats(looks.spread_D * np.sqrt(features)))
    squares_BK = part.add("ReduceSum", part.add("Mul", spreads_BKD, spreads_BKD), part.axes(2), keepdims=0)
    nearest_B1 = part.add("TopK", part.add("Sqrt", squares_BK), part.axes(1), axis=1, largest=0, outputs=2)
    part.add("Add", part.add("Squeeze", nearest_B1, part.axes(1)), never_B, gives="ood_B")


def _after_inputs(classifier: Classifier) -> list[onnx.ValueInfoProto]:
    taken = [
        helper.make_tensor_value_info(_AROUND + role, TensorProto.FLOAT, [None] * _AXES[role])
        for role in _taken(classifier).values()
    ]
    mask_BS = helper.make_tensor_value_info("slice_mask_BS", TensorProto.BOOL, ["B", "S"])
    return [*taken, mask_BS, helper.make_tensor_value_info("modality_B", TensorProto.INT64, ["B"])]


def _after_outputs(classifier: Classifier) -> list[onnx.ValueInfoProto]:
    labels = len(classifier.spec.labels)
    h, w = classifier.activation.side_hw if classifier.activation else (1, 1)
    shapes = (["B", labels], ["B", "S", labels, h, w], ["B", "S"], ["B"])
    return [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip(OUTPUT_NAMES, shapes, strict=True)
    ]


@dataclass
class _Part:
    """Nodes and constants in the making, named by number."""

    side: Literal["before", "after"]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    _number: Iterator[int] = field(default_factory=itertools.count)

    def add(self, operator: str, *inputs: str, gives: str = "", outputs: int = 1, **attributes: Any) -> str:
        """Gives the name of the (first) output."""
        name = gives or self._new_name()
        others = [self._new_name() for _ in range(outputs - 1)]
        self.nodes.append(
            helper.make_node(operator, list(inputs), [name, *others], name + "/" + operator, **attributes)
        )
        return name

    def floats(self, value: float | NDArray[np.floating]) -> str:
        return self.constant(np.asarray(value, np.float32))

    def axes(self, *axes: int) -> str:
        return self.constant(np.array(axes, np.int64))

    def shape(self, shape_BS: str, *rest: int) -> str:
        return self.add("Concat", shape_BS, self.axes(*rest), axis=0)

    def constant(self, value: NDArray[Any]) -> str:
        name = self._new_name()
        self.constants.append(numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def model(
        self, classifier: Classifier, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """Of the network's own opset and IR version: onnx joins no others."""
        graph = helper.make_graph(self.nodes, "wardround", inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", classifier.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=classifier.model.ir_version)

    def _new_name(self) -> str:
        return f"{_AROUND}{self.side}.{next(self._number)}"
