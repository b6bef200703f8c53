"""The site decides: each reason not to join, and the hours."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from edge_agent import config
from edge_agent.config import Policy
from edge_agent.policy import LEAVE_WITH, Facts, may_join, minutes_to_open
from fleet_link.messages import RoundPlan
from models import accountant
from models.bundle import SHIPPED, read_bundle
from models.delta import Trainable, trainable_names

OPEN = Policy(
    learn=True,
    tasks=("XR", "CT", "MR"),
    weights_may_leave=("all",),
    allow_unsafe_open_rounds=True,
    min_cohort=3,
    min_examples=8,
    require_noise=False,
    epsilon_max=10.0,
    delta=1e-5,
    hours="00:00-24:00",
)
FACTS = Facts(base_here=True, train_examples=24, local_minute=14 * 60)
NOW = 1_000_000.0


def plan(**changes: object) -> RoundPlan:
    fields: dict[str, object] = {
        "message_id": "0" * 32,
        "round_id": "r1",
        "kind": "unsafe_open",
        "base_digest": "a" * 64,
        "rule": "fedavg",
        "trainable": "all",
        "clip_norm": 1.0,
        "epochs": 2,
        "learning_rate": 1e-3,
        "min_examples": 4,
        "seed": 7,
        "sealing_key": b"k" * 32,
        "deadline_unix_s": NOW + 3600.0,
    }
    return RoundPlan(**(fields | changes))  # type: ignore[arg-type]


def test_a_willing_site_joins() -> None:
    assert may_join(plan(), OPEN, FACTS, NOW) == ""


def test_a_site_that_changed_nothing_joins_masked_rounds_and_no_open_ones() -> None:
    shipped = config.parse({}, folder=Path("/srv/box")).policy
    assert may_join(plan(kind="masked"), shipped, FACTS, NOW) == ""
    assert "allow_unsafe_open_rounds" in may_join(plan(), shipped, FACTS, NOW)


@pytest.mark.parametrize(
    ("policy", "facts", "invitation", "reason"),
    [
        (replace(OPEN, learn=False), FACTS, plan(), "policy.learn = false"),
        (replace(OPEN, allow_unsafe_open_rounds=False), FACTS, plan(), "policy.allow_unsafe_open_rounds = false"),
        (
            replace(OPEN, min_cohort=10),
            FACTS,
            plan(kind="masked", boxes_max=9),
            "at most 9 boxes stand in the round's sum, this site asks for 10 (policy.min_cohort)",
        ),
        (
            OPEN,
            FACTS,
            plan(kind="masked", word_bits=16),
            "the round's sum cannot be: the sum of 1000 boxes does not fit",
        ),
        (
            OPEN,
            FACTS,
            plan(kind="masked", word_bits=16, value_bits=12, boxes_max=100),
            "the round's sum cannot be: values of 12 bits, not 4 to 9",
        ),
        (OPEN, replace(FACTS, train_examples=7), plan(kind="masked"), "needs 8"),
        (OPEN, FACTS, plan(deadline_unix_s=NOW), "deadline has passed"),
        (OPEN, replace(FACTS, base_here=False), plan(), "base bundle is not on this box"),
        (OPEN, replace(FACTS, train_examples=7), plan(), "7 reviewed examples for XR, CT, MR, needs 8"),
        (OPEN, replace(FACTS, train_examples=24), plan(min_examples=25), "needs 25"),
        (replace(OPEN, tasks=()), replace(FACTS, train_examples=0), plan(), "for no task"),
        (replace(OPEN, hours="22:00-06:00"), FACTS, plan(), "policy.hours = 22:00-06:00"),
    ],
)
def test_each_reason_names_what_decides(policy: Policy, facts: Facts, invitation: RoundPlan, reason: str) -> None:
    assert reason in may_join(invitation, policy, facts, NOW)


@pytest.mark.parametrize(
    ("allowed", "joins"),
    [
        (("all",), {"all", "norms", "adapters", "heads"}),
        (("norms",), {"norms", "heads"}),
        (("adapters",), {"adapters", "heads"}),
        (("norms", "adapters"), {"norms", "adapters", "heads"}),
        (("heads",), {"heads"}),
        (("heads", "all"), {"all", "norms", "adapters", "heads"}),
    ],
)
@pytest.mark.parametrize("kind", ["masked", "unsafe_open"])
def test_a_round_that_asks_for_other_weights_than_may_leave_is_declined(
    allowed: tuple[Trainable, ...], joins: set[Trainable], kind: str
) -> None:
    strict = replace(OPEN, weights_may_leave=allowed)
    for trainable in get_args(Trainable):
        reason = may_join(plan(kind=kind, trainable=trainable), strict, FACTS, NOW)
        said = f"{trainable} (policy.weights_may_leave = {', '.join(allowed)})"
        assert reason == ("" if trainable in joins else f"the round asks for weights that stay at this site: {said}")


def test_a_drawn_share_of_all_weights_asks_for_all() -> None:
    strict = replace(OPEN, weights_may_leave=("norms", "adapters"))
    assert "all (policy.weights_may_leave" in may_join(plan(kind="masked", share=0.01), strict, FACTS, NOW)


def test_what_may_leave_together_is_what_the_weights_names_say() -> None:
    """Of the shipped network: one subset is allowed with another just where all of its weights lie in it."""
    weights = read_bundle(SHIPPED).weights
    names = {trainable: set(trainable_names(weights, trainable)) for trainable in get_args(Trainable)}
    assert len({frozenset(subset) for subset in names.values()}) == len(names)
    for allowed, together in LEAVE_WITH.items():
        assert together == {trainable for trainable, subset in names.items() if subset <= names[allowed]}


def test_hours_that_begin_before_the_deadline_are_no_reason() -> None:
    at_two = replace(FACTS, local_minute=14 * 60)
    assert may_join(plan(deadline_unix_s=NOW + 9 * 3600), replace(OPEN, hours="22:00-06:00"), at_two, NOW) == ""


@pytest.mark.parametrize(
    ("hours", "clock", "minutes"),
    [
        ("00:00-24:00", 0, 0),
        ("00:00-24:00", 23 * 60 + 59, 0),
        ("20:00-06:00", 20 * 60, 0),
        ("20:00-06:00", 5 * 60 + 59, 0),
        ("20:00-06:00", 6 * 60, 14 * 60),
        ("09:00-17:00", 8 * 60 + 30, 30),
        ("09:00-17:00", 17 * 60, 16 * 60),
        ("08:00-08:00", 3, 0),
    ],
)
def test_minutes_until_training_may_start(hours: str, clock: int, minutes: int) -> None:
    assert minutes_to_open(hours, clock) == minutes


NOISY = {"kind": "masked", "noise": 1.0, "noise_boxes": 3, "boxes_max": 8}
COST = accountant.Cost(10**8, 10**6, 10**8)  # of a multiplier of 1


@pytest.mark.parametrize("kind", ["masked", "unsafe_open"])
def test_a_site_that_requires_noise_joins_no_round_without(kind: str) -> None:
    strict = replace(OPEN, require_noise=True)
    assert "policy.require_noise = true" in may_join(plan(kind=kind), strict, FACTS, NOW)
    assert may_join(plan(kind=kind), OPEN, FACTS, NOW) == ""
    assert may_join(plan(**NOISY), strict, replace(FACTS, cost=COST), NOW) == ""


def test_an_open_round_cannot_claim_noise() -> None:
    lying = plan(**NOISY | {"kind": "unsafe_open"})
    for policy in (OPEN, replace(OPEN, require_noise=True)):
        assert "adds no noise, whatever its plan says" in may_join(lying, policy, replace(FACTS, cost=COST), NOW)


def test_the_budget_counts_what_was_before_and_names_the_figures() -> None:
    facts = replace(FACTS, cost=COST)
    assert may_join(plan(**NOISY), OPEN, facts, NOW) == ""
    reason = may_join(plan(**NOISY), OPEN, replace(facts, costs_before=(COST,) * 20), NOW)
    spent, would_be = (accountant.epsilon([COST] * rounds, 1e-5) for rounds in (20, 21))
    for figure in (f"{spent:.3g}", f"{would_be:.3g}", "1e-05", "above 10"):
        assert figure in reason
    assert (
        may_join(plan(**NOISY), replace(OPEN, epsilon_max=100.0), replace(facts, costs_before=(COST,) * 20), NOW) == ""
    )


@pytest.mark.parametrize(("min_cohort", "own", "joins"), [(5, 3, True), (0, 5, True), (4, 3, False), (0, 3, False)])
def test_no_more_honest_boxes_are_believed_than_the_sum_has_for_certain(min_cohort: int, own: int, joins: bool) -> None:
    invitation = plan(**NOISY | {"noise_boxes": 5, "min_cohort": min_cohort})
    reason = may_join(invitation, replace(OPEN, min_cohort=own), replace(FACTS, cost=COST), NOW)
    assert ("counts on the noise of 5 boxes" not in reason) == joins


def test_a_cost_that_nobody_can_tell_is_too_high() -> None:
    assert "no room" in may_join(plan(**NOISY), OPEN, FACTS, NOW)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"share": 0.036, "value_bits": 3, "trainable": "all"}, ""),
        ({"share": 0.036, "value_bits": 3, "trainable": "heads"}, "a share of 0.036 of heads"),
        ({"share": 0.036, "value_bits": 12, "trainable": "all"}, "values of 12 bits in an open round"),
        ({"value_bits": 12}, "values of 12 bits in an open round"),
    ],
)
def test_an_open_round_whose_update_cannot_be_made_is_declined(changes: dict[str, object], reason: str) -> None:
    said = may_join(plan(kind="unsafe_open", **changes), OPEN, FACTS, NOW)
    assert said == "" if not reason else reason in said


def test_a_masked_round_of_too_few_bits_is_declined() -> None:
    assert "values of 3 bits, not 4" in may_join(plan(kind="masked", value_bits=3), OPEN, FACTS, NOW)
