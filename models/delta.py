"""The delta codec: what fine-tuning changed, clipped, quantised to 8 bits, and back.

Reads and writes arrays and bytes in memory.
Never does I/O or draws unseeded noise; a payload that is not exactly what is expected is refused with DeltaError.
Source: stochastic rounding as in QSGD (Alistarh 2017). Layout: magic · u32 header length · header (MessagePack) · int8 values.
"""

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from models.errors import DeltaError

Arrays = dict[str, NDArray[np.float32]]
Trainable = Literal["all", "heads", "norms", "adapters"]

MAGIC = b"WRD1"
MAX_HEADER_BYTES = 1 << 20
_LEVELS = 127
_CHUNK = 1 << 15  # values handled at once
_HEADER_LENGTH = struct.Struct("<I")
_REFUSED = "the sender's software or its base bundle differs from this one's; compare the versions"

FIXED_PREFIX = "ood_"  # statistics of the training features: never trained, never sent
HEAD_PREFIX = "head."
ADAPTED = ("context",)  # parts of a name: the transformer, whose linear layers get low-rank adapters


class _Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    name: str
    shape: tuple[Annotated[int, Meta(ge=0)], ...]
    scale: Annotated[float, Meta(ge=0.0)]  # value of one level


def trainable_names(names: Iterable[str], trainable: Trainable) -> tuple[str, ...]:
    """The weights a round may change, sorted. The head is always among them."""
    learned = sorted(name for name in names if not name.startswith(FIXED_PREFIX))
    return tuple(name for name in learned if name.startswith(HEAD_PREFIX) or _is_chosen(name, trainable))


def is_norm(name: str) -> bool:
    """Whether a weight belongs to a norm: what FedBN keeps at the site (Li 2021)."""
    return any("norm" in part for part in name.split("."))


def _is_chosen(name: str, trainable: Trainable) -> bool:
    if trainable == "adapters":  # the linear layers' matrices
        is_transformer = any(part in ADAPTED for part in name.split("."))
        return is_transformer and name.endswith(".weight") and not is_norm(name)
    return trainable == "all" or (trainable == "norms" and is_norm(name))


def subtract(
    after: Mapping[str, NDArray[np.float32]], before: Mapping[str, NDArray[np.float32]], names: Iterable[str]
) -> Arrays:
    """after - before for `names`; raises DeltaError where they do not fit or are not finite."""
    delta: Arrays = {}
    for name in names:
        if name not in after or name not in before or after[name].shape != before[name].shape:
            raise DeltaError(f"{name} is not the same tensor before and after", advice=_REFUSED)
        difference = after[name].astype(np.float32) - before[name].astype(np.float32)
        if not np.isfinite(difference).all():
            raise DeltaError(f"{name} is not finite after training", advice="lower the learning rate")
        delta[name] = difference
    return delta


def norm(delta: Mapping[str, NDArray[np.float32]]) -> float:
    """L2 norm over all tensors together."""
    return float(np.sqrt(sum(float(np.sum(np.square(value, dtype=np.float64))) for value in delta.values())))


def clip(delta: Mapping[str, NDArray[np.float32]], clip_norm: float) -> tuple[Arrays, float]:
    """Scale the whole delta so that its norm is at most clip_norm; also gives the norm before."""
    norm_before = norm(delta)
    factor = np.float32(1.0 if norm_before <= clip_norm else clip_norm / norm_before)
    return {name: value * factor for name, value in delta.items()}, norm_before


def encode(delta: Mapping[str, NDArray[np.float32]], seed: int) -> bytes:
    """int8 with one scale per tensor, rounded stochastically: the expectation of what is decoded is the delta."""
    generator = np.random.default_rng(seed)
    tensors, bodies = [], []
    for name in sorted(delta):
        value = np.asarray(delta[name], np.float32)
        largest = float(np.max(np.abs(value), initial=0.0))
        if not np.isfinite(largest):
            raise DeltaError(f"{name} is not finite", advice="lower the learning rate")
        scale = largest / _LEVELS
        tensors.append(_Tensor(name, value.shape, scale))
        bodies.append(_quantise(value, scale, generator).tobytes())
    header = msgspec.msgpack.encode(tensors)
    return b"".join([MAGIC, _HEADER_LENGTH.pack(len(header)), header, *bodies])


@dataclass(frozen=True)
class Quantised(Mapping[str, NDArray[np.float32]]):
    """A delta as its payload holds it, a byte a value: a tensor becomes float32 when it is asked for, and no sooner."""

    levels: Mapping[str, NDArray[np.int8]]  # views of the payload
    steps: Mapping[str, float]  # value of one level; finite, and so are all values

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self.levels[name].astype(np.float32) * np.float32(self.steps[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.levels)

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def norm(self) -> float:
        """L2 norm over all tensors together."""
        spare = np.empty(_CHUNK, np.float32)
        return math.sqrt(sum(self.steps[name] ** 2 * _squares(each, spare) for name, each in self.levels.items()))

    def clipped(self, clip_norm: float) -> "tuple[Quantised, float]":
        """As `clip`."""
        norm_before = self.norm
        if norm_before <= clip_norm:
            return self, norm_before
        factor = clip_norm / norm_before
        return replace(self, steps={name: step * factor for name, step in self.steps.items()}), norm_before


def decode(payload: bytes, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Exactly the tensors of `shapes`, float32. Raises DeltaError on anything else."""
    return dict(read(payload, shapes))


def read(payload: bytes, shapes: Mapping[str, tuple[int, ...]]) -> Quantised:
    """As `decode`, over the payload's own bytes."""
    tensors, begin = _parse(payload)
    names = [tensor.name for tensor in tensors]
    if sorted(names) != sorted(shapes):
        odd = sorted(set(names) ^ set(shapes)) or ["a name given twice"]
        raise DeltaError(f"the delta does not hold the expected tensors: {odd[0][:80]!r}", advice=_REFUSED)
    levels: dict[str, NDArray[np.int8]] = {}
    for tensor in tensors:
        if tensor.shape != tuple(shapes[tensor.name]):
            raise DeltaError(f"{tensor.name} has shape {tensor.shape}, not {shapes[tensor.name]}", advice=_REFUSED)
        if not np.isfinite(tensor.scale * _LEVELS) or tensor.scale > float(np.finfo(np.float32).max) / 256:
            raise DeltaError(
                f"{tensor.name} is not finite", advice="the sender's training diverged; its update is left out"
            )
        count = math.prod(tensor.shape)
        if begin + count > len(payload):
            raise DeltaError(f"{tensor.name} is cut short", advice=_REFUSED)
        levels[tensor.name] = np.frombuffer(payload, np.int8, count, begin).reshape(tensor.shape)
        begin += count
    if begin != len(payload):
        raise DeltaError(f"{len(payload) - begin} bytes follow the last tensor", advice=_REFUSED)
    return Quantised(levels, {tensor.name: tensor.scale for tensor in tensors})


def apply(weights: Mapping[str, NDArray[np.float32]], delta: Mapping[str, NDArray[np.floating]]) -> Arrays:
    """weights + delta as new arrays; tensors without a delta are kept."""
    for name, change in delta.items():
        if name not in weights or weights[name].shape != change.shape:
            raise DeltaError(f"{name} is not a tensor of these weights", advice=_REFUSED)
    return {
        name: (value + delta[name]).astype(np.float32) if name in delta else value.copy()
        for name, value in weights.items()
    }


def _quantise(value: NDArray[np.float32], scale: float, generator: np.random.Generator) -> NDArray[np.int8]:
    if scale == 0.0:
        return np.zeros(value.shape, np.int8)
    levels = np.floor(value / np.float32(scale) + generator.random(value.shape, np.float32))
    return np.asarray(np.clip(levels, -_LEVELS, _LEVELS), np.int8)


def _squares(levels: NDArray[np.int8], spare: NDArray[np.float32]) -> float:
    """Their sum, a few at a time in the processor's cache. Exact to float32's rounding of one part's."""
    flat, total = levels.reshape(-1), 0.0
    for begin in range(0, flat.size, _CHUNK):
        part = spare[: min(_CHUNK, flat.size - begin)]
        np.copyto(part, flat[begin : begin + _CHUNK])
        total += float(np.dot(part, part))
    return total


def _parse(payload: bytes) -> tuple[list[_Tensor], int]:
    """The header, and where the values begin."""
    start = len(MAGIC) + _HEADER_LENGTH.size
    if len(payload) < start or payload[: len(MAGIC)] != MAGIC:
        raise DeltaError("not a delta of a version this software knows", advice=_REFUSED)
    (length,) = _HEADER_LENGTH.unpack_from(payload, len(MAGIC))
    if length > MAX_HEADER_BYTES or start + length > len(payload):
        raise DeltaError("the delta's header is cut short or too long", advice=_REFUSED)
    try:
        tensors = msgspec.msgpack.decode(payload[start : start + length], type=list[_Tensor])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DeltaError(f"the delta's header is not valid: {error}", advice=_REFUSED) from error
    return tensors, start + length
