"""A sparse delta codec that no round has, to compare with: a box's largest changes in few bits; the rest waits in its memory.

Reads and writes arrays and bytes in memory; what the plan does not promise exactly is refused with DeltaError.
Never does I/O or draws noise: the same delta and memory give the same bytes.
Source: top-k with memory Stich 2018, Lin 2018; positions as gaps Sattler 2019; Huffman code of DEFLATE, RFC 1951.

Layout: magic · float32 smallest · float32 step · DEFLATE of the gaps' classes · DEFLATE of the values' symbols · the
gaps' low bits. How many values there are and their bits follow from the plan, so a payload cannot say otherwise. A gap
is written as its two highest bits, which the Huffman code shortens by how often they come, and its lower bits, which
are as good as random. On deltas of the hybrid this is 1 to 3 % longer than the arithmetic code of `constriction`;
zstandard and lzma of gaps as bytes are 3 to 10 % longer than that (7,313 to 731 of 731,304 coordinates).
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models import huffman
from models.delta import Arrays
from models.errors import DeltaError

Vector = NDArray[np.float32]
Whole = NDArray[np.int64]

MAGIC = b"WRS1"
MIN_VALUE_BITS, MAX_VALUE_BITS = 2, 8
_SCALE = struct.Struct("<ff")
_FLOAT32_ERROR = 1e-6  # of the largest value: rounding of the smallest, the step and their sum
_LARGEST = float(np.finfo(np.float32).max) / 256
_PAIRED_BITS = 4  # two symbols share a byte up to here, so that the code may give one less than a bit
_REFUSED = "the sender's software or its base bundle differs from this one's; compare the versions"
_PLAN = "correct the round's plan"


@dataclass(frozen=True)
class Sparsity:
    """What the plan says of a sparse round. Raises DeltaError where it cannot be.

    share: part of all coordinates together that a box sends, 0 < share <= 1. value_bits: of each, its sign among them.
    """

    share: float
    value_bits: int = MIN_VALUE_BITS

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise DeltaError(f"a share of {self.share}, not above 0 and at most 1", advice=_PLAN)
        if not MIN_VALUE_BITS <= self.value_bits <= MAX_VALUE_BITS:
            raise DeltaError(
                f"values of {self.value_bits} bits, not {MIN_VALUE_BITS} to {MAX_VALUE_BITS}", advice=_PLAN
            )

    def kept(self, size: int) -> int:
        """Coordinates sent of `size`."""
        return min(size, max(1, round(self.share * size)))

    @property
    def levels(self) -> int:
        """Magnitudes a value may have."""
        return 1 << (self.value_bits - 1)


def encode(
    delta: Mapping[str, NDArray[np.floating]], sparsity: Sparsity, clip_norm: float, memory: Vector | None = None
) -> tuple[bytes, Vector | None]:
    """One box's payload, and the memory for its next round; without memory, what is not sent is forgotten.

    A first memory is `np.zeros(size_of(shapes), np.float32)`. What is sent + the new memory = clipped delta + memory, so
    the new one replaces the old only once the payload is in a sum. The delta is clipped first, and what exceeds the
    clip is gone; what is sent is never longer than the clip either, and what exceeds it only with the memory waits.
    Raises DeltaError on a delta or a memory that is not finite or has another shape.
    """
    if not 0.0 < clip_norm < math.inf:
        raise DeltaError(f"a clip norm of {clip_norm}", advice=_PLAN)
    vector = _flatten(delta)
    norm = _norm(vector)
    if norm > clip_norm:
        vector *= np.float32(clip_norm / norm)
    if memory is not None:
        vector += _checked_memory(memory, vector.size)
    places = _largest(vector, sparsity.kept(vector.size))
    smallest, step, levels = _quantise(np.abs(vector[places]), sparsity.levels, clip_norm)
    is_negative = np.signbit(vector[places])
    payload = b"".join([MAGIC, _SCALE.pack(smallest, step), _pack(places, levels, is_negative, sparsity)])
    if memory is None:
        return payload, None
    vector[places] -= _values(smallest, step, levels, is_negative)
    return payload, vector


def decode(payload: bytes, shapes: Mapping[str, tuple[int, ...]], sparsity: Sparsity) -> Arrays:
    """Exactly the tensors of `shapes`, float32, zero where nothing was sent. Raises DeltaError on anything else.

    Memory: at most 100 bytes for each coordinate of the delta, whatever the payload says.
    """
    size = size_of(shapes)
    start = len(MAGIC) + _SCALE.size
    if len(payload) < start or payload[: len(MAGIC)] != MAGIC:
        raise DeltaError("not a sparse delta of a version this software knows", advice=_REFUSED)
    smallest, step = _SCALE.unpack_from(payload, len(MAGIC))
    if not (0.0 <= smallest <= _LARGEST and 0.0 <= step <= _LARGEST):
        raise DeltaError(
            "the delta's scale is not finite", advice="the sender's training diverged; its update is left out"
        )
    places, levels, is_negative = _unpack(payload[start:], size, sparsity)
    vector = np.zeros(size, np.float32)
    vector[places] = _values(smallest, step, levels, is_negative)
    return _cut(vector, shapes)


def size_of(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Coordinates of the delta, and of the memory. Raises DeltaError where there is none."""
    size = sum(math.prod(shape) for shape in shapes.values())
    if size < 1 or any(length < 0 for shape in shapes.values() for length in shape):
        raise DeltaError("there is no weight to send", advice=_PLAN)
    return size


def error_bound(norm: float, largest: float, size: int, sparsity: Sparsity) -> float:
    """L2 bound of delta + memory less what is sent of it, for this norm and largest magnitude within the clip.

    The places left out hold at most 1 - kept/size of the norm squared, as the largest are kept (Stich 2018, 2.2). A value
    that is kept errs by half a step at most, and a step is at most the largest magnitude over the levels but one. As no
    value errs by more than itself either, the bound is never above the norm: memory stays finite.
    """
    kept = sparsity.kept(size)
    left_out = math.sqrt(1.0 - kept / size) * norm
    rounding = math.sqrt(kept) * largest / (2.0 * (sparsity.levels - 1))
    return min(math.hypot(left_out, rounding), norm) + _FLOAT32_ERROR * math.sqrt(size) * largest


def _flatten(delta: Mapping[str, NDArray[np.floating]]) -> Vector:
    parts = []
    for name in sorted(delta):
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused
            part = np.asarray(delta[name]).astype(np.float32).ravel()
        if not np.isfinite(part).all():
            raise DeltaError(f"{name} is not finite", advice="lower the learning rate")
        parts.append(part)
    size_of({name: value.shape for name, value in delta.items()})
    return np.concatenate(parts)


def _cut(vector: Vector, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    delta: Arrays = {}
    offset = 0
    for name in sorted(shapes):
        count = math.prod(shapes[name])
        delta[name] = vector[offset : offset + count].reshape(shapes[name])
        offset += count
    return delta


def _checked_memory(memory: Vector, size: int) -> Vector:
    forget = "start again with a memory of zeros"
    if memory.shape != (size,) or memory.dtype != np.float32:
        raise DeltaError(f"a memory of shape {memory.shape}, not of {size} float32", advice=forget)
    if not math.isfinite(_norm(memory)):
        raise DeltaError("the memory is not finite", advice=forget)
    return memory


def _norm(vector: Vector) -> float:
    return math.sqrt(float(np.sum(np.square(vector, dtype=np.float64))))


def _largest(vector: Vector, kept: int) -> Whole:
    """Places of the largest magnitudes, ascending."""
    places = np.argpartition(np.abs(vector), vector.size - kept)[vector.size - kept :]
    return np.sort(places).astype(np.int64)


def _quantise(magnitudes: Vector, levels: int, clip_norm: float) -> tuple[float, float, Whole]:
    """Smallest, step, and for each magnitude its nearest level; smallest and step shrunk until all are within the clip."""
    smallest = float(magnitudes.min())
    step = float(np.float32((float(magnitudes.max()) - smallest) / (levels - 1)))
    if not math.isfinite(smallest + step * levels) or smallest + step * levels > _LARGEST:
        raise DeltaError("the delta is too large to send", advice="lower the learning rate or the clip norm")
    chosen = np.zeros(magnitudes.size, np.int64)
    if step > 0.0:
        chosen = np.clip(np.rint((magnitudes.astype(np.float64) - smallest) / step), 0, levels - 1).astype(np.int64)
    norm = math.sqrt(float(np.sum(np.square(smallest + step * chosen.astype(np.float64)))))
    within = min(1.0, clip_norm / norm) if norm > 0.0 else 1.0
    return float(np.float32(smallest * within)), float(np.float32(step * within)), chosen


def _values(smallest: float, step: float, levels: Whole, is_negative: NDArray[np.bool_]) -> Vector:
    """What both sides make of the same levels."""
    magnitudes = (np.float64(smallest) + np.float64(step) * levels).astype(np.float32)
    return np.where(is_negative, -magnitudes, magnitudes)


def _pack(places: Whole, levels: Whole, is_negative: NDArray[np.bool_], sparsity: Sparsity) -> bytes:
    symbols = (levels * 2 + is_negative).astype(np.uint8)
    if sparsity.value_bits <= _PAIRED_BITS:
        symbols = np.append(symbols, np.zeros(symbols.size % 2, np.uint8))
        symbols = (symbols[0::2] | symbols[1::2] << _PAIRED_BITS).astype(np.uint8)
    classes, low_bits = _split(np.diff(places, prepend=-1) - 1)
    return b"".join([huffman.encode(classes), huffman.encode(symbols), np.packbits(low_bits).tobytes()])


def _unpack(body: bytes, size: int, sparsity: Sparsity) -> tuple[Whole, Whole, NDArray[np.bool_]]:
    """Places, levels and signs, each checked against what the plan allows."""
    kept = sparsity.kept(size)
    is_paired = sparsity.value_bits <= _PAIRED_BITS
    classes, body = huffman.decode(body, kept)
    symbols, body = huffman.decode(body, -(-kept // 2) if is_paired else kept)
    if is_paired:
        symbols = np.stack([symbols & 15, symbols >> _PAIRED_BITS], 1).astype(np.uint8).ravel()
        if symbols[kept:].any():
            raise DeltaError("a value follows the last", advice=_REFUSED)
    symbols = symbols[:kept]
    if int(symbols.max()) >= 2 * sparsity.levels:
        raise DeltaError(f"a value of more than {sparsity.value_bits} bits", advice=_REFUSED)
    places = _placed(classes, body, size)
    return places, (symbols >> 1).astype(np.int64), (symbols & 1).astype(np.bool_)


def _placed(classes: NDArray[np.uint8], low: bytes, size: int) -> Whole:
    places = np.cumsum(_joined(classes, low, size) + 1) - 1
    if int(places[-1]) >= size:
        raise DeltaError("a position beyond the last weight", advice=_REFUSED)
    return places


def _split(gaps: Whole) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """gap + 2 as a class, of its bit length and its second highest bit, and the bits below these, one each."""
    numbers = gaps + 2
    lengths = np.frexp(numbers.astype(np.float64))[1].astype(np.int64) - 2  # of the low bits
    classes = lengths * 2 + (numbers >> lengths) - 2
    owner, height = _spread(lengths)
    return classes.astype(np.uint8), (numbers[owner] >> height & 1).astype(np.uint8)


def _joined(classes: NDArray[np.uint8], low: bytes, size: int) -> Whole:
    """The gaps; the inverse of _split. Raises DeltaError on positions that cannot be, or bits too few or too many."""
    lengths = classes.astype(np.int64) >> 1
    if int(lengths.max()) > (size + 1).bit_length() - 2:
        raise DeltaError("a position beyond the last weight", advice=_REFUSED)
    numbers = (classes.astype(np.int64) % 2 + 2) << lengths
    if int(numbers.sum()) - lengths.size > size:  # before the low bits, which it bounds
        raise DeltaError("a position beyond the last weight", advice=_REFUSED)
    count = int(lengths.sum())
    if len(low) != -(-count // 8):
        raise DeltaError("the positions are cut short or something follows them", advice=_REFUSED)
    bits = np.unpackbits(np.frombuffer(low, np.uint8))
    if bits[count:].any():
        raise DeltaError("something follows the positions", advice=_REFUSED)
    owner, height = _spread(lengths)
    numbers += np.bincount(owner, bits[:count] * np.exp2(height), minlength=lengths.size).astype(np.int64)
    return numbers - 2


def _spread(lengths: Whole) -> tuple[Whole, Whole]:
    """For each low bit of all numbers, highest first: whose it is, and its height in it."""
    owner = np.repeat(np.arange(lengths.size), lengths)
    height = np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(owner.size)
    return owner, height
