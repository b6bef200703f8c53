"""What boxes bring to a round: answers and sealed updates, each verified, counted once, or refused with its reason.

Reads and writes the table round_devices and data_dir/rounds/<round>/updates; runs in the hub's one loop.
Never counts an update twice: the row is the count, the sum is rebuilt from rows and files whenever it differs from them.
Source: ARCHITECTURE.md, "Rounds".
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from sqlalchemy import select

from cloud_hub import collection, ledger, registry, rounds
from cloud_hub.collection import Collection, Counted, LostError, Vault
from cloud_hub.config import Config
from cloud_hub.database import Database, Release, Round, RoundDevice, record_refusal
from cloud_hub.ledger import REASON_CHARACTERS
from cloud_hub.releases import Repository
from cloud_hub.rounds import Member, State
from cloud_hub.update import Update
from fleet_link import notify
from fleet_link.errors import SiteError, TrustError
from fleet_link.files import move_durably
from fleet_link.messages import RoundAnswer, TransferOffer

log = logging.getLogger(__name__)


class Intake:
    """Owned by the hub's loop."""

    def __init__(self, config: Config, database: Database, repository: Repository, vault: Vault) -> None:
        self._config = config
        self._database = database
        self._repository = repository
        self._vault = vault
        self._collection: Collection | None = None

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
            ledger.advance(session, row, rounds.Answered(device, answer.joins), now)
            if part.state in (Member.JOINED, Member.DECLINED) and part.state != before:
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
        if offer.size > (limit := self.update_bytes_max(offer.subject)):
            return "refuse", f"{offer.size} bytes, at most {limit} are taken"
        return ("take", "") if part.state == Member.JOINED else ("wait", "")

    def update_bytes_max(self, round_id: str) -> int:
        """A sealed update holds the tensors of its base in fewer bits: it is never much larger."""
        with self._database.reading() as session:
            base_bytes = session.scalars(
                select(Release.size)
                .join(Round, Round.base_digest == Release.bundle_digest)
                .where(Round.round_id == round_id)
            ).first()
        return int(self._config.rounds.update_per_base_max * (base_bytes or 0))

    def take_update(self, device: str, offer: TransferOffer, path: Path, now: float) -> str:
        """Verify and count a whole, durable update file; the file is moved. Gives "" or the reason of a refusal."""
        round_id = offer.subject
        action, reason = self.judge_update(device, offer)
        if action != "take":
            path.unlink(missing_ok=True)
            return reason
        try:
            collected = self.collected(round_id)
        except LostError as error:
            ledger.apply(self._database, round_id, rounds.Failed(str(error)), now)
            return f"round {round_id} is over"
        try:
            update = collected.open(path, sender=device, now=now)
            with self._database.reading() as session:
                registry.check_certificate(session, device, update.serial)
        except TrustError as error:
            path.unlink(missing_ok=True)
            self.refuse_update(device, round_id, str(error), now)
            return str(error)[:REASON_CHARACTERS]
        kept = self._config.paths.rounds / round_id / "updates" / f"{device}.sealed"
        move_durably(path, kept)
        collected.add(device, update)
        return self._count(device, offer, kept, update, now)

    def refuse_update(self, device: str, round_id: str, reason: str, now: float) -> None:
        """This device gives nothing to this round any more; the others do."""
        with self._database.writing() as session:
            row = session.get(Round, round_id)
            part = session.get(RoundDevice, (round_id, device))
            record_refusal(session, device=device, what="update", reason=f"{round_id}: {reason}", now=now)
            if row is None or part is None:
                return
            ledger.advance(session, row, rounds.Refused(device), now)
            if part.state == Member.REFUSED:
                part.reason = reason[:REASON_CHARACTERS]
        log.warning("round %s: refused the update of %s: %s", round_id, device, reason)

    def collected(self, round_id: str) -> Collection:
        """The round's running sum over exactly the devices whose rows count now. Raises LostError."""
        with self._database.reading() as session:
            plan = ledger.plan_of(session.get_one(Round, round_id))
            parts = session.scalars(
                select(RoundDevice).filter_by(round_id=round_id, state=Member.DELIVERED).order_by(RoundDevice.device)
            ).all()
        held = self._collection
        if held is None or held.plan.round_id != round_id or held.devices != {part.device for part in parts}:
            data_dir = self._config.paths.data_dir
            counted = [Counted(p.device, data_dir / (p.update_path or ""), p.counted_at or 0.0) for p in parts]
            base = self.base(plan.base_digest)
            held = self._collection = collection.rebuild(plan, base, self._vault, _alive(counted))
        return held

    def base(self, digest: str) -> Path:
        """The bundle that the round starts from. Raises LostError."""
        try:
            return self._repository.bundle_path(digest)
        except SiteError as error:
            raise LostError(f"the round's base: {error}", advice=error.advice) from error

    def forget(self) -> None:
        """The round is over: its sum leaves the memory."""
        self._collection = None

    def _count(self, device: str, offer: TransferOffer, kept: Path, update: Update, now: float) -> str:
        """Gives "", or why it does not count: its round was dropped or itself revoked at this very moment."""
        with self._database.writing() as session:
            row = session.get_one(Round, offer.subject)
            part = session.get_one(RoundDevice, (offer.subject, device))
            ledger.advance(session, row, rounds.Delivered(device), now)
            if part.state != Member.DELIVERED:
                return part.reason or f"round {offer.subject} is over"
            part.examples = update.examples
            part.update_path = str(kept.relative_to(self._config.paths.data_dir))
            part.update_sha256 = offer.sha256
            part.bytes_received = offer.size
            part.counted_at = now
        log.info("round %s: counted %s, %d examples", offer.subject, device, update.examples)
        return ""


def _alive(counted: Iterable[Counted]) -> Iterator[Counted]:
    """Opening many updates again takes long; the watchdog is told meanwhile."""
    for row in counted:
        notify.watchdog()
        yield row
