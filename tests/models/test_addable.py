"""The addable delta codec: sums decode to means, within the bound; nothing is lost between memory and words."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import ThreadpoolController, threadpool_info

from models import addable, delta
from models.addable import Layout, decode_sum, encode, error_bound, value_bits_for
from models.errors import DeltaError

SHAPES = {"stem.bias": (4,), "head.weight": (2, 3)}
SEED = b"the digest of a plan"
LAYOUT = Layout(SHAPES, SEED, clip_norm=1.0, boxes=8, word_bits=16, value_bits=12)


def change(layout: Layout, seed: int, norm: float = 1.0) -> dict[str, np.ndarray]:
    """As a network's: tensors of very different scales, some with heavy tails."""
    generator = np.random.default_rng(seed)
    drawn = {
        name: generator.standard_t(4, shape) * 10.0 ** generator.uniform(-2, 0) for name, shape in layout.shapes.items()
    }
    factor = norm / delta.norm(drawn)
    return {name: (value * factor).astype(np.float32) for name, value in drawn.items()}


def flat(tensors: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)]).astype(np.float64)


def total(words: list[np.ndarray]) -> np.ndarray:
    """Modulo the word, as the hub adds."""
    return np.sum(words, axis=0, dtype=words[0].dtype)


def mean_error(layout: Layout, deltas: list[dict[str, np.ndarray]], weights: list[int], seed: int) -> float:
    """L2, against the mean by weight levels."""
    generator = np.random.default_rng(seed)
    words = [encode(one, layout, level / 255, generator)[0] for one, level in zip(deltas, weights, strict=True)]
    wanted = np.average([flat(one) for one in deltas], axis=0, weights=weights)
    return float(np.linalg.norm(flat(decode_sum(total(words), layout)) - wanted))


# --- what fits a word -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word_bits", "boxes", "bits"),
    [(16, 1, 16), (16, 2, 15), (16, 8, 13), (16, 257, 8), (32, 2, 16), (32, 65538, 16), (32, 65539, 15)],
)
def test_bits_of_a_value_by_hand(word_bits: int, boxes: int, bits: int) -> None:
    assert value_bits_for(word_bits, boxes) == bits


@given(st.sampled_from([16, 32]), st.integers(1, 257))
def test_one_more_bit_would_overflow(word_bits: int, boxes: int) -> None:
    bits, largest = value_bits_for(word_bits, boxes), 2 ** (word_bits - 1) - 1
    assert boxes * (2 ** (bits - 1) - 1) <= largest
    assert bits == 16 or boxes * (2**bits - 1) > largest


@pytest.mark.parametrize(("word_bits", "boxes"), [(16, 258), (32, 2**25), (16, 0), (8, 1)])
def test_a_sum_that_fits_no_word_is_refused(word_bits: int, boxes: int) -> None:
    with pytest.raises(DeltaError):
        value_bits_for(word_bits, boxes)


@pytest.mark.parametrize("word_bits", [16, 32])
def test_every_box_at_the_highest_level_does_not_overflow(word_bits: int) -> None:
    layout = Layout({"x": (1,)}, SEED, 1.0, boxes=257, word_bits=word_bits, value_bits=value_bits_for(word_bits, 257))
    for level in (layout.levels, -layout.levels):
        words = np.array([255, level % 2**word_bits], layout.word_type)
        decoded = decode_sum(total([words] * 257), layout)["x"]
        assert abs(decoded[0]) == pytest.approx(layout.levels * layout.step, rel=1e-6)
        assert decoded[0] == pytest.approx(decode_sum(words, layout)["x"][0], rel=1e-6)


# --- the mean ---------------------------------------------------------------------------------------


def test_one_value_by_hand() -> None:
    layout = Layout({"x": (1,)}, SEED, clip_norm=1.0, boxes=1, word_bits=16, value_bits=8)  # reaches 4 spreads of 1
    delta_of_4_levels = {"x": np.array([4 * 4 / 127], np.float32)}
    words, memory = encode(delta_of_4_levels, layout, 1.0, np.random.default_rng(0))
    assert memory is None
    assert words.dtype == np.uint16
    assert words[0] == 255
    assert int(words[1]) in (4, 2**16 - 4)  # the rotation of one value is its sign
    assert decode_sum(words, layout)["x"][0] == pytest.approx(16 / 127, rel=1e-6)


@settings(deadline=None)
@given(st.data())
def test_a_sum_decodes_to_the_mean_within_one_step(data: st.DataObject) -> None:
    word_bits = data.draw(st.sampled_from([16, 32]))
    limit = data.draw(st.integers(1, 40))
    bits = data.draw(st.integers(8, value_bits_for(word_bits, limit)))
    layout = Layout(SHAPES, data.draw(st.binary(min_size=8, max_size=40)), 1.0, limit, word_bits, bits)
    boxes = data.draw(st.integers(1, limit))
    seed = data.draw(st.integers(0, 2**32))
    deltas = [change(layout, seed + i, norm=data.draw(st.floats(1e-6, 0.999))) for i in range(boxes)]
    weights = data.draw(st.lists(st.integers(1, 255), min_size=boxes, max_size=boxes))
    # at most 16 values, so no coordinate reaches the clamp: what is left is under one level per value and box
    hard = layout.step * np.sqrt(layout.padded) * boxes / (sum(weights) / 255) + 1e-5
    assert layout.padded <= 16
    assert mean_error(layout, deltas, weights, seed) <= hard


@pytest.mark.parametrize("size", [40, 1000, 70000])
@pytest.mark.parametrize("bits", [4, 8, 12, 16])
@pytest.mark.parametrize("boxes", [1, 8])
def test_the_error_of_the_mean_is_within_its_bound(size: int, bits: int, boxes: int) -> None:
    """At the clip norm: deltas like a network's, and all of it in one coordinate, the same for every box."""
    squares = []
    for trial in range(4):
        layout = Layout({"a": (size // 4,), "b": (3, size // 4)}, SEED + bytes([trial]), 2.0, boxes, 32, bits)
        spike = {"a": np.zeros(size // 4, np.float32), "b": np.zeros((3, size // 4), np.float32)}
        spike["a"][trial] = 2.0
        for deltas in ([change(layout, 10 * trial + i, norm=2.0) for i in range(boxes)], [spike] * boxes):
            squares.append(mean_error(layout, deltas, [255] * boxes, trial) ** 2)
    assert np.sqrt(np.mean(squares)) <= error_bound(layout, boxes)


def test_the_bound_shrinks_with_boxes_and_grows_with_their_lightness() -> None:
    assert error_bound(LAYOUT, 8) < error_bound(LAYOUT, 1) < error_bound(LAYOUT, 1, weight_share=0.1)


class Nearest(np.random.Generator):
    """Draws that make the rounding go to the nearest level: a biased coder."""

    def random(self, size: int, dtype: type) -> np.ndarray:  # type: ignore[override]
        return np.full(size, 0.5, dtype)


def test_rounding_is_unbiased_and_a_biased_one_would_show() -> None:
    """The mean over many encodings of one delta."""
    layout = Layout({"x": (64,)}, SEED, 1.0, boxes=1, word_bits=16, value_bits=8)
    one, draws = change(layout, 5, norm=0.5), 2000

    def mean_error_of(generator: np.random.Generator) -> float:
        decoded = [decode_sum(encode(one, layout, 100 / 255, generator)[0], layout)["x"] for _ in range(draws)]
        return float(np.sqrt(np.mean(np.square(np.mean(decoded, axis=0, dtype=np.float64) - one["x"]))))

    allowed = 1.2 * layout.step * 2.55 / 2 / np.sqrt(draws)  # a variance of at most a quarter of a level squared
    assert mean_error_of(np.random.default_rng(1)) <= allowed
    assert mean_error_of(Nearest(np.random.PCG64(1))) > 5 * allowed


def test_the_order_of_boxes_and_of_tensors_changes_nothing() -> None:
    words = [encode(change(LAYOUT, i), LAYOUT, 0.5, np.random.default_rng(i))[0] for i in range(5)]
    turned = dict(reversed(change(LAYOUT, 0).items()))
    np.testing.assert_array_equal(encode(turned, LAYOUT, 0.5, np.random.default_rng(0))[0], words[0])
    forth, back = decode_sum(total(words), LAYOUT), decode_sum(total(words[::-1]), LAYOUT)
    for name, shape in SHAPES.items():
        assert forth[name].shape == shape
        assert forth[name].dtype == np.float32
        np.testing.assert_array_equal(forth[name], back[name])


def test_the_sum_may_come_as_signed_integers() -> None:
    words = [encode(change(LAYOUT, i), LAYOUT, 1.0, np.random.default_rng(i))[0] for i in range(8)]
    plain = np.sum([word.view(np.int16) for word in words], axis=0, dtype=np.int64)
    for form in (plain, plain.astype(np.int16)):
        np.testing.assert_array_equal(
            decode_sum(form, LAYOUT)["head.weight"], decode_sum(total(words), LAYOUT)["head.weight"]
        )


def test_a_weight_above_half_a_word_is_read_from_signed_words() -> None:
    layout = Layout({"x": (1,)}, SEED, 1.0, boxes=257, word_bits=16, value_bits=8)
    words = np.array([65535, 257], np.uint16)
    assert decode_sum(words.view(np.int16), layout)["x"][0] == decode_sum(words, layout)["x"][0]


def test_a_weight_is_at_least_one_level() -> None:
    assert encode(change(LAYOUT, 0), LAYOUT, 1e-9, np.random.default_rng(0))[0][0] == 1
    assert encode(change(LAYOUT, 0), LAYOUT, 0.5, np.random.default_rng(0))[0][0] == 128


def test_what_exceeds_the_clip_is_gone() -> None:
    layout = dataclasses.replace(LAYOUT, word_bits=32, value_bits=16)
    long = change(layout, 1, norm=1e30)
    words, memory = encode(long, layout, 1.0, np.random.default_rng(0), np.zeros(layout.size, np.float32))
    assert delta.norm(decode_sum(words, layout)) == pytest.approx(1.0, abs=1e-3)
    assert memory is not None
    assert np.abs(memory).max() < 1e-3


def test_a_delta_of_zeros_survives() -> None:
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    words, _ = encode(zeros, LAYOUT, 1.0, np.random.default_rng(0))
    assert not words[1:].any()
    assert not flat(decode_sum(words, LAYOUT)).any()


# --- the seed ---------------------------------------------------------------------------------------


def test_another_round_has_another_rotation() -> None:
    layout = Layout({"x": (1000,)}, SEED, 1.0, boxes=1)
    other = dataclasses.replace(layout, seed=SEED + b"2")
    one = change(layout, 3)
    words, same, others = (
        encode(one, each, 1.0, np.random.default_rng(0))[0] for each in (layout, dataclasses.replace(layout), other)
    )
    np.testing.assert_array_equal(words, same)
    assert np.mean(words != others) > 0.9
    assert np.linalg.norm(flat(decode_sum(words, other)) - flat(one)) > 1.0


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 1000, 5000])
def test_the_rotation_keeps_lengths_and_comes_back(size: int) -> None:
    layout = Layout({"x": (size,)}, SEED, 1.0, boxes=1)
    assert size <= layout.padded < size + layout.block
    before = np.random.default_rng(0).standard_normal(layout.padded).astype(np.float32)
    values = before.copy()
    addable._rotate(values, layout)
    assert np.linalg.norm(values) == pytest.approx(np.linalg.norm(before), rel=1e-5)
    addable._rotate_back(values, layout)
    np.testing.assert_allclose(values, before, atol=1e-5)


@pytest.mark.parametrize("rotation", ["_rotate", "_rotate_back"])
def test_the_rotation_takes_one_thread_and_gives_the_others_back(
    rotation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    seen: list[set[int]] = []
    transform = addable._transform_along
    monkeypatch.setattr(addable, "_transform_along", lambda *given: (seen.append(threads()), transform(*given)))
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        getattr(addable, rotation)(np.zeros(LAYOUT.padded, np.float32), LAYOUT)
        assert (seen, threads()) == ([{1}], {2})


def test_one_large_coordinate_is_spread_over_all() -> None:
    layout = Layout({"x": (60000,)}, SEED, 1.0, boxes=1)
    values = np.zeros(layout.padded, np.float32)
    values[777] = 1.0
    addable._rotate(values, layout)
    assert np.abs(values).max() * np.sqrt(layout.padded) <= 3.0


def test_only_the_chosen_coordinates_move() -> None:
    layout = Layout({"a": (500,), "b": (20, 25)}, SEED, 1.0, boxes=1, share=1 / 4)
    one = change(layout, 1, norm=0.3)
    words, memory = encode(one, layout, 1.0, np.random.default_rng(0))
    assert memory is None
    decoded = flat(decode_sum(words, layout))
    places = layout.places
    np.testing.assert_allclose(decoded[places], flat(one)[places], atol=1e-3)
    assert np.count_nonzero(decoded) <= layout.chosen == 250
    assert words.size < 1 + 250 + layout.block


# --- memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.25, 1 / 16])
@pytest.mark.parametrize("weight_share", [1.0, 0.1])
@pytest.mark.parametrize("norm", [0.1, 3.0])
def test_what_is_sent_and_what_is_kept_are_the_whole(share: float, weight_share: float, norm: float) -> None:
    layout = Layout({"a": (700,), "b": (30, 10)}, SEED, 1.0, boxes=4, word_bits=16, value_bits=8, share=share)
    before = np.random.default_rng(9).normal(0, 0.02, layout.size).astype(np.float32)
    given_memory = before.copy()
    one = change(layout, 2, norm=norm)
    words, kept = encode(one, layout, weight_share, np.random.default_rng(0), before)
    assert kept is not None
    whole = layout.feedback_rate * flat(delta.clip(one, 1.0)[0]) + before
    np.testing.assert_allclose(flat(decode_sum(words, layout)) + kept, whole, atol=1e-5)
    np.testing.assert_array_equal(before, given_memory)
    if share < 1.0:
        unsent = np.setdiff1d(np.arange(layout.size), layout.places)
        np.testing.assert_allclose(kept[unsent], whole[unsent], atol=1e-7)


def test_what_is_clamped_is_kept() -> None:
    """A delta whose rotation is one value far beyond the highest level."""
    layout = Layout({"x": (4096,)}, SEED, 1.0, boxes=1, value_bits=4)
    spike = np.zeros(4096, np.float32)
    spike[5] = 1.0
    addable._rotate_back(spike, layout)
    words, kept = encode({"x": spike}, layout, 1.0, np.random.default_rng(0), np.zeros(4096, np.float32))
    assert words[6] == layout.levels == 7
    assert kept is not None
    assert np.linalg.norm(kept) == pytest.approx(1.0 - 7 * layout.step, abs=1e-4)


def test_at_full_share_the_rate_is_one_and_the_sum_over_rounds_loses_nothing() -> None:
    layout = Layout({"x": (200,)}, SEED, 1.0, boxes=1, word_bits=16, value_bits=4)
    assert layout.feedback_rate == 1.0
    one, memory, sent = change(layout, 4, norm=0.2), np.zeros(200, np.float32), np.zeros(200)
    generator = np.random.default_rng(0)
    for _ in range(50):
        words, kept = encode(one, layout, 1.0, generator, memory)
        assert kept is not None
        memory = kept
        sent += flat(decode_sum(words, layout))
    assert np.linalg.norm(sent / 50 - flat(one)) < 0.1 * 0.2  # each round alone errs by about as much as the delta


def test_what_waits_stays_within_the_clip_though_every_round_is_at_it() -> None:
    layout = Layout({"x": (2000,)}, SEED, 1.0, boxes=1, share=1 / 8)
    one, memory, norms = change(layout, 4), np.zeros(2000, np.float32), []
    for index in range(80):
        this_round = dataclasses.replace(layout, seed=SEED + bytes([index]))
        kept = encode(one, this_round, 1.0, np.random.default_rng(index), memory)[1]
        assert kept is not None
        memory = kept
        norms.append(np.linalg.norm(memory))
    assert max(norms) < 1.0
    assert np.mean(norms[40:]) == pytest.approx(np.sqrt((1 - 1 / 8) / (2 - 1 / 8)), rel=0.15)


@pytest.mark.parametrize(("feedback", "is_full_size", "settles"), [(0, 0, True), (1, 0, True), (1, 1, False)])
def test_boxes_that_each_go_all_the_way_to_their_own_best_settle_at_the_mean(
    feedback: bool, is_full_size: bool, settles: bool
) -> None:
    """A quadratic loss per box, a sixteenth of the weights a round: with memory only the shrunk delta does not overshoot."""
    boxes, size = 3, 256
    best = np.random.default_rng(0).normal(0, 1, (boxes, size)).astype(np.float32)
    weights = np.full(size, 3.0, np.float32)
    memories = [np.zeros(size, np.float32) if feedback else None for _ in range(boxes)]
    generator = np.random.default_rng(1)
    for index in range(400):
        layout = Layout({"x": (size,)}, SEED + index.to_bytes(2, "little"), 1000.0, boxes, share=1 / 16)
        step = 1.0 / layout.feedback_rate if is_full_size else 1.0
        results = [
            encode({"x": step * (best[i] - weights)}, layout, 1.0, generator, memory)
            for i, memory in enumerate(memories)
        ]
        memories = [kept for _, kept in results]
        weights = weights + decode_sum(total([words for words, _ in results]), layout)["x"]
    apart, apart_before = (float(np.linalg.norm(each - best.mean(axis=0))) for each in (weights, np.float32(3.0)))
    assert apart < 0.02 * apart_before if settles else apart > apart_before


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"boxes": 9, "word_bits": 16, "value_bits": 13}, "bits"),
        ({"value_bits": 3}, "bits"),
        ({"value_bits": 17}, "bits"),
        ({"boxes": 0}, "no such sum"),
        ({"clip_norm": 0.0}, "clip norm"),
        ({"clip_norm": float("nan")}, "clip norm"),
        ({"clip_norm": float("inf")}, "clip norm"),
        ({"share": 0.0}, "share"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(wrong: dict, reason: str) -> None:
    with pytest.raises(DeltaError, match=reason) as refused:
        dataclasses.replace(LAYOUT, **wrong)
    assert refused.value.advice


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"stem.bias": np.full(4, np.nan)}, "not finite"),
        ({"stem.bias": np.full(4, -np.inf)}, "not finite"),
        ({"stem.bias": np.full(4, 1e200)}, "not finite"),
        ({"stem.bias": np.zeros(5)}, "shape"),
        ({"stem.bias": np.zeros((2, 2))}, "shape"),
        ({"tail": np.zeros(1)}, "round's tensors: tail"),
    ],
)
def test_a_delta_that_does_not_fit_is_refused(wrong: dict, reason: str) -> None:
    with pytest.raises(DeltaError, match=reason):
        encode(change(LAYOUT, 0) | wrong, LAYOUT, 1.0, np.random.default_rng(0))


def test_a_delta_without_a_tensor_is_refused() -> None:
    with pytest.raises(DeltaError, match=r"round's tensors: head\.weight"):
        encode({"stem.bias": np.zeros(4)}, LAYOUT, 1.0, np.random.default_rng(0))


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_weight_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(DeltaError, match="weight share"):
        encode(change(LAYOUT, 0), LAYOUT, share, np.random.default_rng(0))


@pytest.mark.parametrize(
    "memory", [np.zeros(9, np.float32), np.zeros((10, 1), np.float32), np.zeros(10), np.full(10, np.nan, np.float32)]
)
def test_a_memory_of_something_else_is_refused(memory: np.ndarray) -> None:
    with pytest.raises(DeltaError, match="memory"):
        encode(change(LAYOUT, 0), LAYOUT, 1.0, np.random.default_rng(0), memory)


def of_words(weight: int, value: int = 0, dtype: type = np.int64, count: int = LAYOUT.word_count) -> np.ndarray:
    words = np.zeros(count, dtype)
    words[0], words[1] = weight, value
    return words


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (of_words(0), "weight 0"),
        (of_words(-1), "weight -1"),
        (of_words(8 * 255 + 1), "weight 2041"),
        (of_words(255, 8 * 2047 + 1), "levels"),
        (of_words(255, -8 * 2047 - 1), "levels"),
        (of_words(255, count=LAYOUT.word_count - 1), "shape"),
        (of_words(255, count=LAYOUT.word_count + 1), "shape"),
        (of_words(255)[None], "shape"),
        (of_words(255, dtype=np.uint32), "uint32"),
        (of_words(255, dtype=np.float64), "float64"),
    ],
)
def test_a_sum_that_no_boxes_could_have_is_refused(words: np.ndarray, reason: str) -> None:
    with pytest.raises(DeltaError, match=reason):
        decode_sum(words, LAYOUT)


@pytest.mark.parametrize(
    ("weight", "boxes", "reason"),
    [(2, 3, "weight 2"), (3 * 255 + 1, 3, "weight 766"), (3, 3, ""), (3 * 255, 3, ""), (2, 2, "")],
)
def test_each_box_weighs_one_level_at_least_and_255_at_most(weight: int, boxes: int, reason: str) -> None:
    words = of_words(weight)
    if not reason:
        assert not flat(decode_sum(words, LAYOUT, boxes)).any()
        return
    assert not flat(decode_sum(words, LAYOUT)).any()
    with pytest.raises(DeltaError, match=reason):
        decode_sum(words, LAYOUT, boxes)


@pytest.mark.parametrize("size", [1, 40, 3000])
@pytest.mark.parametrize(("bits", "boxes"), [(4, 2), (8, 40), (13, 8)])
@pytest.mark.parametrize("weight", [1, 20, 255])
def test_the_longest_honest_mean_is_within_the_bound(size: int, bits: int, boxes: int, weight: int) -> None:
    """All boxes far beyond the clip norm, and all in one direction."""
    layout = Layout({"x": (size,)}, SEED, 10.0, boxes, 32, bits)
    beyond = {"x": np.full(size, 50.0, np.float32)}
    generator = np.random.default_rng(weight)
    words = total([encode(beyond, layout, weight / 255, generator)[0] for _ in range(boxes)])
    norm = delta.norm(decode_sum(words, layout, boxes))
    assert norm <= addable.norm_bound(layout, boxes, boxes * weight)
    assert norm > 0.9 * layout.clip_norm or weight == 1


def full_levels(layout: Layout, weight: int, boxes: int = 1) -> np.ndarray:
    """Words of one box that says so little of its weight, and all levels of so many boxes."""
    words = np.full(layout.word_count, boxes * layout.levels, layout.word_type)
    words[0] = weight
    return words


@pytest.mark.parametrize(("weight", "levels_of"), [(1, 1), (255, 5)])
def test_a_mean_that_honest_boxes_cannot_have_is_refused(weight: int, levels_of: int) -> None:
    """Full levels under a weight of one, and the whole room of the sum: both decoded as if they were a mean."""
    layout = Layout({"x": (1000,)}, SEED, 10.0, boxes=8, value_bits=13)
    still = {"x": np.zeros(1000, np.float32)}
    honest = [encode(still, layout, 5 / 255, np.random.default_rng(0))[0] for _ in range(3)]
    words = total([*honest, full_levels(layout, weight, levels_of)])
    assert delta.norm(decode_sum(words, layout)) > 4 * layout.clip_norm
    with pytest.raises(DeltaError, match=r"a mean of norm .*honest boxes give 10.* at most"):
        decode_sum(words, layout, boxes=4)


def test_a_mask_that_did_not_cancel_is_refused() -> None:
    layout = Layout({"x": (1000,)}, SEED, 1.0, boxes=8)
    words = encode(change(layout, 0), layout, 1.0, np.random.default_rng(0))[0]
    words += np.random.default_rng(1).integers(0, 2**32, words.size, np.uint32)
    with pytest.raises(DeltaError, match=r"weight|levels"):
        decode_sum(words, layout)
