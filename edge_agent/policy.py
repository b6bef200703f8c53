"""Site policy: may this box join that round, and may it train now.

Reads the plan, the site's [policy] section and facts gathered by the caller.
Never yields to the hub: a reason given here is final for the round and is told to the hub.
Source: ARCHITECTURE.md, "The link": "The site decides".
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from edge_agent.config import Policy
from fleet_link.messages import RoundPlan
from fleet_link.sealing import plan_digest
from models import accountant, round_layout
from models.accountant import Cost
from models.delta import Trainable
from models.errors import DeltaError

MINUTES_A_DAY = 24 * 60
# What a site that lets the one leave lets leave with it: as models.delta.trainable_names, the heads are in each.
LEAVE_WITH: Mapping[Trainable, frozenset[Trainable]] = MappingProxyType(
    {
        "all": frozenset[Trainable](("all", "norms", "adapters", "heads")),
        "norms": frozenset[Trainable](("norms", "heads")),
        "adapters": frozenset[Trainable](("adapters", "heads")),
        "heads": frozenset[Trainable](("heads",)),
    }
)


@dataclass(frozen=True)
class Facts:
    """What the box knows at the moment of the decision."""

    base_here: bool  # the plan's base bundle is on this disk
    train_examples: int  # reviewed series this policy lets it learn from
    local_minute: int  # minutes since local midnight
    new_since_opened: int | None = None  # verdicts; None: no sum over the plan's base has this box's update in it yet
    cost: Cost | None = None  # of the round's noise, where it has some and the base is here
    costs_before: tuple[Cost, ...] = ()  # of rounds joined before, sent or not yet sent


def may_join(plan: RoundPlan, policy: Policy, facts: Facts, now: float) -> str:
    """Gives "" when the box may join, else the reason that the hub and the site will read."""
    if not policy.learn:
        return "this site's policy does not learn (policy.learn = false)"
    if reason := against_weights(plan, policy):
        return reason
    if plan.kind == "masked" and (reason := _against_masks(plan, policy)):
        return reason
    if plan.kind == "unsafe_open" and plan.noise:
        return "an open round adds no noise, whatever its plan says"
    if plan.kind == "unsafe_open" and (reason := _against_values(plan)):
        return reason
    if policy.require_noise and not plan.noise:
        return "the round adds no noise to what it learns (policy.require_noise = true)"
    if plan.kind == "unsafe_open" and not policy.allow_unsafe_open_rounds:
        return "this site allows no rounds in which the hub reads its update (policy.allow_unsafe_open_rounds = false)"
    if now >= plan.deadline_unix_s:
        return "the round's deadline has passed"
    if now + minutes_to_open(policy.hours, facts.local_minute) * 60 >= plan.deadline_unix_s:
        return f"the round ends before this site's learning hours begin (policy.hours = {policy.hours})"
    if not facts.base_here:
        return "the round's base bundle is not on this box"
    needed = max(policy.min_examples, plan.min_examples)
    if facts.train_examples < needed:
        return f"{facts.train_examples} reviewed examples for {', '.join(policy.tasks) or 'no task'}, needs {needed}"
    if plan.noise:
        return against_budget(policy, facts.costs_before, facts.cost)
    if plan.kind == "masked" and facts.new_since_opened is not None and facts.new_since_opened < needed:
        return (
            f"a sum with this box's update over the same base may have been opened before, and {facts.new_since_opened} verdicts "
            f"are new since, needs {needed}: the difference of two such sums could be one site's update"
        )
    return ""


def against_weights(plan: RoundPlan, policy: Policy) -> str:
    """Gives "" when the site lets all weights leave that the round trains."""
    if any(plan.trainable in LEAVE_WITH[allowed] for allowed in policy.weights_may_leave):
        return ""
    allowed = ", ".join(policy.weights_may_leave)
    return f"the round asks for weights that stay at this site: {plan.trainable} (policy.weights_may_leave = {allowed})"


def against_budget(policy: Policy, before: Sequence[Cost], cost: Cost | None) -> str:
    """Gives "" when the site's privacy budget has room for one more round of this cost."""
    if cost is None:
        return "what the round's noise would cost cannot be told: its words have no room for it"
    would_be = accountant.epsilon([*before, cost], policy.delta)
    if would_be <= policy.epsilon_max:
        return ""
    return (
        f"this site's privacy budget: epsilon {accountant.epsilon(before, policy.delta):.3g} is spent or promised and would "
        f"become {would_be:.3g} at delta {policy.delta:g}, above {policy.epsilon_max:g} (policy.epsilon_max)"
    )


def _against_masks(plan: RoundPlan, policy: Policy) -> str:
    if plan.boxes_max < policy.min_cohort:
        return (
            f"at most {plan.boxes_max} boxes stand in the round's sum, this site asks for "
            f"{policy.min_cohort} (policy.min_cohort)"
        )
    if plan.noise and plan.noise_boxes > max(plan.min_cohort, policy.min_cohort):
        return f"the round counts on the noise of {plan.noise_boxes} boxes, more than stand in its sum for certain"
    try:
        round_layout.check(plan, plan_digest(plan))
    except DeltaError as error:
        return f"the round's sum cannot be: {error}"
    return ""


def _against_values(plan: RoundPlan) -> str:
    try:
        round_layout.check_open(plan, plan_digest(plan))
    except DeltaError as error:
        return f"the round's update cannot be: {error}"
    return ""


def minutes_to_open(hours: str, local_minute: int) -> int:
    """0 while training may start; else minutes until it may. Equal ends mean the whole day."""
    begin, end = (_minute(part) for part in hours.split("-"))
    open_for = (end - begin) % MINUTES_A_DAY or MINUTES_A_DAY
    since_begin = (local_minute - begin) % MINUTES_A_DAY
    return 0 if since_begin < open_for else MINUTES_A_DAY - since_begin


def local_minute(now: float) -> int:
    """Minutes since midnight on this site's clock."""
    local = time.localtime(now)
    return local.tm_hour * 60 + local.tm_min


def _minute(clock: str) -> int:
    hour, minute = clock.split(":")
    return int(hour) * 60 + int(minute)
