"""Robust rules: against a few lines of numpy, by hand, in any order, in any number of passes, and under attack."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from cloud_hub import robust
from cloud_hub.aggregation import RunningSum
from cloud_hub.robust import RULES, CentredClip, Deferred, Delta, Krum, Median, Rule, TrimmedMean, Updates, aggregate
from fleet_link.errors import LinkError, SiteError, TrustError

SHAPES = {"head.weight": (3, 4), "head.bias": (3,), "gate": (), "context.weight": (5, 2, 1)}
SIZE = 12 + 3 + 1 + 10
HUGE = 2.0**127
BY_DISTANCE = {"krum", "multi_krum"}

Matrix = NDArray[np.float64]


def delta_of(row_C: Matrix) -> dict[str, NDArray[np.float32]]:
    """A row's coordinates, tensor after tensor by name."""
    found, begin = {}, 0
    for name in sorted(SHAPES):
        end = begin + int(np.prod(SHAPES[name]))
        found[name] = row_C[begin:end].reshape(SHAPES[name]).astype(np.float32)
        begin = end
    return found


def flat(delta: Delta) -> Matrix:
    return np.concatenate([np.asarray(delta[name], np.float64).reshape(-1) for name in sorted(delta)])


def updates_of(x_BC: Matrix, weights: list[int] | None = None, memory_bytes: int = robust.MEMORY_BYTES) -> Updates:
    weight_B = weights or [1] * len(x_BC)

    def read() -> Iterator[tuple[Delta, int]]:
        yield from ((delta_of(row_C), weight) for row_C, weight in zip(x_BC, weight_B, strict=True))

    return Updates(read, len(x_BC), SHAPES, memory_bytes)


def result(rule: Rule, x_BC: Matrix, weights: list[int] | None = None) -> Matrix:
    return flat(aggregate(rule, updates_of(x_BC, weights)))


def drawn(boxes: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).normal(1.0, 1.0, (boxes, SIZE)).astype(np.float32).astype(np.float64)


# --- the same as a few lines of numpy -------------------------------------------------------------


def numpy_trimmed(x_BC: Matrix, cut: int) -> Matrix:
    return np.asarray(np.sort(x_BC, axis=0)[cut : len(x_BC) - cut].mean(0))


def numpy_krum(x_BC: Matrix, byzantine: int, keep: int) -> Matrix:
    near = len(x_BC) - byzantine - 2
    scores = [np.sort(((x_BC - row_C) ** 2).sum(1))[1 : near + 1].sum() for row_C in x_BC]
    return np.asarray(x_BC[np.argsort(scores)[:keep]].mean(0))


def numpy_clip(x_BC: Matrix, weight_B: Matrix, radius: float, iterations: int) -> Matrix:
    centre_C = np.zeros(x_BC.shape[1])
    for _ in range(iterations):
        off_BC = x_BC - centre_C
        kept_B = np.minimum(1.0, radius / np.maximum(np.linalg.norm(off_BC, axis=1), 1e-30))
        centre_C = centre_C + (weight_B / weight_B.sum() * kept_B) @ off_BC
    return np.asarray(centre_C)


finite = arrays(
    np.float64, st.tuples(st.integers(1, 17), st.just(SIZE)), elements=st.floats(-HUGE, HUGE, width=32, allow_nan=False)
)


@given(finite)
def test_median_is_numpys(x_BC: Matrix) -> None:
    assert np.array_equal(result(Median(), x_BC), np.median(x_BC, axis=0).astype(np.float32))


@given(finite, st.sampled_from([0.1, 0.2, 0.3, 0.45]))
def test_trimmed_mean_is_numpys(x_BC: Matrix, trim: float) -> None:
    cut = min(int(np.ceil(trim * len(x_BC) - 1e-9)), (len(x_BC) - 1) // 2)
    expected_C = numpy_trimmed(x_BC, cut)
    assert np.allclose(result(TrimmedMean(trim), x_BC), expected_C, rtol=1e-6, atol=1e-6 * np.abs(x_BC).max())


@pytest.mark.parametrize(("boxes", "cut"), [(1, 0), (2, 0), (3, 1), (5, 1), (10, 2), (15, 3), (16, 4)])
def test_a_fifth_is_trimmed_and_one_box_at_least_from_three_on(boxes: int, cut: int) -> None:
    x_BC = drawn(boxes)
    assert np.allclose(result(TrimmedMean(), x_BC), numpy_trimmed(x_BC, cut), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("boxes", "byzantine"), [(4, 0), (5, 1), (8, 2), (9, 1), (12, 4)])
@pytest.mark.parametrize("seed", range(5))
def test_krum_is_numpys(boxes: int, byzantine: int, seed: int) -> None:
    x_BC, keep = drawn(boxes, seed), boxes - byzantine - 2
    expected_C = numpy_krum(x_BC, byzantine, 1)
    assert np.array_equal(result(Krum(byzantine), x_BC), expected_C)
    several_C = result(Krum(byzantine, keep=None), x_BC)
    assert np.allclose(several_C, numpy_krum(x_BC, byzantine, keep), rtol=1e-6, atol=1e-6)


def test_krum_withstands_as_many_as_the_boxes_allow_unless_it_is_told() -> None:
    x_BC = drawn(9)
    assert np.array_equal(result(Krum(), x_BC), result(Krum(byzantine=3), x_BC))
    assert np.array_equal(result(RULES["multi_krum"], x_BC), result(Krum(byzantine=3, keep=4), x_BC))


@given(st.integers(1, 12), st.integers(0, 99), st.floats(0.1, 50.0), st.integers(1, 8))
def test_centred_clip_is_numpys(boxes: int, seed: int, radius: float, iterations: int) -> None:
    x_BC, weights = drawn(boxes, seed), np.random.default_rng(seed).integers(1, 50, boxes)
    expected_C = numpy_clip(x_BC, np.minimum(weights, np.median(weights)), radius, iterations)
    found_C = result(CentredClip(radius, iterations), x_BC, [int(weight) for weight in weights])
    assert np.allclose(found_C, expected_C, rtol=1e-5, atol=1e-5)


def test_centred_clip_draws_its_radius_from_the_updates() -> None:
    x_BC = drawn(5)
    radius = float(np.median(np.linalg.norm(x_BC, axis=1)))
    assert np.allclose(result(CentredClip(None, 1), x_BC), result(CentredClip(radius, 1), x_BC), rtol=1e-6)


def test_by_hand() -> None:
    values = np.array([1.0, 2.0, 3.0, 10.0, 100.0])
    x_BC = np.repeat(values[:, None], SIZE, axis=1)
    for rule, value in (
        (Median(), 3.0),
        (TrimmedMean(0.2), 5.0),  # (2 + 3 + 10) / 3
        (Krum(1), 2.0),  # two nearest: 1 + 1; of 1 they are 1 + 4, of 3 too
        (Krum(0), 3.0),  # three nearest: 1 + 4 + 49; of 2 they are 1 + 1 + 64
        (Krum(1, keep=2), 1.5),  # 1 and 3 are alike; the smaller norm comes first
    ):
        assert np.allclose(result(rule, x_BC), value, rtol=1e-6), rule


# --- whatever the order, the memory and the claims ------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@given(st.integers(0, 99), st.integers(3, 12), st.permutations(range(12)))
def test_order_does_not_matter(name: str, seed: int, boxes: int, order: list[int]) -> None:
    x_BC, weights = drawn(boxes, seed), [3 + i for i in range(boxes)]
    shuffled = [i for i in order if i < boxes]
    straight_C = result(RULES[name], x_BC, weights)
    assert np.allclose(
        straight_C, result(RULES[name], x_BC[shuffled], [weights[i] for i in shuffled]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("memory_bytes", [1, 7 * 4 * 5, 7 * 4 * SIZE - 1])
def test_memory_changes_the_number_of_passes_and_nothing_else(name: str, memory_bytes: int) -> None:
    x_BC = drawn(7)
    passes = []
    inner = updates_of(x_BC).read

    def read() -> Iterator[tuple[Delta, int]]:
        passes.append(1)
        return inner()

    expected_C = result(RULES[name], x_BC)
    found_C = flat(aggregate(RULES[name], Updates(read, 7, SHAPES, memory_bytes)))
    assert np.allclose(found_C, expected_C, rtol=1e-6, atol=1e-7)
    windows = min(SIZE, -(-7 * 4 * SIZE // memory_bytes))
    assert len(passes) == windows + (name not in ("median", "trimmed_mean"))


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"centred_clip"}))
def test_order_and_choice_do_not_know_the_weights(name: str) -> None:
    x_BC = drawn(8)
    assert np.array_equal(result(RULES[name], x_BC), result(RULES[name], x_BC, [1, 5, 1, 900, 1, 2, 7, 10**9]))


def test_clipping_weighs_by_examples_up_to_their_median() -> None:
    x_BC = drawn(3)
    weighted_C = result(CentredClip(1e6, 1), x_BC, [10, 40, 10**9])
    assert np.allclose(weighted_C, (10 * x_BC[0] + 40 * x_BC[1] + 40 * x_BC[2]) / 90, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(RULES.keys() - BY_DISTANCE))
def test_single_box_is_its_own_mean(name: str) -> None:
    x_BC = drawn(1)
    assert np.allclose(result(RULES[name], x_BC, [40]), x_BC[0], rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_equal_updates_give_themselves(name: str) -> None:
    x_BC = np.repeat(drawn(1), 6, axis=0)
    assert np.allclose(result(RULES[name], x_BC), x_BC[0], rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_arrays_are_as_the_base_has_them(name: str) -> None:
    found = aggregate(RULES[name], updates_of(drawn(5)))
    assert {key: values.shape for key, values in found.items()} == SHAPES
    assert {values.dtype for values in found.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 13, 32])
def test_sorting_network_sorts_every_row_of_zeros_and_ones(rows: int) -> None:
    """What sorts all zeros and ones sorts everything (Knuth 5.3.4, theorem Z)."""
    if rows <= 13:
        x_BC = ((np.arange(2**rows)[None, :] >> np.arange(rows)[:, None]) & 1).astype(np.float32)
    else:
        x_BC = np.random.default_rng(0).integers(0, 2, (rows, 100_000)).astype(np.float32)
    robust._sort_columns(x_BC)
    assert all((low_C <= high_C).all() for low_C, high_C in pairwise(x_BC))


# --- under attack ---------------------------------------------------------------------------------

ATTACKS = {
    "huge": lambda honest_C: np.full_like(honest_C, 3e38),
    "sign flip": lambda honest_C: -10.0 * honest_C,
    "scaled": lambda honest_C: 1e6 * honest_C,
    "opposed": lambda honest_C: np.where(np.arange(len(honest_C)) % 2, 3e38, -3e38),
    "tiny": lambda honest_C: np.full_like(honest_C, 1e-30),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("boxes", "byzantine"), [(5, 1), (10, 2), (11, 4)])
def test_a_minority_cannot_move_the_result_far(name: str, attack: str, boxes: int, byzantine: int) -> None:
    honest_BC = drawn(boxes - byzantine)
    mean_C = honest_BC.mean(0)
    spread = np.linalg.norm(honest_BC - mean_C, axis=1).max()
    bad_C = ATTACKS[attack](mean_C).astype(np.float32).astype(np.float64)
    x_BC = np.concatenate([np.tile(bad_C, (byzantine, 1)), honest_BC])
    weights = [10**9] * byzantine + [20] * len(honest_BC)
    rule = TrimmedMean(max(0.2, byzantine / boxes)) if name == "trimmed_mean" else RULES[name]
    off = np.linalg.norm(result(rule, x_BC, weights) - mean_C)
    assert off <= 1.5 * spread
    total = RunningSum(SHAPES)
    for row_C, weight in zip(x_BC, weights, strict=True):
        total.add(delta_of(row_C), weight)
    if attack != "tiny":
        assert np.linalg.norm(flat(total.mean()) - mean_C) > 3 * spread


@given(st.integers(0, 99), st.floats(-HUGE, HUGE, width=32, allow_nan=False))
def test_median_and_trimmed_mean_stay_between_the_honest(seed: int, value: float) -> None:
    honest_BC = drawn(8, seed)
    x_BC = np.concatenate([honest_BC, np.full((2, SIZE), value)])
    for rule in (Median(), TrimmedMean(0.2)):
        found_C = result(rule, x_BC)
        assert (found_C >= honest_BC.min(0) - 1e-6).all()
        assert (found_C <= honest_BC.max(0) + 1e-6).all()


# --- groups ---------------------------------------------------------------------------------------


def test_rule_over_group_means() -> None:
    means_GC = drawn(5)
    means = [(delta_of(mean_C), boxes) for mean_C, boxes in zip(means_GC, [3, 4, 3, 4, 3], strict=True)]
    found_C = flat(robust.bucketed(Median(), means, SHAPES))
    assert np.array_equal(found_C, np.median(means_GC, axis=0).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "groups", "spoiled"), [*((name, 3, 1) for name in RULES), ("median", 5, 2), ("centred_clip", 5, 2)]
)
def test_spoiled_groups_cannot_move_the_result_far(name: str, groups: int, spoiled: int) -> None:
    """As many as `fleet round start --help` says: one of three, with the median two of five."""
    honest_GC = drawn(groups - spoiled)
    means = [(delta_of(np.full(SIZE, 1e6)), 1000) for _ in range(spoiled)]
    means += [(delta_of(mean_C), 3) for mean_C in honest_GC]
    off = np.linalg.norm(flat(robust.bucketed(RULES[name], means, SHAPES)) - honest_GC.mean(0))
    assert off <= 1.5 * np.linalg.norm(honest_GC - honest_GC.mean(0), axis=1).max()


@pytest.mark.parametrize(("value", "boxes", "reason"), [(np.inf, 2, "holds NaN or infinity"), (1.0, 0, "no weight")])
def test_unsound_group_is_refused(value: float, boxes: int, reason: str) -> None:
    mean = {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}
    with pytest.raises(TrustError, match=reason):
        robust.bucketed(Median(), [(mean, boxes)], SHAPES)


# --- where a running sum stands -------------------------------------------------------------------


def test_deferred_counts_as_they_come_and_reads_again() -> None:
    kept: list[tuple[Delta, int]] = []
    total = Deferred(Median(), SHAPES, lambda: iter(kept))
    x_BC = drawn(3)
    for row_C in x_BC:
        total.add(delta_of(row_C), 5)
        kept.append((delta_of(row_C), 5))
    assert total.updates == 3
    assert np.array_equal(flat(total.mean()), np.median(x_BC, axis=0).astype(np.float32))


def test_deferred_refuses_what_the_running_sum_refuses() -> None:
    total = Deferred(Median(), SHAPES, lambda: iter(()))
    with pytest.raises(TrustError, match="holds NaN or infinity"):
        total.add(delta_of(np.full(SIZE, np.nan)), 1)
    assert total.updates == 0
    with pytest.raises(TrustError, match="no update to average"):
        total.mean()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused(name: str, value: float) -> None:
    x_BC = drawn(5)
    x_BC[3, SIZE - 1] = value
    with pytest.raises(TrustError, match="holds NaN or infinity"):
        result(RULES[name], x_BC)


@pytest.mark.parametrize("name", RULES)
def test_foreign_tensors_shapes_and_no_weight_are_refused(name: str) -> None:
    good = delta_of(drawn(1)[0])
    for bad, weight, reason in (
        (good | {"evil": np.zeros(1, np.float32)}, 1, "evil"),
        (good | {"gate": np.zeros(2, np.float32)}, 1, "gate has shape"),
        (good, 0, "no weight"),
    ):
        mixed: list[tuple[Delta, int]] = [(good, 1), (bad, weight), (good, 1)]
        with pytest.raises(TrustError, match=reason):
            aggregate(RULES[name], Updates(lambda mixed=mixed: iter(mixed), 3, SHAPES))  # type: ignore[misc]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("counted", [4, 6])
def test_other_updates_than_were_counted_are_refused(name: str, counted: int) -> None:
    with pytest.raises(SiteError, match=f"{counted} updates were counted, 5 can be read"):
        aggregate(RULES[name], Updates(updates_of(drawn(5)).read, counted, SHAPES))


@pytest.mark.parametrize("name", RULES)
def test_no_update_is_refused(name: str) -> None:
    with pytest.raises(TrustError, match="no update to average"):
        aggregate(RULES[name], Updates(lambda: iter(()), 0, SHAPES))


@pytest.mark.parametrize(
    ("rule", "boxes", "reason"),
    [
        (Krum(1), 4, "Krum against 1 boxes needs more than 4 updates, not 4"),
        (Krum(2, keep=None), 6, "needs more than 6 updates, not 6"),
        (Krum(), 2, "needs more than 2 updates, not 2"),
        (Krum(), 1, "needs more than 2 updates, not 1"),
        (Krum(1, keep=4), 6, "may keep 3 of 6 updates, not 4"),
    ],
)
def test_krum_needs_enough_boxes(rule: Krum, boxes: int, reason: str) -> None:
    with pytest.raises(LinkError, match=reason) as caught:
        result(rule, drawn(boxes))
    assert "wait for more boxes" in caught.value.advice


@pytest.mark.parametrize(
    "make",
    [
        lambda: Krum(byzantine=-1),
        lambda: Krum(keep=0),
        lambda: TrimmedMean(0.5),
        lambda: TrimmedMean(0.0),
        lambda: TrimmedMean(float("nan")),
        lambda: CentredClip(radius=0.0),
        lambda: CentredClip(radius=float("inf")),
        lambda: CentredClip(radius=float("nan")),
        lambda: CentredClip(iterations=0),
    ],
)
def test_rule_that_cannot_be_is_refused(make: "type[Rule]") -> None:
    with pytest.raises(SiteError) as caught:
        make()
    assert caught.value.advice == "correct the round's plan"
