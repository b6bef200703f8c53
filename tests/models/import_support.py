"""Small classifiers for the importer's tests: convolution, mean over all places, linear layer; built with onnx alone."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = 32

SPEC = """
name = "elsewhere"
version = "3"
task = "chest-xray"
modality = "{modality}"
description = "Made for a test."

[input]
{size}
max_slices = {max_slices}
normalisation = "percentile"
range = {range}
mean = {mean}
std = {std}

[output]
kind = "{kind}"
{tensor}

{explanation}

[[labels]]
name = "normal"
is_finding = false
code = {{ scheme = "SCT", value = "17621005", meaning = "Normal" }}

[[labels]]
name = "pneumonia"
is_finding = true
code = {{ scheme = "SCT", value = "233604007", meaning = "Pneumonia" }}

[[labels]]
name = "nodule"
is_finding = true
code = {{ scheme = "RADLEX", value = "RID50149", meaning = "Pulmonary nodule" }}
"""
EXPLAINED = '[explanation]\nfeatures = "features"\nweights = "linear.weight"'


def write_spec(path: Path, **changes: object) -> Path:
    filled: dict[str, object] = {
        "modality": "XR",
        "size": f"size = {SIZE}",
        "max_slices": 4,
        "range": "[0.0, 255.0]",
        "mean": "[10.0]",
        "std": "[50.0]",
        "kind": "logits",
        "tensor": "",
        "explanation": "",
    }
    path.write_text(SPEC.format(**filled | changes))
    return path


@dataclass(frozen=True)
class Net:
    """What to build. None as a dim is dynamic."""

    channels: int | None = 1  # None: N×H×W
    labels: int = 3
    batch: int | str = "N"
    side: int | str = SIZE
    softmax: bool = False
    transposed: bool = False  # the linear layer is D×K
    opset: int = 18
    pool: str = "GlobalAveragePool"
    factor: float = 1.0  # of the logits
    bias: tuple[float, ...] = (-0.5, 0.0, 0.5)


PLAIN = Net()
UNDECIDED = Net(bias=(-0.35, -0.64, -1.17))  # with mean 60: says each label of noise about as often


def build(net: Net = PLAIN) -> onnx.ModelProto:
    generator = np.random.default_rng(0)
    convolution = generator.normal(0, 0.3, (4, net.channels or 1, 3, 3)).astype(np.float32)
    linear_KD = generator.normal(0, 1.0, (net.labels, 4)).astype(np.float32) * net.factor
    bias_K = np.array(net.bias[: net.labels], np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["c"], strides=[4, 4]),
        helper.make_node("Relu", ["c"], ["features"]),
        helper.make_node(net.pool, ["features"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "linear.weight", "linear.bias"], ["logits"], transB=int(not net.transposed)),
        helper.make_node("Softmax" if net.softmax else "Identity", ["logits"], ["scores"]),
    ]
    shape: list[int | str] = [net.batch, net.side, net.side]
    if net.channels is None:
        nodes.insert(0, helper.make_node("Unsqueeze", ["image", "one"], ["x"]))
    else:
        nodes.insert(0, helper.make_node("Identity", ["image"], ["x"]))
        shape.insert(1, net.channels)
    arrays = {
        "conv.weight": convolution,
        "linear.weight": np.ascontiguousarray(linear_KD.T) if net.transposed else linear_KD,
        "linear.bias": bias_K,
        "one": np.array([1]),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [net.batch, net.labels])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", net.opset)], ir_version=10)


def save(path: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, path)
    return path
