"""Buffered rounds and a hub that lies or loses: open updates counted once, plans no honest hub makes, sums over one base."""

import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent import invitations, learn, ledger, replay, spool
from edge_agent.learner import Learner
from edge_agent.rounds import GIVE_UP_AFTER_S, Event, State
from fleet_link import messages, sealing
from fleet_link.errors import LinkError, SiteError
from fleet_link.messages import BASES, RoundAnswer, RoundPlan
from models import delta
from tests.edge_agent.buffered_fleet import (
    SHAPES,
    WIDE,
    close,
    files,
    last_no,
    late,
    next_plan,
    raw,
    release,
    the_state,
    to_training,
    with_policy,
    work,
)
from tests.edge_agent.link_support import Box
from tests.edge_agent.masked_fleet import NAMES, ROUND, Fleet, Never
from tests.masked_support import changed

Make = Callable[..., Fleet]


# --- open rounds ----------------------------------------------------------------------------------


def open_round(fleet: Fleet) -> Box:
    """As far as its update is on its way."""
    box = fleet.boxes["box-1"]
    box.config = with_policy(box.config, allow_unsafe_open_rounds=True)
    fleet.plan = changed(fleet.plan, kind="unsafe_open", value_bits=16)
    fleet.tell("box-1", fleet.plan)
    work(fleet)
    assert fleet.state() == State.TRAINING
    work(fleet)
    assert fleet.state() == State.UPLOADING
    return box


def opened(fleet: Fleet, box: Box, plan: RoundPlan) -> delta.Arrays:
    """As the hub reads it."""
    (transfer,) = box.rows("transfers_out")
    sealed = (box.data_dir / transfer["path"]).read_bytes()
    update = sealing.open_update(
        sealed,
        private_key=fleet.key,
        trust=fleet.authority.trust,
        sender="box-1",
        plan=plan,
        now=time.time(),
    )
    return delta.decode(update.payload, SHAPES)


@pytest.mark.parametrize("event", [Event.REJECTED, Event.LEFT_OUT])
def test_what_an_open_round_had_no_room_for_is_sealed_anew_for_the_next(make_buffered: Make, event: Event) -> None:
    fleet = make_buffered(changes={"clip_norm": 1000.0})
    box = open_round(fleet)
    before = opened(fleet, box, fleet.plan)
    first = fleet.plan.base_digest
    close(fleet, event=event)
    assert (fleet.state(), len(box.rows("spool"))) == (State.CLOSED, 1)
    plan = next_plan(fleet, release(fleet, slope=11.0), first)
    fleet.tell("box-1", plan)
    work(fleet)
    work(fleet)
    again = opened(fleet, box, plan)
    step = max(float(np.abs(value).max()) for value in before.values()) / 60  # two roundings to 8 bits
    for name in again:
        assert again[name] == pytest.approx(before[name] / np.sqrt(2.0), abs=step)


@pytest.mark.parametrize("event", [Event.ACCEPTED, Event.CLOSED_BY_HUB, Event.GIVEN_UP])
def test_an_open_update_that_may_have_been_counted_is_not_sent_again(make_buffered: Make, event: Event) -> None:
    fleet = make_buffered()
    box = open_round(fleet)
    close(fleet, event=event)
    assert box.rows("spool") == []


def test_while_an_open_update_may_be_counted_the_next_buffer_waits_for_word_of_it(make_buffered: Make) -> None:
    """The hub has counted it, and its receipt and the end of its round were lost."""
    fleet = make_buffered(changes={"clip_norm": 1000.0})
    box = open_round(fleet)
    fleet.tell("box-1", changed(fleet.plan, round_id="round-2"))
    work(fleet)
    assert the_state(fleet, "round-2") == State.INVITED
    close(fleet)
    assert (box.rows("spool"), box.rows("transfers_out")) == ([], [])


def test_an_open_update_that_is_to_be_sealed_again_goes_where_its_round_was_released(make_buffered: Make) -> None:
    fleet = make_buffered()
    box = open_round(fleet)
    known = ledger.find(box.db, ROUND)
    assert known is not None
    ledger.lose_update(box.db, box.data_dir, known, "sealed with the certificate before", time.time())
    assert fleet.state() == State.TRAINING
    close(fleet)
    assert box.rows("spool") == []


def test_of_an_open_round_asked_for_again_the_next_update_in_the_spool_is_not_dropped(make_buffered: Make) -> None:
    """A hub restored from its backup asks for what it had counted; another update is in the spool by then."""
    fleet = make_buffered()
    box = open_round(fleet)
    close(fleet, event=Event.ACCEPTED)
    fleet.tell("box-1", changed(fleet.plan, round_id="round-2"))
    close(fleet, "round-2")
    work(fleet)
    (late,) = box.rows("spool")
    fleet.tell("box-1", fleet.plan)
    assert fleet.state() == State.UPLOADING
    close(fleet, event=Event.ACCEPTED)
    assert box.rows("spool") == [late]


def test_what_the_hub_may_have_read_hides_nobody_in_a_masked_sum(make_buffered: Make) -> None:
    """A hub that reads updates in an open round, refuses them, and subtracts them from the masked sum that follows."""
    fleet = make_buffered()
    box = open_round(fleet)
    close(fleet, event=Event.REJECTED)
    (seen,) = box.rows("spool")
    fleet.tell("box-1", changed(fleet.plan, kind="masked", value_bits=12, round_id="round-2"))
    work(fleet)
    (now,) = box.rows("spool")
    assert (seen["is_shown"], now["is_shown"]) == (1, 0)
    assert now["sha256"] != seen["sha256"]


# --- a hub that lies ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bases": ()}, "bases do not begin with its own"),
        ({"bases": ("f" * 64,)}, "bases do not begin with its own"),
        ({"bases": (None, "f" * 64, "f" * 64)}, "or list one twice"),
        ({"buffer": 6}, "a buffer of 6, and at least 3, at most 5 boxes"),
        ({"buffer": 2}, "a buffer of 2, and at least 3, at most 5 boxes"),
        ({"buffer": 0}, "is of no buffered round"),
        ({"share": 0.5}, "an older update would be of another drawn share"),
    ],
)
def test_a_plan_no_honest_hub_makes_is_declined(make_buffered: Make, changes: dict[str, Any], reason: str) -> None:
    fleet = make_buffered()
    if "bases" in changes:
        changes = {"bases": tuple(base or fleet.plan.base_digest for base in changes["bases"])}
    fleet.tell("box-1", changed(fleet.plan, **changes))
    (answer,) = fleet.said("box-1")
    assert isinstance(answer, RoundAnswer)
    assert not answer.joins
    assert reason in answer.reason


def test_a_list_of_bases_without_end_is_not_read(make_buffered: Make) -> None:
    plan = make_buffered().plan
    bases = tuple(f"{number:064x}" for number in range(BASES + 1))
    with pytest.raises(LinkError):
        messages.decode(msgspec.msgpack.encode(changed(plan, bases=bases)))


def test_an_update_over_a_base_that_the_hub_does_not_list_is_thrown_away_and_trained_anew(make_buffered: Make) -> None:
    fleet = make_buffered()
    change = late(fleet)
    second = release(fleet, slope=11.0)
    fleet.tell("box-1", next_plan(fleet, second, "f" * 64))
    box = work(fleet)
    assert the_state(fleet, "round-2") == State.KEYED
    (row,) = box.rows("spool")
    assert (row["base_digest"], row["round_id"], files(box)) == (second, "round-2", ["round-2.safetensors"])
    assert any((raw(box)[name] != value).any() for name, value in change.items())


@pytest.mark.parametrize(
    "policy", [{"tasks": ("CT",)}, {"min_examples": 4}, {"weights_may_leave": ("heads",)}], ids=str
)
def test_what_the_site_forbids_since_is_not_taken_from_the_spool(make_buffered: Make, policy: dict[str, Any]) -> None:
    fleet = make_buffered()
    first = fleet.plan.base_digest
    late(fleet)
    box = fleet.boxes["box-1"]
    box.config = with_policy(box.config, **policy)
    fleet.tell("box-1", next_plan(fleet, release(fleet, slope=11.0), first))
    work(fleet)
    assert the_state(fleet, "round-2") == State.DECLINED


def seal_round_2(fleet: Fleet, plan: RoundPlan) -> None:
    to_training(fleet, plan)
    fleet.train("box-1")


def open_round_2(fleet: Fleet) -> None:
    box = fleet.boxes["box-1"]
    for event in (Event.ACCEPTED, Event.SURVIVORS_SIGNED, Event.UNMASK_GIVEN):
        part = ledger.part_of(box.db, "round-2")
        ledger.apply(box.db, box.data_dir, "round-2", event, time.time(), ledger.Outcome(part=part))
    for name in NAMES:
        close(fleet, "round-2", name=name)


def test_of_a_stale_update_the_base_it_was_trained_from_counts_for_the_next_sum(make_buffered: Make) -> None:
    """Two sums whose difference could be one site's update: over the first base there was one, though no plan was over it."""
    fleet = make_buffered()
    first = fleet.plan.base_digest
    late(fleet)
    second = release(fleet, slope=11.0)
    seal_round_2(fleet, next_plan(fleet, second, first))
    open_round_2(fleet)
    third = next_plan(fleet, first, round_id="round-3", buffer=0, bases=())
    fleet.tell("box-1", third)
    answer = fleet.said("box-1")[-1]
    assert isinstance(answer, RoundAnswer)
    assert "may have been opened before, and 0 verdicts are new since" in answer.reason
    fleet.tell("box-1", changed(third, round_id="round-4", base_digest=second))
    assert the_state(fleet, "round-4") == State.KEYED


def late_after_round_2(fleet: Fleet, base: str) -> None:
    """Box-1 could not train for its first round before its update for a second one, over `base`, was sealed."""
    box = fleet.boxes["box-1"]
    fleet.tell("box-1", fleet.plan)
    box.db.execute("UPDATE rounds SET state = 'declined'")
    seal_round_2(fleet, changed(fleet.plan, round_id="round-2", base_digest=base, buffer=0, bases=()))
    box.db.execute("UPDATE rounds SET state = 'late' WHERE round_id = ?", (ROUND,))
    work(fleet)
    open_round_2(fleet)


def test_an_update_over_a_base_of_an_opened_sum_is_thrown_away(make_buffered: Make) -> None:
    """As a second round over that base would be declined: the difference of the two sums could be one site's update."""
    fleet = make_buffered()
    first = fleet.plan.base_digest
    late(fleet)
    box, second = fleet.boxes["box-1"], release(fleet, slope=11.0)
    (row,) = box.rows("spool")
    replay.note_opened(box.db, ROUND)
    replay.keep_learned(box.db, ROUND, learn.examples(box.db, box.config.policy.tasks, "train"))
    assert row["base_digest"] == first
    fleet.tell("box-1", next_plan(fleet, second, first, round_id="round-3", buffer=5))
    work(fleet)
    assert [row["base_digest"] for row in box.rows("spool")] == [second]


def test_late_training_over_the_base_of_an_earlier_sum_is_not_done(make_buffered: Make) -> None:
    fleet = make_buffered()
    late_after_round_2(fleet, fleet.plan.base_digest)
    assert fleet.boxes["box-1"].rows("spool") == []


def test_joined_for_its_spool_a_box_does_not_train_where_it_would_not_have_joined(make_buffered: Make) -> None:
    fleet = make_buffered()
    first, second = fleet.plan.base_digest, release(fleet, slope=11.0)
    late_after_round_2(fleet, second)
    fleet.tell("box-1", next_plan(fleet, second, first, round_id="round-3", buffer=5))
    assert the_state(fleet, "round-3") == State.PREPARING
    fleet.boxes["box-1"].db.execute("DELETE FROM spool")
    work(fleet)
    assert the_state(fleet, "round-3") == State.DECLINED
    assert "0 of its verdicts are new since a sum over its base may have been opened" in last_no(fleet)


def test_late_training_makes_room_for_a_round_that_needs_its_update_now(
    make_buffered: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go with the other's seal anyway."""
    fleet = make_buffered()
    fleet.tell("box-1", fleet.plan)
    close(fleet)
    box = fleet.boxes["box-1"]
    asked: list[bool] = []

    def train(*arguments: Any) -> learn.Trained:
        stopped = arguments[-1]
        asked.append(stopped())
        fleet.tell("box-1", changed(fleet.plan, round_id="round-2", buffer=0, bases=()))
        box.db.execute("UPDATE rounds SET state = 'training' WHERE round_id = 'round-2'")
        asked.append(stopped())
        raise learn.TrainingStoppedError

    monkeypatch.setattr(learn, "train", train)
    work(fleet)
    assert asked == [False, True]
    assert fleet.state() == State.LATE


def test_late_training_is_not_begun_while_another_round_is_held_up(
    make_buffered: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_buffered()
    fleet.tell("box-1", fleet.plan)
    close(fleet)
    box = fleet.boxes["box-1"]
    fleet.tell("box-1", changed(fleet.plan, round_id="round-2", buffer=0, bases=()))
    box.db.execute("UPDATE rounds SET state = 'training' WHERE round_id = 'round-2'")
    begun: list[str] = []

    def train(plan: RoundPlan, *_: Any) -> learn.Trained:
        begun.append(plan.round_id)
        raise SiteError("the disk is full")

    monkeypatch.setattr(learn, "train", train)
    learner = Learner(box.config, box.holder, box.enrolled, time.time)
    for _ in range(3):
        learner.step(box.db, Never())
    assert begun == ["round-2"]


def test_what_is_in_the_spool_stays_until_it_is_dropped(make_buffered: Make) -> None:
    fleet = make_buffered()
    change = late(fleet)
    box = fleet.boxes["box-1"]
    spool.keep(box.db, spool.write(box.data_dir, changed(fleet.plan, round_id="other"), change, (3, ()), 0.0))
    (row,) = box.rows("spool")
    assert row["round_id"] == ROUND
    work(fleet)
    assert files(box) == [f"{ROUND}.safetensors"]


def test_an_update_in_the_spool_goes_with_the_next_one_that_is_sealed(make_buffered: Make) -> None:
    """Else what it learned would stand in two sums."""
    fleet = make_buffered()
    late(fleet)
    plan = changed(fleet.plan, round_id="round-2", buffer=0, bases=())
    to_training(fleet, plan)
    fleet.train("box-1")
    box = fleet.boxes["box-1"]
    assert (the_state(fleet, "round-2"), box.rows("spool")) == (State.UPLOADING, [])


def test_a_masked_round_waits_while_another_is_prepared(make_buffered: Make) -> None:
    fleet = make_buffered()
    fleet.tell("box-1", fleet.plan)
    fleet.tell("box-1", changed(fleet.plan, round_id="round-2"))
    assert the_state(fleet, "round-2") == State.INVITED
    close(fleet)
    box = fleet.boxes["box-1"]
    invitations.judge_waiting(box.db, box.config, box.enrolled.identity, time.time())
    assert the_state(fleet, "round-2") == State.PREPARING


def test_a_late_training_never_takes_the_place_of_what_a_round_counts_on(make_buffered: Make) -> None:
    fleet = make_buffered()
    fleet.tell("box-1", fleet.plan)
    close(fleet)
    fleet.tell("box-1", changed(fleet.plan, round_id="round-2"))
    box = fleet.boxes["box-1"]
    box.db.execute("UPDATE rounds SET state = 'declined' WHERE round_id = ?", (ROUND,))
    work(fleet)
    (before,) = box.rows("spool")
    box.db.execute("UPDATE rounds SET state = 'late' WHERE round_id = ?", (ROUND,))
    work(fleet)
    assert box.rows("spool") == [before]
    assert (fleet.state(), the_state(fleet, "round-2")) == (State.CLOSED, State.KEYED)


def test_a_round_that_is_on_is_trained_for_before_one_that_is_over(make_buffered: Make) -> None:
    fleet = make_buffered()
    fleet.tell("box-1", fleet.plan)
    close(fleet)
    fleet.tell("box-1", next_plan(fleet, release(fleet, slope=11.0), fleet.plan.base_digest))
    (row,) = work(fleet).rows("spool")
    assert row["round_id"] == "round-2"
    assert (fleet.state(), the_state(fleet, "round-2")) == (State.CLOSED, State.KEYED)


def test_the_privacy_pledge_of_a_late_box_is_given_back(make_buffered: Make) -> None:
    noisy = WIDE | {"noise": 1.0, "noise_boxes": 3}
    fleet = make_buffered(changes=noisy, policy={"epsilon_max": 1000.0})
    fleet.tell("box-1", fleet.plan)
    box = fleet.boxes["box-1"]
    assert [row["is_spent"] for row in box.rows("privacy_costs")] == [0]
    close(fleet)
    work(fleet)
    assert (box.rows("privacy_costs"), len(box.rows("spool"))) == ([], 1)


def test_a_box_that_never_ends_its_training_is_given_up(make_buffered: Make) -> None:
    fleet = make_buffered()
    fleet.tell("box-1", fleet.plan)
    close(fleet)
    box = fleet.boxes["box-1"]
    invitations.close_expired(box.db, box.data_dir, fleet.plan.deadline_unix_s + 1)
    assert fleet.state() == State.LATE
    invitations.close_expired(box.db, box.data_dir, fleet.plan.deadline_unix_s + GIVE_UP_AFTER_S)
    assert fleet.state() == State.CLOSED
