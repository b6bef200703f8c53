"""`edge-agent status`: what the box is doing and what waits for somebody, from its database.

Reads box.db and the run lock; the daemon need not run.
Never shows patient data: our own series numbers, counts and reasons only.
"""

import fcntl
import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_agent import database, health, identity, privacy, task_status
from edge_agent.config import Config, Policy
from edge_agent.task_status import TaskStatus
from fleet_link import messages
from fleet_link.errors import SiteError
from fleet_link.messages import RoundPlan
from models import accountant

LOCK = "run.lock"
SHOWN = 20  # newest rows of each list


@dataclass(frozen=True)
class Status:
    """Everything `status` prints; --json gives the same."""

    running: bool
    device: str  # "" before enrolment
    certificate_days_left: int | None  # below 0 it has expired; None before enrolment
    hub_connected: bool
    bundle: dict[str, Any]
    series: dict[str, int]  # number by state
    counts: dict[str, int]
    tasks: list[TaskStatus]
    quarantine: list[dict[str, Any]]
    failed: list[dict[str, Any]]
    pacs: list[dict[str, Any]]  # results that the PACS has not taken yet
    rounds: list[dict[str, Any]]
    spool: dict[str, Any]  # an update that waits for a buffered round; empty where there is none
    privacy: dict[str, Any]  # what rounds with noise have cost this site
    refused_bundles: list[dict[str, Any]]
    disk_free_bytes: int
    alarms: list[str]
    notices: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def run_lock(data_dir: Path) -> Iterator[None]:
    """Held while the daemon runs. Raises SiteError when another one holds it."""
    with (data_dir / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SiteError(
                f"another edge-agent runs on {data_dir}", advice="stop it first, or use its status"
            ) from error
        yield


def is_running(data_dir: Path) -> bool:
    try:
        with run_lock(data_dir):
            return False
    except SiteError:
        return True


def gather(config: Config) -> Status:
    """Raises SiteError when the box has no data yet."""
    data_dir = config.box.data_dir
    if not data_dir.is_dir():
        raise SiteError(f"{data_dir} does not exist", advice="run `edge-agent init`, then `edge-agent run`")
    db = database.connect(data_dir)
    try:
        running = is_running(data_dir)
        free = health.free_bytes(data_dir)
        enrolled = identity.known(data_dir) if identity.is_enrolled(data_dir) else None
        return Status(
            running=running,
            device=enrolled.address.device if enrolled else "",
            certificate_days_left=math.floor(enrolled.life.days_left(time.time())) if enrolled else None,
            hub_connected=running and bool(database.counter(db, "hub_connected")),
            bundle=next(iter(_rows(db, "SELECT * FROM bundles WHERE state = 'active'")), {}),
            series={
                row["state"]: row["n"] for row in _rows(db, "SELECT state, count(*) AS n FROM series GROUP BY state")
            },
            counts=asdict(health.count(db)),
            tasks=task_status.gather(db, config),
            quarantine=_newest(db, "quarantine", "quarantine_no, size, reason, calling_ae, received_at, path"),
            failed=_newest(db, "series", "series_no, Modality, state, reason", "state IN ('failed', 'not-for-us')"),
            pacs=_newest(db, "outbox", "item_no, kind, state, attempts, last_error", "state <> 'delivered'"),
            rounds=_rounds(db),
            spool=next(iter(_rows(db, "SELECT round_id, base_digest, examples, made_at FROM spool")), {}),
            privacy=_spent(db, config.policy),
            refused_bundles=_newest(db, "bundles", "bundle_digest, release_version, reason", "state = 'refused'"),
            disk_free_bytes=free,
            alarms=health.alarms(db, config, free),
            notices=database.notices(db) + (health.certificate_notices(enrolled.life, time.time()) if enrolled else []),
        )
    finally:
        db.close()


def _spent(db: sqlite3.Connection, policy: Policy) -> dict[str, Any]:
    costs = privacy.spent(db)
    return {
        "rounds": len(costs),
        "epsilon": accountant.epsilon(costs, policy.delta),
        "epsilon_max": policy.epsilon_max,
        "delta": policy.delta,
    }


def _rounds(db: sqlite3.Connection) -> list[dict[str, Any]]:
    """`buffer`: of the plan, 0 where it is not a buffered one. `staleness`: of the update sealed for it."""
    found = db.execute(
        "SELECT r.round_id, r.state, r.examples, s.staleness, r.reason, r.changed_at, r.plan FROM rounds r"
        " LEFT JOIN stale_updates s USING (round_id) ORDER BY r.rowid DESC LIMIT ?",
        (SHOWN,),
    )
    rows = [dict(row) for row in found]
    for row in rows:
        plan = messages.decode(row.pop("plan"))
        row["buffer"] = plan.buffer if isinstance(plan, RoundPlan) else 0
    return rows


def _newest(db: sqlite3.Connection, table: str, columns: str, where: str = "1") -> list[dict[str, Any]]:
    return _rows(db, f"SELECT {columns} FROM {table} WHERE {where} ORDER BY rowid DESC LIMIT {SHOWN}")  # noqa: S608


def _rows(db: sqlite3.Connection, sql: str) -> list[dict[str, Any]]:
    return [dict(row) for row in db.execute(sql)]
