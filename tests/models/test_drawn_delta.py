"""The codec of drawn coordinates: its bytes by hand, its bound, no bias, and what an attacker's bytes give."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import delta, drawn_delta
from models.bundle import SHIPPED, read_bundle
from models.drawn import Drawn
from models.drawn_delta import DrawnCodec
from models.errors import DeltaError

SEED = b"the round's own seed"
SHAPES = {"body.weight": (6, 50), "head.bias": (3,), "stem.norm.weight": (4,)}
CODEC = DrawnCodec(Drawn(SHAPES, SEED, 0.1), 3, 1e6)
CHOSEN = 30 + 3 + 4
HEADS = DrawnCodec(Drawn({"head.bias": (2,), "head.weight": (1, 3)}, SEED), 3, 1e6)


def change(codec: DrawnCodec, seed: int, spread: float = 0.01) -> delta.Arrays:
    """Of the chosen coordinates alone; each tensor of another size."""
    generator = np.random.default_rng(seed)
    return {
        name: np.where(
            mask, 10.0 ** generator.uniform(-2, 2) * spread * generator.standard_t(5, mask.shape), 0.0
        ).astype(np.float32)
        for name, mask in codec.drawn.masks().items()
    }


def huffman(packed: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(packed) + coder.flush()


def payload(steps: tuple[float, ...] = (0.5, 2.0), packed: bytes = bytes([4 + 7 * 2, 6 + 7 * 0, 3 + 7 * 3])) -> bytes:
    """Levels 1, -1 of the bias, 3, -3, 0 of the weight: 3 more each, two to a byte in base 7; the last byte half empty."""
    return drawn_delta.MAGIC + struct.pack(f"<{len(steps)}f", *steps) + huffman(packed)


def test_the_payload_by_hand() -> None:
    decoded = HEADS.decode(payload())
    assert decoded["head.bias"].tolist() == [0.5, -0.5]
    assert decoded["head.weight"].tolist() == [[6.0, -6.0, 0.0]]
    exact = {"head.bias": np.float32([1.5, -1.5]), "head.weight": np.float32([[6.0, -6.0, 0.0]])}
    assert HEADS.encode(exact, 0) == payload(packed=bytes([6 + 7 * 0, 6 + 7 * 0, 3 + 7 * 3]))


@given(st.integers(2, 8), st.floats(0.01, 1.0), st.integers(0, 10**6), st.floats(1e-30, 1e6))
def test_no_value_errs_by_a_step_and_no_payload_is_longer_than_said(
    bits: int, share: float, seed: int, spread: float
) -> None:
    codec = DrawnCodec(Drawn(SHAPES, SEED, share), bits, 1e30)
    sent = change(codec, seed, spread)
    encoded = codec.encode(sent, seed)
    assert encoded == codec.encode(sent, seed)
    assert len(encoded) <= codec.payload_bytes_max
    decoded = codec.decode(encoded)
    for name, value in sent.items():
        largest, mask = float(np.abs(value).max()), codec.drawn.masks()[name]
        error = np.abs(decoded[name].astype(np.float64) - value)
        assert error.max() <= largest * (1 / (2 ** (bits - 1) - 1) + drawn_delta.FLOAT32_ERROR)
        assert np.linalg.norm(error) <= 2 * drawn_delta.error_bound(largest, int(mask.sum()), bits)
        assert not decoded[name][~mask].any()


@given(st.integers(2, 8), st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_what_is_decoded_is_never_longer_than_the_clip(bits: int, seed: int, clip_norm: float) -> None:
    codec = DrawnCodec(Drawn(SHAPES, SEED, 0.1), bits, clip_norm)
    clipped, _ = delta.clip(change(codec, seed), clip_norm)
    assert delta.norm(codec.decode(codec.encode(clipped, seed))) <= clip_norm * (1 + 1e-5)


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_rounding_has_no_bias_and_the_error_is_within_its_bound(bits: int) -> None:
    """Over 400 seeds: the mean is off by its standard error, 20 times smaller than one error, as a normal one would be."""
    codec = DrawnCodec(Drawn(SHAPES, SEED, 0.1), bits, 1e6)
    sent = change(codec, 7)
    decoded = [codec.decode(codec.encode(sent, seed)) for seed in range(400)]
    for name, value in sent.items():
        mask = codec.drawn.masks()[name]
        errors = np.stack([one[name][mask] - value[mask] for one in decoded]).astype(np.float64)
        bound = drawn_delta.error_bound(float(np.abs(value).max()), int(mask.sum()), bits)
        assert np.sqrt(np.square(errors).sum(1).mean()) <= bound
        spread = errors.std(0)
        is_rounded = spread > 0
        scores = errors.mean(0)[is_rounded] / (spread[is_rounded] / 20)
        assert is_rounded.any()
        assert np.abs(scores).max() < 4.5


def test_rounding_to_the_nearest_would_be_caught_as_bias() -> None:
    sent = {"head.bias": np.float32([3.0, 0.3]), "head.weight": np.float32([[0.0, 0.0, 0.0]])}
    sums = sum(HEADS.decode(HEADS.encode(sent, seed))["head.bias"][1] for seed in range(1000))
    assert sums / 1000 == pytest.approx(0.3, abs=0.06)


def test_a_delta_of_zeros_and_one_of_the_smallest_number_survive() -> None:
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    assert not any(value.any() for value in CODEC.decode(CODEC.encode(zeros, 0)).values())
    least = zeros | {"head.bias": np.full(3, np.float32(1e-45))}
    assert CODEC.decode(CODEC.encode(least, 0))["head.bias"].max() <= np.float32(1e-44)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "of a version this software knows"),
        (b"WRD1" + payload()[4:], "of a version this software knows"),
        (payload()[:11], "of a version this software knows"),
        (payload(steps=(float("nan"), 1.0)), "not finite"),
        (payload(steps=(1.0, float("inf"))), "not finite"),
        (payload(steps=(1.0, -1.0)), "not finite"),
        (payload(steps=(3e38, 1.0)), "not finite"),
        (payload(packed=bytes([24, 24])), "more or fewer values"),
        (payload(packed=bytes([24, 24, 24, 24])), "more or fewer values"),
        (payload(packed=bytes([24, 49, 24])), "more than 3 bits"),
        (payload(packed=bytes([24, 24, 0])), "a value follows the last"),
        (payload()[:-1], "damaged|more or fewer values"),
        (payload() + b"\x00", "1 bytes follow"),
        (payload()[:12] + b"\xff" * 9, "damaged"),
        (payload() + bytes(200), "bytes, at most"),
    ],
)
def test_a_wrong_payload_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(DeltaError, match=reason) as refused:
        HEADS.decode(content)
    assert refused.value.advice


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    codec = DrawnCodec(Drawn({"head.bias": (200_000,)}, SEED), 3, 1.0)
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = drawn_delta.MAGIC + bytes(4) + coder.compress(bytes(50_000_000)) + coder.flush()
    assert len(bomb) < codec.payload_bytes_max
    codec.decode(codec.encode({"head.bias": np.zeros(200_000, np.float32)}, 0))  # what stays in memory with the codec
    tracemalloc.start()
    with pytest.raises(DeltaError, match="more or fewer values"):
        codec.decode(bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@given(st.data())
def test_no_damage_ever_gives_anything_but_a_finite_delta_or_a_refusal(data: st.DataObject) -> None:
    content = bytearray(CODEC.encode(change(CODEC, 0), 0))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = CODEC.decode(bytes(content[: data.draw(st.integers(0, len(content)))]))
    except DeltaError:
        return
    assert {name: value.shape for name, value in decoded.items()} == SHAPES
    assert all(np.isfinite(value).all() for value in decoded.values())
    assert not any(decoded[name][~mask].any() for name, mask in CODEC.drawn.masks().items())


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"head.bias": np.float32([np.nan, 0, 0])}, "not finite"),
        ({"head.bias": np.float64([1e300, 0, 0])}, "not finite"),
        ({"head.bias": np.zeros(4, np.float32)}, "round's tensors"),
        ({"tail": np.zeros(4, np.float32)}, "round's tensors"),
        ({"body.weight": np.ones((6, 50), np.float32)}, "moved where the round does not move it"),
    ],
)
def test_what_cannot_be_sent_is_not(broken: delta.Arrays, reason: str) -> None:
    with pytest.raises(DeltaError, match=reason):
        CODEC.encode(change(CODEC, 0) | broken, 0)


@pytest.mark.parametrize(("bits", "clip_norm"), [(1, 1.0), (9, 1.0), (16, 1.0), (3, 0.0), (3, float("nan"))])
def test_a_plan_that_cannot_be_is_refused(bits: int, clip_norm: float) -> None:
    with pytest.raises(DeltaError):
        DrawnCodec(Drawn(SHAPES, SEED, 0.5), bits, clip_norm)


@pytest.mark.skipif(not SHIPPED.exists(), reason="models/bundles/phantom-tiny.bundle is not made yet")
def test_the_shipped_network_travels_in_a_two_hundredth_of_float32() -> None:
    """Payload alone; sealed: tests.cloud_hub.test_open_share."""
    weights = read_bundle(SHIPPED).weights
    shapes = {name: weights[name].shape for name in delta.trainable_names(weights, "all")}
    codec = DrawnCodec(Drawn(shapes, SEED, 0.036), 3, 10.0)
    assert 4 * codec.drawn.size / len(codec.encode(change(codec, 1), 1)) > 200
    assert 4 * codec.drawn.size / codec.payload_bytes_max > 190
