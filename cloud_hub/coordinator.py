"""Rounds on disk: start one, take answers and updates, carry out what `rounds.advance` commands.

Reads and writes the tables rounds and round_devices, and data_dir/rounds; runs in the hub's one loop.
Never decides a transition itself, never counts an update twice: the row is the count, the sum is rebuilt from it.
Source: ARCHITECTURE.md, "Rounds".
"""

import logging
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud_hub import candidate, collection, releases, rounds
from cloud_hub.candidate import CandidateError, Export, Order
from cloud_hub.collection import Collection, Counted, LostError, Vault
from cloud_hub.config import Config
from cloud_hub.database import Certificate, Database, Device, Release, Round, RoundDevice, record_refusal
from cloud_hub.releases import Repository
from cloud_hub.rollout import Stage
from cloud_hub.rounds import Command, Event, Member, State
from cloud_hub.update import Update
from fleet_link import messages, sealing
from fleet_link.errors import SiteError, TrustError
from fleet_link.files import move_durably
from fleet_link.messages import RoundAnswer, RoundPlan, TransferOffer
from models.bundle import file_digest

log = logging.getLogger(__name__)

GRACE_S = 60.0  # a hub that was away gives the boxes this long to deliver, whatever the deadline
CANDIDATE = "candidate.bundle"
REASON_CHARACTERS = 500


def start_round(
    session: Session,
    config: Config,
    *,
    kind: Literal["unsafe_open", "masked"],
    rule: Literal["fedavg"],
    trainable: Literal["all", "heads"],
    epochs: int,
    learning_rate: float,
    clip_norm: float,
    min_examples: int,
    min_devices: int,
    deadline_s: float,
    devices: Sequence[str] | None,
    now: float,
) -> str:
    """Store a round over the newest release that is not halted and give its id; `devices` None: every enrolled one.

    Raises SiteError when a round is on, or when this one could not end well.
    """
    if kind == "masked":
        raise SiteError("this version of the hub knows no masked rounds", advice="start an unsafe_open round")
    active = active_round(session)
    if active is not None:
        raise SiteError(f"round {active.round_id} is on ({active.state})", advice="wait for its end: fleet round list")
    base = session.scalars(
        select(Release).where(Release.state != Stage.HALTED).order_by(Release.release_version.desc())
    ).first()
    if base is None:
        raise SiteError("there is no release to start from", advice="complete the hub: hub init")
    invited = _invited(session, devices)
    if len(invited) < min_devices:
        raise SiteError(
            f"{len(invited)} devices are invited, {min_devices} are needed",
            advice="enrol more boxes or lower --min-devices",
        )
    count = len(session.scalars(select(Round.round_id)).all())
    plan = RoundPlan(
        message_id=secrets.token_hex(16),
        round_id=f"r{count + 1:04d}",
        kind=kind,
        base_digest=base.bundle_digest,
        rule=rule,
        trainable=trainable,
        clip_norm=clip_norm,
        epochs=epochs,
        learning_rate=learning_rate,
        min_examples=min_examples,
        seed=secrets.randbelow(1_000_000_000),
        sealing_key=sealing.public_bytes(sealing.load_sealing_key(config.paths.sealing_key)),
        deadline_unix_s=now + deadline_s,
    )
    _add_rows(session, plan, invited, min_devices, now)
    log.info("round %s: invited %d devices", plan.round_id, len(invited))
    return plan.round_id


def active_round(session: Session) -> Round | None:
    """At most one round is on at a time."""
    return session.scalars(select(Round).where(Round.state.not_in(rounds.FINISHED))).first()


def plan_of(row: Round) -> RoundPlan:
    plan = messages.decode(row.plan)
    assert isinstance(plan, RoundPlan)  # we wrote it
    return plan


class Coordinator:
    """Owned by the hub's loop. `start` once, then `tick`, and the other calls as messages come."""

    def __init__(
        self,
        config: Config,
        database: Database,
        repository: Repository,
        vault: Vault,
        *,
        export_command: tuple[str, ...] = candidate.EXPORT,
    ) -> None:
        self._config = config
        self._database = database
        self._repository = repository
        self._vault = vault
        self._export_command = export_command
        self._export: Export | None = None
        self._collection: Collection | None = None
        self._last = ""  # the round that was active at the last tick
        self._told = ""  # the active round that boxes have heard of
        self._started_at = 0.0

    def start(self, now: float) -> None:
        """Repair half-done work: rows that follow published files, leftovers of exports and of finished rounds."""
        self._started_at = now
        with self._database.writing() as session:
            for release in self._repository.listed():
                releases.add_row(session, release, now=now)
            active = active_round(session)
        for folder in self._config.paths.rounds.glob("*"):
            if active is None or folder.name != active.round_id:
                shutil.rmtree(folder, ignore_errors=True)
        if active is not None:
            candidate.clear(self._folder(active.round_id))
            log.info("round %s: goes on, %s", active.round_id, active.state)

    def tick(self, now: float) -> bool:
        """Do what time and the state demand. True when boxes should hear of it: a round began or ended."""
        active = self._active()
        if active:
            self._apply(active, rounds.Tick(), now)
            self._refuse_revoked(active, now)
        for round_id in {self._last, active} - {""}:
            self._carry_out(round_id, now)
        self._last = active  # carried out once more after its end: to be closed
        told, self._told = self._told, self._active()
        return told != self._told

    def _active(self) -> str:
        with self._database.reading() as session:
            row = active_round(session)
        return row.round_id if row is not None else ""

    def stop(self) -> None:
        if self._export is not None:
            self._export.stop()

    # --- what boxes say -------------------------------------------------------------------------------

    def answered(self, device: str, answer: RoundAnswer, now: float) -> tuple[bool, str]:
        """Store an answer; the same one again is accepted again. Gives (accepted, reason)."""
        with self._database.writing() as session:
            row = session.get(Round, answer.round_id)
            part = session.get(RoundDevice, (answer.round_id, device))
            if row is None or part is None:
                return False, f"{device} is not invited to a round {answer.round_id}"
            if State(row.state) in rounds.FINISHED:
                return False, f"round {answer.round_id} is over"
            before = part.state
            self._advance(session, row, rounds.Answered(device, answer.joins), now)
            if part.state != before:
                part.examples, part.reason = answer.examples, answer.reason
                log.info("round %s: %s %s", answer.round_id, device, part.state)
        return True, ""

    def judge_update(self, device: str, offer: TransferOffer) -> tuple[Literal["take", "wait", "done", "refuse"], str]:
        """What to do with the offer of an update, and why it is refused."""
        with self._database.reading() as session:
            row = session.get(Round, offer.subject)
            part = session.get(RoundDevice, (offer.subject, device))
        if row is None or part is None:
            return "refuse", f"{device} is not invited to a round {offer.subject}"
        if part.state == Member.DELIVERED:
            return "done", ""
        if part.state in (Member.REFUSED, Member.DECLINED):
            return "refuse", part.reason or f"{device} has {part.state}"
        if State(row.state) not in rounds.COLLECTING:
            return "refuse", f"round {offer.subject} is over"
        if offer.size > self._config.rounds.update_bytes_max:
            return "refuse", f"{offer.size} bytes, at most {self._config.rounds.update_bytes_max} are taken"
        return ("take", "") if part.state == Member.JOINED else ("wait", "")

    def take_update(self, device: str, offer: TransferOffer, path: Path, now: float) -> str:
        """Verify and count a whole, durable update file; the file is moved. Gives "" or the reason of a refusal."""
        round_id = offer.subject
        action, reason = self.judge_update(device, offer)
        if action != "take":
            path.unlink(missing_ok=True)
            return reason
        try:
            collected = self._collect(round_id)
        except LostError as error:
            self._apply(round_id, rounds.Failed(str(error)), now)
            return f"round {round_id} is over"
        try:
            update = collected.open(path, sender=device, now=now)
        except TrustError as error:
            path.unlink(missing_ok=True)
            self.refuse_update(device, round_id, str(error), now)
            return str(error)[:REASON_CHARACTERS]
        kept = self._folder(round_id) / "updates" / f"{device}.sealed"
        move_durably(path, kept)
        try:
            collected.add(update)
            self._count(device, offer, kept, update, now)
        except BaseException:
            self._collection = None  # sum and rows may differ: rebuilt from the rows when it is next used
            raise
        log.info("round %s: counted %s, %d examples", round_id, device, update.examples)
        return ""

    def refuse_update(self, device: str, round_id: str, reason: str, now: float) -> None:
        """This device gives nothing to this round any more; the others do."""
        with self._database.writing() as session:
            row = session.get(Round, round_id)
            part = session.get(RoundDevice, (round_id, device))
            record_refusal(session, device=device, what="update", reason=f"{round_id}: {reason}", now=now)
            if row is None or part is None:
                return
            self._advance(session, row, rounds.Refused(device), now)
            if part.state == Member.REFUSED:
                part.reason = reason[:REASON_CHARACTERS]
        log.warning("round %s: refused the update of %s: %s", round_id, device, reason)

    def _count(self, device: str, offer: TransferOffer, kept: Path, update: Update, now: float) -> None:
        with self._database.writing() as session:
            row = session.get_one(Round, offer.subject)
            part = session.get_one(RoundDevice, (offer.subject, device))
            part.examples = update.examples
            part.update_path = str(kept.relative_to(self._config.paths.data_dir))
            part.update_sha256 = offer.sha256
            part.bytes_received = offer.size
            part.counted_at = now
            self._advance(session, row, rounds.Delivered(device), now)

    # --- the sum --------------------------------------------------------------------------------------

    def _collect(self, round_id: str) -> Collection:
        """The round's running sum, rebuilt from rows and files when this process does not hold it. Raises LostError."""
        if self._collection is not None and self._collection.plan.round_id == round_id:
            return self._collection
        with self._database.reading() as session:
            plan = plan_of(session.get_one(Round, round_id))
            parts = session.scalars(
                select(RoundDevice).filter_by(round_id=round_id, state=Member.DELIVERED).order_by(RoundDevice.device)
            ).all()
        data_dir = self._config.paths.data_dir
        counted = [Counted(p.device, data_dir / (p.update_path or ""), p.counted_at or 0.0) for p in parts]
        base = self._repository.bundle_path(plan.base_digest)
        self._collection = collection.rebuild(plan, base, self._vault, counted)
        return self._collection

    # --- transitions and commands ---------------------------------------------------------------------

    def _apply(self, round_id: str, event: Event, now: float) -> None:
        with self._database.writing() as session:
            self._advance(session, session.get_one(Round, round_id), event, now)

    def _advance(self, session: Session, row: Round, event: Event, now: float) -> None:
        """Load, decide, store, in the caller's transaction."""
        parts = session.scalars(select(RoundDevice).filter_by(round_id=row.round_id)).all()
        before = rounds.Round(
            state=State(row.state),
            deadline_unix_s=max(row.deadline, self._started_at + GRACE_S),
            min_devices=row.min_devices,
            members={part.device: Member(part.state) for part in parts},
            candidate_digest=row.candidate_digest or "",
            reason=row.reason,
        )
        after, _ = rounds.advance(before, event, now)
        for part in parts:
            if part.state != after.members[part.device]:
                part.state, part.changed_at = after.members[part.device], now
        if after.state is not before.state:
            row.state, row.reason, row.changed_at = after.state, after.reason[:REASON_CHARACTERS], now
            row.candidate_digest = after.candidate_digest or None
            log.info(
                "round %s: %s -> %s%s", row.round_id, before.state, after.state, after.reason and f" ({after.reason})"
            )

    def _refuse_revoked(self, round_id: str, now: float) -> None:
        with self._database.reading() as session:
            revoked = session.scalars(
                select(RoundDevice.device)
                .join(Device, Device.device == RoundDevice.device)
                .where(RoundDevice.round_id == round_id, Device.revoked_at.is_not(None))
                .where(RoundDevice.state.in_((Member.INVITED, Member.JOINED)))
            ).all()
        for device in revoked:
            self.refuse_update(device, round_id, "the device is revoked", now)

    def _carry_out(self, round_id: str, now: float) -> None:
        with self._database.reading() as session:
            row = session.get_one(Round, round_id)
        demanded = rounds.commands(State(row.state))
        if Command.BUILD in demanded:
            self._build(row, now)
        if Command.PUBLISH in demanded:
            self._publish(row, now)
        if Command.CLOSE in demanded:
            self._close(row.round_id)

    def _build(self, row: Round, now: float) -> None:
        try:
            if self._export is None:
                self._export = self._start_export(row, now)
            bundle = self._export.poll(now)
            if bundle is None:
                return
        except (CandidateError, LostError) as error:
            self._export = None
            self._apply(row.round_id, rounds.Failed(str(error)), now)
            return
        self._export = None
        move_durably(bundle, self._folder(row.round_id) / CANDIDATE)
        candidate.clear(self._folder(row.round_id))
        digest = file_digest(self._folder(row.round_id) / CANDIDATE)
        self._apply(row.round_id, rounds.CandidateReady(digest), now)

    def _start_export(self, row: Round, now: float) -> Export:
        folder = self._folder(row.round_id)
        candidate.clear(folder)
        mean = self._collect(row.round_id).total.mean()
        base, timeout_s = self._repository.bundle_path(row.base_digest), self._config.rounds.export_timeout_s
        return Export(Order(folder, base, row.round_id, timeout_s, self._export_command), mean, now=now)

    def _publish(self, row: Round, now: float) -> None:
        path = self._folder(row.round_id) / CANDIDATE
        listed = next((r for r in self._repository.listed() if r.bundle_digest == row.candidate_digest), None)
        if listed is None and (not path.exists() or file_digest(path) != row.candidate_digest):
            self._apply(row.round_id, rounds.Failed("the candidate was lost from the hub's disk"), now)
            return
        release = listed or self._repository.publish(path, round_id=row.round_id, now=now)
        with self._database.writing() as session:
            releases.add_row(session, release, now=now)
            self._advance(session, session.get_one(Round, row.round_id), rounds.Published(), now)

    def _close(self, round_id: str) -> None:
        """Nothing of the round's files is needed any more; what a crash leaves here goes at the next start."""
        self.stop()
        self._export = self._collection = None
        shutil.rmtree(self._config.paths.rounds / round_id, ignore_errors=True)

    def _folder(self, round_id: str) -> Path:
        folder = self._config.paths.rounds / round_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _invited(session: Session, devices: Sequence[str] | None) -> list[str]:
    enrolled = session.scalars(
        select(Device.device)
        .join(Certificate, Certificate.device == Device.device)
        .where(Device.revoked_at.is_(None), Certificate.revoked_at.is_(None))
        .distinct()
        .order_by(Device.device)
    ).all()
    if devices is None:
        return list(enrolled)
    for device in devices:
        if device not in enrolled:
            raise SiteError(f"{device[:63]} is not an enrolled device", advice="fleet devices shows all")
    return sorted(set(devices))


def _add_rows(session: Session, plan: RoundPlan, invited: Sequence[str], min_devices: int, now: float) -> None:
    session.add(
        Round(
            round_id=plan.round_id,
            state=State.INVITED,
            plan=messages.encode(plan),
            min_devices=min_devices,
            base_digest=plan.base_digest,
            created_at=now,
            changed_at=now,
            deadline=plan.deadline_unix_s,
        )
    )
    session.flush()
    for device in invited:
        session.add(RoundDevice(round_id=plan.round_id, device=device, state=Member.INVITED, changed_at=now))
    session.flush()
