"""The privacy budget: pledged with the keys, spent with the update, never forgotten, and the box stops at it."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_agent import cli, database, hub_change, invitations, ledger, privacy, status, update
from edge_agent.ledger import Outcome
from edge_agent.rounds import Event, State
from fleet_link.errors import LinkError
from fleet_link.messages import RoundAnswer, RoundClosed
from fleet_link.sealing import plan_digest
from models import accountant, addable, round_layout
from models.accountant import Cost
from models.layout import Layout
from tests.edge_agent.link_support import make_plan
from tests.edge_agent.masked_fleet import ID, NAMES, ROUND, Fleet
from tests.masked_support import changed

NOISE = {"noise": 1.0, "noise_boxes": 3, "word_bits": 32, "value_bits": 16}
Make = Callable[..., Fleet]


@pytest.fixture
def make_noisy(make: Make) -> Make:
    def a_fleet(**fields: Any) -> Fleet:
        return make(**fields | {"changes": NOISE | fields.get("changes", {})})

    return a_fleet


def cost_of(fleet: Fleet) -> Cost:
    cost = accountant.cost_of(fleet.layout)
    assert cost is not None
    return cost


def costs(fleet: Fleet, name: str = "box-1") -> tuple[list[Cost], list[Cost]]:
    """Spent; spent or pledged."""
    db = fleet.boxes[name].db
    return privacy.spent(db), privacy.spent_or_pledged(db)


def invite_another(fleet: Fleet, round_id: str, **changes: object) -> str:
    """Box-1's reason not to join, or ""."""
    box = fleet.box("box-1")
    fields = {name: getattr(fleet.plan, name) for name in fleet.plan.__struct_fields__}
    plan = type(fleet.plan)(**(fields | {"round_id": round_id} | changes))
    invitations.take(box.db, box.config, box.enrolled.identity, plan, time.time())
    return str(next(row["reason"] for row in box.rows("rounds") if row["round_id"] == round_id))


def test_no_more_boxes_are_believed_to_add_noise_than_the_site_asks_for(make_noisy: Make) -> None:
    """The hub may have enrolled the others itself."""
    fleet = make_noisy()
    base = fleet.boxes["box-1"].holder.current.reader.bundle.path
    plan = changed(fleet.plan, noise_boxes=fleet.plan.noise_boxes * 100, boxes_max=1000)
    believed, all_of_them = (privacy.cost_of(plan, base, honest) for honest in (3, plan.noise_boxes))
    assert believed is not None
    assert all_of_them is not None
    assert believed.variance == pytest.approx(all_of_them.variance * 3 / plan.noise_boxes, rel=1e-6)
    assert accountant.epsilon([believed], 1e-5) > 3 * accountant.epsilon([all_of_them], 1e-5)


# --- a round with noise -----------------------------------------------------------------------------


@pytest.mark.parametrize("restarts", [False, True])
def test_the_update_spends_what_joining_has_pledged(make_noisy: Make, restarts: bool) -> None:
    fleet = make_noisy(restarts=restarts)
    fleet.to_stage("training")
    assert costs(fleet) == ([], [cost_of(fleet)])
    fleet.collect()
    assert fleet.states() == {State.DELIVERED}
    assert costs(fleet) == ([cost_of(fleet)], [cost_of(fleet)])
    fleet.tell_survivors()
    fleet.agree()
    assert (fleet.sum() == fleet.plain_sum()).all()
    fleet.close_round()
    assert costs(fleet) == ([cost_of(fleet)], [cost_of(fleet)])


def test_the_mean_of_the_sum_is_the_mean_and_noise(make_noisy: Make) -> None:
    fleet = make_noisy()
    fleet.to_stage("unmasked")
    total = fleet.sum()
    assert total[0] == 255 * len(NAMES)
    mean = addable.decode_sum(total, fleet.layout)
    deviation = fleet.plan.clip_norm * math.sqrt(len(NAMES) / 3) / len(NAMES)
    errors = np.concatenate([mean[name] - np.mean([fleet.deltas[box][name] for box in NAMES], axis=0) for name in mean])
    assert 0.1 * deviation < np.sqrt(np.mean(errors**2)) < 3 * deviation


def test_two_boxes_of_one_delta_send_different_noise_and_one_weight() -> None:
    plan = make_plan("a" * 64, b"k" * 32, kind="masked", min_cohort=3, boxes_max=5, examples_cap=1000, **NOISE)
    before, after = {"head": np.zeros(400, np.float32)}, {"head": np.ones(400, np.float32)}
    one, two = (update.to_words(update.change_of(before, after, plan), plan, examples).words for examples in (3, 700))
    assert one[0] == two[0] == 255
    layout = round_layout.layout_of(plan, plan_digest(plan), {"head": (400,)})
    apart = (one[1:].astype(np.int64) - two[1:]).std()
    assert apart == pytest.approx(math.sqrt(2 * layout.noise_variance), rel=0.2)


def test_a_round_without_noise_is_not_counted(make_noisy: Make) -> None:
    fleet = make_noisy(changes={"noise": 0.0, "noise_boxes": 0})
    fleet.to_stage("uploading")
    assert costs(fleet) == ([], [])


# --- how it ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["keyed", "shared", "training"])
@pytest.mark.parametrize("event", [Event.CLOSED_BY_HUB, Event.DEADLINE, Event.FAILED])
def test_what_was_not_sent_costs_nothing(make_noisy: Make, stage: str, event: Event) -> None:
    fleet = make_noisy()
    fleet.to_stage(stage)
    box = fleet.boxes["box-1"]
    ledger.apply(box.db, box.data_dir, ROUND, event, time.time(), Outcome(reason="over"))
    assert costs(fleet) == ([], [])


@pytest.mark.parametrize("stage", ["uploading", "delivered", "agreed", "unmasked"])
@pytest.mark.parametrize("event", [Event.CLOSED_BY_HUB, Event.GIVEN_UP, Event.FAILED, Event.LOST])
def test_what_was_sent_is_spent_however_the_round_ends(make_noisy: Make, stage: str, event: Event) -> None:
    fleet = make_noisy()
    fleet.to_stage(stage)
    box = fleet.boxes["box-1"]
    ledger.apply(box.db, box.data_dir, ROUND, event, time.time(), Outcome(reason="over"))
    assert fleet.state() in (State.CLOSED, State.DECLINED)
    assert costs(fleet) == ([cost_of(fleet)], [cost_of(fleet)])


def test_asked_again_a_box_pledges_and_spends_once(make_noisy: Make) -> None:
    fleet = make_noisy()
    fleet.to_stage("training")
    fleet.tell("box-1", fleet.plan)
    assert costs(fleet) == ([], [cost_of(fleet)])
    fleet.collect()
    fleet.tell("box-1", fleet.plan)
    assert fleet.state() == State.UPLOADING
    assert costs(fleet) == ([cost_of(fleet)], [cost_of(fleet)])


def test_the_update_and_its_cost_are_one_transaction(make_noisy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = make_noisy()
    fleet.to_stage("training")

    def power_cut(*_: object) -> None:
        raise LinkError("cut")

    with monkeypatch.context() as cut:
        cut.setattr(privacy, "spend", power_cut)
        with pytest.raises(LinkError):
            fleet.train("box-1")
    assert fleet.state() == State.TRAINING
    assert not fleet.boxes["box-1"].rows("transfers_out")
    assert costs(fleet) == ([], [cost_of(fleet)])
    fleet.train("box-1")
    assert fleet.state() == State.UPLOADING
    assert costs(fleet) == ([cost_of(fleet)], [cost_of(fleet)])


def test_another_hub_finds_the_budget_as_it_was(make_noisy: Make) -> None:
    fleet = make_noisy()
    fleet.to_stage("delivered")
    box = fleet.boxes["box-1"]
    database.keep(box.db, hub_change.HUB, 4711)
    hub_change.follow(box.db, box.data_dir, box.enrolled, time.time())
    assert fleet.state() == State.CLOSED
    assert costs(fleet)[0] == [cost_of(fleet)]


# --- the end of the budget --------------------------------------------------------------------------


def budget_for(rounds: int, layout: Layout) -> float:
    """Epsilon of so many rounds, and a little."""
    cost = accountant.cost_of(layout)
    assert cost is not None
    return accountant.epsilon([cost] * rounds, 1e-5) + 0.001


def layout_of_noise() -> Layout:
    return Layout({"head.bias": (2,), "head.weight": (2,)}, b"any seed", 20.0, 5, 32, 16, 1.0, 1.0, 3)


def test_the_box_stops_at_its_budget_and_says_why(make_noisy: Make) -> None:
    fleet = make_noisy(policy={"epsilon_max": budget_for(2, layout_of_noise())})
    fleet.to_stage("delivered")
    assert invite_another(fleet, "round-2") == ""
    assert costs(fleet)[1] == [cost_of(fleet)] * 2
    fleet.close_round()
    reason = invite_another(fleet, "round-3")
    assert "this site's privacy budget: epsilon" in reason
    assert "policy.epsilon_max" in reason
    box = fleet.boxes["box-1"]
    assert box.state_of("round-3") == State.DECLINED
    said = [message for message in ledger.pending(box.db) if isinstance(message, RoundAnswer)]
    assert [(answer.round_id, answer.joins) for answer in said] == [("round-2", True), ("round-3", False)]
    assert said[1].reason == reason
    assert invite_another(fleet, "round-4", noise=0.0, noise_boxes=0) == ""  # not counted, so not refused


def test_what_was_pledged_in_vain_is_there_again(make_noisy: Make) -> None:
    fleet = make_noisy(policy={"epsilon_max": budget_for(1, layout_of_noise())})
    fleet.to_stage("training")
    assert "budget" in invite_another(fleet, "round-2")
    fleet.tell("box-1", RoundClosed(message_id=ID, round_id=ROUND, outcome="dropped", reason="too few"))
    assert invite_another(fleet, "round-3") == ""


def test_a_budget_lowered_after_joining_holds(make_noisy: Make) -> None:
    fleet = make_noisy()
    fleet.to_stage("training")
    box = fleet.boxes["box-1"]
    box.config = replace(box.config, policy=replace(box.config.policy, epsilon_max=0.5))
    fleet.train("box-1")
    assert fleet.state() == State.DECLINED
    assert costs(fleet) == ([], [])
    assert not box.rows("transfers_out")


def test_noise_that_the_words_have_no_room_for_is_refused(make_noisy: Make) -> None:
    fleet = make_noisy()
    assert "has no room" not in invite_another(fleet, "round-2")
    reason = invite_another(fleet, "round-3", noise=1000.0, word_bits=16, value_bits=12)
    assert "noise" in reason


def test_status_shows_what_is_spent(make_noisy: Make, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = make_noisy()
    fleet.to_stage("training")
    config = fleet.boxes["box-1"].config
    assert status.gather(config).privacy == {"rounds": 0, "epsilon": 0.0, "epsilon_max": 10.0, "delta": 1e-5}
    fleet.collect()
    shown = status.gather(config).privacy
    assert shown["rounds"] == 1
    assert shown["epsilon"] == pytest.approx(accountant.epsilon([cost_of(fleet)], 1e-5))
    cli._print_status(status.gather(config))
    assert f"privacy: epsilon {shown['epsilon']:.3g} of 10 spent at delta 1e-05" in capsys.readouterr().out
