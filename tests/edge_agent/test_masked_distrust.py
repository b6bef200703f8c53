"""What a box does not believe in a masked round: a second sum over the same base, cohorts, shares and lists of a hub that lies."""

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from cloud_hub import secure_sum
from edge_agent import invitations, learn, ledger, replay
from edge_agent.rounds import State
from fleet_link import messages
from fleet_link.errors import SiteError, TooFewError, TrustError
from fleet_link.messages import RoundKeys, Shares, SurvivorsSigned
from tests.edge_agent.masked_fleet import ID, NAMES, ROUND, Fleet, is_out, on_disk, secrets_of, the_no
from tests.masked_support import changed, flipped

STAGES = ("keyed", "shared", "training", "uploading", "delivered", "agreed", "unmasked")
Make = Callable[..., Fleet]


# --- two sums whose difference could be one box's update --------------------------------------------


def invite_again(fleet: Fleet, **changes: object) -> dict[str, Any]:
    """Box-1's row of a second round."""
    fleet.tell("box-1", changed(fleet.plan, round_id="round-2", **changes))
    box = fleet.boxes["box-1"]
    invitations.judge_waiting(box.db, box.config, box.enrolled.identity, time.time())
    return dict(next(row for row in box.rows("rounds") if row["round_id"] == "round-2"))


def test_a_second_round_waits_until_the_first_is_over(make: Make) -> None:
    fleet = make()
    fleet.to_stage("shared")
    assert invite_again(fleet)["state"] == State.INVITED
    fleet.close_round("dropped", "too few")
    assert invite_again(fleet)["state"] == State.KEYED  # no update was sealed


@pytest.mark.parametrize("outcome", ["released", "dropped"])
def test_over_the_same_base_a_second_sum_needs_new_verdicts(make: Make, outcome: str) -> None:
    fleet = make()
    fleet.to_stage("unmasked")
    fleet.close_round(outcome, "" if outcome == "released" else "no candidate")
    row = invite_again(fleet)
    assert row["state"] == State.DECLINED
    assert "may have been opened before, and 0 verdicts are new since, needs 2" in row["reason"]


@pytest.mark.parametrize("hidden", ["survivors", "agreement"])
def test_a_hub_that_opens_a_sum_without_telling_every_box_gets_no_second_one(make: Make, hidden: str) -> None:
    """The neighbours' shares are enough to open it."""
    fleet = make()
    fleet.to_stage("delivered")
    fleet.told = secure_sum.settle_survivors(fleet.circle, fleet.sharing, fleet.uploads, message_id=ID)
    others = [name for name in fleet.told.active if name != "box-1"]
    for name in others if hidden == "survivors" else fleet.told.active:
        fleet.tell(name, fleet.told)
    fleet.hear()
    for name in others:
        fleet.tell(name, fleet.agreement(name))
    assert (fleet.sum() == fleet.plain_sum()).all()
    fleet.close_round("dropped", "too few signed")
    assert invite_again(fleet)["state"] == State.DECLINED


def test_with_enough_new_verdicts_it_joins(make: Make) -> None:
    fleet = make()
    fleet.to_stage("unmasked")
    fleet.close_round()
    box = fleet.boxes["box-1"]
    for number in range(2):
        box.add_reviewed(f"new-{number}", bright=True, label="nodule")
    learn.collect(box.db, box.data_dir, box.holder.current.reader.bundle.manifest, 0.25)
    box.db.execute("UPDATE examples SET split = 'train'")
    assert invite_again(fleet)["state"] == State.KEYED


def test_a_sum_over_another_base_is_no_reason(make: Make) -> None:
    fleet = make()
    fleet.to_stage("agreed")
    fleet.close_round("dropped", "too few signed")
    box = fleet.boxes["box-1"]
    assert invite_again(fleet)["state"] == State.DECLINED
    examples = learn.examples(box.db, box.config.policy.tasks, "train")
    assert replay.new_since_opened(box.db, fleet.plan.base_digest, examples) == 0
    assert replay.new_since_opened(box.db, "f" * 64, examples) is None


# --- distrust -------------------------------------------------------------------------------------


def distrusted(fleet: Fleet, message: messages.AnyMessage, reason: str) -> None:
    """Given up with an alarm, its secrets gone, and not taken up again."""
    fleet.hear()
    secrets = secrets_of(fleet)
    with pytest.raises(TrustError, match=reason):
        fleet.tell("box-1", message)
    assert is_out(fleet)
    assert reason in the_no(fleet).reason
    assert on_disk(fleet, secrets) == [False] * 3
    fleet.hear()
    fleet.tell("box-1", fleet.plan)
    fleet.tell("box-1", fleet.cohort("box-1"))
    assert is_out(fleet)


def test_a_cohort_that_lists_other_keys(make: Make) -> None:
    fleet = make()
    fleet.to_stage("keyed")
    fleet.gather()
    good = fleet.cohort("box-1")
    distrusted(fleet, changed(good, keys_digests=flipped(good.keys_digests)), "the cohort lists other keys of box-5")


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_second_cohort_sound_by_itself(make: Make, stage: str) -> None:
    fleet = make()
    fleet.to_stage(stage)
    fleet.hear()
    fleet.gather(away=["box-5"])
    distrusted(fleet, fleet.cohort("box-1"), "a second, other cohort")


def test_shares_that_do_not_open(make: Make) -> None:
    fleet = make()
    fleet.to_stage("shared")
    fleet.hear()
    fleet.sharing = NAMES
    good = fleet.forwarded("box-1")
    bad = {name: flipped(packet) if name == "box-3" else packet for name, packet in good.sealed.items()}
    fleet.tell("box-1", changed(good, sealed=bad))  # another box's doing: no alarm against the hub
    assert is_out(fleet)
    assert "box-3 do not open here" in the_no(fleet).reason


def test_lists_without_this_box(make: Make) -> None:
    fleet = make()
    fleet.to_stage("delivered")
    distrusted(fleet, fleet.lists(NAMES[1:], NAMES[:1]), "this box is not in the sum")


def test_a_second_pair_of_lists(make: Make) -> None:
    """One share of each kind, of one neighbour, would bare its update."""
    fleet = make()
    fleet.to_stage("unmasked")
    distrusted(fleet, fleet.lists(NAMES[:4], NAMES[4:]), "a second, other list of survivors")


def test_an_agreement_that_nobody_signed(make: Make) -> None:
    fleet = make()
    fleet.to_stage("agreed")
    fleet.hear()
    good = fleet.agreement("box-1")
    forged = {name: flipped(signature, 8) for name, signature in good.signatures.items()}
    distrusted(fleet, changed(good, signatures=forged), "0 of 4 neighbours signed the same survivors")


def test_lists_before_there_is_an_update(make: Make) -> None:
    fleet = make()
    fleet.to_stage("training")
    distrusted(fleet, fleet.lists(), "has given no update")


def test_a_cohort_smaller_than_the_plan_promised_is_distrusted(make: Make) -> None:
    fleet = make()
    fleet.to_stage("keyed")
    fleet.hear()
    small = messages.Cohort(
        message_id=ID,
        round_id=ROUND,
        names=("box-1", "box-2"),
        keys_digests=bytes(64),
        neighbours={"box-2": fleet.keys["box-2"].keys},
    )
    with pytest.raises(TooFewError, match="a cohort of 2, this box asks for 3"):
        fleet.tell("box-1", small)
    assert is_out(fleet)


@pytest.mark.parametrize("stage", ["keyed", "delivered"])
def test_a_site_that_asks_for_more_than_the_plan_sits_out_without_an_alarm(
    make: Make, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = make(policy={"min_cohort": 5})
    fleet.to_stage("keyed")
    if stage == "keyed":
        fleet.form(away=["box-5"])
        expected = "a cohort of 4, this box asks for 5"
    else:
        fleet.form()
        fleet.forward()
        fleet.collect(away=["box-5"])
        fleet.hear()
        fleet.tell_survivors()
        expected = "a sum of 4 boxes, this box asks for 5"
    assert is_out(fleet)
    assert the_no(fleet).reason == expected
    assert [
        record.levelno for record in caplog.records if expected in record.message and record.name.endswith("masked")
    ] == [logging.WARNING]


def test_a_plan_that_promises_fewer_than_the_site_asks_for_is_declined(make: Make) -> None:
    fleet = make(policy={"min_cohort": 6})
    fleet.tell("box-1", fleet.plan)
    assert is_out(fleet)
    assert "policy.min_cohort" in the_no(fleet).reason


def test_a_certificate_replaced_in_mid_round_cannot_sign(make: Make) -> None:
    fleet = make()
    fleet.to_stage("delivered")
    fleet.hear()
    box = fleet.boxes["box-1"]
    box.enrolled.identity = fleet.authority.issue("box-1", to_days=90)
    with pytest.raises(SiteError, match="certificate was replaced"):
        fleet.tell("box-1", fleet.lists())
    assert is_out(fleet)


@pytest.mark.parametrize("stage", ["shared", "training"])
def test_a_damaged_row_ends_the_round_here(make: Make, stage: str) -> None:
    """Found by the link at the hub's next message, or by the learner."""
    fleet = make()
    fleet.to_stage(stage)
    fleet.hear()
    fleet.sharing = NAMES
    fleet.boxes["box-1"].db.execute("UPDATE masked_parts SET part = ?", (b"\xc1",))
    if stage == "training":
        fleet.train("box-1")
    else:
        with pytest.raises(SiteError, match="damaged"):
            fleet.tell("box-1", fleet.forwarded("box-1"))
    assert is_out(fleet)
    assert "damaged" in the_no(fleet).reason


# --- nothing secret is told -----------------------------------------------------------------------


def test_no_secret_and_no_share_is_logged_or_shown(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    fleet = make()
    fleet.to_stage("unmasked")
    fleet.hear()
    shares = [*fleet.given["box-1"].self_shares.values()]
    part = ledger.part_of(fleet.boxes["box-1"].db, ROUND)
    shown = caplog.text + repr(part) + repr(ledger.Outcome(part=part, said=fleet.given["box-1"]))
    for secret in (*secrets_of(fleet), *shares):
        assert repr(secret)[2:-1] not in shown
        assert secret.hex() not in shown


def test_the_database_that_holds_the_secrets_is_private(make: Make) -> None:
    fleet = make()
    fleet.to_stage("keyed")
    assert {oct(os.stat(path).st_mode & 0o777) for path in fleet.boxes["box-1"].data_dir.glob("box.db*")} == {"0o600"}


def test_ids_are_those_of_the_fact(make: Make) -> None:
    fleet = make()
    fleet.to_stage("unmasked")
    fleet.hear()
    ids = {
        message.message_id
        for message in (fleet.keys["box-1"], fleet.made["box-1"], fleet.signed["box-1"], fleet.given["box-1"])
    }
    assert len(ids) == 4
    assert {type(m) for m in (fleet.keys["box-1"], fleet.made["box-1"])} == {RoundKeys, Shares}
    assert isinstance(fleet.signed["box-1"], SurvivorsSigned)
    assert msgspec.structs.replace(fleet.given["box-1"], message_id=ID) != fleet.given["box-1"]
