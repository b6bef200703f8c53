"""Our round over the real broker: a real hub, real boxes, each end in a network namespace of its own.

Starts `hub run` and `benchmarks.link.box`; reads both sides' databases, interface counters and proc(5).
Never waits for the export that follows: the dummy network has no graph of its own, so the round is dropped once its sum is there.
"""

import os
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal

from safetensors import numpy as safetensors_numpy

from benchmarks.house import Box, House
from benchmarks.link import cost, dummy
from benchmarks.link.box import EXAMPLES, make_up_cases
from benchmarks.link.wire import HUB, Count, Wire
from benchmarks.processes import BIN, Daemon, HouseError, wait_for
from cloud_hub import config, releases
from cloud_hub.candidate import PREFIX
from fleet_link import messages
from fleet_link.messages import RoundPlan
from models.bundle import read_bundle

Kind = Literal["unsafe_open", "masked"]
Row = dict[str, Any]

ROOT = Path(__file__).parents[2]
SITE = "bench"
CLIP_NORM = 10.0
READY_TIMEOUT_S, ROUND_TIMEOUT_S = 180.0, 900.0
POLL_S = 0.01
COUNTED_S = 0.5  # a box has written down by then what it has sent and received
LOG_TIME = "%Y-%m-%d %H:%M:%S,%f"
BOX_SETTINGS: dict[str, object] = {
    "pacs.enabled": False,
    "inference.threads": 1,
    "policy.allow_unsafe_open_rounds": True,
    "policy.min_examples": 1,
}
SUM_ERROR_MAX = 0.05  # of the mean's norm: rounding is far below, masks that did not cancel far above
_CLOSED_BOX = "SELECT count(*) AS open FROM rounds WHERE state <> 'closed'"


@dataclass(frozen=True)
class Scene:
    """What one row measures."""

    kind: Kind
    boxes: int
    parameters: int
    rounds: int


@dataclass(frozen=True)
class Costs:
    """At one moment of a round."""

    hub_cpu_s: float
    broker_cpu_s: float
    box_cpu_s: float  # of all boxes


class Fleet:
    """A hub that has released the dummy network, and boxes that run it."""

    def __init__(self, house: House, wire: Wire, bundle: Path) -> None:
        self.house = house
        self.wire = wire
        self.bundle = bundle
        self.release_s = 0.0
        self.rounds_before = 0
        self.base = read_bundle(bundle).weights

    @property
    def broker_pid(self) -> int:
        return int((self.house.hub.data_dir / "broker" / "mosquitto.pid").read_text())

    def open(self, names: Sequence[str]) -> None:
        """Everything runs the shipped bundle; then the dummy is released, to all boxes at once, and taken into use."""
        self._init_hub(len(names))
        self._start_hub()
        self.house.hub.fleet("site", "add", SITE)
        with ThreadPoolExecutor(2) as pool:
            boxes = list(pool.map(lambda name: self.house.add_box(name, SITE, BOX_SETTINGS), names))
            list(pool.map(self._enroll, boxes))
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        for box in boxes:
            command = [*self.wire.inside(box.name), sys.executable, "-m", "benchmarks.link.box", str(box.config_path)]
            box.daemon = Daemon(command, box.folder / "edge-agent.log")
            box.daemon.start(environment)
        wait_for("heartbeat of every box", self._all_seen, timeout_s=READY_TIMEOUT_S, every_s=0.5)
        self._release()

    def query(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """Rows of the hub's database, read beside the running hub."""
        self.house.must_run()
        path = self.house.hub.data_dir / "hub.db"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30.0)) as db:
            db.row_factory = sqlite3.Row
            return db.execute(sql, values).fetchall()

    def costs(self) -> Costs:
        return Costs(
            cost.own_cpu_s(self.house.hub.daemon.pid),
            cost.own_cpu_s(self.broker_pid),
            sum(cost.own_cpu_s(box.daemon.pid) for box in self.house.boxes),
        )

    def counts(self) -> list[Count]:
        """Of each box."""
        time.sleep(COUNTED_S)
        return [self.wire.count(box.name) or _counted_by(box) for box in self.house.boxes]

    def add_verdicts(self) -> None:
        """One for each box: a box joins no second masked round over the same base without."""
        if self.rounds_before:
            for box in self.house.boxes:
                make_up_cases(box.data_dir, self.bundle, EXAMPLES + self.rounds_before, 1)
        self.rounds_before += 1

    # --- opening it -----------------------------------------------------------------------------------

    def _init_hub(self, canaries: int) -> None:
        hub = self.house.hub
        hub.init("--host", self.wire.hub_address, "--bind", "0.0.0.0" if self.wire.is_apart else "127.0.0.1")
        path = hub.data_dir / "hub.toml"
        text = config.with_value(path.read_text(), "rollout", "canaries", canaries)
        # Every box weighs all that one may weigh: a masked sum of light boxes is coarser, and this one is checked.
        path.write_text(config.with_value(text, "rounds", "examples_cap", EXAMPLES))
        command = [*self.wire.inside(HUB), str(BIN / "hub"), "run", "--config", str(path)]
        hub.daemon = Daemon(command, self.house.folder / "hub.log")

    def _start_hub(self) -> None:
        self.house.hub.start()
        wait_for("answer from the hub", self._hub_answers, timeout_s=READY_TIMEOUT_S, every_s=0.5)

    def _hub_answers(self) -> bool:
        self.house.hub.daemon.must_run()
        try:
            self.house.hub.fleet("site", "list")
        except HouseError:
            return False
        return True

    def _enroll(self, box: Box) -> None:
        self.house.enroll(box)
        make_up_cases(box.data_dir, self.bundle)

    def _all_seen(self) -> bool:
        self.house.must_run()
        return all(row["last_seen_at"] for row in self.query("SELECT last_seen_at FROM devices"))

    def _release(self) -> None:
        """Offered and fetched over the link, as any release; published while the hub is down, so that all boxes are asked at once."""
        hub = self.house.hub
        hub.daemon.stop()
        paths = config.load(hub.data_dir / "hub.toml").paths
        version = releases.Repository(paths).publish(self.bundle, round_id="", now=time.time()).release_version
        self._start_hub()
        everyone = "SELECT 1 FROM releases WHERE release_version = ? AND state = 'everyone'"
        wait_for("release on every box", lambda: self.query(everyone, version), timeout_s=READY_TIMEOUT_S, every_s=0.5)
        self.release_s = max(_fetched_in_s(box, version) for box in self.house.boxes)


def measured(scene: Scene, work: Path) -> Row:
    """Median of the rounds. Raises HouseError where one fails or its sum is wrong."""
    with opened(scene, work) as fleet:
        rounds = [one_round(fleet, scene) for _ in range(scene.rounds)]
        middle = {name: median(row[name] for row in rounds) for name in rounds[0]}
        return middle | {
            "release_s": fleet.release_s,
            "wire": fleet.wire.says,
            "rounds_s": [r["round_s"] for r in rounds],
        }


@contextmanager
def opened(scene: Scene, work: Path) -> Iterator[Fleet]:
    """A fleet that is ready for rounds, and gone afterwards."""
    work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="ours-", dir=work.resolve()))
    names = [f"box-{number}" for number in range(1, scene.boxes + 1)]
    try:
        bundle = dummy.write_dummy_bundle(folder / "dummy.bundle", scene.parameters)
        with Wire(names) as wire, House(folder / "house") as house:
            fleet = Fleet(house, wire, bundle)
            fleet.open(names)
            yield fleet
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def one_round(fleet: Fleet, scene: Scene) -> Row:
    """From the operator's `round start` on the hub's clock to the next weights on its disk.

    At `summed` an open round's last update is in the sum, a masked one's last share is here: its sum is made after that.
    """
    hub = fleet.house.hub
    wait_for("quiet boxes", lambda: _are_quiet(fleet), timeout_s=READY_TIMEOUT_S, every_s=0.2)
    fleet.add_verdicts()
    hub_pids = (hub.daemon.pid, fleet.broker_pid)
    for pid in hub_pids:
        cost.forget_peak(pid)
    counts, before = fleet.counts(), fleet.costs()
    round_id = _start(fleet, scene)
    summed_at = wait_for("sum", lambda: _summed_at(fleet, round_id), timeout_s=ROUND_TIMEOUT_S, every_s=POLL_S)
    weights = fleet.house.folder / f"{round_id}.safetensors"
    wait_for("weights", lambda: _is_kept(fleet, round_id, weights), timeout_s=READY_TIMEOUT_S, every_s=POLL_S)
    after = fleet.costs()
    peak = sum(cost.peak_bytes(pid) for pid in hub_pids)
    moved = [now - then for now, then in zip(fleet.counts(), counts, strict=True)]
    _drop(fleet, round_id)
    (row,) = fleet.query("SELECT created_at, plan FROM rounds WHERE round_id = ?", round_id)
    return {
        "round_s": weights.stat().st_mtime - row["created_at"],
        "summed_s": summed_at - row["created_at"],
        "hub_cpu_s": after.hub_cpu_s - before.hub_cpu_s,
        "broker_cpu_s": after.broker_cpu_s - before.broker_cpu_s,
        "box_cpu_s": (after.box_cpu_s - before.box_cpu_s) / scene.boxes,
        "hub_peak_bytes": peak,
        "up_bytes": int(median(count.sent for count in moved)),
        "down_bytes": int(median(count.received for count in moved)),
        "sum_error": _checked_error(fleet, weights, row["plan"]),
    }


def _start(fleet: Fleet, scene: Scene) -> str:
    kind = ["--unsafe-open"] if scene.kind == "unsafe_open" else []
    options = ["--min-devices", str(scene.boxes), "--min-examples", "1", "--epochs", "1", "--clip-norm", str(CLIP_NORM)]
    return str(fleet.house.hub.fleet("round", "start", *kind, *options)["round_id"])


def _drop(fleet: Fleet, round_id: str) -> None:
    """Unless the export was faster: it fails on the dummy network, which drops the round too."""
    try:
        fleet.house.hub.fleet("round", "drop", round_id)
    except HouseError:
        if not fleet.query("SELECT 1 FROM rounds WHERE round_id = ? AND state = 'dropped'", round_id):
            raise


def _summed_at(fleet: Fleet, round_id: str) -> float:
    """0 before; on the hub's clock. Raises HouseError where the round came to nothing."""
    (row,) = fleet.query("SELECT state, changed_at, reason FROM rounds WHERE round_id = ?", round_id)
    if row["state"] in ("evaluated", "released", "dropped"):
        raise HouseError(f"the round is {row['state']} before its sum was seen: {row['reason']}")
    return float(row["changed_at"]) if row["state"] == "summed" else 0.0


def _is_kept(fleet: Fleet, round_id: str, kept: Path) -> bool:
    """The next weights, kept beyond the round by a hard link; whole once the export's log is beside them."""
    for started in (fleet.house.hub.data_dir / "rounds" / round_id).glob(f"{PREFIX}*/err"):
        os.link(started.parent / "weights.safetensors", kept)
        return True
    return False


def _are_quiet(fleet: Fleet) -> bool:
    """No round is on, and no box has one that is not over."""
    on = fleet.query("SELECT 1 FROM rounds WHERE state NOT IN ('released', 'dropped')")
    return not on and all(box.query(_CLOSED_BOX)[0]["open"] == 0 for box in fleet.house.boxes)


def _checked_error(fleet: Fleet, weights: Path, plan: bytes) -> float:
    """Raises HouseError unless the next weights are the base plus the mean of what the boxes made up."""
    told = messages.decode(plan)
    assert isinstance(told, RoundPlan)  # the hub wrote it
    after = safetensors_numpy.load_file(weights)
    weights.unlink()
    names = [box.name for box in fleet.house.boxes]
    error = dummy.error_of_mean(after, fleet.base, names, told.seed, told.clip_norm)
    if not error < SUM_ERROR_MAX:
        raise HouseError(f"the {told.kind} sum is wrong: {error:.2g} of the mean's norm")
    return error


def _counted_by(box: Box) -> Count:
    """What the box itself counts: messages and chunks without MQTT, TLS and TCP."""
    counted = {row["name"]: int(row["value"]) for row in box.query("SELECT name, value FROM counters")}
    return Count(counted.get("bytes_received", 0), counted.get("bytes_sent", 0))


def _fetched_in_s(box: Box, version: int) -> float:
    """From the verified offer to the whole bundle on this box's disk, by its own log."""
    said = {text: _said_at(box, text) for text in (f"release {version}: offered and verified", ": received")}
    offered_at, received_at = said.values()
    return (received_at - offered_at).total_seconds()


def _said_at(box: Box, text: str) -> datetime:
    for line in box.daemon.log_path.read_text("utf-8").splitlines():
        if line.endswith(text):
            return datetime.strptime(" ".join(line.split()[:2]), LOG_TIME)
    raise HouseError(f"{box.name} has not said {text!r}")
