"""Masked rounds over a real Mosquitto: five boxes, whoever drops out, a hub that is killed, and what is refused."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from cloud_hub import registry, views
from cloud_hub.database import RoundDevice
from fleet_link import sealing
from fleet_link.messages import (
    Cohort,
    Receipt,
    RoundClosed,
    RoundKeys,
    RoundPlan,
    Shares,
    SharesForwarded,
    SignedKeys,
    SurvivorsSigned,
    Unmask,
)
from models import delta
from models.bundle import SHIPPED, read_bundle
from tests.cloud_hub.box_twin import BoxTwin, new_id
from tests.cloud_hub.hub_support import needs_mosquitto
from tests.cloud_hub.link_support import LinkedHub
from tests.cloud_hub.masked_twin import IDS, MaskedTwin, plain_mean
from tests.cloud_hub.round_support import make_round_hub, needs_bundle

pytestmark = [needs_bundle, needs_mosquitto, pytest.mark.slow]
NAMES = "abcde"
ORDER = [
    "invited",
    "keys",
    "sharing",
    "training",
    "uploading",
    "agreeing",
    "unmasking",
    "summed",
    "evaluated",
    "released",
]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LinkedHub]:
    made = LinkedHub(make_round_hub(tmp_path, *NAMES))
    for number, name in enumerate(NAMES, 1):
        box = made.add(name)
        box.masked = MaskedTwin(box.identity, made.rounds.trust, value=0.01 * number)
        box.heartbeat()
    yield made
    made.close()


def twin(hub: LinkedHub, name: str) -> MaskedTwin:
    found = hub.boxes[name].masked
    assert found is not None
    return found


def state(hub: LinkedHub) -> str:
    return hub.rounds.round().state


def check_release(hub: LinkedHub, plan: RoundPlan, names: str) -> None:
    hub.until(lambda: state(hub) == "released")
    mean = plain_mean(plan, [twin(hub, name) for name in names])
    expected = delta.apply(read_bundle(SHIPPED).weights, mean)
    after = read_bundle(hub.rounds.repository.bundle_path(str(hub.rounds.round().candidate_digest))).weights
    assert all(np.array_equal(after[name], expected[name]) for name in expected)


def test_masked_round_over_the_wire_gives_the_plain_mean_to_the_last_bit(hub: LinkedHub) -> None:
    plan = hub.rounds.start(kind="masked")
    check_release(hub, plan, NAMES)
    for box in hub.boxes.values():
        box.heartbeat()
    hub.until(lambda: all(box.of(RoundClosed) for box in hub.boxes.values()))
    assert {box.of(RoundClosed)[0].outcome for box in hub.boxes.values()} == {"released"}
    assert all(receipt.accepted for box in hub.boxes.values() for receipt in box.of(Receipt))
    assert all(not hub.refusals(name) for name in NAMES)


@pytest.mark.parametrize("restarts", [False, True])
def test_groups_over_the_wire_release_the_median_of_their_means_and_a_poisoned_one_is_left_out(
    tmp_path: Path, restarts: bool
) -> None:
    names = [f"box-{number:02}" for number in range(1, 13)]
    hub = LinkedHub(make_round_hub(tmp_path, *names))
    for number, name in enumerate(names, 1):
        box = hub.add(name)
        kind = AnyWords if name == "box-05" else MaskedTwin
        box.masked = kind(box.identity, hub.rounds.trust, value=0.01 * number)
        box.heartbeat()
    try:
        plan = hub.rounds.start(kind="masked", rule="median", groups=4)
        if restarts:
            for state_now in ("sharing", "uploading", "unmasking"):
                hub.until(lambda state_now=state_now: ORDER.index(state(hub)) >= ORDER.index(state_now))
                hub.restart()
        hub.until(lambda: state(hub) == "released")
        with hub.database.reading() as session:
            cohorts = views.round_(session, plan.round_id)["cohorts"]
        (spoiled,) = (cohort for cohort in cohorts if cohort["reason"])
        assert "box-05" in spoiled["devices"]
        means = [
            plain_mean(plan, [twin(hub, name) for name in cohort["devices"]])
            for cohort in cohorts
            if cohort is not spoiled
        ]
        median = {name: np.median(np.stack([mean[name] for mean in means]), axis=0) for name in means[0]}
        expected = delta.apply(read_bundle(SHIPPED).weights, median)
        after = read_bundle(hub.rounds.repository.bundle_path(str(hub.rounds.round().candidate_digest))).weights
        assert all(np.array_equal(after[name], expected[name]) for name in expected)
        assert all(not hub.refusals(name) for name in names)
    finally:
        hub.close()


class AnyWords(MaskedTwin):
    """A box whose update is drawn by chance."""

    def encoded(self, plan: RoundPlan) -> NDArray[np.unsignedinteger]:
        honest = super().encoded(plan)
        return np.random.default_rng(5).integers(0, 1 << plan.word_bits, len(honest), honest.dtype)


def test_box_that_shared_and_went_away_is_taken_out_of_the_masks_and_told_so(hub: LinkedHub) -> None:
    plan = hub.rounds.start(kind="masked", deadline_s=3600.0)
    twin(hub, "c").withheld.add(bytes)
    hub.until(lambda: [hub.rounds.member(name).state for name in NAMES].count("delivered") == 4)
    hub.boxes["c"].heartbeat()  # still there, and says "shared"
    with hub.database.writing() as session:
        session.get_one(type(hub.rounds.round()), plan.round_id).deadline = time.time()
    hub.until(lambda: hub.boxes["c"].of(RoundClosed))
    closed = hub.boxes["c"].of(RoundClosed)[0]
    assert (closed.outcome, closed.reason) == ("dropped", "left out: an update did not come in time")
    check_release(hub, plan, "abde")


@pytest.mark.parametrize(
    "until", ["keys", "sharing", "training", "uploading", "agreeing", "unmasking", "summed", "evaluated"]
)
def test_hub_killed_in_a_state_ends_the_round_all_the_same(hub: LinkedHub, until: str) -> None:
    plan = hub.rounds.start(kind="masked")
    hub.until(lambda: ORDER.index(state(hub)) >= ORDER.index(until))
    hub.restart()
    check_release(hub, plan, NAMES)


def test_what_a_stage_says_is_said_again_until_it_is_answered(hub: LinkedHub) -> None:
    plan = hub.rounds.start(kind="masked")
    a = hub.boxes["a"]
    twin(hub, "a").withheld.add(Shares)
    hub.until(lambda: a.of(Cohort))
    hub.link._owed["a"] = 0.0  # resend_s later
    hub.until(lambda: len(a.of(Cohort)) == 2)
    twin(hub, "a").withheld.clear()
    hub.link._owed["a"] = 0.0
    check_release(hub, plan, NAMES)
    first, second = (msgspec.structs.replace(cohort, message_id="0" * 32) for cohort in a.of(Cohort)[:2])
    assert first == second


def test_box_that_trains_is_not_told_again_whom_to_mask_against(hub: LinkedHub) -> None:
    hub.rounds.start(kind="masked")
    a = hub.boxes["a"]
    twin(hub, "a").withheld.add(bytes)
    hub.until(lambda: a.of(SharesForwarded))
    a.round_state[hub.rounds.round_id] = "training"
    a.heartbeat()
    hub.until(lambda: "training" in _heartbeat(hub, "a"))
    heard = len(a.of(SharesForwarded))
    for _ in range(5):
        hub.link._owed["a"] = 0.0
        hub.step()
    assert len(a.of(SharesForwarded)) == heard


@pytest.mark.parametrize("box_is", ["delivered", "agreed", "unmasked"])
def test_hub_that_was_restored_asks_again_for_the_update_it_has_lost(hub: LinkedHub, box_is: str) -> None:
    plan = hub.rounds.start(kind="masked")
    twin(hub, "e").withheld.add(bytes)
    hub.until(lambda: [hub.rounds.member(name).state for name in NAMES].count("delivered") == 4)
    a = hub.boxes["a"]
    with hub.database.writing() as session:  # as its backup has it
        lost = session.get_one(RoundDevice, (plan.round_id, "a"))
        lost.state, lost.counted_at, lost.update_path = "shared", None, None
    a.round_state[plan.round_id] = box_is
    twin(hub, "a").withheld.add(bytes)  # told again whom to mask against, a box that has delivered says nothing
    a.heartbeat()
    hub.until(lambda: len(a.of(RoundPlan)) == 2)
    a.upload(plan.round_id, twin(hub, "a")._sealed)
    hub.until(lambda: hub.rounds.member("a").state == "delivered")
    twin(hub, "e").withheld.clear()
    hub.link._owed["e"] = 0.0
    check_release(hub, plan, NAMES)


def _heartbeat(hub: LinkedHub, name: str) -> str:
    with hub.database.reading() as session:
        return str(registry.find_device(session, name).heartbeat)


@pytest.mark.parametrize("kind", [RoundKeys, Shares, SurvivorsSigned, Unmask])
def test_wrong_or_foreign_message_is_refused_with_a_receipt_and_the_round_goes_on(
    hub: LinkedHub, kind: type[Any]
) -> None:
    plan = hub.rounds.start(kind="masked")
    for name in NAMES:
        twin(hub, name).withheld.add(kind)
    waiting = {RoundKeys: "invited", Shares: "sharing", SurvivorsSigned: "agreeing", Unmask: "unmasking"}[kind]
    hub.until(lambda: state(hub) == waiting and all(_asked(hub.boxes[name], kind) for name in NAMES))
    a = hub.boxes["a"]
    for wrong in (_wrong(plan, kind), msgspec.structs.replace(_wrong(plan, kind), round_id="r0042")):
        a.say(wrong)
        hub.until(lambda wrong=wrong: any(receipt.of == wrong.message_id for receipt in a.of(Receipt)))
        (receipt,) = (receipt for receipt in a.of(Receipt) if receipt.of == wrong.message_id)
        assert (receipt.accepted, bool(receipt.reason)) == (False, True)
    assert len(hub.refusals("a")) == 1  # a message of another round is no attack: it is answered
    for name in NAMES:
        twin(hub, name).withheld.clear()
        hub.link._owed[name] = 0.0
    if kind is RoundKeys:
        for name in NAMES:
            hub.boxes[name]._answer_stage(plan.round_id, plan)
    check_release(hub, plan, NAMES)


def _asked(box: BoxTwin, kind: type[Any]) -> bool:
    return box.masked is not None and kind in box.masked.asked


def _wrong(plan: RoundPlan, kind: type[Any]) -> Any:
    common: dict[str, Any] = {"message_id": new_id(), "round_id": plan.round_id}
    if kind is RoundKeys:
        zero = bytes(32)
        keys = SignedKeys(share_key=zero, mask_key=zero, self_commitment=zero, signature=b"none", certificate=b"none")
        return RoundKeys(**common, plan_digest=sealing.plan_digest(plan), keys=keys)
    if kind is Shares:
        return Shares(**common, cohort_digest=bytes(32), sealed={})
    if kind is SurvivorsSigned:
        return SurvivorsSigned(**common, signature=b"none")
    return Unmask(**common, self_shares={"b": bytes(16)}, mask_shares={"b": bytes(16)})


def test_ids_of_a_twin_differ_by_kind() -> None:
    assert len(set(IDS.values())) == len(IDS)
