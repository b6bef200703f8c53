"""Masked rounds on disk: the whole way to the last bit, who drops out where, kill -9, revocation, and what is refused."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from cloud_hub import ledger, registry, views
from cloud_hub.database import MaskedGroup
from cloud_hub.transfers import Transfers
from edge_agent import masking as box
from fleet_link import notify, sealing
from fleet_link.errors import SiteError
from fleet_link.messages import (
    AnyMessage,
    RoundAnswer,
    RoundKeys,
    RoundPlan,
    Shares,
    SurvivorsSigned,
    TransferReceipt,
    Unmask,
)
from models import round_layout
from models.bundle import SHIPPED, read_bundle
from tests.cloud_hub.masked_house import UPDATE, House, came, opened, refusals, rows
from tests.cloud_hub.masked_twin import EXAMPLES, IDS, MaskedTwin, layout_of
from tests.cloud_hub.round_support import RoundHub, failing_export, needs_bundle

pytestmark = [needs_bundle, pytest.mark.slow]
NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with opened(tmp_path, *NAMES) as made:
        yield made


# --- the whole way --------------------------------------------------------------------------------


@pytest.mark.parametrize("restarts", [False, True])
def test_what_is_released_is_the_plain_mean_to_the_last_bit(house: House, restarts: bool) -> None:
    house.restarts = restarts
    plan = house.start()
    house.play("summed")
    assert house.facts() == ("summed", ["unmasked"] * 5)
    house.check_release(plan, "abcde")


def test_a_round_of_a_share_releases_what_its_plan_draws_and_nothing_else(house: House) -> None:
    house.restarts = True
    plan = house.start(trainable="all", share=0.033)
    house.play("summed")
    house.check_release(plan, "abcde")
    layout = layout_of(plan)
    before = read_bundle(SHIPPED).weights
    after = read_bundle(house.hub.repository.bundle_path(str(house.hub.round().candidate_digest))).weights
    masks = layout.drawn.masks()
    assert not any((after[name] != before[name])[~mask].any() for name, mask in masks.items())
    assert sum(np.count_nonzero(after[name] != before[name]) for name in masks) > 0.99 * layout.chosen
    assert 4 * layout.size / len(house.said["a", UPDATE]) > 48  # the sealed file: words, envelope, certificate


def test_plan_says_what_the_sum_looks_like(house: House) -> None:
    plan = house.start(min_devices=4)
    assert (plan.kind, plan.min_cohort, plan.boxes_max, plan.word_bits) == ("masked", 4, 5, 16)
    assert plan.value_bits >= 8
    assert plan.examples_cap == house.hub.files.config.rounds.examples_cap
    assert house.hub.round().min_devices == 4


def test_min_devices_never_lowers_the_cohort(house: House) -> None:
    assert house.start(min_devices=1).min_cohort == house.hub.files.config.rounds.min_cohort == 3


def test_states_and_counts_follow_what_came(house: House) -> None:
    house.start()
    seen = []
    for state in ("keys", "sharing", "training", "uploading", "agreeing", "unmasking", "summed"):
        house.play(state)
        counts = came(house)
        seen.append((house.hub.round().state, *(counts[name] for name in views.STAGES_OF_MASKED)))
    assert seen == [
        ("keys", 1, 0, 0, 0, 0),
        ("sharing", 5, 0, 0, 0, 0),
        ("training", 5, 5, 0, 0, 0),
        ("uploading", 5, 5, 1, 0, 0),
        ("agreeing", 5, 5, 5, 0, 0),
        ("unmasking", 5, 5, 5, 5, 0),
        ("summed", 5, 5, 5, 5, 5),
    ]


def test_what_boxes_said_is_gone_when_the_round_is_over_and_its_counts_stay(house: House) -> None:
    house.start()
    house.play("summed")
    before = came(house)
    assert all(part.unmask for part in rows(house))
    house.hub.tick_until("released")
    house.hub.coordinator.tick(house.hub.now)
    assert [(part.keys, part.shares, part.signature, part.unmask) for part in rows(house)] == [(b"", b"", b"", b"")] * 5
    with house.hub.files.database.reading() as session:
        row = session.get_one(MaskedGroup, (house.hub.round_id, 1))
    assert (row.circle, row.sharing, row.survivors, row.devices) == (None, None, None, "a b c d e")
    assert came(house) == before
    assert list(house.hub.files.config.paths.rounds.iterdir()) == []


def test_no_share_is_logged(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    house.start()
    house.play("summed")
    house.hub.tick_until("released")
    given = house.said["a", Unmask]
    assert all(
        share.hex() not in caplog.text and repr(share) not in caplog.text for share in given.self_shares.values()
    )


# --- who drops out --------------------------------------------------------------------------------


def test_without_keys_the_round_goes_on_with_the_others(house: House) -> None:
    plan = house.start()
    house.withhold(RoundKeys, "e")
    house.withhold(RoundAnswer, "e")
    house.play("sharing")
    assert house.hub.round().state == "keys"
    house.wait(61.0)
    assert house.facts() == ("sharing", ["keyed"] * 4 + ["left"])
    assert house.hub.member("e").reason == "left out: keys did not come in time"
    house.play("summed")
    house.check_release(plan, "abcd")


def test_box_that_declines_is_not_waited_for(house: House) -> None:
    plan = house.start()
    house.withhold(RoundKeys, "e")
    house.withhold(RoundAnswer, "e")
    house.play("sharing")
    house.give("e", RoundAnswer(message_id="0" * 32, round_id=plan.round_id, joins=False, examples=2, reason="few"))
    assert house.facts() == ("sharing", ["keyed"] * 4 + ["declined"])
    assert house.hub.member("e").reason == "few"


def test_without_shares_the_round_goes_on_with_the_others(house: House) -> None:
    plan = house.start()
    house.withhold(Shares, "b")
    house.play("training")
    house.wait(61.0)
    assert house.facts() == ("training", ["shared", "left", "shared", "shared", "shared"])
    assert house.hub.member("b").reason == "left out: shares did not come in time"
    house.play("summed")
    house.check_release(plan, "acde")


@pytest.mark.parametrize("declines", [False, True])
def test_without_its_update_a_box_is_taken_out_of_the_masks(house: House, declines: bool) -> None:
    plan = house.start()
    house.withhold(UPDATE, "c")
    house.play("agreeing")
    assert house.hub.round().state == "uploading"
    if declines:
        answer = RoundAnswer(message_id="0" * 32, round_id=plan.round_id, joins=False, examples=0, reason="no memory")
        assert house.give("c", answer) == (True, "")
    else:
        house.wait(3601.0)
    assert house.facts() == ("agreeing", ["delivered", "delivered", "left", "delivered", "delivered"])
    assert house.hub.member("c").reason == ("no memory" if declines else "left out: an update did not come in time")
    house.play("summed")
    house.check_release(plan, "abde")


def test_box_that_gives_up_before_the_sum_is_told_is_not_in_it(house: House) -> None:
    plan = house.start()
    house.withhold(UPDATE, "e")
    house.play("agreeing")
    house.give("a", RoundAnswer(message_id="0" * 32, round_id=plan.round_id, joins=False, examples=0, reason="alarm"))
    assert came(house)["updates"] == 3
    house.twins["e"].withheld.clear()
    house.play("summed")
    house.check_release(plan, "bcde")


def test_without_one_signature_the_others_open_the_sum(house: House) -> None:
    plan = house.start()
    house.withhold(SurvivorsSigned, "d")
    house.play("unmasking")
    house.wait(61.0)
    assert house.facts() == ("unmasking", ["agreed"] * 3 + ["delivered", "agreed"])
    house.play("summed")
    house.check_release(plan, "abcde")  # its update was in the sum


def test_without_one_unmasking_the_others_open_the_sum(house: House) -> None:
    plan = house.start()
    house.withhold(Unmask, "a")
    house.play("summed")
    assert house.hub.round().state == "unmasking"
    house.wait(61.0)
    house.check_release(plan, "abcde")


def test_box_that_will_not_sign_is_not_waited_for(house: House) -> None:
    plan = house.start()
    house.withhold(SurvivorsSigned, "d")
    house.play("unmasking")
    house.give("d", RoundAnswer(message_id="0" * 32, round_id=plan.round_id, joins=False, examples=0, reason="alarm"))
    assert house.facts() == ("unmasking", ["agreed"] * 3 + ["left", "agreed"])
    house.play("summed")
    house.check_release(plan, "abcde")


@pytest.mark.parametrize(
    ("kind", "away", "seconds", "reason"),
    [
        (RoundKeys, "cde", 61.0, "2 boxes sent keys, 3 are needed"),
        (Shares, "cde", 61.0, "2 of 5 boxes sent shares; with enough neighbours 0, needed 3; missing: c, d, e"),
        (UPDATE, "cde", 3601.0, "2 of 5 boxes uploaded, 3 are needed; missing: c, d, e"),
        (UPDATE, "de", 3601.0, "1 shares short for a, b, c; missing: d, e"),
        (SurvivorsSigned, "de", 61.0, "1 shares short for a, b, c; missing: d, e"),
        (Unmask, "de", 61.0, "1 shares short for a, b, c; missing: d, e"),
    ],
)
def test_too_many_away_drop_the_round_with_its_reason(
    house: House, kind: type[Any], away: str, seconds: float, reason: str
) -> None:
    house.start()
    house.withhold(kind, *away)
    house.play("summed")
    house.wait(seconds)
    assert (house.hub.round().state, house.hub.round().reason) == ("dropped", reason)
    assert not any(part.keys or part.shares or part.unmask for part in rows(house))


def test_round_that_can_no_longer_have_its_cohort_ends_at_once(house: House) -> None:
    plan = house.start()
    house.withhold(UPDATE, *"abcde")
    house.play("agreeing")
    for name in "abc":
        house.give(name, RoundAnswer(message_id="0" * 32, round_id=plan.round_id, joins=False, examples=0))
    assert house.hub.round().reason == "0 of 5 invited devices sent an update and 2 may still do so; 3 are needed"


def test_nobody_answers_until_the_deadline(house: House) -> None:
    house.start(deadline_s=100.0)
    house.wait(101.0)
    assert house.hub.round().reason == "0 boxes sent keys, 3 are needed"


# --- kill -9 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["keys", "sharing", "training", "uploading", "agreeing", "unmasking", "summed"])
def test_hub_killed_in_a_state_goes_on_in_it(house: House, state: str) -> None:
    plan = house.start()
    house.play(state)
    before, told = house.facts(), [house.owed(name) for name in "abcde"]
    house.hub.restart()
    assert house.facts() == before
    for message, again in zip(told, [house.owed(name) for name in "abcde"], strict=True):
        assert message is None or msgspec.structs.replace(message, message_id="0" * 32) == msgspec.structs.replace(
            again, message_id="0" * 32
        )
    house.play("summed")
    house.check_release(plan, "abcde")


@pytest.mark.parametrize("kind", [RoundKeys, Shares, SurvivorsSigned, Unmask])
def test_stage_goes_on_for_a_while_after_a_hub_that_was_away(house: House, kind: type[Any]) -> None:
    plan = house.start()
    house.withhold(kind, "e")
    if kind is RoundKeys:
        house.withhold(RoundAnswer, "e")
    house.play("summed")
    before = house.facts()
    house.hub.now += 1000.0
    house.hub.restart()
    house.wait(59.0)
    assert house.facts() == before
    house.twins["e"].withheld.clear()
    house.play("summed")
    house.check_release(plan, "abcde")


def test_update_lost_from_disk_drops_the_round_with_its_reason(house: House) -> None:
    house.start()
    house.play("summed")
    house.hub.restart()  # else the sum is there, without the files
    (house.hub.files.config.paths.rounds / house.hub.round_id / "updates" / "a.sealed").write_bytes(b"rotten")
    assert "the counted update of a cannot be read again" in house.hub.tick_until("dropped").reason


def test_killed_while_the_candidate_is_made_the_sum_is_made_again(house: House) -> None:
    plan = house.start()
    house.play("summed")
    house.hub.export_command = failing_export("import time; time.sleep(600)")
    house.hub.restart()
    house.hub.coordinator.tick(house.hub.now)
    house.hub.coordinator.stop()
    house.hub.export_command = RoundHub.export_command
    house.hub.restart()
    house.check_release(plan, "abcde")


# --- revoked --------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["keys", "sharing", "training", "uploading"])
def test_box_revoked_before_the_sum_is_told_is_taken_out(house: House, state: str) -> None:
    plan = house.start()
    house.play(state)
    with house.hub.files.database.writing() as session:
        registry.revoke(session, "a", now=house.hub.now)
    del house.twins["a"]
    house.hub.coordinator.tick(house.hub.now)
    assert (house.hub.member("a").state, house.hub.member("a").reason) == ("refused", "the device is revoked")
    house.play("summed")
    house.check_release(plan, "bcde")
    assert refusals(house, "a") == [f"{plan.round_id}: the device is revoked"]


@pytest.mark.parametrize("state", ["agreeing", "unmasking"])
def test_box_revoked_after_the_sum_is_told_drops_the_round(house: House, state: str) -> None:
    house.start()
    house.play(state)
    with house.hub.files.database.writing() as session:
        registry.revoke(session, "a", now=house.hub.now)
    house.hub.coordinator.tick(house.hub.now)
    assert house.hub.round().reason == (
        "a was revoked after its masked update went into the sum: it cannot be taken out"
    )


def test_box_that_dropped_out_and_is_revoked_then_hinders_nobody(house: House) -> None:
    plan = house.start()
    house.withhold(UPDATE, "c")
    house.play("agreeing")
    house.wait(3601.0)
    with house.hub.files.database.writing() as session:
        registry.revoke(session, "c", now=house.hub.now)
    house.play("summed")
    house.check_release(plan, "abde")


# --- what is refused ------------------------------------------------------------------------------


def changed(message: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(message, **changes)


def turned(value: bytes) -> bytes:
    return bytes([value[0] ^ 1]) + value[1:]


def wrong_keys(house: House, keys: RoundKeys) -> dict[str, tuple[RoundKeys, str]]:
    own, plan = house.twins["a"], house.twins["a"].plan
    assert plan is not None
    other, _ = box.begin(plan, house.twins["b"].identity, box.draw_secrets(), min_cohort=3, message_id="0" * 32)
    zero = msgspec.structs.replace(keys.keys, mask_key=bytes(32))
    of = box.RoundOf(plan.round_id, sealing.plan_digest(plan))
    public = box.PublicKeys(zero.share_key, zero.mask_key, zero.self_commitment)
    return {
        "another plan": (changed(keys, plan_digest=bytes(32)), "were made for another plan"),
        "changed key": (changed(keys, keys=changed(keys.keys, mask_key=turned(keys.keys.mask_key))), "are not signed"),
        "of another box": (changed(keys, keys=other.keys), "."),
        "agrees with nobody": (changed(keys, keys=box.cohort.sign_keys(own.identity, of, public)), "."),
    }


@pytest.mark.parametrize("kind", ["another plan", "changed key", "of another box", "agrees with nobody"])
def test_wrong_keys_are_refused_and_the_right_ones_still_count(house: House, kind: str) -> None:
    plan = house.start()
    keys = house.twins["a"].hear(plan, house.hub.now)[1]
    assert isinstance(keys, RoundKeys)
    wrong, why = wrong_keys(house, keys)[kind]
    accepted, reason = house.give("a", wrong)
    assert not accepted
    assert reason
    assert why == "." or why in reason
    assert refusals(house, "a") == [reason]
    house.play("summed")
    house.check_release(plan, "abcde")


def test_wrong_shares_signatures_and_unmaskings_are_refused_and_the_round_goes_on(house: House) -> None:
    plan = house.start()
    for kind, state in ((Shares, "sharing"), (SurvivorsSigned, "agreeing"), (Unmask, "unmasking")):
        house.play(state)
        message = house.owed("a")
        assert message is not None
        (right,) = house.twins["a"].hear(message, house.hub.now)
        for wrong in wrongs(right):
            accepted, reason = house.give("a", wrong)
            assert (accepted, bool(reason)) == (False, True), (kind, wrong)
        assert len(refusals(house, "a")) >= 1
    house.play("summed")
    house.check_release(plan, "abcde")


def wrongs(right: Any) -> list[Any]:
    match right:
        case Shares():
            fewer = {name: packet for name, packet in right.sealed.items() if name != "b"}
            return [changed(right, cohort_digest=bytes(32)), changed(right, sealed=fewer)]
        case SurvivorsSigned():
            return [changed(right, signature=turned(right.signature)), changed(right, signature=b"")]
        case Unmask():
            fewer = {name: share for name, share in right.self_shares.items() if name != "b"}
            return [
                changed(right, self_shares=fewer),
                changed(right, mask_shares=dict(right.self_shares)),  # both secrets of one box
            ]
    raise AssertionError(right)


def test_share_that_somebody_lied_about_does_not_stop_the_sum(house: House, caplog: pytest.LogCaptureFixture) -> None:
    plan = house.start()
    house.play("unmasking")
    message = house.owed("a")
    assert message is not None
    (given,) = house.twins["a"].hear(message, house.hub.now)
    assert isinstance(given, Unmask)
    assert house.give("a", changed(given, self_shares=dict.fromkeys(given.self_shares, bytes(16)))) == (True, "")
    house.play("summed")
    house.check_release(plan, "abcde")
    assert "wrong shares" in caplog.text


def test_lies_that_no_subset_repairs_drop_the_round(house: House) -> None:
    house.start()
    house.play("unmasking")
    for name in "cde":
        message = house.owed(name)
        assert message is not None
        (given,) = house.twins[name].hear(message, house.hub.now)
        assert isinstance(given, Unmask)
        house.give(name, changed(given, self_shares=dict.fromkeys(given.self_shares, bytes(16))))
    house.play("summed")
    assert "the masks do not come off" in house.hub.tick_until("dropped").reason


def test_messages_of_other_rounds_boxes_and_stages_change_nothing(house: House) -> None:
    plan = house.start(devices=list("abcd"))
    del house.twins["e"]
    house.play("training")
    before = house.facts()
    keys, shares = house.said["a", RoundKeys], house.said["a", Shares]
    assert house.give("a", changed(keys, round_id="r0042")) == (False, "a is not invited to a round r0042")
    assert house.give("e", keys) == (False, f"e is not invited to a round {plan.round_id}")
    late = changed(shares, sealed={name: turned(packet) for name, packet in shares.sealed.items()})
    assert house.give("a", late) == (
        False, f"no Shares is expected of a: it is shared, round {plan.round_id} is training",
    )  # fmt: skip
    early = SurvivorsSigned(message_id="0" * 32, round_id=plan.round_id, signature=b"s")
    assert house.give("a", early)[0] is False
    assert house.facts() == before
    house.play("summed")
    house.check_release(plan, "abcd")


def test_same_message_again_is_accepted_again_at_any_time(house: House) -> None:
    house.start()
    house.play("summed")
    before = house.facts()
    for (name, kind), said in list(house.said.items()):
        again = said if isinstance(said, bytes) else changed(said, message_id=IDS[kind])
        assert house.give(name, again) == (True, ""), kind
    assert house.facts() == before
    assert refusals(house, "a") == []


def test_message_of_a_masked_stage_in_an_open_round_is_not_taken(house: House) -> None:
    house.start()
    house.play("keys")
    keys = house.said["a", RoundKeys]
    with house.hub.files.database.writing() as session:
        ledger.drop(session, house.hub.round_id, "", house.hub.now)
    assert house.give("a", keys) == (False, f"round {keys.round_id} is over")
    plan = house.hub.start()
    accepted, reason = house.give("a", changed(keys, round_id=plan.round_id))
    assert (accepted, reason[:24]) == (False, "no RoundKeys is expected")


def test_update_of_another_length_is_refused_and_its_box_counts_as_dropped_out(house: House) -> None:
    plan = house.start()
    house.withhold(UPDATE, "a")
    house.play("agreeing")
    short = bytes(layout_of(plan).word_count * plan.word_bits // 8 - 2)
    blob = sealing.seal_update(short, identity=house.twins["a"].identity, plan=plan, examples=20)
    accepted, reason = house.give("a", blob)
    assert (accepted, "are not" in reason) == (False, True)
    assert house.hub.member("a").state == "refused"
    house.play("summed")
    house.check_release(plan, "bcde")


class Cheat(MaskedTwin):
    """All levels as high as they go, under a weight of its own choice."""

    weight: int = 1

    def encoded(self, plan: RoundPlan) -> NDArray[np.unsignedinteger]:
        layout = layout_of(plan)
        words = np.full(layout.word_count, layout.levels, layout.word_type)
        words[0] = self.weight % 2**plan.word_bits
        return words


@pytest.mark.parametrize(
    ("weight_in_all", "reason"),
    [(None, r"a mean of norm \d.*, and honest boxes give 10\.\d* at most"), (4, "a sum of weight 4")],
)
def test_sum_that_honest_boxes_cannot_have_drops_the_round(
    house: House, weight_in_all: int | None, reason: str
) -> None:
    plan = house.start()
    cheat = house.twins["e"] = Cheat(house.hub.boxes["e"].identity, house.hub.trust)
    if weight_in_all is not None:
        cheat.weight = weight_in_all - 4 * round(255 * round_layout.weight_share(EXAMPLES, plan))
    house.play("summed")
    assert re.fullmatch(f"the masked sum is refused: {reason}", house.hub.tick_until("dropped").reason)
    assert house.hub.release(2) is None


def test_watchdog_is_told_while_the_masks_come_off(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.start()
    house.play("summed")
    house.hub.restart()
    told: list[str] = []
    monkeypatch.setattr(notify, "watchdog", lambda: told.append("alive"))
    house.hub.intake.mean(house.hub.round_id)
    assert len(told) == 5 + 5 + 1  # secrets, updates, one pass over the words


def test_offer_to_a_round_whose_base_is_lost_ends_it_and_is_refused(house: House) -> None:
    plan = house.start()
    house.withhold(UPDATE, *"abcde")
    house.play("agreeing")
    house.hub.repository.bundle_path(plan.base_digest).write_bytes(b"rotten")
    house.hub.restart()
    hub, answers = house.hub, list[AnyMessage]()
    moving = Transfers(
        hub.files.config, hub.files.database, hub.intake, lambda device, said: answers.append(said), lambda *_: True
    )
    offer, _ = hub.offer("a", b"sealed")
    moving.on_offer("a", offer, hub.now)
    (receipt,) = answers
    assert isinstance(receipt, TransferReceipt)
    assert (receipt.accepted, receipt.reason) == (False, f"round {plan.round_id} is over")
    assert "base" in hub.round().reason
    assert hub.round().state == "dropped"


def test_update_that_is_too_large_is_refused_before_it_travels(house: House) -> None:
    plan = house.start()
    house.withhold(UPDATE, "a")
    house.play("agreeing")
    limit = house.hub.intake.update_bytes_max(plan.round_id)
    exact = layout_of(plan).word_count * plan.word_bits // 8
    assert exact < limit <= exact + 16 * 1024
    offer, _ = house.hub.offer("a", bytes(limit + 1))
    assert house.hub.intake.judge_update("a", offer, house.hub.now) == (
        "refuse",
        f"{limit + 1} bytes, at most {limit} are taken",
    )


def test_update_is_waited_with_until_the_shares_are_forwarded(house: House) -> None:
    house.start()
    house.play("sharing")
    offer, _ = house.hub.offer("a", b"sealed")
    assert house.hub.intake.judge_update("a", offer, house.hub.now) == ("wait", "")


def test_update_of_a_box_that_was_left_out_is_refused(house: House) -> None:
    house.start()
    house.withhold(UPDATE, "c")
    house.play("agreeing")
    late = house.owed("c")
    assert late is not None
    house.wait(3601.0)
    house.twins["c"].withheld.clear()
    (blob,) = house.twins["c"].hear(late, house.hub.now)
    assert house.give("c", blob) == (False, "left out: an update did not come in time")


def test_masked_round_of_more_boxes_than_a_sum_holds_is_not_started(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud_hub.invitations.COHORT", 4)
    with pytest.raises(SiteError, match="5 devices are invited, a masked round has room for 4") as refused:
        house.start()
    assert refused.value.advice
