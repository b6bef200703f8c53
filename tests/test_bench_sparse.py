"""The sparse codec: what it sends and keeps, its bound, and that an attacker's bytes give a refusal or a finite delta."""

import math
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from benchmarks import sparse
from benchmarks.sparse import Sparsity
from models import delta
from models.errors import DeltaError

SHAPES = {"head.bias": (2,), "stem.weight": (2, 4)}
HAND = {
    "head.bias": np.array([0.0, -1.0], np.float32),
    "stem.weight": np.array([[0.25, 0, 0, 3.0], [0, 2.5, 0, 0.75]], np.float32),
}
THREE_OF_TEN = Sparsity(0.3, 2)
VECTORS = arrays.arrays(
    np.float32, st.integers(1, 200), elements=st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False)
)
SPARSITIES = st.builds(Sparsity, st.floats(0.001, 1.0), st.integers(2, 8))


def huffman(symbols: list[int]) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(bytes(symbols)) + coder.flush()


def payload(
    smallest: float = 1.0, step: float = 1.0, classes: bytes = huffman([1, 1, 0]), symbols: bytes = huffman([0x21, 0x02]),
    low: bytes = b"",
) -> bytes:  # fmt: skip
    return sparse.MAGIC + struct.pack("<ff", smallest, step) + classes + symbols + low


def test_the_payload_by_hand() -> None:
    """Places 1, 3 and 4: gaps 1, 1 and 0, as classes 1, 1 and 0; level 0 negative, level 1, level 1."""
    decoded = sparse.decode(payload(), SHAPES, THREE_OF_TEN)
    assert decoded["head.bias"].tolist() == [0.0, -1.0]
    assert decoded["stem.weight"].tolist() == [[0, 2.0, 2.0, 0], [0, 0, 0, 0]]
    gap_6 = payload(classes=huffman([5, 1, 0]), low=bytes([0b10000000]))  # 6 + 2 = 0b1000: class 4, low bits 00
    with pytest.raises(DeltaError):
        sparse.decode(gap_6, SHAPES, THREE_OF_TEN)
    decoded = sparse.decode(payload(classes=huffman([2, 1, 0]), low=bytes([0b10000000])), SHAPES, THREE_OF_TEN)
    assert np.flatnonzero(decoded["stem.weight"]).tolist() == [1, 3, 4]  # 3 + 2 = 0b101: class 2, low bit 1


def test_the_largest_are_sent_and_the_rest_waits() -> None:
    sent, memory = sparse.encode(HAND, THREE_OF_TEN, 10.0, np.zeros(10, np.float32))
    decoded = sparse.decode(sent, SHAPES, THREE_OF_TEN)
    assert decoded["head.bias"].tolist() == [0.0, -1.0]
    assert decoded["stem.weight"].tolist() == [[0, 0, 0, 3.0], [0, 3.0, 0, 0]]  # the levels are 1 and 3
    assert memory is not None
    assert memory.tolist() == [0, 0, 0.25, 0, 0, 0, 0, -0.5, 0, 0.75]
    nothing = {name: np.zeros_like(value) for name, value in HAND.items()}
    again, left = sparse.encode(nothing, THREE_OF_TEN, 10.0, memory)
    assert sparse.decode(again, SHAPES, THREE_OF_TEN)["stem.weight"].tolist() == [[0.25, 0, 0, 0], [0, -0.25, 0, 0.75]]
    assert left is not None
    assert left.tolist() == [0, 0, 0, 0, 0, 0, 0, -0.25, 0, 0]


def test_without_memory_nothing_is_kept() -> None:
    sent, memory = sparse.encode(HAND, THREE_OF_TEN, 10.0)
    assert memory is None
    assert sent == sparse.encode(HAND, THREE_OF_TEN, 10.0, np.zeros(10, np.float32))[0]


@given(VECTORS, SPARSITIES)
def test_the_bound_holds(vector: np.ndarray, sparsity: Sparsity) -> None:
    norm, largest = float(np.linalg.norm(vector.astype(np.float64))), float(np.abs(vector).max())
    sent, memory = sparse.encode({"x": vector}, sparsity, max(2 * norm, 1.0), np.zeros(vector.size, np.float32))
    decoded = sparse.decode(sent, {"x": vector.shape}, sparsity)["x"]
    error = float(np.linalg.norm(vector.astype(np.float64) - decoded))
    assert error <= sparse.error_bound(norm, largest, vector.size, sparsity)
    assert memory is not None
    np.testing.assert_allclose(memory + decoded, vector, rtol=0, atol=largest * 1e-6)
    assert np.count_nonzero(decoded) <= sparsity.kept(vector.size)


def test_the_bound_is_not_idle() -> None:
    """Where all are alike, exactly what is left out is missing; where few are kept in full, nearly nothing is."""
    alike = np.ones(100, np.float32)
    assert sparse.error_bound(10.0, 1.0, 100, Sparsity(0.19, 8)) == pytest.approx(math.sqrt(81), rel=1e-3)
    decoded = sparse.decode(sparse.encode({"x": alike}, Sparsity(0.19, 8), 10.0)[0], {"x": (100,)}, Sparsity(0.19, 8))
    assert np.linalg.norm(alike - decoded["x"]) == pytest.approx(9.0)
    assert sparse.error_bound(10.0, 1.0, 100, Sparsity(1.0, 8)) == pytest.approx(10 / 254, rel=1e-3)


@given(st.integers(0, 2**32), SPARSITIES, st.floats(0.1, 10.0))
def test_rounds_add_up_and_memory_stays_bounded(seed: int, sparsity: Sparsity, clip_norm: float) -> None:
    """All that was sent and what waits are all the clipped deltas; no payload is longer than the clip."""
    generator, size, rounds = np.random.default_rng(seed), 60, 12
    memory, sent = np.zeros(size, np.float32), np.zeros(size)
    wanted = np.zeros(size)
    for _ in range(rounds):
        change = {"x": generator.standard_t(3, size).astype(np.float32)}
        wanted += delta.clip(change, clip_norm)[0]["x"]
        content, kept = sparse.encode(change, sparsity, clip_norm, memory)
        assert kept is not None
        decoded = sparse.decode(content, {"x": (size,)}, sparsity)["x"]
        assert delta.norm({"x": decoded}) <= clip_norm * (1 + 1e-5)
        sent += decoded
        memory = kept
    np.testing.assert_allclose(sent + memory, wanted, rtol=0, atol=1e-4 * rounds * clip_norm)
    assert np.linalg.norm(memory) <= rounds * clip_norm


def test_with_memory_a_sum_of_equal_rounds_comes_whole() -> None:
    """50 times the same delta, a twentieth each round: what was sent is what was learned, but for what still waits."""
    change = np.random.default_rng(0).normal(size=400).astype(np.float32)
    memory: sparse.Vector | None = np.zeros(400, np.float32)
    total, forgetful = np.zeros(400), np.zeros(400)
    for _ in range(50):
        content, memory = sparse.encode({"x": change}, Sparsity(0.05, 4), 100.0, memory)
        total += sparse.decode(content, {"x": (400,)}, Sparsity(0.05, 4))["x"]
        content, _ = sparse.encode({"x": change}, Sparsity(0.05, 4), 100.0)
        forgetful += sparse.decode(content, {"x": (400,)}, Sparsity(0.05, 4))["x"]
    length = 50 * np.linalg.norm(change)
    assert np.linalg.norm(total - 50 * change) < 0.35 * length
    assert np.linalg.norm(forgetful - 50 * change) > 0.8 * length


def test_a_longer_delta_is_clipped_and_what_exceeds_with_the_memory_waits() -> None:
    change = {"x": np.array([30.0, 40.0], np.float32)}
    content, memory = sparse.encode(change, Sparsity(1.0, 8), 5.0, np.array([3.0, 4.0], np.float32))
    decoded = sparse.decode(content, {"x": (2,)}, Sparsity(1.0, 8))["x"]
    np.testing.assert_allclose(decoded, [3.0, 4.0], rtol=1e-5)
    assert memory is not None
    np.testing.assert_allclose(memory, [3.0, 4.0], rtol=1e-5)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1])
def test_positions_cost_what_their_entropy_is(share: float) -> None:
    size = 300_000
    kept = round(share * size)
    vector = np.random.default_rng(1).normal(size=size).astype(np.float32)
    content = sparse.encode({"x": vector}, Sparsity(share, 2), 1e3)[0]
    entropy_bits = size * -(share * math.log2(share) + (1 - share) * math.log2(1 - share))
    assert len(content) <= 1.02 * (entropy_bits + 2 * kept) / 8 + 60


def test_a_delta_of_zeros_and_one_of_all_alike_survive() -> None:
    for value in (0.0, -0.5):
        alike = {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}
        decoded = sparse.decode(sparse.encode(alike, Sparsity(1.0, 3), 10.0)[0], SHAPES, Sparsity(1.0, 3))
        assert all((array == value).all() for array in decoded.values())
    one = sparse.encode({"x": np.array(7.0, np.float32)}, Sparsity(0.001), 10.0)[0]
    assert sparse.decode(one, {"x": ()}, Sparsity(0.001))["x"].tolist() == 7.0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a sparse delta"),
        (b"WRD1" + bytes(20), "not a sparse delta"),
        (sparse.MAGIC + bytes(8), "more or fewer"),
        (payload(smallest=float("nan")), "scale is not finite"),
        (payload(step=float("inf")), "scale is not finite"),
        (payload(smallest=3e38), "scale is not finite"),
        (payload(smallest=-1.0), "scale is not finite"),
        (payload(step=-1.0), "scale is not finite"),
        (payload(classes=huffman([1, 1])), "more or fewer"),
        (payload(classes=huffman([1, 1, 0, 0])), "more or fewer"),
        (payload(classes=huffman([1, 1, 0])[:-1], symbols=b""), "more or fewer|damaged"),
        (payload(classes=b"\xff\xff"), "damaged"),
        (payload(symbols=huffman([0x21, 0x12])), "follows the last"),
        (payload(symbols=huffman([0x41, 0x02])), "more than 2 bits"),
        (payload(symbols=huffman([0x21, 0x02, 0])), "more or fewer"),
        (payload(classes=huffman([255, 1, 0])), "beyond the last"),
        (payload(classes=huffman([3, 3, 3]), low=bytes(1)), "beyond the last"),
        (payload(classes=huffman([2, 1, 0])), "cut short"),
        (payload(classes=huffman([2, 1, 0]), low=bytes(2)), "something follows"),
        (payload(classes=huffman([2, 1, 0]), low=b"\x01"), "something follows"),
        (payload(low=b"\0"), "something follows"),
    ],
)
def test_a_wrong_payload_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(DeltaError, match=reason):
        sparse.decode(content, SHAPES, THREE_OF_TEN)


@pytest.mark.parametrize("other", [Sparsity(0.2, 2), Sparsity(0.5, 2), Sparsity(1.0, 2), Sparsity(0.3, 8)])
def test_a_payload_of_another_plan_is_refused(other: Sparsity) -> None:
    content = sparse.encode(HAND, THREE_OF_TEN, 10.0)[0]
    with pytest.raises(DeltaError):
        sparse.decode(content, SHAPES, other)


def test_a_small_payload_cannot_take_much_memory() -> None:
    bomb = payload(classes=zlib.compress(bytes(50_000_000), 9, -15))
    assert len(bomb) < 100_000
    tracemalloc.start()
    with pytest.raises(DeltaError, match="more or fewer"):
        sparse.decode(bomb, SHAPES, THREE_OF_TEN)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(bomb) + 100_000


@given(st.data())
def test_no_damage_ever_gives_anything_but_a_finite_delta_or_a_refusal(data: st.DataObject) -> None:
    sparsity = data.draw(SPARSITIES)
    original = {"x": np.random.default_rng(0).normal(size=(20, 10)).astype(np.float32)}
    content = bytearray(sparse.encode(original, sparsity, 100.0)[0])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = sparse.decode(bytes(content[: data.draw(st.integers(0, len(content)))]), {"x": (20, 10)}, sparsity)
    except DeltaError:
        return
    assert decoded["x"].shape == (20, 10)
    assert np.isfinite(decoded["x"]).all()
    assert np.count_nonzero(decoded["x"]) <= sparsity.kept(200)


@given(st.binary(max_size=64), SPARSITIES)
def test_strange_bytes_are_refused_or_finite(tail: bytes, sparsity: Sparsity) -> None:
    try:
        decoded = sparse.decode(sparse.MAGIC + tail, SHAPES, sparsity)
    except DeltaError:
        return
    assert all(np.isfinite(value).all() for value in decoded.values())


@given(VECTORS, SPARSITIES)
def test_the_same_delta_gives_the_same_bytes(vector: np.ndarray, sparsity: Sparsity) -> None:
    assume(float(np.abs(vector).max()) > 0)
    first = sparse.encode({"x": vector}, sparsity, 1.0)[0]
    assert first == sparse.encode({"x": vector.copy()}, sparsity, 1.0)[0]


def test_what_cannot_be_sent_is_refused() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(DeltaError, match="x is not finite"):
            sparse.encode({"x": np.array([0.0, bad], np.float32)}, THREE_OF_TEN, 1.0)
    with pytest.raises(DeltaError, match="x is not finite"):
        sparse.encode({"x": np.array([1e300])}, THREE_OF_TEN, 1.0)
    with pytest.raises(DeltaError, match="too large"):
        sparse.encode({"x": np.array([3e38], np.float32)}, THREE_OF_TEN, 1e39)
    for clip_norm in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(DeltaError, match="clip norm"):
            sparse.encode(HAND, THREE_OF_TEN, clip_norm)
    for shapes in ({}, {"x": (0,)}):
        with pytest.raises(DeltaError, match="no weight"):
            sparse.encode({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, THREE_OF_TEN, 1.0)


@pytest.mark.parametrize("memory", [np.zeros(9, np.float32), np.zeros(10), np.full(10, np.nan, np.float32)])
def test_a_memory_of_another_base_is_refused(memory: np.ndarray) -> None:
    with pytest.raises(DeltaError, match="memory"):
        sparse.encode(HAND, THREE_OF_TEN, 1.0, memory)


@pytest.mark.parametrize(("share", "bits"), [(0.0, 2), (1.1, 2), (math.nan, 2), (0.5, 1), (0.5, 9)])
def test_a_plan_that_cannot_be_is_refused(share: float, bits: int) -> None:
    with pytest.raises(DeltaError):
        Sparsity(share, bits)
