"""How this box is: the facts of a heartbeat, and what needs somebody's attention.

Reads tables, the disk and the open bundle; gives a Heartbeat.
Never counts or names anything about patients.
Source: ARCHITECTURE.md, "Five paths": presence.
"""

import shutil
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from edge_agent import database, ledger, renewal, retention
from edge_agent.bundles import Active
from edge_agent.config import Config
from edge_agent.identity import Life
from edge_agent.rounds import State
from fleet_link.messages import Heartbeat, RoundStatus

RENEW_ADVICE = (
    "the running box renews it as soon as it reaches the hub's HTTPS port: check firewall and clock;"
    " or stop it and run `edge-agent enroll --replace TOKEN` with a new token from the hub"
)
MAX_ROUNDS = 16
MAX_ALARMS = 16
MAX_ALARM_CHARACTERS = 300
SAID_ROUNDS = (
    *(State.PREPARING, State.TRAINING, State.KEYED, State.SHARED, State.UPLOADING, State.AGREED, State.UNMASKED),
    *(State.DELIVERED, State.INVITED, State.DECLINED),
)


@dataclass(frozen=True)
class Counts:
    series_read: int
    series_abstained: int
    series_failed: int
    quarantined: int
    reviews: int
    reviews_agreed: int
    outbox_pending: int


def heartbeat(
    db: sqlite3.Connection,
    config: Config,
    active: Active,
    uptime_s: float,
    link_alarms: Iterable[str],
    link_notices: Iterable[str] = (),
) -> Heartbeat:
    """Everything but message_id is a fact of this moment."""
    counts = count(db)
    free = free_bytes(config.box.data_dir)
    return Heartbeat(
        message_id="0" * 32,  # nobody answers it: the next heartbeat replaces it
        software_version=metadata.version("wardround"),
        bundle_digest=active.digest,
        release_version=active.release_version,
        provider=active.reader.provider,
        uptime_s=int(uptime_s),
        series_read=counts.series_read,
        series_abstained=counts.series_abstained,
        series_failed=counts.series_failed,
        quarantined=counts.quarantined,
        reviews=counts.reviews,
        reviews_agreed=counts.reviews_agreed,
        outbox_pending=counts.outbox_pending,
        disk_free_bytes=free,
        rounds=round_statuses(db),
        alarms=_newest([*link_alarms, *alarms(db, config, free)]),
        notices=_newest([*link_notices, *database.notices(db)]),
    )


def count(db: sqlite3.Connection) -> Counts:
    """Newest result and newest review of each series; also what `edge-agent status` shows."""

    def one(query: str) -> int:
        return int(db.execute(query).fetchone()[0])

    newest_result = "FROM results r WHERE version = (SELECT MAX(version) FROM results WHERE series_no = r.series_no)"
    newest_review = (
        "FROM reviews v WHERE review_no = (SELECT MAX(review_no) FROM reviews WHERE series_no = v.series_no)"
    )
    return Counts(
        series_read=one(f"SELECT COUNT(*) {newest_result}"),
        series_abstained=one(f"SELECT COUNT(*) {newest_result} AND abstained = 1"),
        series_failed=one("SELECT COUNT(*) FROM series WHERE state = 'failed'"),
        quarantined=one("SELECT COUNT(*) FROM quarantine"),
        reviews=one(f"SELECT COUNT(*) {newest_review}"),
        reviews_agreed=one(f"SELECT COUNT(*) {newest_review} AND verdict = 'accepted'"),
        outbox_pending=one("SELECT COUNT(*) FROM outbox WHERE state = 'pending'"),
    )


def round_statuses(db: sqlite3.Connection) -> tuple[RoundStatus, ...]:
    """Rounds that the hub has not closed; those in work first."""
    known = [entry for state in SAID_ROUNDS for entry in ledger.in_states(db, state)]
    stale = dict(db.execute("SELECT round_id, staleness FROM stale_updates").fetchall())
    return tuple(
        RoundStatus(
            round_id=entry.round_id,
            state=entry.state.value,
            reason=entry.reason,
            staleness=stale.get(entry.round_id, 0),
        )
        for entry in known[:MAX_ROUNDS]
    )


def free_bytes(data_dir: Path) -> int:
    return shutil.disk_usage(data_dir).free


def _newest(texts: list[str]) -> tuple[str, ...]:
    return tuple(text[:MAX_ALARM_CHARACTERS] for text in texts[-MAX_ALARMS:])


def certificate_notices(life: Life, now: float) -> list[str]:
    """It is renewed by itself: said only where that should have happened long ago."""
    if now < renewal.overdue_at(life):
        return []
    days = life.days_left(now)
    state = "has expired" if days < 0 else f"ends in {int(days)} days" if days >= 1 else "ends within a day"
    return [f"the certificate {state}: {RENEW_ADVICE}"]


def alarms(db: sqlite3.Connection, config: Config, free: int) -> list[str]:
    """What somebody must look at on this box, the link's own troubles apart; `edge-agent status` shows it too."""
    told = database.alarms(db)
    if free < config.dicom.min_free_bytes:
        told.append(
            f"disk: {free} bytes free, images are refused below {config.dicom.min_free_bytes}; {_room(db, config)}"
        )
    return told


def _room(db: sqlite3.Connection, config: Config) -> str:
    """Where some could come from."""
    could_go = retention.removable(db)
    if not config.pacs.enabled and not could_go.series:
        return "no images are removed while pacs.enabled = false: free some disk or add some"
    days = "a smaller storage.keep_days" if config.storage.keep_days else "a storage.keep_days above 0"
    return f"{days} removes up to {could_go.bytes} bytes, the images of {could_go.series} delivered series"
