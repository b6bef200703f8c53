"""Delta → clip → seal: what the hub opens is what was learned, and nonsense is not sealed."""

import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from edge_agent import update
from edge_agent.learn import CannotTrainError
from fleet_link import sealing
from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.messages import RoundPlan
from models import addable, delta, round_layout
from models.bundle import SHIPPED, read_bundle
from models.delta import Trainable
from tests.edge_agent.link_support import make_plan
from tests.fleet_link.mosquitto_support import TestAuthority

BEFORE = {
    "head.weight": np.zeros(4, np.float32),
    "body.weight": np.zeros(2, np.float32),
    "ood_mean": np.ones(2, np.float32),
}
AFTER = {
    "head.weight": np.full(4, 2.0, np.float32),
    "body.weight": np.full(2, 1.0, np.float32),
    "ood_mean": np.ones(2, np.float32),
}
AUTHORITY = TestAuthority()
BOX = AUTHORITY.issue("box-1")


def build(before: update.Weights, after: update.Weights, plan: RoundPlan) -> update.Update:
    return update.build(update.change_of(before, after, plan), plan, BOX, 5)


def to_words(before: update.Weights, after: update.Weights, plan: RoundPlan, examples: int) -> update.Addable:
    return update.to_words(update.change_of(before, after, plan), plan, examples)


def opened(tmp_path: Path, **changes: object) -> tuple[update.Update, sealing.OpenedUpdate]:
    key = sealing.new_sealing_key(tmp_path / "key")
    plan = make_plan("a" * 64, sealing.public_bytes(key), **changes)
    made = build(BEFORE, AFTER, plan)
    return made, sealing.open_update(
        made.sealed, private_key=key, trust=AUTHORITY.trust, sender="box-1", plan=plan, now=time.time()
    )


def test_the_hub_opens_the_delta_of_what_was_trained(tmp_path: Path) -> None:
    made, update_ = opened(tmp_path)
    decoded = delta.decode(update_.payload, {"head.weight": (4,), "body.weight": (2,)})
    assert update_.examples == 5
    assert decoded["head.weight"] == pytest.approx([2.0] * 4)
    assert decoded["body.weight"] == pytest.approx([1.0] * 2)
    assert made.norm_before_clip == pytest.approx(np.sqrt(4 * 4 + 2))


def test_the_delta_is_clipped(tmp_path: Path) -> None:
    _, update_ = opened(tmp_path, clip_norm=0.5)
    assert delta.norm(delta.decode(update_.payload, {"head.weight": (4,), "body.weight": (2,)})) == pytest.approx(
        0.5, rel=0.01
    )


def test_heads_only_sends_heads_only(tmp_path: Path) -> None:
    _, update_ = opened(tmp_path, trainable="heads")
    assert list(delta.decode(update_.payload, {"head.weight": (4,)})) == ["head.weight"]


@pytest.mark.parametrize("trainable", get_args(Trainable))
def test_a_sealed_update_holds_the_plans_subset_and_no_other_weight(tmp_path: Path, trainable: Trainable) -> None:
    """Of the shipped network, although every weight has changed."""
    before = {name: np.asarray(value, np.float32) for name, value in read_bundle(SHIPPED).weights.items()}
    after = {name: value + np.float32(0.5) for name, value in before.items()}
    shapes = {name: before[name].shape for name in delta.trainable_names(before, trainable)}
    key = sealing.new_sealing_key(tmp_path / "key")
    plan = make_plan("a" * 64, sealing.public_bytes(key), trainable=trainable)
    sealed = build(before, after, plan).sealed
    opened_ = sealing.open_update(
        sealed, private_key=key, trust=AUTHORITY.trust, sender="box-1", plan=plan, now=time.time()
    )
    assert set(delta.decode(opened_.payload, shapes)) == set(shapes)
    masked = make_plan("a" * 64, sealing.public_bytes(key), trainable=trainable, kind="masked")
    layout = round_layout.layout_of(masked, sealing.plan_digest(masked), shapes)
    assert to_words(before, after, masked, 5).words.size == layout.word_count


def test_each_device_rounds_with_its_own_noise() -> None:
    rng = np.random.default_rng(0)
    after = {"head.weight": rng.normal(size=500).astype(np.float32)}
    before = {"head.weight": np.zeros(500, np.float32)}
    plan = make_plan("a" * 64, b"k")
    decoded = [
        delta.decode(delta.encode(after, update.rounding_seed(plan, device)), {"head.weight": (500,)})["head.weight"]
        for device in ("box-1", "box-2", "box-1")
    ]
    assert (decoded[0] == decoded[2]).all()
    assert (decoded[0] != decoded[1]).any()
    assert before["head.weight"].sum() == 0.0


def test_words_round_the_delta_and_begin_with_its_weight() -> None:
    """Off by less than a level of one box at its weight; rounded anew each time."""
    plan = make_plan("a" * 64, b"k", kind="masked", clip_norm=8.0, examples_cap=10, boxes_max=4)
    made = [to_words(BEFORE, AFTER, plan, 5) for _ in range(2)]
    layout = round_layout.layout_of(plan, sealing.plan_digest(plan), {"head.weight": (4,), "body.weight": (2,)})
    assert made[0].norm_before_clip == pytest.approx(np.sqrt(4 * 4 + 2))
    assert made[0].words[0] == 128
    assert (made[0].words != made[1].words).any()
    mean = addable.decode_sum(made[0].words, layout)
    assert mean["head.weight"] == pytest.approx([2.0] * 4, abs=0.01)
    assert mean["body.weight"] == pytest.approx([1.0] * 2, abs=0.01)


def test_words_of_nonsense_are_not_made() -> None:
    plan = make_plan("a" * 64, b"k", kind="masked")
    broken = AFTER | {"head.weight": np.array([1, np.nan, 0, 0], np.float32)}
    with pytest.raises(CannotTrainError, match="not finite"):
        to_words(BEFORE, broken, plan, 5)
    with pytest.raises(CannotTrainError, match="0 examples"):
        to_words(BEFORE, AFTER, plan, 0)


def test_few_bits_of_drawn_weights_are_what_the_hub_reads(tmp_path: Path) -> None:
    """The hub's end is cloud_hub/update.py; here its codec is made of plan and base alone, as there."""
    key = sealing.new_sealing_key(tmp_path / "key")
    plan = make_plan("a" * 64, sealing.public_bytes(key), clip_norm=8.0, share=0.5, value_bits=3)
    codec = round_layout.codec_of(plan, sealing.plan_digest(plan), {"head.weight": (4,), "body.weight": (2,)})
    assert codec is not None
    mask = codec.drawn.masks()["body.weight"]
    after = AFTER | {"body.weight": np.where(mask, np.float32(1.0), np.float32(0.0))}
    made = build(BEFORE, after, plan)
    opened_ = sealing.open_update(
        made.sealed, private_key=key, trust=AUTHORITY.trust, sender="box-1", plan=plan, now=time.time()
    )
    decoded = codec.decode(opened_.payload)
    assert decoded["head.weight"] == pytest.approx([2.0] * 4)
    assert decoded["body.weight"] == pytest.approx(mask.astype(np.float32))
    with pytest.raises(CannotTrainError, match="moved where the round does not move it"):
        build(BEFORE, AFTER, plan)


def test_nan_is_not_sealed() -> None:
    with pytest.raises(SiteError, match="not finite"):
        build(BEFORE, AFTER | {"head.weight": np.array([1, np.nan, 0, 0], np.float32)}, make_plan("a" * 64, b"k"))


def test_a_missing_tensor_is_not_sealed() -> None:
    with pytest.raises(SiteError, match=r"head\.weight"):
        build(BEFORE, {"body.weight": AFTER["body.weight"]}, make_plan("a" * 64, b"k"))


def test_a_plan_with_a_bad_key_is_refused() -> None:
    with pytest.raises((LinkError, TrustError)):
        build(BEFORE, AFTER, make_plan("a" * 64, b"k" * 32))
