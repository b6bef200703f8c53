"""Rounds in a row with real boxes, from the operator's start to a release on every box; hub and a box are killed -9 on the way.

Starts `hub run` and slow_box.py's daemons; reads the hub's and the boxes' databases and the releases' weights.
Never counts a round whose release is not its base plus the exact mean of what each box made up, once each.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.fleet.crowd import ROOT, SITE
from benchmarks.fleet.scale import ENDS, query
from benchmarks.house import Box, House
from benchmarks.link import dummy
from benchmarks.link.box import EXAMPLES, make_up_cases
from benchmarks.link.ours import BOX_SETTINGS, SUM_ERROR_MAX
from benchmarks.processes import Daemon, HouseError, wait_for
from cloud_hub import config
from fleet_link import messages
from fleet_link.messages import RoundPlan
from models import delta
from models.bundle import SHIPPED, read_bundle

Row = dict[str, Any]
Weights = Mapping[str, NDArray[np.float32]]

BOXES = 4
CLIP_NORM = 0.1  # what the boxes make up must leave a network that can be exported
READY_TIMEOUT_S, ROUND_TIMEOUT_S = 300.0, 900.0
POLL_S = 0.05
_IN_TRAINING = "SELECT 1 FROM rounds WHERE state = 'training'"
_SHARED = "SELECT 1 FROM round_devices WHERE round_id = ? AND state IN ('shared', 'delivered')"
_COUNTED = "SELECT device FROM round_devices WHERE round_id = ? AND counted_at IS NOT NULL ORDER BY device"


@dataclass(frozen=True)
class Extent:
    rounds: int
    hub_killed_in: int  # number of the round, from 1
    box_killed_in: int


class Fleet:
    """A hub and boxes that have nothing to do but rounds."""

    def __init__(self, house: House) -> None:
        self.house = house

    @property
    def names(self) -> list[str]:
        return [box.name for box in self.house.boxes]

    def open(self) -> None:
        hub = self.house.hub
        hub.init()
        path = hub.data_dir / "hub.toml"
        text = config.with_value(path.read_text(), "rollout", "canaries", BOXES)
        path.write_text(config.with_value(text, "rounds", "examples_cap", EXAMPLES))
        self.start_hub()
        hub.fleet("site", "add", SITE)
        for number in range(1, BOXES + 1):
            box = self.house.add_box(f"box-{number}", SITE, BOX_SETTINGS)
            self.house.enroll(box)
            make_up_cases(box.data_dir, SHIPPED)
            command = [sys.executable, "-m", "benchmarks.fleet.slow_box", str(box.config_path)]
            box.daemon = Daemon(command, box.folder / "edge-agent.log")
            self.start_box(box)
        seen = "SELECT count(*) AS seen FROM devices WHERE last_seen_at IS NOT NULL"
        wait_for("heartbeats", lambda: query(hub, seen)[0]["seen"] == BOXES, timeout_s=READY_TIMEOUT_S)

    def start_hub(self) -> None:
        self.house.hub.start()
        self.house.hub.wait_ready(READY_TIMEOUT_S)

    def start_box(self, box: Box) -> None:
        box.daemon.start(os.environ | {"PYTHONPATH": str(ROOT)})

    def query(self, sql: str, *values: object) -> list[Any]:
        self.house.must_run()
        return query(self.house.hub, sql, *values)

    def kill_hub(self, round_id: str) -> str:
        """Once the boxes train in this round."""
        wait_for("training", lambda: self.query(_SHARED, round_id), timeout_s=ROUND_TIMEOUT_S, every_s=POLL_S)
        self.house.hub.daemon.kill()
        self.start_hub()
        return "hub"

    def kill_box(self, round_id: str) -> str:
        """Once it trains in this round."""
        box = self.house.boxes[-1]
        wait_for("training", lambda: box.query(_IN_TRAINING), timeout_s=ROUND_TIMEOUT_S, every_s=POLL_S)
        box.daemon.kill()
        self.start_box(box)
        return "box in training"


def measured(extent: Extent, work: Path) -> Row:
    """Raises HouseError where a round does not end, is repeated, or counts an update not at all or twice."""
    with House(work) as house:
        fleet = Fleet(house)
        fleet.open()
        rounds = [_one(fleet, number, extent) for number in range(1, extent.rounds + 1)]
        _check(fleet, [str(each["round_id"]) for each in rounds])
    usual = median(each["round_s"] for each in rounds if not each["killed"])
    delays = {each["killed"]: each["round_s"] - usual for each in rounds if each["killed"]}
    return {"boxes": BOXES, "rounds": rounds, "usual_s": usual, "delays_s": delays}


def _one(fleet: Fleet, number: int, extent: Extent) -> Row:
    """From the operator's start to the sum, and to the release on every box."""
    options = ["--min-devices", str(BOXES), "--min-examples", "1", "--epochs", "1", "--clip-norm", str(CLIP_NORM)]
    begin = time.time()
    round_id = str(fleet.house.hub.fleet("round", "start", *options)["round_id"])
    killed = ""
    kills: dict[int, Callable[[str], str]] = {
        extent.hub_killed_in: fleet.kill_hub,
        extent.box_killed_in: fleet.kill_box,
    }
    if number in kills:
        killed = kills[number](round_id)
    summed_at = wait_for("sum", lambda: _summed_at(fleet, round_id), timeout_s=ROUND_TIMEOUT_S, every_s=POLL_S)
    everywhere = "SELECT release_version FROM releases WHERE round_id = ? AND state = 'everyone'"
    wait_for("release", lambda: fleet.query(everywhere, round_id), timeout_s=ROUND_TIMEOUT_S, every_s=POLL_S)
    released_at = time.time()
    wait_for("quiet boxes", lambda: _are_quiet(fleet), timeout_s=ROUND_TIMEOUT_S, every_s=POLL_S)
    return {
        "number": number,
        "round_id": round_id,
        "killed": killed,
        "round_s": summed_at - begin,
        "release_s": released_at - begin,
        "sum_error": _sum_error(fleet, round_id),
    }


def _summed_at(fleet: Fleet, round_id: str) -> float:
    (row,) = fleet.query("SELECT state, reason, changed_at FROM rounds WHERE round_id = ?", round_id)
    if row["state"] == "dropped":
        raise HouseError(f"round {round_id} was dropped: {row['reason']}")
    return float(row["changed_at"]) if row["state"] in ENDS else 0.0


def _are_quiet(fleet: Fleet) -> bool:
    fleet.house.must_run()
    unfinished = "SELECT 1 FROM rounds WHERE state <> 'closed'"
    return not any(box.query(unfinished) for box in fleet.house.boxes)


def _sum_error(fleet: Fleet, round_id: str) -> float:
    """Of the mean's norm. Raises HouseError unless each box is in it once."""
    (row,) = fleet.query("SELECT plan, base_digest, candidate_digest FROM rounds WHERE round_id = ?", round_id)
    counted = [each["device"] for each in fleet.query(_COUNTED, round_id)]
    if counted != fleet.names:
        raise HouseError(f"round {round_id} counted {counted}")
    plan = messages.decode(row["plan"])
    assert isinstance(plan, RoundPlan)  # the hub wrote it
    folder = fleet.house.hub.data_dir / "releases"
    before, after = (read_bundle(folder / f"{row[key]}.bundle").weights for key in ("base_digest", "candidate_digest"))
    error = _error_of_mean(after, before, counted, plan)
    if not error < SUM_ERROR_MAX:
        raise HouseError(f"the sum of round {round_id} is wrong: {error:.2g} of the mean's norm")
    return error


def _error_of_mean(after: Weights, before: Weights, devices: Sequence[str], plan: RoundPlan) -> float:
    """Of the weights that the round moves: the boxes make up a change of the others too, which none of them sends."""
    of = {name: value.shape for name, value in before.items()}
    changes = [dummy.change(device, plan.seed, of, plan.clip_norm) for device in devices]
    names = delta.trainable_names(before, plan.trainable)
    exact = np.concatenate([np.mean([change[name] for change in changes], axis=0).ravel() for name in names])
    moved = np.concatenate([(after[name] - before[name]).ravel() for name in names])
    return float(np.linalg.norm(moved - exact) / np.linalg.norm(exact))


def _check(fleet: Fleet, round_ids: Sequence[str]) -> None:
    """Raises HouseError unless hub and boxes know these rounds, each once, each with one release over the one before."""
    told = [row["round_id"] for row in fleet.query("SELECT round_id FROM rounds ORDER BY created_at")]
    released = fleet.query("SELECT round_id, bundle_digest FROM releases ORDER BY release_version")
    bases = [row["base_digest"] for row in fleet.query("SELECT base_digest FROM rounds ORDER BY created_at")]
    if told != list(round_ids) or [row["round_id"] for row in released] != [None, *round_ids]:
        raise HouseError(f"rounds {told}, released {[row['round_id'] for row in released]}, started {round_ids}")
    if bases != [row["bundle_digest"] for row in released[:-1]]:
        raise HouseError("a round began from another release than the one before it")
    for box in fleet.house.boxes:
        known = [row["round_id"] for row in box.query("SELECT round_id FROM rounds ORDER BY rowid")]
        if sorted(known) != sorted(round_ids):
            raise HouseError(f"{box.name} knows {known}")
