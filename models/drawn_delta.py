"""The delta codec of open rounds that move drawn coordinates: few bits a value, rounded stochastically, entropy coded.

Reads and writes arrays and bytes in memory.
Never does I/O or draws unseeded noise; a payload that is not exactly what the plan promises is refused with DeltaError.
Source: QSGD (Alistarh 2017), one step for each tensor; Huffman code of DEFLATE, RFC 1951.

Layout: magic · float32 step of each tensor that has a chosen coordinate, by name · DEFLATE of the levels, several to a byte.
Names, shapes, places and how many values there are follow from the plan and its base, so a payload cannot say otherwise.

A level is a whole number from -levels to levels and stands for as many steps. A step is the tensor's largest magnitude over
the levels: each coordinate errs by less than a step, half a step at most root mean square over seeds, and by nothing in
expectation, as long as what is sent stays within the clip norm; beyond it all of it is shrunk onto the clip, as the hub
would. There is no error feedback: the box trained nothing but the chosen coordinates, so there is no rest to send
later, and the next round chooses others.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from models import huffman
from models.delta import Arrays
from models.drawn import PLAN_ADVICE, Drawn
from models.errors import DeltaError

Vector = NDArray[np.float32]

MAGIC = b"WRD2"
MIN_VALUE_BITS, MAX_VALUE_BITS = 2, 8
FLOAT32_ERROR = 1e-6  # of a tensor's largest magnitude: rounding of a step, and of a step times a level
_STEP = np.dtype("<f4")
_LARGEST_STEP = float(np.finfo(np.float32).max) / 256
_BYTE = 1 << 8
_REFUSED = "the sender's software or its base bundle differs from this one's; compare the versions"


def error_bound(largest: float, count: int, value_bits: int) -> float:
    """L2 bound of one tensor's error, root mean square over seeds; at worst it is twice that.

    largest: magnitude among the tensor's chosen coordinates. count: how many these are.
    """
    return largest * math.sqrt(count) * (0.5 / _levels(value_bits) + FLOAT32_ERROR)


@dataclass(frozen=True)
class DrawnCodec:
    """What both sides know of an open round's payloads. Raises DeltaError where it cannot be.

    value_bits: of each value before the entropy code, its sign among them.
    """

    drawn: Drawn
    value_bits: int
    clip_norm: float

    def __post_init__(self) -> None:
        if not MIN_VALUE_BITS <= self.value_bits <= MAX_VALUE_BITS:
            raise DeltaError(
                f"values of {self.value_bits} bits in an open round, not {MIN_VALUE_BITS} to {MAX_VALUE_BITS}",
                advice=PLAN_ADVICE,
            )
        if not 0.0 < self.clip_norm < math.inf:
            raise DeltaError(f"a clip norm of {self.clip_norm}", advice=PLAN_ADVICE)

    @property
    def payload_bytes_max(self) -> int:
        """No payload that `encode` gives is longer: what does not shrink is stored, with five bytes for each block."""
        return self._begin + self._packed + self._packed // 1024 + 64

    def encode(self, delta: Mapping[str, NDArray[np.floating]], seed: int) -> bytes:
        """One box's payload; what is decoded of it is never longer than the clip norm, but for float32 rounding.

        Raises DeltaError on a delta that is not finite, has other tensors, or moves a coordinate that was not chosen.
        """
        vector = self._flatten(delta)
        self.drawn.check_alone(delta)
        chosen = vector[self._places]
        steps = _steps(np.maximum.reduceat(np.abs(chosen), self._begins), self.levels)
        exact = np.divide(chosen, self._spread(steps), out=np.zeros(chosen.size), where=chosen != 0, dtype=np.float64)
        levels = np.floor(exact + np.random.default_rng(seed).random(exact.size)).astype(np.int64)
        sent = _norm(self._spread(steps) * levels)
        if sent > self.clip_norm:
            steps = (steps * (self.clip_norm / sent)).astype(_STEP)
        return b"".join([MAGIC, steps.tobytes(), huffman.encode(self._pack(levels))])

    def decode(self, payload: bytes) -> Arrays:
        """Exactly the round's tensors, float32, zero where the round moves nothing. Raises DeltaError on anything else.

        Whatever the payload says, it unpacks to one byte more than the plan promises at most.
        """
        if len(payload) > self.payload_bytes_max:
            raise DeltaError(
                f"a delta of {len(payload)} bytes, at most {self.payload_bytes_max} are needed", advice=_REFUSED
            )
        if len(payload) < self._begin or payload[: len(MAGIC)] != MAGIC:
            raise DeltaError("not a delta of drawn weights of a version this software knows", advice=_REFUSED)
        steps = np.frombuffer(payload, _STEP, len(self._begins), len(MAGIC))
        if not bool(np.all((steps >= 0.0) & (steps <= _LARGEST_STEP))):  # false for NaN
            raise DeltaError(
                "the delta's steps are not finite", advice="the sender's training diverged; its update is left out"
            )
        packed, rest = huffman.decode(payload[self._begin :], self._packed)
        if rest:
            raise DeltaError(f"{len(rest)} bytes follow the last value", advice=_REFUSED)
        levels = self._unpack(packed)
        vector = np.zeros(self.drawn.size, np.float32)
        vector[self._places] = self._spread(steps) * levels
        return self.drawn.cut(vector)

    @property
    def levels(self) -> int:
        """Largest level."""
        return _levels(self.value_bits)

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        """Of the chosen coordinates, tensor by tensor."""
        return np.flatnonzero(np.concatenate([mask.ravel() for mask in self.drawn.masks().values()]))

    @cached_property
    def _counts(self) -> NDArray[np.int64]:
        """Chosen coordinates of each tensor that has some."""
        counts = np.array([np.count_nonzero(mask) for mask in self.drawn.masks().values()], np.int64)
        return counts[counts > 0]

    @cached_property
    def _begins(self) -> NDArray[np.int64]:
        """Of those tensors, among the chosen coordinates."""
        return np.asarray(np.cumsum(self._counts) - self._counts, np.int64)

    @cached_property
    def _begin(self) -> int:
        """Of the levels, in the payload."""
        return len(MAGIC) + _STEP.itemsize * len(self._counts)

    @cached_property
    def _to_a_byte(self) -> int:
        """Levels: a Huffman code gives a whole number of bits to a symbol, so that several share one."""
        return int(math.log(_BYTE) / math.log(2 * self.levels + 1))

    @property
    def _packed(self) -> int:
        """Bytes before the entropy code."""
        return -(-self.drawn.chosen // self._to_a_byte)

    @cached_property
    def _powers(self) -> NDArray[np.int64]:
        return np.asarray((2 * self.levels + 1) ** np.arange(self._to_a_byte), np.int64)

    def _spread(self, steps: Vector) -> Vector:
        return np.repeat(steps, self._counts)

    def _flatten(self, delta: Mapping[str, NDArray[np.floating]]) -> Vector:
        shapes = self.drawn.shapes
        if delta.keys() != shapes.keys() or any(delta[name].shape != tuple(shapes[name]) for name in shapes):
            raise DeltaError("the delta does not hold the round's tensors", advice=_REFUSED)
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused
            vector = np.concatenate([np.asarray(delta[name], np.float32).ravel() for name in self.drawn.names])
        if not np.isfinite(vector).all() or float(np.max(np.abs(vector))) > _LARGEST_STEP:
            raise DeltaError("the delta is not finite or too large to send", advice="lower the learning rate")
        return vector

    def _pack(self, levels: NDArray[np.int64]) -> NDArray[np.uint8]:
        padded = np.zeros(self._packed * self._to_a_byte, np.int64)
        padded[: levels.size] = levels
        symbols = (padded + self.levels).reshape(-1, self._to_a_byte)
        return (symbols @ self._powers).astype(np.uint8)

    def _unpack(self, packed: NDArray[np.uint8]) -> NDArray[np.int8]:
        base = 2 * self.levels + 1
        if int(packed.max()) >= base**self._to_a_byte:
            raise DeltaError(f"a value of more than {self.value_bits} bits", advice=_REFUSED)
        symbols = packed[:, None] // self._powers % base
        levels = (symbols - self.levels).astype(np.int8).ravel()
        if levels[self.drawn.chosen :].any():
            raise DeltaError("a value follows the last", advice=_REFUSED)
        return levels[: self.drawn.chosen]


def _levels(value_bits: int) -> int:
    return (1 << (value_bits - 1)) - 1


def _steps(largest: Vector, levels: int) -> Vector:
    """The smallest float32 steps of which `levels` reach each largest magnitude."""
    steps = (largest.astype(np.float64) / levels).astype(_STEP)
    is_short = steps.astype(np.float64) * levels < largest
    return np.where(is_short, np.nextafter(steps, np.float32(np.inf), dtype=np.float32), steps).astype(_STEP)


def _norm(vector: NDArray[np.floating]) -> float:
    return math.sqrt(float(np.sum(np.square(vector, dtype=np.float64))))
