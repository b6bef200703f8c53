"""The stages of a masked round: what came from each box, what was settled in each group, what is owed to whom.

Reads and writes the tables masked_rounds, masked_groups and masked_parts, in the caller's transaction.
Never settles a stage twice, never judges what secure_sum.py judges, never opens an update; no share gets into a log.
Source: Bonawitz et al. 2017, figure 4; the box's end is edge_agent/masked.py, which knows its own group as the cohort.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from cloud_hub import registry, rounds, secure_sum
from cloud_hub.database import MaskedGroup, MaskedPart, MaskedRound
from cloud_hub.robust import ROBUST_MIN
from cloud_hub.rounds import Failed, Member, Round, Settled, State
from cloud_hub.secure_sum import NEXT_ROUND, Circle
from fleet_link import cohort, masking, messages
from fleet_link.cohort import Judge, RoundOf
from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.messages import (
    GROUPS,
    AnyMessage,
    Message,
    RoundKeys,
    RoundPlan,
    Shares,
    Survivors,
    SurvivorsSigned,
    Unmask,
)
from fleet_link.pki import parse_certificate, serial_hex
from fleet_link.sealing import plan_digest

log = logging.getLogger(__name__)

REASON_CHARACTERS = 400  # of one group's end
StageMessage = RoundKeys | Shares | SurvivorsSigned | Unmask
StageEvent = rounds.Keyed | rounds.Shared | rounds.Signed | rounds.Unmasked

EVENTS: Mapping[type[StageMessage], type[StageEvent]] = MappingProxyType(
    {RoundKeys: rounds.Keyed, Shares: rounds.Shared, SurvivorsSigned: rounds.Signed, Unmask: rounds.Unmasked}
)
_COLUMNS: Mapping[type[StageMessage], str] = MappingProxyType(
    {RoundKeys: "keys", Shares: "shares", SurvivorsSigned: "signature", Unmask: "unmask"}
)
_ANY_ID = "0" * 32  # what is kept is the message, not the letter it came in
_ANY_KEY = X25519PrivateKey.from_private_bytes(bytes(32))  # no secret: to try another key with
M = TypeVar("M", bound=Message)


def begin(session: Session, round_id: str, stage_s: float, now: float) -> None:
    session.add(MaskedRound(round_id=round_id, stage_at=now, stage_s=stage_s))


def facts(session: Session, round_id: str) -> rounds.Masked | None:
    """None for an open round."""
    row = session.get(MaskedRound, round_id)
    if row is None:
        return None
    told = session.scalars(select(MaskedGroup.survivors).filter_by(round_id=round_id)).all()
    is_one_sum = len(told) == 1  # a group can be left out, with whoever is in its sum
    active = _read_survivors(told[0]).active if is_one_sum and told[0] else ()
    return rounds.Masked(row.stage_at, row.stage_s, frozenset(active))


def grant(session: Session, round_id: str, until: float) -> None:
    """After a restart: the stage goes on until then at least."""
    row = session.get(MaskedRound, round_id)
    if row is not None:
        row.stage_at = max(row.stage_at, until - row.stage_s)


def empty(session: Session, round_id: str) -> None:
    """The round is over: what its boxes said goes, that they said it stays."""
    for column in _COLUMNS.values():
        kept = getattr(MaskedPart, column)
        session.execute(
            update(MaskedPart).where(MaskedPart.round_id == round_id, kept.is_not(None)).values({column: b""})
        )
    nothing = {"circle": None, "sharing": None, "survivors": None}
    session.execute(update(MaskedGroup).where(MaskedGroup.round_id == round_id).values(nothing))


# --- what comes -----------------------------------------------------------------------------------


def is_known(session: Session, device: str, message: StageMessage) -> bool:
    """The same was said before: it is on our disk."""
    part = session.get(MaskedPart, (message.round_id, device))
    return part is not None and getattr(part, _COLUMNS[type(message)]) == _encoded(message)


def check(session: Session, plan: RoundPlan, device: str, message: StageMessage, judge: Judge) -> None:
    """Raises TrustError unless it is what the stage asks `device` for."""
    if isinstance(message, RoundKeys):
        _check_keys(session, plan, device, message, judge)
        return
    row = _group_of(session, plan.round_id, device)
    if row is None:
        raise TrustError(f"{device} stands in no group of round {plan.round_id}", advice="inspect the device")
    match message:
        case Shares():
            secure_sum.check_shares(_circle(row), device, message)
        case SurvivorsSigned():
            secure_sum.check_signature(_circle(row), _survivors(row), device, message)
        case Unmask():
            secure_sum.check_unmask(_circle(row), _survivors(row), device, message)


def keep(session: Session, device: str, message: StageMessage) -> None:
    """The first word counts: the state of its device does not ask for a second one."""
    part = session.get(MaskedPart, (message.round_id, device))
    if part is None:
        part = MaskedPart(round_id=message.round_id, device=device)
        session.add(part)
    setattr(part, _COLUMNS[type(message)], _encoded(message))


def _check_keys(session: Session, plan: RoundPlan, device: str, message: RoundKeys, judge: Judge) -> None:
    of = _of(plan)
    if message.plan_digest != of.plan_digest:
        raise TrustError(
            f"keys of {device} were made for another plan of round {plan.round_id}",
            advice="update the older of hub and box; if both are of one version, inspect the device",
        )
    cohort.verify_keys(message.keys, device, of, judge)
    for key in (message.keys.share_key, message.keys.mask_key):
        masking.agree(_ANY_KEY, key, device)  # a key that agrees with nobody would turn every neighbour away
    registry.check_certificate(session, device, serial_hex(parse_certificate(message.keys.certificate)))


# --- what is settled ------------------------------------------------------------------------------


def settle(session: Session, plan: RoundPlan, round_: Round) -> Settled | Failed:
    """Who goes on from the stage that is over, stored in the caller's transaction; or why nobody can.

    A group that cannot go on ends alone, with its reason, while enough others are on.
    """
    stage = rounds.STAGES[round_.state]
    arrived = {device for device, member in round_.members.items() if member is stage.arrived}
    try:
        if stage.then is State.SHARING:
            staying = _form_groups(session, plan, arrived)
        else:
            staying = _settle_groups(session, plan, round_, arrived)
    except LinkError as error:
        return Failed(str(error))
    return Settled(round_.state, frozenset(staying))


def check_enough(session: Session, plan: RoundPlan) -> None:
    """Raises LinkError, with each ended group's reason, where the rule cannot do with the groups that are left."""
    _check_enough(plan, _groups(session, plan.round_id))


def end_groups(session: Session, round_id: str, reasons: Mapping[int, str]) -> None:
    for number, reason in reasons.items():
        _end(session.get_one(MaskedGroup, (round_id, number)), reason)


def why_ended(session: Session, round_id: str, device: str) -> str:
    """ "" while its group goes on."""
    row = _group_of(session, round_id, device)
    return f"group {row.group_no} was left out: {row.reason}" if row is not None and row.reason else ""


def _form_groups(session: Session, plan: RoundPlan, arrived: set[str]) -> set[str]:
    said = _said(session, plan.round_id, arrived, RoundKeys)
    keys = {device: message.keys for device, message in said.items()}
    for number, circle in enumerate(secure_sum.form_circles(_of(plan), keys, plan.min_cohort, plan.groups), 1):
        session.add(
            MaskedGroup(
                round_id=plan.round_id,
                group_no=number,
                devices=" ".join(circle.roster.names),
                circle=msgspec.msgpack.encode(circle),
            )
        )
    return set(keys)


def _settle_groups(session: Session, plan: RoundPlan, round_: Round, arrived: set[str]) -> set[str]:
    settle_one, rows = _SETTLE[rounds.STAGES[round_.state].then], _groups(session, plan.round_id)
    staying: set[str] = set()
    for row in rows:
        if row.reason:
            continue
        try:
            _check_revoked(row, round_.revoked)
            staying.update(settle_one(row, arrived & set(_devices(row))))
        except LinkError as error:
            if plan.groups == 1:
                raise
            _end(row, str(error))
    if plan.groups > 1:
        _check_enough(plan, rows)
        if len(staying) < round_.min_devices:
            raise LinkError(
                f"{len(staying)} boxes are left in their groups, {round_.min_devices} are needed", advice=NEXT_ROUND
            )
    return staying


def _settle_shares(row: MaskedGroup, arrived: set[str]) -> Iterable[str]:
    sharing = secure_sum.settle_shares(_circle(row), arrived)
    row.sharing = msgspec.msgpack.encode(sharing)
    return sharing


def _settle_survivors(row: MaskedGroup, arrived: set[str]) -> Iterable[str]:
    told = secure_sum.settle_survivors(_circle(row), _sharing(row), arrived, message_id=_ANY_ID)
    row.survivors = messages.encode(told)
    return told.active


def _settle_agreement(row: MaskedGroup, arrived: set[str]) -> Iterable[str]:
    told = _survivors(row)
    secure_sum.settle_agreement(_circle(row), told, arrived)
    return told.active  # whoever is silent from here on is in the sum all the same


_SETTLE: Mapping[State, Callable[[MaskedGroup, set[str]], Iterable[str]]] = MappingProxyType(
    {
        State.TRAINING: _settle_shares,
        State.AGREEING: _settle_survivors,
        State.UNMASKING: _settle_agreement,
        State.SUMMED: _settle_agreement,  # whoever gave shares must reach as far as whoever signed
    }
)


def _check_revoked(row: MaskedGroup, revoked: Iterable[str]) -> None:
    """Once the survivors are told; until then a revoked box's update is taken out of its group's sum."""
    if row.survivors and (gone := set(revoked) & set(_survivors(row).active)):
        raise LinkError(
            f"{', '.join(sorted(gone))} was revoked after its masked update went into the sum", advice=NEXT_ROUND
        )


def _check_enough(plan: RoundPlan, rows: Sequence[MaskedGroup]) -> None:
    on = [row for row in rows if not row.reason]
    if plan.groups > 1 and len(on) < ROBUST_MIN:
        why = "; ".join(f"group {row.group_no}: {row.reason}" for row in rows if row.reason)
        raise LinkError(
            f"{len(on)} of {len(rows)} groups are left, {plan.rule} needs {ROBUST_MIN}; {why}", advice=NEXT_ROUND
        )


def _end(row: MaskedGroup, reason: str) -> None:
    row.reason = reason[:REASON_CHARACTERS]
    log.warning(
        "round %s: group %d of %d boxes is left out: %s", row.round_id, row.group_no, len(_devices(row)), reason
    )


# --- what is owed ---------------------------------------------------------------------------------


def owed(
    session: Session, round_id: str, state: State, device: str, member: Member, message_id: str
) -> AnyMessage | None:
    """What the stage has to say to a device that has not answered yet."""
    stage = rounds.STAGES.get(state)
    row = _group_of(session, round_id, device) if stage is not None and member in stage.waits_for else None
    if stage is None or row is None or row.reason:
        return None
    circle = _circle(row)
    match stage.arrived:
        case Member.SHARED:
            return secure_sum.cohort_for(circle, device, message_id=message_id)
        case Member.DELIVERED:
            made = _said(session, round_id, circle.graph[device], Shares)
            return secure_sum.forwarded_for(circle, _sharing(row), made, device, message_id=message_id)
        case Member.AGREED:
            return msgspec.structs.replace(_survivors(row), message_id=message_id)
        case Member.UNMASKED:
            signatures = _said(session, round_id, circle.graph[device], SurvivorsSigned)
            return secure_sum.agreement_for(circle, signatures, device, message_id=message_id)
    return None


# --- what the sum needs ---------------------------------------------------------------------------


def group_no(session: Session, round_id: str, device: str) -> int:
    """In whose sum its update is; 0 for a device that stands in none."""
    row = _group_of(session, round_id, device)
    return row.group_no if row is not None else 0


def groups_on(session: Session, round_id: str) -> tuple[int, ...]:
    return tuple(row.group_no for row in _groups(session, round_id) if not row.reason)


def opened(
    session: Session, round_id: str, group_no: int, alive: secure_sum.Alive
) -> tuple[Circle, Survivors, secure_sum.Rebuilt]:
    """The secrets that take the masks off a group's sum. Raises LinkError or TrustError when the shares do not give them."""
    row = session.get_one(MaskedGroup, (round_id, group_no))
    circle, told = _circle(row), _survivors(row)
    given = _said(session, round_id, told.active, Unmask)
    return circle, told, secure_sum.rebuild(circle, told, given, alive=alive)


# --- rows -----------------------------------------------------------------------------------------


def _of(plan: RoundPlan) -> RoundOf:
    return RoundOf(plan.round_id, plan_digest(plan))


def _encoded(message: StageMessage) -> bytes:
    return messages.encode(msgspec.structs.replace(message, message_id=_ANY_ID))


def _said(session: Session, round_id: str, devices: Iterable[str], kind: type[M]) -> dict[str, M]:
    """Of those devices, who said it; each was checked when it came."""
    column = getattr(MaskedPart, _COLUMNS[kind])  # type: ignore[index]
    rows = session.execute(
        select(MaskedPart.device, column).where(
            MaskedPart.round_id == round_id, MaskedPart.device.in_(list(devices)), column.is_not(None)
        )
    ).all()
    return {device: _decoded(said, kind) for device, said in rows}


def _decoded(kept: bytes, kind: type[M]) -> M:
    message = messages.decode(kept)
    assert isinstance(message, kind)  # we wrote it
    return message


def _groups(session: Session, round_id: str) -> Sequence[MaskedGroup]:
    return session.scalars(select(MaskedGroup).filter_by(round_id=round_id).order_by(MaskedGroup.group_no)).all()


def _group_of(session: Session, round_id: str, device: str) -> MaskedGroup | None:
    """None while there are no groups, or where its keys came too late for one."""
    listed = session.execute(select(MaskedGroup.group_no, MaskedGroup.devices).filter_by(round_id=round_id)).all()
    for number, devices in listed:
        if device in devices.split():
            return session.get_one(MaskedGroup, (round_id, number))
    return None


def _devices(row: MaskedGroup) -> list[str]:
    return row.devices.split()


def _circle(row: MaskedGroup) -> Circle:
    return _read_circle(_there(row.circle, row.round_id, "cohort"))


# Every message of a stage asks for these two, and of a thousand boxes in one group one is read in 60 ms. Never written to.
@lru_cache(maxsize=GROUPS)
def _read_circle(kept: bytes) -> Circle:
    return msgspec.msgpack.decode(kept, type=Circle)


@lru_cache(maxsize=GROUPS)
def _read_survivors(kept: bytes) -> Survivors:
    return _decoded(kept, Survivors)


def _sharing(row: MaskedGroup) -> tuple[str, ...]:
    kept = _there(row.sharing, row.round_id, "list of those who shared")
    return msgspec.msgpack.decode(kept, type=tuple[str, ...])


def _survivors(row: MaskedGroup) -> Survivors:
    return _read_survivors(_there(row.survivors, row.round_id, "survivors"))


def _there(kept: bytes | None, round_id: str, what: str) -> bytes:
    if not kept:
        raise SiteError(f"round {round_id} has no {what} yet", advice="report it: the stages are out of order")
    return kept
