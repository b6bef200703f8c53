"""Noise in the sum: its distribution, the room it has in a word, what one box can show in it, and what that costs."""

import dataclasses
import hashlib
import inspect
import math
import os
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import accountant, addable, delta, noise
from models.accountant import Cost
from models.addable import decode_sum, encode, error_bound
from models.errors import DeltaError
from models.layout import Layout

SEED = b"the digest of a plan"
LAYOUT = Layout({"a": (30,), "b": (7, 10)}, SEED, 1.0, boxes=8, word_bits=32, value_bits=16, noise=1.0, noise_boxes=8)


def bytes_of(seed: int) -> Callable[[int], bytes]:
    """A source that repeats itself from one test run to the next, but not from one call to the next."""
    calls = iter(range(1 << 30))
    return lambda count: hashlib.shake_256(b"%d %d" % (seed, next(calls))).digest(count)


def silent(count: int) -> bytes:
    """What no threshold is above: a noise of zero."""
    return b"\xff" * count


def chances(variance: float, largest: int) -> np.ndarray:
    """P(X = k) for k from -largest to largest, as the difference of two Poisson numbers: not by Bessel's recurrence."""
    counts = np.arange(4 * largest + 60)
    log_factorials = np.array([math.lgamma(n + 1) for n in counts])
    poisson = np.exp(counts * math.log(variance / 2) - variance / 2 - log_factorials)
    differences = np.correlate(poisson, poisson, "full")
    middle = len(poisson) - 1
    return differences[middle - largest : middle + largest + 1]


def change(layout: Layout, seed: int, norm: float) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    drawn = {name: generator.standard_t(4, shape) for name, shape in layout.shapes.items()}
    factor = norm / delta.norm(drawn)
    return {name: (value * factor).astype(np.float32) for name, value in drawn.items()}


def flat(tensors: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)]).astype(np.float64)


def signed(words: np.ndarray) -> np.ndarray:
    return words[1:].view(np.int16 if words.dtype == np.uint16 else np.int32).astype(np.int64)


# --- the distribution -------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [1, 3, 25, 400])
def test_the_table_is_the_difference_of_two_poisson_numbers(variance: int) -> None:
    thresholds = noise.Skellam(variance)._thresholds
    beyond = [float(each) / 2**63 for each in thresholds[::-1]]  # P(|X| >= k) from k = 1 on
    middle = len(beyond)
    wanted = chances(variance, middle)
    assert 1.0 - beyond[0] == pytest.approx(wanted[middle], rel=1e-9)
    for k in range(1, middle):
        assert (beyond[k - 1] - beyond[k]) / 2 == pytest.approx(wanted[middle + k], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("variance", [1, 12, 3000, noise.MAX_VARIANCE])
def test_mean_variance_and_kurtosis(variance: int) -> None:
    count = 200_000
    drawn = noise.Skellam(variance).draw(count, bytes_of(1))
    assert abs(drawn.mean()) < 4 * math.sqrt(variance / count)
    assert drawn.var() == pytest.approx(variance, rel=4 * math.sqrt((2 + 1 / variance) / count))
    assert np.mean(drawn.astype(float) ** 4) / variance**2 == pytest.approx(3 + 1 / variance, rel=0.05)


@pytest.mark.parametrize(("boxes", "variance"), [(1, 6), (4, 5), (9, 1)])
def test_noises_of_boxes_add_to_noise_of_their_variances(boxes: int, variance: int) -> None:
    """Chi-square of the sum's histogram against the one distribution; a sum of other noise does not pass."""
    count = 100_000
    total = np.sum([noise.Skellam(variance).draw(count, bytes_of(box)) for box in range(boxes)], axis=0)

    def chi_square(of: float) -> float:
        largest = math.ceil(2.5 * math.sqrt(of))
        wanted = count * chances(of, largest)
        found = np.array([np.count_nonzero(total == k) for k in range(-largest, largest + 1)])
        return float(np.sum((found - wanted) ** 2 / wanted)) / wanted.size

    assert chi_square(boxes * variance) < 2.0
    assert chi_square(1.25 * boxes * variance) > 10.0


@pytest.mark.parametrize("variance", [0, -1, noise.MAX_VARIANCE + 1])
def test_a_variance_without_a_table_is_refused(variance: int) -> None:
    with pytest.raises(ValueError, match="variance"):
        noise.Skellam(variance)


@pytest.mark.parametrize("variance", [1, 2, 9, 100, 1000])
@pytest.mark.parametrize("count", [1, 1000, 10_000_000])
def test_a_value_beyond_reach_is_rarer_than_said(variance: int, count: int) -> None:
    limit = noise.reach(variance, count)
    largest = limit + 40
    beyond = 2 * float(np.sum(chances(variance, largest)[largest + limit + 1 :]))
    assert beyond * count <= noise.OVERFLOW
    assert limit <= 10 * math.sqrt(variance) + 27  # and the bound is not an empty one


# --- the room in a word -----------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data())
def test_values_and_noise_of_all_boxes_fit_the_word(data: st.DataObject) -> None:
    boxes = data.draw(st.integers(1, 1000))
    try:
        layout = Layout(
            {"x": (data.draw(st.integers(1, 20_000_000)),)},
            SEED,
            clip_norm=data.draw(st.floats(1e-6, 1e6)),
            boxes=boxes,
            word_bits=32,
            value_bits=data.draw(st.integers(4, 16)),
            share=data.draw(st.floats(0.01, 1.0)),
            noise=data.draw(st.floats(1e-3, 10.0)),
            noise_boxes=data.draw(st.integers(1, boxes)),
        )
    except DeltaError:
        return
    noise_in_sum = noise.reach(boxes * layout.noise_variance, layout.padded)
    assert boxes * layout.levels + noise_in_sum <= layout.most_in_sum < 2**31
    plain = dataclasses.replace(layout, noise=0.0)
    assert layout.step >= plain.step * (1 - 1e-12)
    assert layout.levels <= plain.levels
    deviation = math.sqrt(layout.noise_boxes * layout.noise_variance / layout.most_norm_squared)
    assert deviation >= layout.noise * (1 - 1e-12)
    assert math.sqrt(layout.most_norm_squared) <= 1.7 * layout.clip_levels  # rounding adds little


def test_a_large_network_has_room_for_noise_in_words_of_32_bits_alone() -> None:
    wanted = {"shapes": {"x": (5_000_000,)}, "boxes": 8, "noise": 3.0, "noise_boxes": 8, "value_bits": 8}
    with pytest.raises(DeltaError, match="too coarse") as refused:
        Layout(**wanted, seed=SEED, clip_norm=1.0, word_bits=16)
    assert "32 bits" in str(refused.value.advice)
    layout = Layout(**wanted, seed=SEED, clip_norm=1.0, word_bits=32)
    assert math.sqrt(layout.most_norm_squared) < 1.01 * layout.clip_levels


@pytest.mark.parametrize("word_bits", [16, 32])
def test_no_sum_of_many_comes_near_the_words_end(word_bits: int) -> None:
    layout = dataclasses.replace(LAYOUT, word_bits=word_bits, value_bits=8, noise_boxes=2)
    for trial in range(50):
        words = [
            encode(
                change(layout, 0, 1.0), layout, 1.0, np.random.default_rng(trial), None, bytes_of(100 * trial + box)
            )[0]
            for box in range(8)
        ]
        exact = np.sum([signed(each) for each in words], axis=0)
        modulo = np.sum(words, axis=0, dtype=words[0].dtype)
        assert np.abs(exact).max() <= layout.most_in_sum
        np.testing.assert_array_equal(signed(modulo), exact)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"noise": -0.1}, "noise"),
        ({"noise": 1001.0}, "noise"),
        ({"noise": float("nan")}, "noise"),
        ({"noise_boxes": 0}, "noise 1.0 of 0"),
        ({"noise_boxes": 9}, "noise 1.0 of 9"),
    ],
)
def test_noise_that_cannot_be_is_refused(wrong: dict, reason: str) -> None:
    with pytest.raises(DeltaError, match=reason):
        dataclasses.replace(LAYOUT, **wrong)


# --- what one box can show --------------------------------------------------------------------------


class AlwaysUp(np.random.Generator):
    """Rounds everything up: the longest vector there is."""

    def random(self, size: int, dtype: type) -> np.ndarray:  # type: ignore[override]
        return np.zeros(size, dtype)


def all_alike(layout: Layout) -> dict[str, np.ndarray]:
    """A delta at the clip norm whose rotation is one number everywhere."""
    rotated = np.full(layout.padded, layout.clip_norm / math.sqrt(layout.padded), np.float32)
    addable._rotate_back(rotated, layout)
    return {"x": rotated}


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.floats(0.0, 1e6), st.sampled_from([4, 6, 8, 16]), st.booleans())
def test_no_delta_and_no_rounding_gives_a_longer_vector(seed: int, norm: float, bits: int, is_worst: bool) -> None:
    layout = dataclasses.replace(LAYOUT, value_bits=bits)
    kind = AlwaysUp if is_worst else np.random.Generator
    words, _ = encode(change(layout, seed, norm), layout, 1.0, kind(np.random.PCG64(seed)), None, silent)
    assert int(np.sum(signed(words) ** 2)) <= layout.most_norm_squared


def test_a_rounding_that_exceeds_the_norm_is_not_sent() -> None:
    """2.33 levels everywhere, always rounded up: too long without the rule, cut to 2 levels with it."""
    layout = Layout({"x": (64,)}, SEED, 1.0, boxes=1, value_bits=4, noise=1.0, noise_boxes=1)
    plain = dataclasses.replace(layout, noise=0.0)
    assert plain.step == layout.step
    up = AlwaysUp(np.random.PCG64(0))
    too_long = signed(encode(all_alike(plain), plain, 1.0, up)[0])
    assert set(too_long) == {3}
    assert int(np.sum(too_long**2)) > layout.most_norm_squared
    assert set(signed(encode(all_alike(layout), layout, 1.0, up, None, silent)[0])) == {2}


@pytest.mark.parametrize("count", [1, 4, 64, 4096])
def test_a_third_of_the_roundings_at_least_is_within_the_norm(count: int) -> None:
    generator, tries = np.random.default_rng(0), 400
    for values in (np.full(count, 0.5), np.full(count, 0.1), np.full(count, 7.5), generator.normal(0, 3, count)):
        limit = noise.rounded_norm_squared(float(np.linalg.norm(values)), count)
        rounded = np.floor(values) + (generator.random((tries, count)) < values - np.floor(values))
        assert np.mean(np.sum(rounded**2, axis=1) <= limit) >= 1 - math.exp(-0.5)


def test_rounding_within_the_norm_shortens_a_delta_at_the_clip_by_less_than_a_thousandth() -> None:
    layout = Layout({"x": (64,)}, SEED, 1.0, boxes=1, word_bits=16, value_bits=8, noise=1e-3, noise_boxes=1)
    one, draws, generator = change(layout, 5, 1.0), 2000, np.random.default_rng(1)
    decoded = [decode_sum(encode(one, layout, 1.0, generator, None, silent)[0], layout)["x"] for _ in range(draws)]
    error = np.mean(decoded, axis=0, dtype=np.float64) - one["x"]
    along = float(error @ one["x"])
    assert -1e-3 < along < 1e-4
    across = error - along * one["x"]
    assert float(np.sqrt(np.mean(across**2))) <= 1.2 * layout.step / 2 / math.sqrt(draws)


def test_every_box_weighs_the_same() -> None:
    words, _ = encode(change(LAYOUT, 0, 1.0), LAYOUT, 1.0, np.random.default_rng(0))
    assert words[0] == 255
    with pytest.raises(DeltaError, match="all weigh the same"):
        encode(change(LAYOUT, 0, 1.0), LAYOUT, 0.5, np.random.default_rng(0))
    for weight in (254, 300):
        with pytest.raises(DeltaError, match="weight"):
            decode_sum(np.concatenate([[weight], np.zeros(LAYOUT.padded, np.int64)]), LAYOUT)
    two = np.concatenate([[2 * 255], np.zeros(LAYOUT.padded, np.int64)])
    assert not flat(decode_sum(two, LAYOUT, boxes=2)).any()
    with pytest.raises(DeltaError, match="weight 510"):
        decode_sum(two, LAYOUT, boxes=3)


@pytest.mark.parametrize("size", [1, 40, 3000])
@pytest.mark.parametrize("multiplier", [0.05, 1.0])
def test_an_honest_mean_with_noise_is_within_the_bound_and_a_cheat_is_not(size: int, multiplier: float) -> None:
    layout = Layout({"x": (size,)}, SEED, 10.0, 8, 32, 13, 1.0, multiplier, 2)
    beyond, generator = {"x": np.full(size, 50.0, np.float32)}, np.random.default_rng(size)
    source = bytes_of(size)
    words = [encode(beyond, layout, 1.0, generator, None, source)[0] for _ in range(8)]
    total = np.sum(words, axis=0, dtype=words[0].dtype)
    assert 0.0 < delta.norm(decode_sum(total, layout, boxes=8)) <= addable.norm_bound(layout, 8, 8 * 255)
    cheat = np.full(layout.word_count, layout.most_in_sum, np.int64)
    cheat[0] = 8 * 255
    with pytest.raises(DeltaError, match="a mean of norm"):
        decode_sum(cheat, layout, boxes=8)


def test_the_memory_knows_nothing_of_the_noise() -> None:
    """Else the next round would send the noise of this one with its sign turned."""
    memory = np.zeros(LAYOUT.size, np.float32)
    results = [
        encode(change(LAYOUT, 0, 0.5), LAYOUT, 1.0, np.random.default_rng(7), memory, source)
        for source in (silent, bytes_of(1), bytes_of(2))
    ]
    assert all(kept is not None for _, kept in results)
    np.testing.assert_array_equal(results[0][1], results[1][1])
    np.testing.assert_array_equal(results[0][1], results[2][1])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.mean(results[i][0] != results[j][0]) > 0.9


def test_noise_comes_from_the_operating_system() -> None:
    assert inspect.signature(encode).parameters["random_bytes"].default is os.urandom


# --- the mean ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word_bits", "size", "share"), [(16, 4000, 1.0), (32, 4000, 1.0), (32, 4000, 0.25)])
@pytest.mark.parametrize(("multiplier", "noise_boxes"), [(0.1, 5), (1.0, 5), (1.0, 2), (3.0, 5)])
def test_the_mean_errs_by_the_noise_and_nothing_else(
    word_bits: int, size: int, share: float, multiplier: float, noise_boxes: int
) -> None:
    boxes, trials = 5, 6
    squares, errors = [], []
    for trial in range(trials):
        layout = Layout({"x": (size,)}, SEED + bytes([trial]), 2.0, boxes, word_bits, 8, share, multiplier, noise_boxes)
        deltas = [change(layout, 100 + box, 1.5) for box in range(boxes)]
        source, generator = bytes_of(trial), np.random.default_rng(trial)
        words = [encode(one, layout, 1.0, generator, None, source)[0] for one in deltas]
        found = decode_sum(np.sum(words, axis=0, dtype=words[0].dtype), layout)["x"]
        wanted = np.mean([flat(one) for one in deltas], axis=0)
        sent = found != 0
        errors.append((found - wanted)[sent])
        squares.append(float(np.mean(errors[-1] ** 2)))
    predicted = multiplier * 2.0 * math.sqrt(boxes / noise_boxes) / boxes  # of a value
    inflation = math.sqrt(layout.most_norm_squared) / layout.clip_levels
    assert inflation < 1.13
    assert math.sqrt(np.mean(squares)) == pytest.approx(predicted * inflation, rel=0.03)
    assert abs(np.mean(np.concatenate(errors))) < 4 * predicted / math.sqrt(trials * layout.chosen)
    if share == 1.0:
        assert math.sqrt(np.mean(squares) * size) <= 1.02 * error_bound(
            layout, boxes
        )  # a bound of the mean over seeds; these are few


# --- what it costs ----------------------------------------------------------------------------------


def divergence_in_numbers(shift: int, variance: float, order: int) -> float:
    """Rényi, of Skellam noise around `shift` from that around 0, by summing it up."""
    largest = math.ceil(12 * math.sqrt(variance) + 40 + 3 * order * shift)
    middle = np.arange(-largest, largest + 1)
    log_chance = _log_chances(variance, largest + shift)
    away, here = log_chance[np.abs(middle - shift)], log_chance[np.abs(middle)]
    terms = order * away - (order - 1) * here
    peak = terms.max()
    return (peak + math.log(np.exp(terms - peak).sum())) / (order - 1)


def _log_chances(variance: float, largest: int) -> np.ndarray:
    """log P(X = k) for k from 0: ratios by continued fraction downwards, where the chances themselves would be 0."""
    ratios, ratio = np.empty(largest + 1), 0.0
    for k in range(largest + 60, 0, -1):
        ratio = 1.0 / (2.0 * k / variance + ratio)
        if k <= largest:
            ratios[k] = ratio
    logs = np.concatenate([[0.0], np.cumsum(np.log(ratios[1:]))])
    return logs - math.log(1.0 + 2.0 * np.exp(logs[1:]).sum())


def test_the_log_chances_of_the_test_are_those_of_the_poisson_difference() -> None:
    np.testing.assert_allclose(np.exp(_log_chances(25.0, 90))[:31], chances(25.0, 30)[30:], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("variance", [1, 4, 30, 1000])
@pytest.mark.parametrize("order", [2, 3, 5, 12, 40])
def test_the_bound_is_above_the_divergence_and_close_to_it(variance: int, order: int) -> None:
    for shift in (1, 2, 3, 7):
        found = divergence_in_numbers(shift, variance, order)
        bound = accountant.divergence(Cost(shift**2, shift, variance), order)
        assert found <= bound * (1 + 1e-9)
        if order * shift <= variance / 10:
            assert bound <= 1.2 * found


def test_of_several_values_the_divergences_add_and_the_bound_holds() -> None:
    shifts = (1, 2, 0, 5, 3)
    cost = Cost(sum(shift**2 for shift in shifts), sum(shifts), 20)
    for order in (2, 4, 10):
        found = sum(divergence_in_numbers(shift, 20, order) for shift in shifts if shift)
        assert found <= accountant.divergence(cost, order)


@given(st.integers(1, 100_000), st.floats(0.05, 1.0), st.sampled_from([4, 8, 16]), st.floats(0.1, 5.0))
def test_the_cost_is_of_the_longest_values_and_the_honest_boxes_noise(
    size: int, share: float, bits: int, multiplier: float
) -> None:
    layout = Layout({"x": (size,)}, SEED, 1.0, 9, 32, bits, share, multiplier, 4)
    cost = accountant.cost_of(layout)
    assert cost is not None
    assert cost.l2_squared == layout.most_norm_squared
    assert cost.variance == 4 * layout.noise_variance
    assert math.sqrt(cost.variance / cost.l2_squared) >= multiplier * (1 - 1e-12)
    assert cost.l1**2 >= min(layout.padded * cost.l2_squared, cost.l2_squared**2)  # Cauchy-Schwarz, or whole numbers
    assert accountant.cost_of(dataclasses.replace(layout, noise=0.0)) is None


GAUSSIAN_LIKE = 10**12  # l2_squared: levels so fine that the noise is as good as normal


def rounds_of(multiplier: float, rounds: int) -> list[Cost]:
    return [Cost(GAUSSIAN_LIKE, 10**6 * 1000, math.ceil(multiplier**2 * GAUSSIAN_LIKE))] * rounds


@pytest.mark.parametrize("multiplier", [0.3, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("rounds", [1, 10, 200])
@pytest.mark.parametrize("at_delta", [1e-5, 1e-8])
def test_fine_noise_costs_what_opacus_says_of_normal_noise(multiplier: float, rounds: int, at_delta: float) -> None:
    opacus = pytest.importorskip("opacus.accountants.analysis.rdp", reason="needs the extra `privacy`")
    orders = list(accountant.ORDERS)
    divergences = opacus.compute_rdp(q=1.0, noise_multiplier=multiplier, steps=rounds, orders=orders)
    wanted, _ = opacus.get_privacy_spent(orders=orders, rdp=divergences, delta=at_delta)
    assert accountant.epsilon(rounds_of(multiplier, rounds), at_delta) == pytest.approx(max(wanted, 0.0), rel=1e-5)


def test_whole_orders_cost_little_where_a_budget_makes_sense() -> None:
    """Beside Opacus' own orders, of which most are no whole numbers: ours is never below, and above by a few per cent."""
    opacus = pytest.importorskip("opacus.accountants", reason="needs the extra `privacy`")
    for multiplier, rounds in ((3.0, 10), (2.0, 10), (5.0, 100), (20.0, 400)):
        peer = opacus.RDPAccountant()
        peer.history = [(multiplier, 1.0, rounds)]
        wanted = peer.get_epsilon(1e-5)
        found = accountant.epsilon(rounds_of(multiplier, rounds), 1e-5)
        assert wanted * (1 - 1e-6) <= found <= 1.05 * wanted


def test_coarse_noise_costs_more_than_fine_of_the_same_multiplier() -> None:
    coarse, fine = Cost(4, 4, 16), Cost(4 * 10**8, 4 * 10**6, 16 * 10**8)
    assert accountant.epsilon([coarse], 1e-5) > accountant.epsilon([fine], 1e-5)


def test_rounds_add_up_but_not_in_epsilon() -> None:
    one, ten = (accountant.epsilon(rounds_of(3.0, rounds), 1e-5) for rounds in (1, 10))
    assert one < ten < 10 * one
    mixed = accountant.epsilon(rounds_of(3.0, 1) + rounds_of(1.0, 1), 1e-5)
    assert accountant.epsilon(rounds_of(1.0, 1), 1e-5) < mixed < accountant.epsilon(rounds_of(1.0, 2), 1e-5)
    assert accountant.epsilon([], 1e-5) == 0.0


@pytest.mark.parametrize("wrong", [0.0, 1.0, -1.0, float("nan")])
def test_a_delta_that_is_none_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        accountant.epsilon(rounds_of(1.0, 1), wrong)
