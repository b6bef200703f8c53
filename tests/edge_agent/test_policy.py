"""The site decides: each reason not to join, and the hours."""

from dataclasses import replace

import pytest

from edge_agent.config import Policy
from edge_agent.policy import Facts, may_join, minutes_to_open
from fleet_link.messages import RoundPlan

OPEN = Policy(learn=True, tasks=("XR", "CT", "MR"), allow_unsafe_open_rounds=True, min_examples=8, hours="00:00-24:00")
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


@pytest.mark.parametrize(
    ("policy", "facts", "invitation", "reason"),
    [
        (replace(OPEN, learn=False), FACTS, plan(), "policy.learn = false"),
        (replace(OPEN, allow_unsafe_open_rounds=False), FACTS, plan(), "policy.allow_unsafe_open_rounds = false"),
        (OPEN, FACTS, plan(kind="masked"), "no masked rounds"),
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
