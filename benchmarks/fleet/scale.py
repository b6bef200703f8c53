"""One hub with many boxes: connect storm, heartbeats, one masked round through which its broker is killed twice.

Starts `hub run` and crowd.py's boxes; reads the hub's database and proc(5).
Never counts a round in which one box is missing: it needs all of them, and the sum is compared.
"""

import os
import resource
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import numpy as safetensors_numpy

from benchmarks.fleet.boxes import CHANGE
from benchmarks.fleet.crowd import Crowd
from benchmarks.house import Hub
from benchmarks.link import cost
from benchmarks.processes import HouseError, wait_for
from cloud_hub import config
from cloud_hub.candidate import PREFIX
from models import delta
from models.bundle import read_bundle
from tests.cloud_hub.masked_twin import EXAMPLES

Row = dict[str, Any]

POLL_S = 0.05
READY_TIMEOUT_S, ROUND_TIMEOUT_S = 300.0, 1800.0
STAGE_S = 600  # nobody is left out because this machine is slow; how long each stage took is in the row
RELATIVE_ERROR_MAX = 0.05  # of the mean: rounding is far below, masks that did not come off far above
TRAINABLE: delta.Trainable = "heads"
CLIP_NORM = 0.5  # a little above the norm of what each box brings
STAGES = ("invited", "keys", "sharing", "training", "uploading", "agreeing", "unmasking")
ENDS = ("summed", "evaluated", "released", "dropped")  # what follows the sum is any round's
_HALF_SHARED = "SELECT count(*) FROM masked_parts WHERE shares IS NOT NULL"
_HALF_DELIVERED = "SELECT count(*) FROM round_devices WHERE state = 'delivered'"


@dataclass(frozen=True)
class Extent:
    boxes: int
    processes: int
    heartbeats_s: float  # how long the quiet fleet is watched


@dataclass
class Meter:
    """What hub and broker cost; a killed broker's share is kept."""

    hub: Hub
    broker_peak_bytes: int = 0
    _killed_cpu_s: float = 0.0

    @property
    def broker_pid(self) -> int:
        return int((self.hub.data_dir / "broker" / "mosquitto.pid").read_text())

    def read(self) -> tuple[float, float, float]:
        """Seconds: of the clock, of the hub's processor time, of the broker's."""
        self.broker_peak_bytes = max(self.broker_peak_bytes, cost.peak_bytes(self.broker_pid))
        broker_s = self._killed_cpu_s + cost.own_cpu_s(self.broker_pid)
        return time.perf_counter(), cost.own_cpu_s(self.hub.daemon.pid), broker_s

    def kill_broker(self) -> None:
        pid = self.broker_pid
        self._killed_cpu_s = self.read()[2]
        os.kill(pid, 9)
        wait_for("another broker", lambda: self.broker_pid != pid, timeout_s=READY_TIMEOUT_S)


@dataclass
class Watched:
    """One round: when each state was first seen, and how long the boxes were away after each kill."""

    begin: tuple[float, float, float]
    seen: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    away_s: list[float] = field(default_factory=list)


def measured(extent: Extent, work: Path) -> Row:
    """Raises HouseError where a box is missing in the round, or the sum is wrong."""
    descriptors = _raise_descriptors()
    with _opened(extent, work) as (hub, crowd, made_s):
        meter = Meter(hub)
        storm = _storm(meter, crowd)
        quiet = _quiet(meter, extent.heartbeats_s)
        round_ = _round(meter, crowd)
        return {
            "boxes": extent.boxes,
            "processes": extent.processes,
            "descriptors": descriptors,
            "made_s": made_s,
            **storm,
            **quiet,
            **round_,
            "hub_peak_bytes": cost.peak_bytes(hub.daemon.pid),
            "broker_peak_bytes": meter.broker_peak_bytes,
        }


def _raise_descriptors() -> int:
    """The hub and its broker inherit it: one descriptor for each connection, two for each upload."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


@contextmanager
def _opened(extent: Extent, work: Path) -> Iterator[tuple[Hub, Crowd, float]]:
    hub = Hub(work / "hub")
    crowd = Crowd(work / "boxes", [f"box-{number:04d}" for number in range(extent.boxes)], extent.processes)
    try:
        hub.init()
        path = hub.data_dir / "hub.toml"
        text = config.with_value(path.read_text(), "rounds", "stage_s", STAGE_S)
        # Every box weighs all that one may weigh: a masked sum of light boxes is coarser, and this one is checked.
        path.write_text(config.with_value(text, "rounds", "examples_cap", EXAMPLES))
        made_s = crowd.make(path)
        hub.start()
        hub.wait_ready()
        crowd.launch()
        yield hub, crowd, made_s
    except HouseError as error:
        error.add_note(hub.daemon.tail(12))
        raise
    finally:
        crowd.stop()
        hub.daemon.stop()


def query(hub: Hub, sql: str, *values: object) -> list[sqlite3.Row]:
    """Rows of the hub's database, read beside the running hub."""
    hub.daemon.must_run()
    with closing(sqlite3.connect(f"file:{hub.data_dir / 'hub.db'}?mode=ro", uri=True, timeout=30.0)) as db:
        db.row_factory = sqlite3.Row
        return db.execute(sql, values).fetchall()


def _number(hub: Hub, sql: str, *values: object) -> int:
    return int(query(hub, sql, *values)[0][0])


def _storm(meter: Meter, crowd: Crowd) -> Row:
    """All boxes at once, from the first packet to the last subscription, and to the last first heartbeat on the hub's disk."""
    hub, everybody = meter.hub, len(crowd.names)
    begin = meter.read()
    crowd.go()
    wait_for("all connections", lambda: crowd.connected == everybody, timeout_s=READY_TIMEOUT_S, every_s=POLL_S)
    connected = meter.read()
    heard = "SELECT count(*) FROM devices WHERE last_seen_at IS NOT NULL"
    wait_for("all boxes", lambda: _number(hub, heard) == everybody, timeout_s=READY_TIMEOUT_S, every_s=POLL_S)
    end = meter.read()
    return {"connect_s": connected[0] - begin[0], "heard_s": end[0] - begin[0], "storm_broker_cpu_s": end[2] - begin[2]}


def _quiet(meter: Meter, watched_s: float) -> Row:
    """Heartbeats alone: the share of one core that they take."""
    begin = meter.read()
    time.sleep(watched_s)
    end = meter.read()
    took_s = end[0] - begin[0]
    return {"quiet_hub": (end[1] - begin[1]) / took_s, "quiet_broker": (end[2] - begin[2]) / took_s}


# --- the round ------------------------------------------------------------------------------------


def _round(meter: Meter, crowd: Crowd) -> Row:
    hub, everybody = meter.hub, len(crowd.names)
    cost.forget_peak(hub.daemon.pid)
    options = ["--min-devices", str(everybody), "--min-examples", "1", "--trainable", TRAINABLE, "--epochs", "1"]
    options += ["--clip-norm", str(CLIP_NORM)]
    watched = Watched(meter.read())
    round_id = str(hub.fleet("round", "start", *options)["round_id"])
    kills = [_HALF_SHARED, _HALF_DELIVERED]
    deadline = time.monotonic() + ROUND_TIMEOUT_S
    while (state := _state(hub, round_id)) not in ENDS:
        watched.seen.setdefault(state, meter.read())
        if kills and _number(hub, kills[0]) >= everybody // 2:
            kills.pop(0)
            watched.away_s.append(_kill_broker(meter, crowd))
        if time.monotonic() > deadline:
            raise HouseError(f"round {round_id} is {state} after {ROUND_TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)
    watched.seen[state] = meter.read()
    if kills:
        raise HouseError("the round was over before its broker was killed twice")
    return _told(watched, everybody) | _checked(hub, round_id, everybody)


def _state(hub: Hub, round_id: str) -> str:
    return str(query(hub, "SELECT state FROM rounds WHERE round_id = ?", round_id)[0]["state"])


def _kill_broker(meter: Meter, crowd: Crowd) -> float:
    """Seconds until every box is connected again."""
    begin, everybody = time.perf_counter(), len(crowd.names)
    meter.kill_broker()
    wait_for("all boxes back", lambda: crowd.connected == everybody, timeout_s=READY_TIMEOUT_S, every_s=POLL_S)
    return time.perf_counter() - begin


def _told(watched: Watched, everybody: int) -> Row:
    """Seconds by stage; until the sum, and what it cost."""
    order = [state for state in (*STAGES, *ENDS) if state in watched.seen]
    at = [watched.seen[state][0] for state in order]
    at[0] = watched.begin[0]
    stages = {state: after - before for state, before, after in zip(order, at, at[1:], strict=False)}
    summed = watched.seen[order[-1]]
    return {
        "round_s": summed[0] - watched.begin[0],
        "hub_cpu_s": summed[1] - watched.begin[1],
        "broker_cpu_s": summed[2] - watched.begin[2],
        "hub_ms_a_box": (summed[1] - watched.begin[1]) / everybody * 1e3,
        "stages_s": stages,
        "away_s": watched.away_s,
    }


def _checked(hub: Hub, round_id: str, everybody: int) -> Row:
    """Raises HouseError unless each box was counted once and the next weights are the base plus their mean."""
    (row,) = query(hub, "SELECT state, reason, base_digest FROM rounds WHERE round_id = ?", round_id)
    if row["state"] == "dropped":
        raise HouseError(f"the round was dropped: {row['reason']}")
    counted = _number(
        hub, "SELECT count(DISTINCT update_sha256) FROM round_devices WHERE round_id = ? AND counted_at > 0", round_id
    )
    if counted != everybody:
        raise HouseError(f"{counted} of {everybody} boxes are in the sum")
    before = read_bundle(hub.data_dir / "releases" / f"{row['base_digest']}.bundle").weights
    next_weights = wait_for("weights", lambda: _next_weights(hub, round_id), timeout_s=READY_TIMEOUT_S)
    after = safetensors_numpy.load_file(next_weights)
    trained = delta.trainable_names(before, TRAINABLE)
    moved = np.concatenate([(after[name] - before[name]).ravel() for name in trained])
    error = float(np.linalg.norm(moved - CHANGE) / np.linalg.norm(np.full_like(moved, CHANGE)))
    if not error < RELATIVE_ERROR_MAX:
        raise HouseError(f"the sum is wrong by {error:.2g} of the mean")
    return {"counted": counted, "sum_error": error, "refusals": _number(hub, "SELECT count(*) FROM refusals")}


def _next_weights(hub: Hub, round_id: str) -> Path | None:
    """Base plus mean, whole once the log of the export is beside them."""
    found = (hub.data_dir / "rounds" / round_id).glob(f"{PREFIX}*/err")
    return next((path.parent / "weights.safetensors" for path in found), None)
