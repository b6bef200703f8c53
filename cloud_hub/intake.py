"""What boxes bring to a round: answers, stages of masked rounds, sealed updates; each verified, kept once, or refused.

Reads and writes the tables round_devices and masked_parts, and data_dir/rounds/<round>/updates; runs in the hub's one loop.
Never counts an update twice: the row is the count, the sum is rebuilt from rows and files whenever it differs from them.
Source: ARCHITECTURE.md, "Rounds".
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud_hub import collection, ledger, masked, memory, registry, rounds, secure_sum
from cloud_hub.collection import Collection, Counted, LostError, MaskedCollection, Vault
from cloud_hub.config import Config
from cloud_hub.database import Database, Release, Round, RoundDevice, record_refusal
from cloud_hub.ledger import REASON_CHARACTERS
from cloud_hub.masked import StageMessage
from cloud_hub.releases import Repository
from cloud_hub.robust import RULES, bucketed
from cloud_hub.rounds import Event, Member, State
from cloud_hub.update import MaskedUpdate, Update
from fleet_link import notify
from fleet_link.cohort import Judge
from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.files import move_durably
from fleet_link.messages import RoundAnswer, RoundPlan, TransferOffer
from models import addable
from models.delta import Arrays
from models.errors import DeltaError

log = logging.getLogger(__name__)

_TOLD = (State.SHARING, State.TRAINING, State.AGREEING, State.UNMASKING)  # stages that begin with a word of the hub

Came = Callable[[Session], None]


def _unnoted(_session: Session) -> None:
    pass


class Intake:
    """Owned by the hub's loop."""

    def __init__(self, config: Config, database: Database, repository: Repository, vault: Vault) -> None:
        self._config = config
        self._database = database
        self._repository = repository
        self._vault = vault
        self._collection: Collection | None = None
        self._masked: MaskedCollection | None = None
        self._has_moved = False
        self._has_work = False

    def has_work(self) -> bool:
        """Whether the round has come since this was asked last to where the coordinator has something to do."""
        work, self._has_work = self._has_work, False
        return work

    def has_moved(self) -> bool:
        """Whether a stage has begun since this was asked last: its boxes are to hear of it now."""
        moved, self._has_moved = self._has_moved, False
        return moved

    def apply(self, round_id: str, event: Event, now: float) -> None:
        with self._database.writing() as session:
            self._advance(session, session.get_one(Round, round_id), event, now)

    def answered(self, device: str, answer: RoundAnswer, now: float, came: Came = _unnoted) -> tuple[bool, str]:
        """Store an answer; the same one again is accepted again. Gives (accepted, reason).

        `came` notes in the same transaction that the message came.
        """
        with self._database.writing() as session:
            came(session)
            row = session.get(Round, answer.round_id)
            part = session.get(RoundDevice, (answer.round_id, device))
            if row is None or part is None:
                return False, f"{device} is not invited to a round {answer.round_id}"
            if State(row.state) in rounds.FINISHED:
                return False, f"round {answer.round_id} is over"
            before = part.state
            self._advance(session, row, rounds.Answered(device, answer.joins), now)
            if part.state in (Member.JOINED, Member.DECLINED, Member.LEFT) and part.state != before:
                part.examples, part.reason = answer.examples, answer.reason
                log.info("round %s: %s %s", answer.round_id, device, part.state)
            elif part.state == Member.KEYED:  # its keys came first
                part.examples = answer.examples
        return True, ""

    def took(self, device: str, message: StageMessage, now: float, came: Came = _unnoted) -> tuple[bool, str]:
        """Store what a stage of a masked round asked for; the same again is accepted again. Gives (accepted, reason).

        `came`: as in `answered`; of what is refused it alone is kept, with the refusal.
        """
        try:
            with self._database.writing() as session:
                came(session)
                return self._took(session, device, message, now)
        except (TrustError, LinkError) as error:
            with self._database.writing() as session:
                came(session)
                record_refusal(session, device=device, what="message", reason=str(error), now=now)
            log.warning("round %s: %s: refused: %s", message.round_id, device, error)
            return False, str(error)[:REASON_CHARACTERS]

    def _took(self, session: Session, device: str, message: StageMessage, now: float) -> tuple[bool, str]:
        row = session.get(Round, message.round_id)
        part = session.get(RoundDevice, (message.round_id, device))
        if row is None or part is None:
            return False, f"{device} is not invited to a round {message.round_id}"
        plan, event = ledger.plan_of(row), masked.EVENTS[type(message)]
        if State(row.state) in rounds.FINISHED:
            return False, f"round {row.round_id} is over"
        if masked.is_known(session, device, message):
            return True, ""
        if plan.kind != "masked" or not rounds.expects(State(row.state), Member(part.state), event):
            kind = type(message).__name__
            return False, f"no {kind} is expected of {device}: it is {part.state}, round {row.round_id} is {row.state}"
        masked.check(session, plan, device, message, Judge(self._vault.trust, now))
        masked.keep(session, device, message)
        self._advance(session, row, event(device), now)
        return True, ""

    def judge_update(
        self, device: str, offer: TransferOffer, now: float
    ) -> tuple[Literal["take", "wait", "done", "refuse"], str]:
        """What to do with the offer of an update, and why it is refused. A round whose base is lost ends here."""
        with self._database.reading() as session:
            row = session.get(Round, offer.subject)
            part = session.get(RoundDevice, (offer.subject, device))
        if row is None or part is None:
            return "refuse", f"{device} is not invited to a round {offer.subject}"
        if part.state in (Member.DELIVERED, Member.AGREED, Member.UNMASKED):
            return "done", ""
        if part.state in (Member.REFUSED, Member.DECLINED, Member.LEFT):
            return "refuse", part.reason or f"{device} has {part.state}"
        if State(row.state) not in rounds.COLLECTING:
            return "refuse", f"round {offer.subject} is over"
        plan = ledger.plan_of(row)
        try:
            limit = self._bytes_max(plan)
        except LostError as error:
            return "refuse", self._failed(offer.subject, error, now)
        if offer.size > limit:
            return "refuse", f"{offer.size} bytes, at most {limit} are taken"
        awaited = Member.JOINED if plan.kind == "unsafe_open" else Member.SHARED
        return ("take", "") if part.state == awaited else ("wait", "")

    def update_bytes_max(self, round_id: str) -> int:
        """A sealed update holds the tensors of its base in fewer bits: it is never much larger. Masked: exactly so large.

        Raises LostError.
        """
        with self._database.reading() as session:
            plan = ledger.plan_of(session.get_one(Round, round_id))
        return self._bytes_max(plan)

    def _bytes_max(self, plan: RoundPlan) -> int:
        if plan.kind == "masked":
            return self._opener(plan).update_bytes_max
        with self._database.reading() as session:
            base_bytes = session.scalars(select(Release.size).filter_by(bundle_digest=plan.base_digest)).first()
        return int(self._config.rounds.update_per_base_max * (base_bytes or 0))

    def take_update(self, device: str, offer: TransferOffer, path: Path, now: float) -> str:
        """Verify and count a whole, durable update file; the file is moved. Gives "" or the reason of a refusal."""
        round_id = offer.subject
        action, reason = self.judge_update(device, offer, now)
        if action != "take":
            path.unlink(missing_ok=True)
            return reason
        try:
            collected, group_no = self._collecting(round_id, device)
        except LostError as error:
            return self._failed(round_id, error, now)
        kept = self._config.paths.rounds / round_id / "updates" / f"{device}.sealed"
        try:
            update = collected.open(path, sender=device, now=now)
            with self._database.reading() as session:
                registry.check_certificate(session, device, update.serial)
        except TrustError as error:
            path.unlink(missing_ok=True)
            self.refuse_update(device, round_id, str(error), now)
            return str(error)[:REASON_CHARACTERS]
        move_durably(path, kept)
        if isinstance(collected, MaskedCollection) and isinstance(update, MaskedUpdate):
            collected.add(Counted(device, kept, now), update, group_no)
        elif isinstance(collected, Collection) and isinstance(update, Update):
            collected.add(Counted(device, kept, now), update)
        return self._count(device, offer, kept, update, now)

    def _collecting(self, round_id: str, device: str) -> tuple[Collection | MaskedCollection, int]:
        """What takes the device's update, and the number of its group. Raises LostError."""
        with self._database.reading() as session:
            plan = ledger.plan_of(session.get_one(Round, round_id))
            group_no = masked.group_no(session, round_id, device) if plan.kind == "masked" else 0
        return (self._opener(plan) if plan.kind == "masked" else self.collected(round_id)), group_no

    def _failed(self, round_id: str, error: LostError, now: float) -> str:
        self.apply(round_id, rounds.Failed(str(error)), now)
        return f"round {round_id} is over"

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
        log.warning("round %s: refused the update of %s: %s", round_id, device, reason[:REASON_CHARACTERS])

    def mean(self, round_id: str) -> Mapping[str, NDArray[np.float32]]:
        """Of a round that is summed: what its updates change on average. Raises LostError when it cannot be made."""
        with self._database.reading() as session:
            plan = ledger.plan_of(session.get_one(Round, round_id))
        is_masked = plan.kind == "masked"
        try:
            return self._unmasked(plan) if is_masked else self.collected(round_id).total.mean()
        except (LinkError, TrustError, DeltaError) as error:
            is_one_sum = is_masked and plan.groups == 1
            what = _what_failed(error) if is_one_sum else f"{plan.rule} cannot be computed"
            raise LostError(f"{what}: {error}", advice=error.advice) from error

    def _unmasked(self, plan: RoundPlan) -> Arrays:
        """One group's mean, or the rule over the means of all groups whose sum can be one of honest boxes."""
        opener = self._opener(plan)
        with self._database.reading() as session:
            groups = masked.groups_on(session, plan.round_id)
        if plan.groups == 1:
            return self._mean_of_group(plan, groups[0])[0]
        means: list[tuple[Arrays, int]] = []
        odd: dict[int, str] = {}
        for number in groups:
            try:
                means.append(self._mean_of_group(plan, number))
            except (LinkError, TrustError, DeltaError) as error:
                odd[number] = f"{_what_failed(error)}: {error}"
            except LostError as error:
                odd[number] = str(error)
        if odd:
            with self._database.writing() as session:
                masked.end_groups(session, plan.round_id, odd)
        with self._database.reading() as session:
            masked.check_enough(session, plan)
        return bucketed(RULES[plan.rule], means, opener.opener.layout.shapes)

    def _mean_of_group(self, plan: RoundPlan, group_no: int) -> tuple[Arrays, int]:
        """And of how many boxes: what the hub itself counted, no box's word."""
        with self._database.reading() as session:
            circle, told, rebuilt = masked.opened(session, plan.round_id, group_no, notify.watchdog)
            parts = session.scalars(select(RoundDevice).filter_by(round_id=plan.round_id)).all()
        if rebuilt.wrong_shares:
            log.warning("round %s: wrong shares, (of, told by): %s", plan.round_id, rebuilt.wrong_shares)
        data_dir = self._config.paths.data_dir
        counted = [
            Counted(part.device, data_dir / (part.update_path or ""), part.counted_at or 0.0)
            for part in parts
            if part.device in told.active
        ]
        opener = self._opener(plan)
        total = opener.sum(counted, group_no)
        words = secure_sum.unmask(total, circle, told, rebuilt, alive=notify.watchdog)
        return addable.decode_sum(words, opener.opener.layout, boxes=len(told.active)), len(told.active)

    def _opener(self, plan: RoundPlan) -> MaskedCollection:
        """Raises LostError."""
        held = self._masked
        if held is None or held.plan.round_id != plan.round_id:
            held = self._masked = collection.masked(plan, self.base(plan.base_digest), self._vault)
        return held

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
        self._collection = self._masked = None
        memory.give_back()

    def _advance(self, session: Session, row: Round, event: Event, now: float) -> None:
        if not ledger.advance(session, row, event, now):
            return
        if row.state in _TOLD and ledger.plan_of(row).kind == "masked":
            self._has_moved = True
        if rounds.commands(State(row.state)):
            self._has_work = True

    def _count(self, device: str, offer: TransferOffer, kept: Path, update: Update | MaskedUpdate, now: float) -> str:
        """Gives "", or why it does not count: its round was dropped or itself revoked at this very moment."""
        with self._database.writing() as session:
            row = session.get_one(Round, offer.subject)
            part = session.get_one(RoundDevice, (offer.subject, device))
            self._advance(session, row, rounds.Delivered(device), now)
            if part.state != Member.DELIVERED:
                return part.reason or f"round {offer.subject} is over"
            part.examples = update.examples
            part.update_path = str(kept.relative_to(self._config.paths.data_dir))
            part.update_sha256 = offer.sha256
            part.bytes_received = offer.size
            part.counted_at = now
        log.info("round %s: counted %s, %d examples", offer.subject, device, update.examples)
        return ""


def _what_failed(error: LinkError | TrustError | DeltaError) -> str:
    return "the masked sum is refused" if isinstance(error, DeltaError) else "the masks do not come off"


def _alive(counted: Iterable[Counted]) -> Iterator[Counted]:
    """Opening many updates again takes long; the watchdog is told meanwhile."""
    for row in counted:
        notify.watchdog()
        yield row
