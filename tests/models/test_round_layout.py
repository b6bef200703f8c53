"""The words of a round from its plan: the same on both sides, wide enough, and weights that cannot exceed the cap."""

from dataclasses import dataclass

import pytest

from models import addable, round_layout
from models.drawn import Drawn
from models.drawn_delta import DrawnCodec
from models.errors import DeltaError

SHAPES = {"body": (3, 2), "head": (4,)}
SEED = b"s" * 32


@dataclass(frozen=True)
class Plan:
    trainable: str = "all"
    clip_norm: float = 2.0
    boxes_max: int = 8
    word_bits: int = 16
    value_bits: int = 12
    share: float = 0.5
    examples_cap: int = 100
    noise: float = 0.0
    noise_boxes: int = 0


def test_the_plan_s_numbers_are_the_layout_s() -> None:
    assert round_layout.layout_of(Plan(), SEED, SHAPES) == addable.Layout(
        SHAPES, SEED, clip_norm=2.0, boxes=8, word_bits=16, value_bits=12, share=0.5
    )


@pytest.mark.parametrize(
    "plan",
    [
        Plan(value_bits=14),
        Plan(boxes_max=300),
        Plan(clip_norm=0.0),
        Plan(share=0.0),
        Plan(word_bits=24),
        Plan(boxes_max=0),
        Plan(noise=1.0),
        Plan(noise=1.0, noise_boxes=9),
    ],
)
def test_a_plan_that_no_weights_fit_is_refused_before_there_are_any(plan: Plan) -> None:
    with pytest.raises(DeltaError):
        round_layout.check(plan, SEED)
    with pytest.raises(DeltaError):
        round_layout.layout_of(plan, SEED, SHAPES)


@pytest.mark.parametrize("trainable", ["heads", "norms", "adapters"])
def test_a_share_is_drawn_of_all_weights_alone(trainable: str) -> None:
    with pytest.raises(DeltaError, match=f"a share of 0.5 of {trainable}") as refused:
        round_layout.check(Plan(trainable=trainable), SEED)
    assert "adapters are no single weights" in refused.value.advice
    round_layout.check(Plan(trainable=trainable, share=1.0), SEED)


@pytest.mark.parametrize(("share", "factor"), [(1.0, 1.0), (0.25, 2.0), (1 / 16, 4.0), (0.036, 4.0), (1e-9, 4.0)])
def test_the_rate_rises_as_the_share_falls_up_to_four_times(share: float, factor: float) -> None:
    assert round_layout.rate_factor(share) == pytest.approx(factor)


def test_heads_and_norms_travel_whole_beside_a_share() -> None:
    """0.036 of the rest; whole blocks of 64 words of 2 bytes and one of weight: a fiftieth of float32."""
    shapes = {"body": (100, 1000), "head.weight": (30,), "norm.bias": (20,)}
    layout = round_layout.layout_of(Plan(share=0.036), SEED, shapes)
    assert layout.chosen == 3600 + 50
    assert (layout.block, layout.word_count) == (64, 1 + 58 * 64)
    assert 4 * layout.size / (2 * layout.word_count) == pytest.approx(53.9, abs=0.1)


def test_a_sound_plan_passes() -> None:
    round_layout.check(Plan(), SEED)


@pytest.mark.parametrize(("examples", "share"), [(1, 0.01), (50, 0.5), (100, 1.0), (100_000, 1.0)])
def test_weight_up_to_the_cap(examples: int, share: float) -> None:
    assert round_layout.weight_share(examples, Plan()) == share


def test_with_noise_all_weigh_the_same() -> None:
    noisy = Plan(noise=1.0, noise_boxes=3)
    assert {round_layout.weight_share(examples, noisy) for examples in (1, 50, 100_000)} == {1.0}
    layout = round_layout.layout_of(noisy, SEED, SHAPES)
    assert (layout.noise, layout.noise_boxes) == (1.0, 3)


def test_noise_has_room_in_words_of_32_bits_for_any_network() -> None:
    for boxes in (3, 8, 1000):
        word_bits, value_bits = round_layout.numbers_for(boxes, noise=3.0)
        assert word_bits == 32
        plan = Plan(boxes_max=boxes, word_bits=word_bits, value_bits=value_bits, share=1.0, noise=3.0, noise_boxes=3)
        layout = round_layout.layout_of(plan, SEED, {"body": (10_000_000,)})
        assert layout.most_norm_squared < 1.25 * layout.clip_levels**2


def test_no_examples_have_no_weight() -> None:
    with pytest.raises(DeltaError, match="0 examples"):
        round_layout.weight_share(0, Plan())


@pytest.mark.parametrize(
    ("boxes", "numbers"),
    [(1, (16, 16)), (3, (16, 14)), (8, (16, 13)), (128, (16, 9)), (257, (16, 8)), (258, (32, 16)), (1000, (32, 16))],
)
def test_words_of_16_bits_where_a_value_keeps_8(boxes: int, numbers: tuple[int, int]) -> None:
    assert round_layout.numbers_for(boxes) == numbers


@pytest.mark.parametrize("boxes", [1, 2, 3, 8, 100, 128, 129, 256, 257, 258, 1000])
def test_what_is_proposed_can_be(boxes: int) -> None:
    word_bits, value_bits = round_layout.numbers_for(boxes)
    plan = Plan(boxes_max=boxes, word_bits=word_bits, value_bits=value_bits)
    round_layout.check(plan, SEED)
    levels = boxes * ((1 << (value_bits - 1)) - 1)
    assert levels < 1 << (word_bits - 1)
    assert boxes * addable.WEIGHT_LEVELS < 1 << word_bits


def test_no_boxes_have_no_sum() -> None:
    with pytest.raises(DeltaError):
        round_layout.numbers_for(0)


def test_an_open_plan_s_codec_is_drawn_where_it_says_few_bits() -> None:
    codec = round_layout.codec_of(Plan(value_bits=3), SEED, SHAPES)
    assert codec == DrawnCodec(Drawn(SHAPES, SEED, 0.5), 3, 2.0)
    whole = round_layout.codec_of(Plan(value_bits=5, share=1.0), SEED, SHAPES)
    assert whole is not None
    assert whole.drawn.chosen == 10
    assert round_layout.codec_of(Plan(value_bits=16, share=1.0), SEED, SHAPES) is None


@pytest.mark.parametrize("plan", [Plan(), Plan(value_bits=16), Plan(share=1.0), Plan(value_bits=3, trainable="norms")])
def test_an_open_plan_whose_values_cannot_be_is_refused(plan: Plan) -> None:
    with pytest.raises(DeltaError) as refused:
        round_layout.check_open(plan, SEED)
    assert refused.value.advice
