"""A fleet whose round is buffered, driven step by step: the learner's turns, the spool, releases that pass a late box by.

Writes below the fleet's folder.
Never asserts what a test is about.
"""

import time
from dataclasses import replace
from typing import Any

from cloud_hub import secure_sum
from edge_agent import bundles, config, database, ledger, spool
from edge_agent.learner import Learner
from edge_agent.rounds import Event, State
from fleet_link.cohort import RoundOf
from fleet_link.messages import RoundAnswer, RoundPlan
from fleet_link.sealing import plan_digest
from models import delta, round_layout
from tests.edge_agent.link_support import Box, write_brightness_bundle
from tests.edge_agent.masked_fleet import BODY, NAMES, ROUND, Fleet, Never
from tests.masked_support import changed

SHAPES = {"head.bias": (2,), "head.weight": (2,), "body.weight": (BODY,)}
WIDE = {"word_bits": 32, "value_bits": 16}


def plan_is(fleet: Fleet, plan: RoundPlan) -> None:
    fleet.plan = plan
    fleet.layout = round_layout.layout_of(plan, plan_digest(plan), SHAPES)


def work(fleet: Fleet, name: str = "box-1") -> Box:
    """One turn of the learner."""
    box = fleet.box(name)
    learner = Learner(box.config, box.holder, box.enrolled, time.time)
    if fleet.restarts:
        learner.repair(box.db)
    learner.step(box.db, Never())  # type: ignore[arg-type]
    return box


def raw(box: Box) -> delta.Arrays:
    waiting = spool.find(box.db)
    assert waiting is not None
    return spool.load(box.data_dir, waiting, SHAPES)


def files(box: Box) -> list[str]:
    return sorted(path.name for path in (box.data_dir / "spool").glob("*"))


def the_state(fleet: Fleet, round_id: str, name: str = "box-1") -> str:
    return fleet.boxes[name].state_of(round_id)


def close(fleet: Fleet, round_id: str = ROUND, event: Event = Event.CLOSED_BY_HUB, name: str = "box-1") -> None:
    box = fleet.box(name)
    ledger.apply(box.db, box.data_dir, round_id, event, time.time())


def release(fleet: Fleet, *, slope: float) -> str:
    """One that every box has: the hub goes on without whoever is late."""
    path = fleet.folder / f"release-{slope}.bundle"
    digest = write_brightness_bundle(path, slope=slope, body=BODY)
    for box in fleet.boxes.values():
        (box.data_dir / bundles.path_of(digest)).write_bytes(path.read_bytes())
        with database.transaction(box.db):
            bundles.activate(box.db, digest, round(slope), time.time())
    return digest


def next_plan(fleet: Fleet, *bases: str, **changes: Any) -> RoundPlan:
    """Of a second round over the first of `bases`."""
    return changed(fleet.plan, **{"round_id": "round-2", "base_digest": bases[0], "bases": bases} | changes)


def late(fleet: Fleet, event: Event = Event.CLOSED_BY_HUB, **changes: Any) -> delta.Arrays:
    """Box-1 trains while the round goes on without it; what it has taught."""
    fleet.tell("box-1", changed(fleet.plan, **changes) if changes else fleet.plan)
    close(fleet, event=event)
    assert fleet.state() == State.LATE
    box = work(fleet)
    assert fleet.state() == State.CLOSED
    return raw(box)


def to_training(fleet: Fleet, plan: RoundPlan) -> None:
    """Round 2 as far as box-1 has to seal. The other boxes are those of the round as well."""
    plan_is(fleet, plan)
    fleet.keys.clear()
    fleet.made.clear()
    for name in NAMES:
        fleet.tell(name, plan)
        work(fleet, name)
    fleet.hear()
    fleet.circle = secure_sum.form_circle(
        RoundOf(plan.round_id, plan_digest(plan)), {name: said.keys for name, said in fleet.keys.items()}, 3
    )
    for name in NAMES:
        fleet.tell(name, fleet.cohort(name))
    fleet.forward()


def with_policy(before: config.Config, **changes: Any) -> config.Config:
    return replace(before, policy=replace(before.policy, **changes))


def last_no(fleet: Fleet) -> str:
    answer = [message for message in fleet.said("box-1") if isinstance(message, RoundAnswer)][-1]
    assert not answer.joins
    return answer.reason
