"""The delta codec: what comes back, and that nothing else than expected ever does."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import delta
from models.errors import DeltaError

BEFORE = {"head.weight": np.ones((2, 3), np.float32), "stem.bias": np.zeros(4, np.float32)}
SHAPES = {name: value.shape for name, value in BEFORE.items()}


def change(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(0, 0.01, shape).astype(np.float32) for name, shape in SHAPES.items()}


def payload(tensors: list[tuple[str, tuple[int, ...], float]], body: bytes) -> bytes:
    header = msgspec.msgpack.encode(tensors)
    return delta.MAGIC + len(header).to_bytes(4, "little") + header + body


GOOD = [("head.weight", (2, 3), 0.5), ("stem.bias", (4,), 0.25)]


def test_the_layout_by_hand() -> None:
    decoded = delta.decode(payload(GOOD, bytes([1, 255, 0, 127, 129, 2, 4, 0, 0, 252])), SHAPES)
    assert decoded["head.weight"].tolist() == [[0.5, -0.5, 0.0], [63.5, -63.5, 1.0]]
    assert decoded["stem.bias"].tolist() == [1.0, 0.0, 0.0, -1.0]


def test_what_is_decoded_is_within_one_level() -> None:
    original = change()
    decoded = delta.decode(delta.encode(original, seed=3), SHAPES)
    for name, value in original.items():
        assert decoded[name].dtype == np.float32
        assert np.abs(decoded[name] - value).max() <= np.abs(value).max() / 127 * 1.001


def test_rounding_is_unbiased_and_seeded() -> None:
    original = {"x": np.full(20000, 0.3, np.float32)}
    original["x"][0] = 127.0
    payload_bytes = delta.encode(original, seed=1)
    assert payload_bytes == delta.encode(original, seed=1)
    assert payload_bytes != delta.encode(original, seed=2)
    assert delta.decode(payload_bytes, {"x": (20000,)})["x"][1:].mean() == pytest.approx(0.3, abs=0.02)


def test_a_delta_of_zeros_survives() -> None:
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    decoded = delta.decode(delta.encode(zeros, seed=0), SHAPES)
    assert all(not value.any() for value in decoded.values())


def test_clip_by_hand() -> None:
    long = {"a": np.array([3.0], np.float32), "b": np.array([[4.0]], np.float32)}
    clipped, norm_before = delta.clip(long, 1.0)
    assert norm_before == pytest.approx(5.0)
    assert delta.norm(clipped) == pytest.approx(1.0)
    assert clipped["a"][0] == pytest.approx(0.6)
    kept, _ = delta.clip(long, 10.0)
    assert kept["a"][0] == 3.0


def test_subtract_and_apply_are_inverse() -> None:
    after = delta.apply(BEFORE, change())
    back = delta.apply(BEFORE, delta.subtract(after, BEFORE, SHAPES))
    for name in BEFORE:
        np.testing.assert_allclose(back[name], after[name], atol=1e-6)
    assert delta.apply(BEFORE, {})["head.weight"] is not BEFORE["head.weight"]


def test_which_weights_a_round_may_change() -> None:
    names = ["stem.bias", "ood_mean_KD", "head.weight", "head.bias"]
    assert delta.trainable_names(names, "all") == ("head.bias", "head.weight", "stem.bias")
    assert delta.trainable_names(names, "heads") == ("head.bias", "head.weight")


@pytest.mark.parametrize(
    ("tensors", "body", "reason"),
    [
        (GOOD[:1], bytes(6), "expected tensors: 'stem.bias'"),
        ([*GOOD, ("tail", (1,), 1.0)], bytes(11), "expected tensors: 'tail'"),
        ([*GOOD, GOOD[0]], bytes(16), "expected tensors"),
        ([*GOOD, ("forged\nline " * 9000, (1,), 1.0)], bytes(11), r"expected tensors: '[^\n]{1,90}'$"),
        ([("head.weight", (3, 2), 0.5), GOOD[1]], bytes(10), "shape"),
        (GOOD, bytes(9), "cut short"),
        (GOOD, bytes(11), "1 bytes follow"),
        ([("head.weight", (2, 3), float("nan")), GOOD[1]], bytes(10), "not valid|not finite"),
        ([("head.weight", (2, 3), float("inf")), GOOD[1]], bytes(10), "not finite"),
        ([("head.weight", (2, 3), 1e38), GOOD[1]], bytes(10), "not finite"),
        ([("head.weight", (2, 3), -1.0), GOOD[1]], bytes(10), "not valid"),
        ([("head.weight", (2, -3), 1.0), GOOD[1]], bytes(10), "not valid"),
        ([("head.weight", (2, 3))], bytes(10), "not valid"),
    ],
)
def test_a_wrong_payload_is_refused(tensors: list, body: bytes, reason: str) -> None:
    with pytest.raises(DeltaError, match=reason):
        delta.decode(payload(tensors, body), SHAPES)


@pytest.mark.parametrize("content", [b"", b"WRD1", b"WRD2" + bytes(8), b"WRD1\xff\xff\xff\xff", b"WRD1\x01\0\0\0\xc1"])
def test_what_is_no_delta_is_refused(content: bytes) -> None:
    with pytest.raises(DeltaError):
        delta.decode(content, SHAPES)


@given(st.data())
def test_no_damage_ever_gives_anything_but_a_finite_delta_or_a_refusal(data: st.DataObject) -> None:
    content = bytearray(delta.encode(change(), seed=0))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = delta.decode(bytes(content[: data.draw(st.integers(0, len(content)))]), SHAPES)
    except DeltaError:
        return
    assert {name: value.shape for name, value in decoded.items()} == SHAPES
    assert all(np.isfinite(value).all() for value in decoded.values())


def test_training_that_diverged_is_refused_before_it_is_sent() -> None:
    after = {name: value.copy() for name, value in BEFORE.items()}
    after["stem.bias"][1] = np.nan
    with pytest.raises(DeltaError, match=r"stem\.bias is not finite"):
        delta.subtract(after, BEFORE, SHAPES)
    with pytest.raises(DeltaError, match="not finite"):
        delta.encode({"x": np.array([np.inf], np.float32)}, seed=0)


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(DeltaError, match=r"stem\.bias is not the same tensor"):
        delta.subtract({"stem.bias": np.zeros(5, np.float32)}, BEFORE, ["stem.bias"])
    with pytest.raises(DeltaError, match="other is not a tensor"):
        delta.apply(BEFORE, {"other": np.zeros(1, np.float32)})
    with pytest.raises(DeltaError, match="not a tensor of these weights"):
        delta.apply(BEFORE, {"stem.bias": np.zeros(5, np.float32)})


@given(st.integers(0, 1000), st.floats(1e-3, 1.0))
def test_what_is_read_without_floats_is_clipped_as_its_floats_are(seed: int, share: float) -> None:
    sent = delta.encode(change(seed), seed)
    floats, norm = delta.clip(delta.decode(sent, SHAPES), share * delta.norm(delta.decode(sent, SHAPES)))
    quantised, same_norm = delta.read(sent, SHAPES).clipped(share * norm)
    assert same_norm == pytest.approx(norm, rel=1e-6)
    assert quantised.norm == pytest.approx(share * norm, rel=1e-6)
    for name, value in floats.items():
        assert np.allclose(quantised[name], value, rtol=1e-5, atol=0)
