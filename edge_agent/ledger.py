"""Rounds, durable messages and outgoing transfers as rows: what link, learner and installer hand to one another.

Reads and writes the tables rounds, masked_parts, spool, privacy_costs, link_outbox and transfers_out; rounds.py decides,
this file stores.
Never talks to the hub and never trains.
Source: ARCHITECTURE.md, "The house": every hand-over inside the box is a row on disk.
"""

import hashlib
import logging
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edge_agent import database, masking, privacy, replay, rounds, spool
from edge_agent.database import transaction
from edge_agent.masking import Part
from edge_agent.rounds import Command, Event, Kind, State
from edge_agent.spool import Spooled
from fleet_link import chunks, messages
from fleet_link.errors import WardroundError
from fleet_link.messages import (
    AnyMessage,
    RoundAnswer,
    RoundKeys,
    RoundPlan,
    Shares,
    SurvivorsSigned,
    TransferOffer,
    Unmask,
)
from models.accountant import Cost

log = logging.getLogger(__name__)

MAX_REASON_CHARACTERS = 480  # the wire's Text has 500
Stage = RoundKeys | Shares | SurvivorsSigned | Unmask  # what a box says in a masked round, in order
OPEN_STATES = tuple(state for state in State if state is not State.CLOSED)


@dataclass(frozen=True)
class Round:
    round_id: str
    state: State
    plan: RoundPlan
    examples: int
    update_path: str
    reason: str
    changed_at: float


@dataclass(frozen=True)
class Outcome:
    """What came with an event; empty fields leave the row as it is."""

    examples: int | None = None
    reason: str | None = None
    update: TransferOffer | None = None
    update_path: str | None = None  # relative to data_dir
    part: Part | None = None  # in a masked round, after the event
    cost: Cost | None = None  # of joining a round with noise
    spooled: Spooled | None = None  # in a buffered round: trained, and in no sum yet
    used: tuple[Spooled, int] | None = None  # in a buffered round: what was sealed, and its staleness
    said: Stage | None = field(default=None, repr=False)  # in a masked round, at this stage; may hold shares


def message_id(*parts: object) -> str:
    """The same fact has the same id, so that saying it twice is saying it once."""
    return hashlib.sha256("|".join(str(part) for part in parts).encode()).hexdigest()[:32]


def work_name(round_id: str) -> str:
    """Of a round's alarm, which ends with the state."""
    return f"round {round_id}"


def invite(db: sqlite3.Connection, plan: RoundPlan, now: float) -> Round:
    """Keep the plan. The first plan of a round counts; a later one of the same id changes nothing."""
    new = db.execute(
        "INSERT OR IGNORE INTO rounds(round_id, state, plan, changed_at) VALUES (?, ?, ?, ?)",
        (plan.round_id, State.INVITED, messages.encode(plan), now),
    )
    if new.rowcount:
        log.info("round %s: invited", plan.round_id)
    found = find(db, plan.round_id)
    assert found is not None
    return found


def find(db: sqlite3.Connection, round_id: str) -> Round | None:
    row = db.execute("SELECT * FROM rounds WHERE round_id = ?", (round_id,)).fetchone()
    return _round(row) if row else None


def in_states(db: sqlite3.Connection, *states: State) -> list[Round]:
    """Newest first."""
    marks = ",".join("?" * len(states))
    rows = db.execute(f"SELECT * FROM rounds WHERE state IN ({marks}) ORDER BY rowid DESC", states)  # noqa: S608
    return [_round(row) for row in rows]


def apply(
    db: sqlite3.Connection, data_dir: Path, round_id: str, event: Event, now: float, outcome: Outcome = Outcome()
) -> State | None:
    """Take one event into the round's row, with its commands, in one transaction. None: no such round."""
    with transaction(db):
        before = find(db, round_id)
        if before is None:
            return None
        state, commands = rounds.advance(kind_of(before.plan), before.state, event)
        if state is before.state and not commands:
            return state
        after = _store(db, before, state, outcome, now)
        for command in commands:
            _carry_out(db, command, after, outcome, now)
    if Command.DROP_UPDATE in commands and before.update_path:
        (data_dir / before.update_path).unlink(missing_ok=True)
    if Command.DROP_PART in commands:
        database.forget_on_disk(db)
    if state is not before.state:
        log.info("round %s: %s -> %s%s", round_id, before.state, state, f" ({after.reason})" if after.reason else "")
    return state


def kind_of(plan: RoundPlan) -> Kind:
    if not plan.buffer:
        return plan.kind
    return "buffered_masked" if plan.kind == "masked" else "buffered_open"


def abandon_spool(db: sqlite3.Connection, data_dir: Path, why: str, now: float) -> None:
    """What was trained and is in no sum goes, and nothing more is trained for later."""
    for known in in_states(db, State.LATE):
        apply(db, data_dir, known.round_id, Event.FAILED, now, Outcome(reason=why))
    waiting = spool.find(db)
    if waiting is not None:
        log.info("the spooled update of round %s is thrown away: %s", waiting.round_id, why)
        spool.drop(db)


def part_of(db: sqlite3.Connection, round_id: str) -> Part | None:
    """None: no masked round, or one that is over for this box. Raises SiteError where the row is damaged."""
    row = db.execute("SELECT part FROM masked_parts WHERE round_id = ?", (round_id,)).fetchone()
    return masking.decode(row["part"]) if row else None


def lose_update(db: sqlite3.Connection, data_dir: Path, known: Round, why: str, now: float) -> None:
    """The sealed update is not there any more. An open round trains again.

    A masked round ends here for this box: a second update under the same masks would bare the difference of the two.
    """
    reason = "" if known.plan.kind == "unsafe_open" else f"{why}; a masked round has no second one"
    log.error("round %s: %s", known.round_id, reason or f"{why}; training again")
    apply(db, data_dir, known.round_id, Event.LOST, now, Outcome(reason=reason))


def hold_up(db: sqlite3.Connection, what: str, error: WardroundError, now: float) -> None:
    """The site's trouble, to be tried again: logged once, and an alarm named `what` until that is ended."""
    text = f"{what} waits: {error}"
    if text not in database.alarms(db):
        log.error("%s; tried again (%s)", text, error.advice)
        database.raise_alarm(db, what, text, now)


def offer_of(path: Path, round_id: str, device: str) -> TransferOffer:
    """Of a sealed update; the same file has the same transfer id. Raises SiteError if it cannot be read."""
    offer = chunks.new_offer(path, kind="update", subject=round_id, transfer_id="0" * 32, message_id="0" * 32)
    transfer_id = chunks.transfer_id(kind="update", subject=round_id, sha256=offer.sha256, sender=device)
    return msgspec.structs.replace(offer, transfer_id=transfer_id, message_id=transfer_id)


def enqueue(db: sqlite3.Connection, message: AnyMessage, now: float) -> None:
    """Put a durable message into the outbox; it stays until the hub's Receipt."""
    db.execute(
        "INSERT OR IGNORE INTO link_outbox VALUES (?, ?, ?)", (message.message_id, messages.encode(message), now)
    )


def pending(db: sqlite3.Connection) -> list[AnyMessage]:
    """Oldest first."""
    rows = db.execute("SELECT body FROM link_outbox ORDER BY rowid")
    return [messages.decode(row["body"]) for row in rows]


def received(db: sqlite3.Connection, of: str) -> bool:
    """The hub has this message on its disk. True if it was waiting."""
    return db.execute("DELETE FROM link_outbox WHERE message_id = ?", (of,)).rowcount > 0


def remove_stray_updates(db: sqlite3.Connection, data_dir: Path) -> None:
    """At start: a sealed file that no open round points to (killed between file and row) goes."""
    kept = {data_dir / known.update_path for known in in_states(db, *OPEN_STATES) if known.update_path}
    for path in (data_dir / "updates").glob("*"):
        if path not in kept:
            path.unlink()


def end_stray_alarms(db: sqlite3.Connection) -> None:
    """At start: an alarm of a round that nobody works on goes."""
    prefix = work_name("")
    db.execute(
        "DELETE FROM alarms WHERE substr(name, 1, ?) = ?"
        " AND substr(name, ?) NOT IN (SELECT round_id FROM rounds WHERE state IN (?, ?, ?))",
        (len(prefix), prefix, len(prefix) + 1, *rounds.TO_WORK_ON),
    )


def _store(db: sqlite3.Connection, before: Round, state: State, outcome: Outcome, now: float) -> Round:
    after = Round(
        round_id=before.round_id,
        state=state,
        plan=before.plan,
        examples=before.examples if outcome.examples is None else outcome.examples,
        update_path=before.update_path if outcome.update_path is None else outcome.update_path,
        reason=before.reason if outcome.reason is None else outcome.reason[:MAX_REASON_CHARACTERS],
        changed_at=now,
    )
    if state is not before.state:
        database.end_alarm(db, work_name(before.round_id))
    db.execute(
        "UPDATE rounds SET state = ?, examples = ?, update_path = ?, reason = ?, changed_at = ? WHERE round_id = ?",
        (after.state, after.examples, after.update_path, after.reason, after.changed_at, after.round_id),
    )
    if outcome.used is not None and state is State.UPLOADING:
        used, staleness = outcome.used
        db.execute(
            "INSERT OR REPLACE INTO stale_updates VALUES (?, ?, ?, ?)",
            (after.round_id, used.base_digest, staleness, used.sha256),
        )
    return after


def _carry_out(db: sqlite3.Connection, command: Command, of: Round, outcome: Outcome, now: float) -> None:
    if command in (Command.SAY_YES, Command.SAY_NO):
        _answer(db, of, command is Command.SAY_YES, now)
    elif command is Command.OFFER_UPDATE and outcome.update is not None:
        offer, path = outcome.update, of.update_path
        db.execute(
            "INSERT OR REPLACE INTO transfers_out VALUES (?, ?, ?, ?, ?, ?, ?)",
            (offer.transfer_id, offer.kind, offer.subject, path, offer.sha256, offer.size, now),
        )
    elif command is Command.DROP_TRANSFER:
        db.execute("DELETE FROM transfers_out WHERE kind = 'update' AND subject = ?", (of.round_id,))
    elif command is Command.SAY_STAGE and outcome.said is not None:
        enqueue(db, outcome.said, now)
    elif command is Command.KEEP_PART:
        assert outcome.part is not None
        db.execute("INSERT OR REPLACE INTO masked_parts VALUES (?, ?)", (of.round_id, masking.encode(outcome.part)))
    elif command is Command.NOTE_OPENED:
        replay.note_opened(db, of.round_id)
    elif command is Command.DROP_PART:
        _drop_part(db, of.round_id)
        privacy.release(db, of.round_id)
    elif command is Command.PLEDGE_PRIVACY and outcome.cost is not None:
        privacy.pledge(db, of.round_id, outcome.cost)
    elif command is Command.SPEND_PRIVACY:
        privacy.spend(db, of.round_id)
    elif command is Command.KEEP_SPOOL and outcome.spooled is not None:
        spool.keep(db, outcome.spooled)
    elif command is Command.SHOW_SPOOL:
        spool.show(db)
    elif command is Command.DROP_SPOOL:
        spool.drop(db)
    elif command is Command.DROP_USED:
        spool.drop_used(db, of.round_id)


def _drop_part(db: sqlite3.Connection, round_id: str) -> None:
    db.execute("DELETE FROM masked_parts WHERE round_id = ?", (round_id,))
    database.note_secret_deleted(db)
    for waiting in pending(db):
        if isinstance(waiting, Stage) and waiting.round_id == round_id:
            received(db, waiting.message_id)


def _answer(db: sqlite3.Connection, of: Round, joins: bool, now: float) -> None:
    """The newest answer of a round replaces one that still waits, so that the hub never reads them out of order."""
    for waiting in pending(db):
        if isinstance(waiting, RoundAnswer) and waiting.round_id == of.round_id:
            received(db, waiting.message_id)
    reason = "" if joins else of.reason
    answer = RoundAnswer(
        message_id=message_id("answer", of.round_id, joins, of.examples, reason),
        round_id=of.round_id,
        joins=joins,
        examples=of.examples,
        reason=reason,
    )
    enqueue(db, answer, now)


def _round(row: sqlite3.Row) -> Round:
    plan = messages.decode(row["plan"])
    if not isinstance(plan, RoundPlan):
        raise msgspec.ValidationError(f"round {row['round_id']} holds no plan")
    return Round(
        row["round_id"],
        State(row["state"]),
        plan,
        row["examples"],
        row["update_path"],
        row["reason"],
        row["changed_at"],
    )
