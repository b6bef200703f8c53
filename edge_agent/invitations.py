"""Invitations: a round's plan meets the site's policy, now or as soon as its base bundle has arrived.

Reads plans, examples and bundles; moves rows of `rounds` through ledger.py.
Never answers for the site against its policy: policy.py decides, this file gathers the facts.
Source: ARCHITECTURE.md, "The link": "The site decides".
"""

import sqlite3
import sys
from dataclasses import replace
from pathlib import Path

from edge_agent import bundles, learn, ledger, masked, policy, privacy, replay, rounds, spool
from edge_agent.config import Config
from edge_agent.ledger import Outcome, Round
from edge_agent.rounds import COUNTED, WITH_SECRETS, Event, State
from fleet_link.messages import RoundPlan
from fleet_link.pki import Identity

SETTLING_S = 60.0  # verdicts given just before the invitation become examples first


def take(db: sqlite3.Connection, config: Config, identity: Identity, plan: RoundPlan, now: float) -> None:
    """A plan, for the first time or again: what the hub has missed, or forgot with an old backup, is said once more."""
    known = ledger.invite(db, plan, now)
    if known.state is State.INVITED:
        _judge(db, config, identity, known, now)
        return
    event, outcome = _answer_again(known, config.box.data_dir, identity.name)
    if known.plan.kind == "masked" and event is Event.INVITATION:
        outcome = replace(outcome, said=masked.keys_again(db, known.round_id))
    ledger.apply(db, config.box.data_dir, plan.round_id, event, now, outcome)


def _answer_again(known: Round, data_dir: Path, device: str) -> tuple[Event, Outcome]:
    if known.state in (State.CLOSED, State.LATE):
        return Event.INVITATION, Outcome(reason=known.reason or "the round is over on this box")
    if known.state not in COUNTED:
        return Event.INVITATION, Outcome()
    update = data_dir / known.update_path
    if not update.is_file():
        return Event.LOST, Outcome(reason="this box has delivered its update and does not have it any more")
    again = ledger.offer_of(update, known.round_id, device)
    return Event.INVITATION, Outcome(reason=replay.NOT_COUNTED, update=again)


def judge_waiting(db: sqlite3.Connection, config: Config, identity: Identity, now: float) -> None:
    for waiting in ledger.in_states(db, State.INVITED):
        _judge(db, config, identity, waiting, now)


def close_expired(db: sqlite3.Connection, data_dir: Path, now: float) -> None:
    for known in ledger.in_states(db, *ledger.OPEN_STATES):
        event = rounds.expired(known.state, known.plan.deadline_unix_s, now)
        if event is not None:
            reason = known.reason or "the deadline passed before this box had an update"
            ledger.apply(db, data_dir, known.round_id, event, now, Outcome(reason=reason))


def _judge(db: sqlite3.Connection, config: Config, identity: Identity, invited: Round, now: float) -> None:
    plan = invited.plan
    examples = learn.examples(db, config.policy.tasks, "train")
    waiting = spool.usable(db, plan, config.policy, now) if plan.buffer else None
    base = bundles.base_file(db, config.box.data_dir, plan.base_digest)
    facts = policy.Facts(
        base_here=base is not None,
        train_examples=max(len(examples), waiting.examples if waiting else 0),
        local_minute=policy.local_minute(now),
        # Of an update that waits the spool has asked the same.
        new_since_opened=None if waiting else replay.new_since_opened(db, plan.base_digest, examples),
        cost=privacy.cost_of(plan, base, config.policy.min_cohort) if plan.noise and base is not None else None,
        costs_before=tuple(privacy.spent_or_pledged(db)),
    )
    if not facts.base_here and bundles.is_coming(db, plan.base_digest) and now < plan.deadline_unix_s:
        return
    if now < plan.deadline_unix_s and (
        (plan.kind == "masked" and not plan.noise and _is_in_another(db, plan))
        or (plan.buffer and _may_be_counted_elsewhere(db, plan))
    ):
        return
    reason = _against_buffer(plan) or policy.may_join(plan, config.policy, facts, now)
    if reason and _is_too_early(db, config, invited, facts, now):
        return
    event = Event.REFUSED_HERE if reason else Event.ADMITTED
    outcome = Outcome(examples=facts.train_examples, reason=reason)
    if plan.kind == "masked" and not reason:
        outcome = replace(outcome, cost=facts.cost)
        if not plan.buffer:  # else the learner says them, once there is an update
            part, keys = masked.begin(plan, identity, config.policy.min_cohort)
            outcome = replace(outcome, part=part, said=keys)
    ledger.apply(db, config.box.data_dir, plan.round_id, event, now, outcome)


def _is_in_another(db: sqlite3.Connection, plan: RoundPlan) -> bool:
    """In another masked round: of two sums at a time the difference could be one site's update. It is waited for."""
    return any(
        other.round_id != plan.round_id and other.plan.kind == "masked"
        for other in ledger.in_states(db, State.PREPARING, *WITH_SECRETS)
    )


def _may_be_counted_elsewhere(db: sqlite3.Connection, plan: RoundPlan) -> bool:
    """Another buffered round in the open has the spooled update, or may take it, and its end is not known here yet."""
    return any(
        other.round_id != plan.round_id and ledger.kind_of(other.plan) == "buffered_open"
        for other in ledger.in_states(db, State.PREPARING, State.TRAINING, State.UPLOADING)
    )


def _against_buffer(plan: RoundPlan) -> str:
    """Gives "" unless the plan of a buffered round says what no honest hub does."""
    if not plan.buffer:
        return "the plan lists bases, and is of no buffered round" if plan.bases else ""
    if plan.bases[:1] != (plan.base_digest,) or len(set(plan.bases)) != len(plan.bases):
        return "the plan's bases do not begin with its own, or list one twice"
    if plan.kind == "masked" and not plan.min_cohort <= plan.buffer <= plan.boxes_max:
        return f"a buffer of {plan.buffer}, and at least {plan.min_cohort}, at most {plan.boxes_max} boxes stand in the sum"
    if plan.share < 1.0:
        return "a buffered round trains all weights: an older update would be of another drawn share"
    return ""


def _is_too_early(db: sqlite3.Connection, config: Config, invited: Round, facts: policy.Facts, now: float) -> bool:
    """True while nothing but examples is missing and the learner still makes some."""
    if now >= invited.changed_at + SETTLING_S or not learn.has_uncollected(db):
        return False
    return not policy.may_join(invited.plan, config.policy, replace(facts, train_examples=sys.maxsize), now)
