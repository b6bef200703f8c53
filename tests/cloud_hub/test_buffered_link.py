"""Buffered rounds over a real Mosquitto: the first boxes fill the buffer, the others hear so and are in the next one."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cloud_hub import ledger
from fleet_link.messages import Receipt, RoundClosed, RoundKeys, RoundPlan
from models import delta
from models.bundle import SHIPPED, read_bundle
from tests.cloud_hub.hub_support import needs_mosquitto
from tests.cloud_hub.link_support import LinkedHub
from tests.cloud_hub.masked_twin import MaskedTwin, plain_mean
from tests.cloud_hub.round_support import make_round_hub, needs_bundle

pytestmark = [needs_bundle, needs_mosquitto, pytest.mark.slow]
NAMES = "abcde"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LinkedHub]:
    made = LinkedHub(make_round_hub(tmp_path, *NAMES))
    for name in NAMES:
        made.add(name)
    yield made
    made.close()


def train(hub: LinkedHub, ready: str) -> None:
    """A new round: each box has a part in it, and those that are not `ready` have no update yet."""
    for number, name in enumerate(NAMES, 1):
        box = hub.boxes[name]
        box.masked = MaskedTwin(box.identity, hub.rounds.trust, value=0.01 * number)
        if name not in ready:
            box.masked.withheld.add(RoundKeys)
        box.heartbeat()


def twins(hub: LinkedHub, names: str) -> list[MaskedTwin]:
    return [found for name in names if (found := hub.boxes[name].masked) is not None]


def check_release(hub: LinkedHub, plan: RoundPlan, names: str) -> None:
    hub.until(lambda: hub.rounds.round().state == "released")
    assert {name for name in NAMES if hub.rounds.member(name).counted_at} == set(names)
    expected = delta.apply(read_bundle(SHIPPED).weights, plain_mean(plan, twins(hub, names)))
    after = read_bundle(hub.rounds.repository.bundle_path(str(hub.rounds.round().candidate_digest))).weights
    assert all(np.array_equal(after[name], expected[name]) for name in expected)


def test_the_buffer_is_the_cohort_and_who_is_late_is_in_the_next_one(hub: LinkedHub) -> None:
    train(hub, "ace")
    plan = hub.rounds.start(kind="masked", buffer=3)
    check_release(hub, plan, "ace")
    for name in "bd":
        box = hub.boxes[name]
        box.round_state[plan.round_id] = "preparing"
        box.heartbeat()
        hub.until(lambda box=box: box.of(RoundClosed))
        assert {(closed.outcome, closed.reason) for closed in box.of(RoundClosed)} == {("dropped", ledger.LATE)}
    train(hub, "bde")
    following = hub.rounds.start(kind="masked", buffer=3)
    assert following.base_digest in following.bases
    check_release(hub, following, "bde")
    assert all(not hub.refusals(name) for name in NAMES)


@pytest.mark.parametrize(
    "until", ["invited", "keys", "sharing", "training", "uploading", "agreeing", "unmasking", "summed"]
)
def test_hub_killed_in_a_state_of_a_buffered_round_ends_it_all_the_same(hub: LinkedHub, until: str) -> None:
    order = ["invited", "keys", "sharing", "training", "uploading", "agreeing", "unmasking", "summed", "evaluated"]
    train(hub, "" if until in ("invited", "keys") else "abd")
    plan = hub.rounds.start(kind="masked", buffer=3)
    if until == "keys":
        twins(hub, "a")[0].withheld.clear()
    if until == "invited":
        hub.until(lambda: hub.rounds.member("e").state == "joined")
    hub.until(lambda: hub.rounds.round().state not in order[: order.index(until)])
    hub.restart()
    for name in "abd":
        twins(hub, name)[0].withheld.clear()
        if hub.rounds.member(name).state == "joined":
            hub.boxes[name]._answer_stage(plan.round_id, plan)
    check_release(hub, plan, "abd")


def test_keys_that_come_after_the_buffer_is_full_are_refused_without_blame(hub: LinkedHub) -> None:
    train(hub, "abc")
    plan = hub.rounds.start(kind="masked", buffer=3)
    hub.until(lambda: hub.rounds.member("e").state == "left")
    e = hub.boxes["e"]
    twins(hub, "e")[0].withheld.clear()
    e._answer_stage(plan.round_id, plan)
    hub.until(lambda: any(not receipt.accepted for receipt in e.of(Receipt)))
    check_release(hub, plan, "abc")
    assert not hub.refusals("e")


def test_who_is_late_in_an_open_round_hears_that_its_update_is_in_no_sum(hub: LinkedHub) -> None:
    """`released` would tell it that its update, whose receipt may be lost, was counted."""
    plan = hub.rounds.start(buffer=3)
    for box in hub.boxes.values():
        box.heartbeat()
    hub.until(lambda: all(box.of(RoundPlan) for box in hub.boxes.values()))
    for name in NAMES:
        hub.boxes[name].answer(plan.round_id)
    hub.until(lambda: [hub.rounds.member(name).state for name in NAMES] == ["joined"] * 5)
    sent = {name: hub.boxes[name].upload(plan.round_id, hub.rounds.boxes[name].seal(plan, 0.01)) for name in "abc"}
    hub.until(lambda: hub.rounds.round().state == "released")
    assert all(hub.boxes[name].verdicts(transfer) == [(True, "")] for name, transfer in sent.items())
    late = hub.boxes["d"].upload(plan.round_id, hub.rounds.boxes["d"].seal(plan, 0.01))
    hub.until(lambda: hub.boxes["d"].verdicts(late))
    assert hub.boxes["d"].verdicts(late) == [(False, ledger.LATE)]
    for name in "ae":
        hub.boxes[name].round_state[plan.round_id] = "uploading"
        hub.boxes[name].heartbeat()
    hub.until(lambda: all(hub.boxes[name].of(RoundClosed) for name in "ae"))
    assert {closed.outcome for closed in hub.boxes["a"].of(RoundClosed)} == {"released"}
    assert {(closed.outcome, closed.reason) for closed in hub.boxes["e"].of(RoundClosed)} == {("dropped", ledger.LATE)}
