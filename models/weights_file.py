"""The weights of a bundle on disk, a tensor at a time: their shapes, and the file of the weights that a change makes of them.

Reads the stored member of a bundle that was checked before (its digest tells); writes a safetensors file.
Never holds more than one tensor, whatever the size of the network.
Source: safetensors' format: u64 length · JSON header · the tensors one after the other.
"""

import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from models.bundle import WEIGHTS, ZIP_ERRORS
from models.errors import BundleError, DeltaError

MAX_HEADER_BYTES = 1 << 24
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_REFUSED = "do not use this file; fetch the bundle again"
_FLOAT32 = np.dtype("<f4")
Position = Annotated[int, Meta(ge=0)]


class _Tensor(msgspec.Struct, frozen=True):
    dtype: Literal["F32"]
    shape: tuple[Position, ...]
    data_offsets: tuple[Position, Position]


@dataclass(frozen=True)
class _Header:
    written: bytes  # with its length in front: equal tensors have an equal header
    tensors: Mapping[str, _Tensor]  # in the order of the file


def shapes(bundle: Path) -> dict[str, tuple[int, ...]]:
    """Of all weights. Raises BundleError where they cannot be read."""
    with _opened(bundle) as member:
        return {name: tensor.shape for name, tensor in _header(member, bundle).tensors.items()}


def write_moved(bundle: Path, change: Mapping[str, NDArray[np.float32]], out: Path) -> None:
    """weights + change; tensors without a change are kept. Not synced.

    Raises BundleError where the bundle cannot be read, DeltaError where the change does not fit its weights.
    """
    with _opened(bundle) as member, out.open("wb") as file:
        header = _header(member, bundle)
        for name in change:
            if name not in header.tensors or change[name].shape != header.tensors[name].shape:
                raise DeltaError(f"{name} is not a tensor of these weights", advice="compare the versions")
        file.write(header.written)
        for name, tensor in header.tensors.items():
            values = np.frombuffer(bytearray(_exactly(member, 4 * prod(tensor.shape), bundle)), _FLOAT32)
            if name in change:
                values += change[name].reshape(-1)
            file.write(values.data)


@contextmanager
def _opened(bundle: Path) -> Iterator[IO[bytes]]:
    """What is written meanwhile may fail for reasons of its own: those are not the bundle's."""
    with ExitStack() as stack:
        with _reading(bundle):
            member = stack.enter_context(stack.enter_context(zipfile.ZipFile(bundle)).open(WEIGHTS))
        yield member


@contextmanager
def _reading(bundle: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, *ZIP_ERRORS) as error:
        raise BundleError(f"{bundle.name} cannot be read: {error}", advice=_REFUSED) from error


def _header(member: IO[bytes], bundle: Path) -> _Header:
    (length,) = _LENGTH.unpack(_exactly(member, _LENGTH.size, bundle))
    if length > MAX_HEADER_BYTES:
        raise BundleError(f"the weights of {bundle.name} have a header of {length} bytes", advice=_REFUSED)
    text = _exactly(member, length, bundle)
    try:
        parts = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        found = {name: msgspec.json.decode(part, type=_Tensor) for name, part in parts.items() if name != _METADATA}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"the weights of {bundle.name} cannot be read: {error}", advice=_REFUSED) from error
    tensors = dict(sorted(found.items(), key=lambda item: item[1].data_offsets))
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * prod(tensor.shape)
        if tensor.data_offsets != (begin, end):
            raise BundleError(f"{name} of {bundle.name} is not where its shape says", advice=_REFUSED)
    return _Header(_LENGTH.pack(length) + text, tensors)


def _exactly(member: IO[bytes], count: int, bundle: Path) -> bytes:
    with _reading(bundle):
        content = member.read(count)
    if len(content) != count:
        raise BundleError(f"the weights of {bundle.name} are cut short", advice=_REFUSED)
    return content
