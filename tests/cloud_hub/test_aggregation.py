"""The running sum: by hand, in any order, and every kind of update it must refuse."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cloud_hub.aggregation import RunningSum
from fleet_link.errors import TrustError
from models import delta as codec

SHAPES = {"head.weight": (2, 2), "head.bias": (2,)}


def delta(value: float) -> dict[str, NDArray[np.float32]]:
    return {name: np.full(shape, value, dtype=np.float32) for name, shape in SHAPES.items()}


def test_weighted_mean_by_hand() -> None:
    total = RunningSum(SHAPES)
    total.add(delta(1.0), 1)
    total.add(delta(5.0), 3)
    assert total.updates == 2
    for values in total.mean().values():
        assert values.dtype == np.float32
        assert np.array_equal(values, np.full_like(values, 4.0))  # (1·1 + 3·5) / 4


def test_small_deltas_are_not_lost_beside_a_large_one() -> None:
    total = RunningSum({"w": (1,)})
    total.add({"w": np.array([1.0], np.float32)}, 1)
    for _ in range(1000):
        total.add({"w": np.array([2.0**-25], np.float32)}, 1)  # each is below float32's step at 1.0
    assert total.mean()["w"][0] * 1001 > 1.0 + 900 * 2.0**-25


updates = st.lists(
    st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(1, 10_000)),
    min_size=1,
    max_size=12,
)


@given(updates, st.randoms(use_true_random=False))
def test_order_does_not_matter(parts: list[tuple[float, int]], random: "np.random.Generator") -> None:
    straight, shuffled = RunningSum(SHAPES), RunningSum(SHAPES)
    for value, weight in parts:
        straight.add(delta(value), weight)
    random.shuffle(parts)
    for value, weight in parts:
        shuffled.add(delta(value), weight)
    largest = max(abs(value) for value, _ in parts)
    for name, values in straight.mean().items():
        assert np.allclose(values, shuffled.mean()[name], rtol=1e-6, atol=largest * 1e-7)


@given(updates)
def test_mean_lies_between_the_updates(parts: list[tuple[float, int]]) -> None:
    total = RunningSum(SHAPES)
    for value, weight in parts:
        total.add(delta(value), weight)
    low, high = min(v for v, _ in parts), max(v for v, _ in parts)
    slack = 1e-6 * max(abs(low), abs(high))
    for values in total.mean().values():
        assert (values >= low - slack).all()
        assert (values <= high + slack).all()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"head.weight": np.zeros((2, 2), np.float32)}, "tensors do not match the base: head.bias"),
        (delta(0.0) | {"evil": np.zeros(1, np.float32)}, "tensors do not match the base: evil"),
        (delta(0.0) | {"head.bias": np.zeros((3,), np.float32)}, r"head.bias has shape \(3,\), the base has \(2,\)"),
        (delta(float("nan")), "head.weight holds NaN or infinity"),
        (delta(0.0) | {"head.bias": np.array([0, np.inf], np.float32)}, "head.bias holds NaN or infinity"),
    ],
)
def test_poisoned_update_is_refused_whole(bad: dict[str, NDArray[np.float32]], reason: str) -> None:
    total = RunningSum(SHAPES)
    total.add(delta(2.0), 1)
    with pytest.raises(TrustError, match=reason):
        total.add(bad, 5)
    assert total.updates == 1
    assert all(np.array_equal(values, np.full_like(values, 2.0)) for values in total.mean().values())


def test_update_without_examples_has_no_weight() -> None:
    with pytest.raises(TrustError, match="0 examples has no weight"):
        RunningSum(SHAPES).add(delta(1.0), 0)


def test_nothing_to_average_is_refused() -> None:
    with pytest.raises(TrustError, match="no update to average"):
        RunningSum(SHAPES).mean()


@given(st.integers(0, 1000), st.integers(1, 10_000))
def test_a_delta_as_it_came_adds_up_as_its_floats_do(seed: int, weight: int) -> None:
    generator = np.random.default_rng(seed)
    sent = codec.encode(
        {name: generator.normal(0, 0.01, shape).astype(np.float32) for name, shape in SHAPES.items()}, seed
    )
    as_it_came, as_floats = RunningSum(SHAPES), RunningSum(SHAPES)
    for total, each in ((as_it_came, codec.read(sent, SHAPES)), (as_floats, codec.decode(sent, SHAPES))):
        total.add(delta(1.0), 3)
        total.add(each, weight)
    for name, values in as_floats.mean().items():
        assert np.allclose(as_it_came.mean()[name], values, rtol=1e-6, atol=1e-9)


def test_a_delta_as_it_came_whose_step_is_not_finite_is_refused() -> None:
    levels = {name: np.ones(shape, np.int8) for name, shape in SHAPES.items()}
    bad = codec.Quantised(levels, dict.fromkeys(SHAPES, float("inf")))
    with pytest.raises(TrustError, match="holds NaN or infinity"):
        RunningSum(SHAPES).add(bad, 1)
