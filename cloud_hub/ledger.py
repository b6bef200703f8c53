"""A round's rows: found, brought forward by what `rounds.advance` decides, dropped by the operator's word.

Reads and writes the tables rounds and round_devices, and those of masked.py; reads who is revoked. Each change is one transaction.
Never decides a transition itself, never touches a file.
Source: ARCHITECTURE.md, "Rounds"; the box's mirror is edge_agent/ledger.py.
"""

import logging

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud_hub import masked, rounds
from cloud_hub.database import Database, Device, MaskedRound, Release, Round, RoundDevice, record_refusal
from cloud_hub.registry import NotFoundError
from cloud_hub.rounds import Event, Member, State
from fleet_link import messages
from fleet_link.errors import SiteError
from fleet_link.messages import RoundPlan

log = logging.getLogger(__name__)

REASON_CHARACTERS = 500
REVOKED = "the device is revoked"
LATE = "left out: the sum was closed before its update was ready; it waits for the next buffered round"
STAGES_AFTER_KEYS = 4  # stage_s that a masked round keeps of its time for what follows the keys, half of it at most


def active_round(session: Session) -> Round | None:
    """At most one round is on at a time."""
    return session.scalars(select(Round).where(Round.state.not_in(rounds.FINISHED))).first()


def find(session: Session, round_id: str) -> Round:
    """Raises NotFoundError."""
    row = session.get(Round, round_id)
    if row is None:
        raise NotFoundError(f"there is no round {round_id[:63]}", advice="fleet round list shows all")
    return row


def plan_of(row: Round) -> RoundPlan:
    plan = messages.decode(row.plan)
    assert isinstance(plan, RoundPlan)  # we wrote it
    return plan


def drop(session: Session, round_id: str, reason: str, now: float) -> None:
    """End a round that is on. The coordinator's next tick clears its files away and has its boxes told.

    Raises NotFoundError, or SiteError when the round is over.
    """
    row = find(session, round_id)
    made = session.scalar(select(Release.release_version).where(Release.round_id == round_id))
    is_published = State(row.state) is State.EVALUATED and made is not None
    if State(row.state) in rounds.FINISHED or is_published:
        raise SiteError(f"round {round_id} is over", advice=f"fleet round show {round_id}")
    advance(session, row, rounds.Failed("dropped by the operator" + (f": {reason}" if reason else "")), now)


def apply(database: Database, round_id: str, event: Event, now: float) -> bool:
    with database.writing() as session:
        return advance(session, session.get_one(Round, round_id), event, now)


def advance(session: Session, row: Round, event: Event, now: float) -> bool:
    """Load, decide, store, in the caller's transaction; and settle what stages are over. True when the state changed."""
    was = row.state
    after = _advance_once(session, row, event, now)
    while rounds.is_stage_over(after, now):  # each time a later state
        after = _advance_once(session, row, masked.settle(session, plan_of(row), after), now)
    if after.masked is not None and after.state in rounds.FINISHED:
        masked.empty(session, row.round_id)
    return row.state != was


def _advance_once(session: Session, row: Round, event: Event, now: float) -> rounds.Round:
    states = session.execute(select(RoundDevice.device, RoundDevice.state).filter_by(round_id=row.round_id)).all()
    of_masked = masked.facts(session, row.round_id)
    before = rounds.Round(
        state=State(row.state),
        deadline_unix_s=row.deadline,
        min_devices=row.min_devices,
        members={device: Member(state) for device, state in states},
        revoked=_revoked(session, row.round_id),
        candidate_digest=row.candidate_digest or "",
        reason=row.reason,
        masked=of_masked,
        buffer=_buffer(row, of_masked.stage_s if of_masked else 0.0),
    )
    after, _ = rounds.advance(before, event, now)
    for device, member in after.members.items():
        if member is not before.members[device]:
            part = session.get_one(RoundDevice, (row.round_id, device))
            _store_member(session, part, before, after, now)
            if part.state == Member.LEFT and isinstance(event, rounds.Settled):
                part.reason = masked.why_ended(session, row.round_id, part.device) or _why_left(before, part.device)
                log.info("round %s: %s %s", part.round_id, part.device, part.reason)
            elif part.state == Member.LEFT and before.masked is None:
                part.reason = LATE
    if after.state is not before.state:
        row.state, row.reason, row.changed_at = after.state, after.reason[:REASON_CHARACTERS], now
        row.candidate_digest = after.candidate_digest or None
        if after.masked is not None:
            session.get_one(MaskedRound, row.round_id).stage_at = after.masked.stage_at
        log.info("round %s: %s -> %s%s", row.round_id, before.state, after.state, after.reason and f" ({after.reason})")
    return after


def _buffer(row: Round, stage_s: float) -> rounds.Buffer | None:
    size = plan_of(row).buffer
    until = max(row.deadline - STAGES_AFTER_KEYS * stage_s, (row.created_at + row.deadline) / 2)
    return rounds.Buffer(size, until) if size else None


def _store_member(session: Session, part: RoundDevice, before: rounds.Round, after: rounds.Round, now: float) -> None:
    part.state, part.changed_at = after.members[part.device], now
    if part.state == Member.REFUSED and part.device in before.revoked:
        _take_out(session, part, now)
    elif part.state == Member.LEFT and before.state in rounds.COLLECTING:
        part.counted_at, part.update_path = None, None  # later its update stays in the sum


def _why_left(before: rounds.Round, device: str) -> str:
    stage = rounds.STAGES[before.state]
    if before.buffer is not None and before.state in rounds.FILLING:
        return LATE
    if before.members[device] in stage.waits_for:
        return f"left out: {stage.what} did not come in time"
    return f"left out: too few of its neighbours sent {stage.what}"


def _revoked(session: Session, round_id: str) -> frozenset[str]:
    devices = session.scalars(
        select(RoundDevice.device)
        .join(Device, Device.device == RoundDevice.device)
        .where(RoundDevice.round_id == round_id, Device.revoked_at.is_not(None))
    )
    return frozenset(devices)


def _take_out(session: Session, part: RoundDevice, now: float) -> None:
    """Its file, if there is one, counts no more: the sum follows the rows."""
    part.reason, part.counted_at, part.update_path = REVOKED, None, None
    record_refusal(session, device=part.device, what="update", reason=f"{part.round_id}: {REVOKED}", now=now)
    log.warning("round %s: %s gives nothing: %s", part.round_id, part.device, REVOKED)
