"""A round's rule and noise, from the order to the release: what may go together, and what a minority can do."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cloud_hub.robust import RULES
from fleet_link.errors import SiteError
from fleet_link.messages import RoundPlan
from models import delta, round_layout
from tests.cloud_hub.round_support import RoundHub, change_of, codec_of, make_round_hub, needs_bundle, shapes

pytestmark = needs_bundle
HONEST, SPOILED = 0.01, -1.0
NAMES = ("a", "b", "c", "d", "e", "f", "g")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RoundHub]:
    made = make_round_hub(tmp_path, *NAMES)
    yield made
    made.coordinator.stop()
    made.files.database.close()


def largest_change(hub: RoundHub, plan: RoundPlan, *, restart: bool = False) -> float:
    """Of the release that six boxes that agree and one that pulls the other way as hard as the clip allows lead to."""
    hub.join(*NAMES)
    for name in NAMES:
        assert hub.deliver(name, hub.boxes[name].seal(plan, SPOILED if name == "d" else HONEST)) == ""
        if restart:
            hub.restart()
    released = hub.release(2) if hub.tick_until("released") else None
    assert released is not None
    change = change_of(hub, released.bundle_digest)
    moved = np.concatenate([values[values != 0] for values in change.values()])
    assert np.ptp(moved) < 1e-4  # each weight was told the same
    return float(moved.mean())


@pytest.mark.parametrize("rule", RULES)
def test_one_box_of_seven_does_not_turn_the_release(hub: RoundHub, rule: str) -> None:
    plan = hub.start(rule=rule, clip_norm=50.0)
    assert largest_change(hub, plan) == pytest.approx(HONEST, abs=0.2 * HONEST)


@pytest.mark.parametrize("rule", RULES)
def test_one_box_of_seven_does_not_turn_a_release_of_drawn_weights(hub: RoundHub, rule: str) -> None:
    """Each weight of 3 bits is told the same here, so that it is exact; what was not drawn has not moved."""
    plan = hub.start(rule=rule, trainable="all", share=0.036, bits=3, clip_norm=50.0)
    assert largest_change(hub, plan) == pytest.approx(HONEST, abs=0.2 * HONEST)


def test_averaged_it_does(hub: RoundHub) -> None:
    assert largest_change(hub, hub.start(clip_norm=50.0)) < -5 * HONEST


def test_the_rule_reads_the_updates_from_the_disk_after_a_restart(hub: RoundHub) -> None:
    plan = hub.start(rule="median", clip_norm=50.0)
    assert largest_change(hub, plan, restart=True) == pytest.approx(HONEST, abs=0.2 * HONEST)


def test_an_update_lost_before_the_rule_read_it_drops_the_round(hub: RoundHub) -> None:
    plan = hub.start(rule="trimmed_mean")
    hub.join(*NAMES)
    for name in NAMES:
        assert hub.deliver(name, hub.boxes[name].seal(plan, HONEST)) == ""
    (hub.files.config.paths.rounds / hub.round_id / "updates" / "c.sealed").unlink()
    assert "the counted update of c cannot be read again" in hub.tick_until("dropped").reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "masked", "rule": "median"}, "a masked round shows the sum alone"),
        ({"noise": 1.0}, "only a masked round adds noise"),
        ({"share": 0.5}, "a share of 0.5 of heads"),
        ({"share": 0.5, "trainable": "all", "bits": 9}, "values of 9 bits in an open round"),
        ({"kind": "masked", "bits": 3}, "the bits of a masked round's values follow"),
        ({"kind": "masked", "trainable": "heads", "share": 0.5}, "a share of 0.5 of heads"),
        ({"kind": "masked", "trainable": "adapters", "share": 0.5}, "a share of 0.5 of adapters"),
        ({"rule": "krum", "devices": ["a", "b"]}, "2 devices are invited, 3 are needed"),
    ],
)
def test_what_does_not_go_together_is_refused_with_advice(
    hub: RoundHub, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(SiteError, match=reason) as refused:
        hub.start(**changes)
    assert refused.value.advice


def test_a_round_with_noise_counts_on_its_smallest_cohort_and_has_room_for_it(hub: RoundHub) -> None:
    plan = hub.start(kind="masked", noise=1.0, min_devices=4)
    assert (plan.noise, plan.noise_boxes, plan.min_cohort, plan.word_bits) == (1.0, 4, 4, 32)
    layout = round_layout.layout_of(plan, b"12345678", {"weight": (1000,)})
    assert (layout.noise, layout.noise_boxes) == (1.0, 4)


@pytest.mark.parametrize(
    ("share", "rate", "planned"), [(1.0, 0.01, 0.01), (0.25, 0.01, 0.02), (0.036, 0.01, 0.04), (0.036, 0.5, 1.0)]
)
@pytest.mark.parametrize("kind", ["masked", "unsafe_open"])
def test_a_round_of_a_share_learns_faster_and_its_plan_says_so(
    hub: RoundHub, kind: str, share: float, rate: float, planned: float
) -> None:
    plan = hub.start(kind=kind, trainable="all", share=share, learning_rate=rate)
    assert (plan.share, plan.learning_rate) == (share, pytest.approx(planned))


@pytest.mark.parametrize(
    ("wish", "planned", "shown"),
    [({}, 16, 8), ({"share": 0.036}, 3, 3), ({"share": 0.036, "bits": 4}, 4, 4), ({"bits": 5}, 5, 5)],
)
def test_the_bits_of_an_open_round_are_planned_and_shown(
    hub: RoundHub, wish: dict[str, object], planned: int, shown: int
) -> None:
    plan = hub.start(trainable="all", **wish)
    assert (plan.value_bits, round_layout.open_bits(plan)) == (planned, shown)


def test_a_payload_that_is_not_the_plan_s_is_refused_and_the_round_goes_on(hub: RoundHub) -> None:
    """Of all weights in 8 bits, of NaN steps, of other bits, too long; then a sound one of the same box counts no more."""
    plan = hub.start(trainable="all", share=0.036, bits=3)
    hub.join(*NAMES)
    sound = hub.boxes["a"].seal(plan, HONEST)
    change = {name: np.zeros(shape, np.float32) for name, shape in shapes(plan).items()}
    codec = codec_of(plan)
    payload = codec.encode(change, 0)
    broken = {
        "a": delta.encode(change, 0),
        "b": payload[:4] + b"\x00\x00\xc0\x7f" + payload[8:],
        "c": replace(codec, value_bits=2).encode(change, 0),
        "d": payload + bytes(codec.payload_bytes_max),
    }
    reasons = ["of a version this software knows|at most", "not finite", "more or fewer values", "bytes, at most"]
    for (name, content), reason in zip(broken.items(), reasons, strict=True):
        assert re.search(reason, hub.deliver(name, hub.boxes[name].seal_payload(plan, content)))
        assert hub.member(name).state == "refused"
    assert hub.deliver("a", sound) != ""
    for name in "efg":
        assert hub.deliver(name, hub.boxes[name].seal(plan, HONEST)) == ""
    hub.tick_until("released")
