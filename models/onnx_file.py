"""An ONNX file from elsewhere: read with its external tensors, checked, refused where it is none.

Reads one .onnx file and the files beside it that it names.
Never follows a name out of the folder, never reads more than MAX_GRAPH_BYTES.
Source: ONNX IR specification, "External tensor data".
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from models.errors import SpecError

MAX_GRAPH_BYTES = 1 << 30
OLDEST_OPSET = 13
EXPORT_AGAIN = f"export it again: opset {OLDEST_OPSET} or newer, float32, batch dynamic, the softmax left out"


def load_model(path: Path) -> onnx.ModelProto:
    try:
        _check_bytes(path.name, path.stat().st_size)
        model = onnx.load(path, load_external_data=False)
        for location in _checked_locations(path, model):
            _check_bytes(location, (path.parent / location).stat().st_size)
        onnx.load_external_data_for_model(model, str(path.parent))
        _check_bytes(path.name, model.ByteSize())
        onnx.checker.check_model(model)
    except OSError as error:
        raise SpecError(
            f"{error.filename or path} cannot be read: {error.strerror}", advice="check the path"
        ) from error
    except (DecodeError, onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise SpecError(f"{path.name} is not a valid ONNX model: {first_line(error)}", advice=EXPORT_AGAIN) from error
    return model


def _checked_locations(path: Path, model: onnx.ModelProto) -> set[str]:
    """The files with external tensors, each beside the graph."""
    locations = {ExternalDataInfo(tensor).location for tensor in _tensors(model.graph) if uses_external_data(tensor)}
    for location in locations:
        if Path(location).name != location or (path.parent / location).is_symlink():
            raise SpecError(f"{path.name} keeps tensors outside of its folder: {location}", advice=EXPORT_AGAIN)
    return locations


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initializers and constants, those of inner graphs too."""
    yield from graph.initializer
    for attribute in itertools.chain.from_iterable(node.attribute for node in graph.node):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def _check_bytes(name: str, size: int) -> None:
    if size > MAX_GRAPH_BYTES:
        raise SpecError(f"{name} is larger than {MAX_GRAPH_BYTES} bytes", advice="a bundle takes smaller networks only")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
