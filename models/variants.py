"""Variants: one graph in int8 or fp16.

Reads and gives ONNX bytes; scratch files only where ONNX Runtime's quantiser wants them.
Never decides whether a variant is good enough: `quantise` measures that.
Source: ONNX Runtime documentation, "Quantize ONNX models" (QDQ, U8S8, reduce_range) and "Float16".
"""

import logging
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnxruntime import quantization
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from models.bundle import Arrays
from models.errors import BundleError

NARROWEST = 16  # channels: stem, gate and head are narrower, cost little and would lose most
OOD = "ood_B"


@dataclass(frozen=True)
class Form:
    """One way to int8."""

    name: str
    operators: tuple[str, ...]
    is_static: bool
    with_ood: bool  # also the stages that only the out-of-distribution score needs


FORMS = (
    Form("static QDQ of Conv and MatMul", ("Conv", "MatMul"), is_static=True, with_ood=False),
    Form("static QDQ of Conv and MatMul, distribution score too", ("Conv", "MatMul"), is_static=True, with_ood=True),
    Form("static QDQ of MatMul", ("MatMul",), is_static=True, with_ood=False),
    Form("dynamic of MatMul", ("MatMul",), is_static=False, with_ood=False),
)


def to_int8(graph: bytes, form: Form, calibration: Iterable[Arrays]) -> bytes:
    """Weights int8 symmetric per channel in 7 bits, activations uint8, inputs and outputs float32.

    Raises BundleError where the graph has no node for the form: the quantiser would take the empty list for all.
    7 bits: a CPU without VNNI adds two products in 16 bits, which would saturate; so every CPU gives the same answer.
    """
    model = _loaded(graph)
    nodes = _wide_nodes(model, form)
    if not nodes:
        raise BundleError(f"nothing in the graph can be quantised as {form.name}", advice="leave the bundle in fp32")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        made = Path(folder) / "int8.onnx"
        common = {
            "model_input": model,
            "model_output": made,
            "op_types_to_quantize": list(form.operators),
            "nodes_to_quantize": nodes,
            "per_channel": True,
            "reduce_range": True,
            "weight_type": quantization.QuantType.QInt8,
            "extra_options": {"WeightSymmetric": True},
        }
        if form.is_static:
            quantization.quantize_static(
                **common,
                calibration_data_reader=_Calibration(calibration),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
            )
        else:
            quantization.quantize_dynamic(**common)
        return _plain(onnx.load(made))


def to_fp16(graph: bytes) -> bytes:
    """Weights and arithmetic in float16, inputs and outputs float32; the out-of-distribution score stays in float32.

    That score is a sum of squares, which may pass 65504 on a strange image: there it has to be right.
    """
    model = _loaded(graph)
    with _quiet():
        kept = sorted(_only_for_ood(model))
        return _plain(convert_float_to_float16(model, keep_io_types=True, node_block_list=kept))


def _loaded(graph: bytes) -> Any:
    """With a name for every node, by which the quantiser takes or leaves it."""
    model = onnx.load_from_string(graph)
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"unnamed_{number}"
    return model


def _wide_nodes(model: Any, form: Form) -> list[str]:
    """Nodes of the form's operators with constant weights, wide enough on both sides."""
    shape_by_name = {constant.name: tuple(constant.dims) for constant in model.graph.initializer}
    left_out = set() if form.with_ood else _only_for_ood(model)
    names = []
    for node in model.graph.node:
        if node.op_type in form.operators and node.name not in left_out and node.input[1] in shape_by_name:
            shape = shape_by_name[node.input[1]]
            channels = shape[:2] if node.op_type == "Conv" else shape[-2:]
            if min(channels) >= NARROWEST:
                names.append(node.name)
    return names


def _only_for_ood(model: Any) -> set[str]:
    """Names of the nodes that no other output needs."""
    others = [output.name for output in model.graph.output if output.name != OOD]
    return _needed_by(model, [OOD]) - _needed_by(model, others)


def _needed_by(model: Any, outputs: list[str]) -> set[str]:
    maker = {output: node for node in model.graph.node for output in node.output}
    found: set[str] = set()
    left = list(outputs)
    while left:
        node = maker.get(left.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            left.extend(node.input)
    return found


class _Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: Iterable[Arrays]) -> None:
        self._left = iter(batches)

    def get_next(self) -> Arrays | None:
        return next(self._left, None)


def _plain(model: Any) -> bytes:
    """Nodes in order, only the domains that are used, and the same bytes each time."""
    OnnxModel(model).topological_sort(is_deterministic=True)
    used = {node.domain for node in model.graph.node}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    onnx.checker.check_model(model)
    written: bytes = model.SerializeToString(deterministic=True)
    return written


@contextmanager
def _quiet() -> Any:
    """The quantiser advises in warnings on the root logger, to people who did not choose."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
