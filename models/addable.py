"""The addable delta codec: words modulo 2^16 or 2^32 whose sum over the boxes decodes to the mean delta.

Reads and writes arrays in memory: one word of weight, then two's complement levels of the chosen, rotated coordinates.
Never does I/O; what does not fit the layout is refused with DeltaError.
Source: rotation Suresh 2017, its two stages Andoni 2015; rounding Alistarh 2017; memory Seide 2014, Stich 2018; noise
Agarwal, Kairouz, Liu 2021.

The order is choose, train, then rotate. Every box draws the same coordinates of the round (models.drawn), trains those
alone, and only those are rotated, so that all have one known spread and one step fits all. Choosing after training loses
what the others learned: 34 to 42 points of accuracy on two sets (benchmarks.bytes). Choosing after rotating would smear
what is not sent over every weight as noise, mix the memory anew each round and cost 1/share as much.

Nothing is scaled up by 1/share. Without memory a round moves the chosen coordinates by exactly what the boxes learned
there: coordinate descent. The memory is for deltas of all coordinates, which no box sends: with it the rest waits 1/share
rounds on average and its changes add up, though every round trained from weights they had not reached: at full size a local step above about
`share` of the way diverges. `Layout.feedback_rate` is the rate at which one of the whole way converges fastest and what
waits stays within the clip norm, so that the step holds for it too. A quadratic loss, 8 boxes, share 1/16, 400 rounds:
with memory local steps of 0.1 and more diverged at full size and none did at this rate; no memory was as fast or faster
for every step, and only under noise, at steps of 0.3 and more, did memory end nearer.

With noise every box weighs the same, and no draw of the rounding makes its values longer than the layout says. The memory
knows nothing of the noise: what it kept of it, it would take back from the next sum.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from models import noise
from models.delta import Arrays
from models.drawn import PLAN_ADVICE
from models.errors import DeltaError
from models.layout import FLOAT32_ERROR, WEIGHT_LEVELS
from models.layout import Layout as Layout
from models.layout import value_bits_for as value_bits_for

Vector = NDArray[np.float32]
Words = NDArray[np.unsignedinteger]

ROUNDINGS = 100  # then toward zero; one in three is within the norm at least, so this happens never
_SPREADS_ABOVE = 18.0  # of an honest mean's error above its norm's mean: t = 9 levels of half a spread each
_CHUNK = 1 << 16  # coordinates handled at once: stays in the processor's cache
_TRANSFORMS = 64  # done at once: scratch of 64 blocks, 1 MiB for 5 M coordinates, and as fast as all at once
_DIFFERS = "the two sides' plans or software differ; compare the versions"


def encode(
    delta: Mapping[str, NDArray[np.floating]],
    layout: Layout,
    weight_share: float,
    generator: np.random.Generator,
    memory: Vector | None = None,
    random_bytes: noise.RandomBytes = os.urandom,
) -> tuple[Words, Vector | None]:
    """One box's words, and the memory for its next round; without memory, what is not sent is forgotten.

    A first memory is `np.zeros(layout.size, np.float32)`. What is sent + the new memory = feedback_rate · clipped delta +
    memory, so the new one replaces the old only once the words are in a sum. The delta is clipped first, and what exceeds the clip
    is gone, as in open rounds; what exceeds it only together with the memory stays in the memory.
    weight_share: this box's weight over the largest allowed, 0 < weight_share <= 1; 1 with noise. generator: the box's
    own, for the rounding. random_bytes: for the noise; what could be predicted could be taken off again.
    Raises DeltaError on a delta or a memory that is not finite or has another shape.
    """
    if not 0.0 < weight_share <= 1.0:
        raise DeltaError(f"a weight share of {weight_share}", advice="compare the box's examples with the plan's limit")
    if layout.noise and weight_share != 1.0:
        raise DeltaError(
            f"a weight share of {weight_share} in a round with noise: all weigh the same", advice=PLAN_ADVICE
        )
    weight = max(1, round(WEIGHT_LEVELS * weight_share))
    vector = _flatten(delta, layout)
    factor = min(1.0, layout.clip_norm / max(_norm(vector), layout.clip_norm))
    if memory is not None:
        factor *= layout.feedback_rate
    if factor != 1.0:
        vector *= np.float32(factor)
    if memory is not None:
        vector += _checked_memory(memory, layout)
    within = layout.clip_norm / max(_norm(vector), layout.clip_norm)
    places = layout.places
    rotated = np.zeros(layout.padded, np.float32)
    np.multiply(vector[places], np.float32(within), out=rotated[: layout.chosen])
    _rotate(rotated, layout)
    words = np.empty(layout.word_count, layout.word_type)
    words[0] = weight
    values = words[1:].view(_signed(layout))
    if layout.noise:
        _quantise_within(rotated, values, layout, generator)
    else:
        _quantise(rotated, values, weight, layout, generator)
    if memory is not None:
        vector[places] -= _restore(values, weight, layout)
    if layout.noise:
        _add_noise(values, layout, random_bytes)
    return words, vector if memory is not None else None


def decode_sum(sum_words: NDArray[np.integer], layout: Layout, boxes: int | None = None) -> Arrays:
    """Mean delta of the boxes whose words were added, weighted by their weight levels; zero where nothing was sent.

    Takes the words modulo 2^word_bits, or the same sum as signed integers (word_bits or 64 bits). boxes: whose words they
    are, where that is known; then a mean that so many honest boxes cannot have is refused too: false weights, or no clipping.
    Raises DeltaError on another length or type, no weight, or a sum that no boxes could have: masks that did not cancel.
    """
    words = np.asarray(sum_words)
    if words.shape != (layout.word_count,):
        raise DeltaError(f"a sum of shape {words.shape}, not {layout.word_count} words", advice=_DIFFERS)
    if words.dtype == layout.word_type:
        values: NDArray[np.signedinteger] = words[1:].view(_signed(layout))
    elif words.dtype in (_signed(layout), np.dtype(np.int64)):
        values = words[1:]
    else:
        raise DeltaError(f"a sum of {words.dtype}, not of {layout.word_type}", advice=_DIFFERS)
    weight = int(words[0])
    if weight < 0 and words.dtype == _signed(layout):
        weight += 1 << layout.word_bits
    most = layout.most_in_sum
    if not _could_weigh(weight, layout, boxes):
        raise DeltaError(f"a sum of weight {weight}", advice="drop the round: its sum is not one of its boxes")
    if int(values.max()) > most or int(values.min()) < -most:
        raise DeltaError("a sum beyond its boxes' levels", advice="drop the round: its sum is not one of its boxes")
    vector = _restore(values, weight, layout)
    if layout.chosen != layout.size:
        chosen, vector = vector, np.zeros(layout.size, np.float32)
        vector[layout.places] = chosen
    if boxes is not None and (norm := _norm(vector)) > (allowed := norm_bound(layout, boxes, weight)):
        raise DeltaError(
            f"a mean of norm {norm:.4g}, and honest boxes give {allowed:.4g} at most",
            advice="one of the boxes did not clip or lied about its weight; which one, nobody can see",
        )
    return layout.drawn.cut(vector)


def norm_bound(layout: Layout, boxes: int, weight: int) -> float:
    """L2 norm that the decoded mean of so many honest boxes, of this weight together, never exceeds: a chance below 1e-15.

    Each box's delta is within the clip norm, and rounding errs by at most one level and a variance of a quarter: the norm of
    all errors is convex in them and exceeds its mean by t levels·√boxes with a chance of exp(-t²/2) (Talagrand; Boucheron 2013,
    Theorem 6.10), here t = 9. With noise the rounded values are within their own norm, and the noise is added: its tail is
    nearly a normal one's, where 18 spreads above √values are rarer still.
    """
    variance = layout.noise_variance if layout.noise else 0.25
    clipped = layout.step * math.sqrt(layout.most_norm_squared) if layout.noise else layout.clip_norm
    spread = layout.step * math.sqrt(variance * boxes) * WEIGHT_LEVELS / weight
    return (clipped + spread * (math.sqrt(layout.padded) + _SPREADS_ABOVE)) * (1.0 + 4.0 * FLOAT32_ERROR)


def error_bound(layout: Layout, boxes: int, weight_share: float = 1.0) -> float:
    """L2 bound of the decoded mean's error, root mean square over seeds, for boxes of this mean weight share.

    For deltas of the chosen coordinates alone and no memory, against the mean by weight levels. Rounding: a variance of at
    most step²/4 per value and box, independent; noise adds its own. Clamping: a rotated coordinate is sub-Gaussian, P(|z| > c) <= 2·exp(-c²/2) (Hoeffding 1963), so
    E[(|z| - c)²+] <= 4·exp(-c²/2)/c² of the clip norm squared; it may hit all boxes alike.
    """
    variance = 0.25 + (layout.noise_variance if layout.noise else 0)
    rounding = layout.step * math.sqrt(variance * layout.padded / boxes) / weight_share
    clamping = 2.0 * math.exp(-(layout.spreads**2) / 4.0) / layout.spreads
    return rounding + (clamping + FLOAT32_ERROR) * layout.clip_norm


def _could_weigh(weight: int, layout: Layout, boxes: int | None) -> bool:
    most = WEIGHT_LEVELS * (boxes or layout.boxes)
    if layout.noise and boxes is not None:
        return weight == most
    return (boxes or 1) <= weight <= most and not (layout.noise and weight % WEIGHT_LEVELS)


def _flatten(delta: Mapping[str, NDArray[np.floating]], layout: Layout) -> Vector:
    if delta.keys() != layout.shapes.keys():
        odd = sorted(delta.keys() ^ layout.shapes.keys())
        raise DeltaError(f"the delta does not hold the round's tensors: {odd[0]}", advice=_DIFFERS)
    vector = np.empty(layout.size, np.float32)
    offset = 0
    for name in layout.names:
        value = np.asarray(delta[name])
        if value.shape != tuple(layout.shapes[name]):
            raise DeltaError(f"{name} has shape {value.shape}, not {layout.shapes[name]}", advice=_DIFFERS)
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused below
            vector[offset : offset + value.size] = value.ravel()
        if not np.isfinite(vector[offset : offset + value.size]).all():
            raise DeltaError(f"{name} is not finite", advice="lower the learning rate")
        offset += value.size
    return vector


def _checked_memory(memory: Vector, layout: Layout) -> Vector:
    forget = "start again with a memory of zeros"
    if memory.shape != (layout.size,) or memory.dtype != np.float32:
        raise DeltaError(f"a memory of shape {memory.shape}, not of {layout.size} float32", advice=forget)
    if not math.isfinite(_norm(memory)):
        raise DeltaError("the memory is not finite", advice=forget)
    return memory


def _norm(vector: Vector) -> float:
    return math.sqrt(sum(float(np.sum(np.square(vector[part], dtype=np.float64))) for part in _parts(vector.size)))


def _rotate(values: Vector, layout: Layout) -> None:
    """In place: signs, transforms across the blocks, signs, transforms along the blocks.

    The first set of transforms takes its coordinates one block count apart, so from every tensor alike; after the second
    one large coordinate is spread over all values.
    """
    with _blas().limit(limits=1, user_api="blas"):
        _flip(values, layout, "first signs")
        _transform_across(values, layout.block)
        _flip(values, layout, "second signs")
        _transform_along(values, layout.block)
    values *= np.float32(1.0 / layout.block)  # two transforms of 1/√block


def _rotate_back(values: Vector, layout: Layout) -> None:
    """The inverse of _rotate: a Hadamard transform is its own."""
    with _blas().limit(limits=1, user_api="blas"):
        _transform_along(values, layout.block)
        _flip(values, layout, "second signs")
        _transform_across(values, layout.block)
        _flip(values, layout, "first signs")
    values *= np.float32(1.0 / layout.block)


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    """Products as small as ours are not worth a second thread, which spins while it waits: where other processes compute
    it takes their core. `./dev bench link`, four boxes of 25 M weights on two cores: 12.9 s a round with two, 6.6 s with one.
    """
    return ThreadpoolController()


def _transform_across(values: Vector, block: int) -> None:
    """Walsh-Hadamard over the first axis of (block, size/block), in place, some columns at a time.

    As two products with small matrices, H_block = H_outer ⊗ H_inner: at 2^12 1.5 × as fast as butterflies in numpy.
    """
    (outer, inner), columns = _factors(block), values.reshape(block, -1)
    for begin in range(0, columns.shape[1], _TRANSFORMS):
        some = np.ascontiguousarray(columns[:, begin : begin + _TRANSFORMS])
        half = np.matmul(_hadamard(outer), some.reshape(outer, -1))
        columns[:, begin : begin + _TRANSFORMS] = np.matmul(_hadamard(inner), half.reshape(outer, inner, -1)).reshape(
            block, -1
        )


def _transform_along(values: Vector, block: int) -> None:
    """Walsh-Hadamard over the last axis of (size/block, block), in place, some rows at a time."""
    (outer, inner), rows = _factors(block), values.reshape(-1, block)
    for begin in range(0, len(rows), _TRANSFORMS):
        some = rows[begin : begin + _TRANSFORMS]
        half = np.matmul(some.reshape(-1, inner), _hadamard(inner))
        np.matmul(_hadamard(outer), half.reshape(-1, outer, inner), out=some.reshape(-1, outer, inner))


def _factors(block: int) -> tuple[int, int]:
    outer = 1 << (block.bit_length() - 1) // 2
    return outer, block // outer


@lru_cache(maxsize=4)
def _hadamard(size: int) -> Vector:
    """Never written to."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _flip(values: Vector, layout: Layout, purpose: str) -> None:
    """Turn the signs that the seed says, by their bit."""
    drawn = np.frombuffer(_stream(layout, purpose, -(-values.size // 8)), np.uint8)
    bits = values.view(np.uint32)
    for part in _parts(values.size):
        signs = np.unpackbits(drawn[part.start // 8 : -(-part.stop // 8)], count=part.stop - part.start)
        bits[part] ^= signs.astype(np.uint32) << 31


def _quantise(
    rotated: Vector, values: NDArray[np.signedinteger], weight: int, layout: Layout, generator: np.random.Generator
) -> None:
    """Levels of weight · rotated, clamped, rounded up with the probability of the fraction: exact in expectation."""
    scale = np.float32(weight / WEIGHT_LEVELS / layout.step)
    limit = np.float32(layout.levels * weight / WEIGHT_LEVELS)
    for part in _parts(rotated.size):
        exact = np.clip(rotated[part] * scale, -limit, limit)
        below = np.floor(exact)
        exact -= below
        below += generator.random(exact.size, np.float32) < exact
        values[part] = below


def _quantise_within(
    rotated: Vector, values: NDArray[np.signedinteger], layout: Layout, generator: np.random.Generator
) -> None:
    """As _quantise, drawn again until the values' norm is within the layout's: exact, whatever the generator gives.

    Source: Kairouz, Liu, Steinke 2021, Algorithm 1 (conditional rounding).
    """
    for _ in range(ROUNDINGS):
        _quantise(rotated, values, WEIGHT_LEVELS, layout, generator)
        if _norm_squared(values) <= layout.most_norm_squared:
            return
    values[:] = np.clip(np.trunc(rotated / np.float32(layout.step)), -layout.levels, layout.levels)


def _norm_squared(values: NDArray[np.signedinteger]) -> int:
    wide = values.astype(np.int64)
    return int(np.dot(wide, wide))


def _add_noise(values: NDArray[np.signedinteger], layout: Layout, random_bytes: noise.RandomBytes) -> None:
    """Modulo the word."""
    skellam = noise.Skellam(layout.noise_variance)
    for part in _parts(values.size):
        values[part] = (values[part] + skellam.draw(values[part].size, random_bytes)).astype(values.dtype)


def _restore(values: NDArray[np.signedinteger], weight: int, layout: Layout) -> Vector:
    """Coordinates of the chosen places from levels of a sum of this weight."""
    rotated = values.astype(np.float32)
    rotated *= np.float32(layout.step * WEIGHT_LEVELS / weight)
    _rotate_back(rotated, layout)
    return rotated[: layout.chosen]


def _signed(layout: Layout) -> np.dtype[np.signedinteger]:
    return np.dtype(np.int16 if layout.word_bits == 16 else np.int32)


def _stream(layout: Layout, purpose: str, length: int) -> bytes:
    """Bytes both sides draw alike. SHAKE-256, because numpy does not promise its draws across versions (NEP 19)."""
    return hashlib.shake_256(b"wardround addable 1|%s|%s" % (purpose.encode(), layout.seed)).digest(length)


def _parts(size: int) -> Iterator[slice]:
    for begin in range(0, size, _CHUNK):
        yield slice(begin, min(begin + _CHUNK, size))
