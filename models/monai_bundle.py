"""A MONAI Bundle: found in a folder or zip, and its network as an ONNX file.

Reads configs/ and models/ of the bundle; writes into the caller's scratch folder.
Never unpickles, and never runs the bundle's code (TorchScript, classes its configuration names) without trust_code.
Source: MONAI Bundle specification, https://docs.monai.io/en/stable/mb_specification.html.
"""

import stat
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any

import msgspec
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from models.bundle import ZIP_ERRORS
from models.errors import SpecError
from models.export import OPSET, quiet
from models.import_spec import ImportSpec
from models.onnx_file import first_line

MAX_ZIP_BYTES = 2 << 30  # unpacked
_METADATA = "configs/metadata.json"
_GRAPH, _SCRIPT, _WEIGHTS = "models/model.onnx", "models/model.ts", "models/model.pt"
_CONFIGS = ("configs/inference.json", "configs/inference.yaml", "configs/inference.yml")
_NETWORK_KEYS = ("network_def", "network")
_TAKEN = "only 2-D classification bundles are taken: one image in, one score for each label out"
_TRUST = "where you trust whoever made it, say --trust-code; or export it to models/model.onnx on another machine"
_FOREIGN_ERRORS = (ImportError, AttributeError, TypeError, ValueError, LookupError, RuntimeError, OSError)


class _Tensor(msgspec.Struct, frozen=True):
    format: str = ""
    num_channels: int | None = None
    spatial_shape: tuple[int | str | None, ...] = ()
    value_range: tuple[float, ...] = ()
    channel_def: dict[str, str] = {}  # msgspec copies it


class _DataFormat(msgspec.Struct, frozen=True):
    inputs: dict[str, _Tensor]
    outputs: dict[str, _Tensor]


class _Metadata(msgspec.Struct, frozen=True):
    network_data_format: _DataFormat
    name: str = ""
    version: str = ""


@dataclass(frozen=True)
class MonaiBundle:
    folder: Path
    channels: int
    defaults: Mapping[str, Any]  # what the metadata says, by the spec's keys
    label_order: tuple[str, ...]  # empty: the metadata does not say


def open_bundle(source: Path, scratch: Path) -> MonaiBundle:
    """Raises SpecError on what is no MONAI Bundle, or not of a 2-D classifier."""
    folder = _root(_unpacked(source, scratch) if source.is_file() else source)
    metadata = _metadata(folder / _METADATA)
    image, scores = _image_and_scores(metadata)
    given: dict[str, Any] = {"size": _side(image), "range": _range(image)}
    defaults: dict[str, Any] = {"name": metadata.name, "version": metadata.version}
    return MonaiBundle(
        folder,
        image.num_channels or 1,
        _said(defaults) | {"input": _said(given)},
        tuple(scores.channel_def[key] for key in sorted(scores.channel_def, key=_number)),
    )


def to_onnx(bundle: MonaiBundle, spec: ImportSpec, scratch: Path, *, trust_code: bool) -> Path:
    """The bundle's own graph, or one exported from its TorchScript or its configured network. Raises SpecError."""
    if (bundle.folder / _GRAPH).is_file():
        return bundle.folder / _GRAPH
    if (bundle.folder / _SCRIPT).is_file():
        _check_trust("TorchScript, which is code", trust_code)
        return _exported(_script(bundle.folder / _SCRIPT), bundle, spec, scratch)
    config = next((bundle.folder / name for name in _CONFIGS if (bundle.folder / name).is_file()), None)
    if config is None or not (bundle.folder / _WEIGHTS).is_file():
        raise SpecError(
            f"the bundle has no {_GRAPH}, no {_SCRIPT}, and not both {_WEIGHTS} and {_CONFIGS[0]}",
            advice="fetch the bundle with its models: python -m monai.bundle download",
        )
    _check_trust(f"{config.name}, which names classes to run", trust_code)
    return _exported(_configured(bundle.folder, config), bundle, spec, scratch)


def _check_trust(what: str, trust_code: bool) -> None:
    if not trust_code:
        raise SpecError(f"the bundle's network comes as {what}", advice=_TRUST)


def _unpacked(source: Path, scratch: Path) -> Path:
    """Raises SpecError before anything is written where a name leads out of the folder or the whole is too large."""
    target = scratch / "monai"
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
            for entry in entries:
                path = PurePosixPath(entry.filename)
                if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or _is_link(entry):
                    raise SpecError(f"{source.name} holds {entry.filename}, which leads out of it", advice=_TAKEN)
            if sum(entry.file_size for entry in entries) > MAX_ZIP_BYTES:
                raise SpecError(f"{source.name} unpacks to more than {MAX_ZIP_BYTES} bytes", advice=_TAKEN)
            archive.extractall(target)  # every name was looked at
    except ZIP_ERRORS as error:
        raise SpecError(
            f"{source.name} cannot be unpacked: {error}", advice="give a bundle's folder or .zip"
        ) from error
    return target


def _is_link(entry: zipfile.ZipInfo) -> bool:
    return stat.S_ISLNK(entry.external_attr >> 16)


def _root(folder: Path) -> Path:
    """A zip often holds the bundle in one folder of its name."""
    if (folder / _METADATA).is_file():
        return folder
    inner = [path for path in folder.iterdir() if (path / _METADATA).is_file()] if folder.is_dir() else []
    if len(inner) != 1:
        raise SpecError(f"{folder.name} is no MONAI Bundle: no {_METADATA}", advice="give a bundle's folder or .zip")
    return inner[0]


def _metadata(path: Path) -> _Metadata:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Metadata)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{_METADATA} cannot be used: {error}", advice=_TAKEN) from error


def _image_and_scores(metadata: _Metadata) -> tuple[_Tensor, _Tensor]:
    inputs, outputs = metadata.network_data_format.inputs, metadata.network_data_format.outputs
    if len(inputs) != 1 or len(outputs) != 1:
        raise SpecError(f"the bundle has {len(inputs)} inputs and {len(outputs)} outputs", advice=_TAKEN)
    image, scores = next(iter(inputs.values())), next(iter(outputs.values()))
    if image.spatial_shape and len(image.spatial_shape) != 2:
        raise SpecError(f"the bundle reads {len(image.spatial_shape)}-D images", advice=_TAKEN)
    if image.num_channels not in (None, 1, 3):
        raise SpecError(f"the bundle reads images of {image.num_channels} channels, not 1 or 3", advice=_TAKEN)
    if scores.format == "segmentation":
        raise SpecError("the bundle segments", advice=_TAKEN)
    return image, scores


def _side(image: _Tensor) -> int | None:
    """None where the shape is a formula or not square: the graph or the spec then says it."""
    shape = set(image.spatial_shape)
    side = shape.pop() if len(shape) == 1 else None
    return side if isinstance(side, int) else None


def _range(image: _Tensor) -> tuple[float, ...] | None:
    return image.value_range if len(image.value_range) == 2 else None


def _said(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value}


def _number(key: str) -> int:
    if not key.isdecimal():
        raise SpecError(f"channel_def has a channel {key}, not a number", advice=_TAKEN)
    return int(key)


def _script(path: Path) -> torch.jit.ScriptModule:
    try:
        return torch.jit.load(path, map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise SpecError(f"{_SCRIPT} cannot be read: {first_line(error)}", advice=_TAKEN) from error


def _configured(folder: Path, config: Path) -> torch.nn.Module:
    try:
        from monai.bundle import ConfigParser
    except ImportError as error:
        raise SpecError(
            "MONAI is not installed", advice="install the extra `import`: pip install wardround[import]"
        ) from error
    try:
        parser = ConfigParser()
        parser.read_config(config)
        parser["bundle_root"] = str(folder)
        key = next((key for key in _NETWORK_KEYS if key in parser), None)
        if key is None:
            raise SpecError(f"{config.name} has no {' or '.join(_NETWORK_KEYS)}", advice=_TAKEN)
        network = parser.get_parsed_content(key).cpu()
        network.load_state_dict(_state(folder / _WEIGHTS))
    except _FOREIGN_ERRORS as error:
        raise SpecError(
            f"{config.name} gives no network with the weights of {_WEIGHTS}: {first_line(error)}", advice=_TAKEN
        ) from error
    return network.eval()


def _state(path: Path) -> Mapping[str, torch.Tensor]:
    """Tensors only: anything else in the file is refused, not unpickled."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise SpecError(
            f"{_WEIGHTS} holds more than tensors",
            advice="save the network's state_dict alone; nothing else is unpickled",
        ) from error
    return dict(state.get("model", state))


def _exported(network: torch.nn.Module, bundle: MonaiBundle, spec: ImportSpec, scratch: Path) -> Path:
    if spec.input.size is None:
        raise SpecError("the bundle's metadata names no image size", advice="say input.size in the spec")
    path = scratch / "exported.onnx"
    images = torch.zeros(2, bundle.channels, spec.input.size, spec.input.size)
    settings: dict[str, Any] = {"dynamo": True, "dynamic_shapes": ({0: torch.export.Dim("N", min=1, max=65536)},)}
    if isinstance(network, torch.jit.ScriptModule):  # torch.export takes none
        settings = {"dynamo": False, "dynamic_axes": {"image": {0: "N"}, "scores": {0: "N"}}}
    try:
        with torch.no_grad(), quiet():
            program = torch.onnx.export(
                network,
                (images,),
                path,
                input_names=["image"],
                output_names=["scores"],
                opset_version=OPSET,
                external_data=False,
                verbose=False,
                **settings,
            )
            if program is not None:  # torch.export's way: it writes where the source lies into each node
                ClearMetadataAndDocStringPass()(program.model)
                program.save(path)
    except _FOREIGN_ERRORS as error:
        raise SpecError(
            f"the bundle's network cannot be exported: {first_line(error)}",
            advice="export it yourself (python -m monai.bundle onnx_export) and put it at models/model.onnx",
        ) from error
    return path
