"""The stages of a masked round: what came from each box, what was settled, what is owed to whom.

Reads and writes the tables masked_rounds and masked_parts, in the caller's transaction.
Never settles a stage twice, never judges what secure_sum.py judges, never opens an update; no share gets into a log.
Source: Bonawitz et al. 2017, figure 4; the box's end is edge_agent/masked.py.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from cloud_hub import registry, rounds, secure_sum
from cloud_hub.database import MaskedPart, MaskedRound
from cloud_hub.rounds import Failed, Member, Round, Settled, State
from cloud_hub.secure_sum import Circle
from fleet_link import cohort, masking, messages
from fleet_link.cohort import Judge, RoundOf
from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.messages import (
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
    active = _survivors(row).active if row.survivors else ()
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
    session.execute(update(MaskedRound).where(MaskedRound.round_id == round_id).values(nothing))


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
    row = session.get_one(MaskedRound, plan.round_id)
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
    """Who goes on from the stage that is over, stored in the caller's transaction; or why nobody can."""
    row = session.get_one(MaskedRound, plan.round_id)
    stage = rounds.STAGES[round_.state]
    arrived = {device for device, member in round_.members.items() if member is stage.arrived}
    try:
        return Settled(round_.state, frozenset(_SETTLE[stage.then](session, plan, row, arrived)))
    except LinkError as error:
        return Failed(str(error))


def _form_circle(session: Session, plan: RoundPlan, row: MaskedRound, arrived: set[str]) -> Iterable[str]:
    said = _said(session, plan.round_id, arrived, RoundKeys)
    circle = secure_sum.form_circle(
        _of(plan), {device: message.keys for device, message in said.items()}, plan.min_cohort
    )
    row.circle = msgspec.msgpack.encode(circle)
    return circle.graph


def _settle_shares(session: Session, plan: RoundPlan, row: MaskedRound, arrived: set[str]) -> Iterable[str]:
    sharing = secure_sum.settle_shares(_circle(row), arrived)
    row.sharing = msgspec.msgpack.encode(sharing)
    return sharing


def _settle_survivors(session: Session, plan: RoundPlan, row: MaskedRound, arrived: set[str]) -> Iterable[str]:
    told = secure_sum.settle_survivors(_circle(row), _sharing(row), arrived, message_id=_ANY_ID)
    row.survivors = messages.encode(told)
    return told.active


def _settle_agreement(session: Session, plan: RoundPlan, row: MaskedRound, arrived: set[str]) -> Iterable[str]:
    secure_sum.settle_agreement(_circle(row), _survivors(row), arrived)
    return arrived


_SETTLE: Mapping[State, Callable[[Session, RoundPlan, MaskedRound, set[str]], Iterable[str]]] = MappingProxyType(
    {
        State.SHARING: _form_circle,
        State.TRAINING: _settle_shares,
        State.AGREEING: _settle_survivors,
        State.UNMASKING: _settle_agreement,
        State.SUMMED: _settle_agreement,  # whoever gave shares must reach as far as whoever signed
    }
)


# --- what is owed ---------------------------------------------------------------------------------


def owed(
    session: Session, round_id: str, state: State, device: str, member: Member, message_id: str
) -> AnyMessage | None:
    """What the stage has to say to a device that has not answered yet."""
    stage, row = rounds.STAGES.get(state), session.get(MaskedRound, round_id)
    if row is None or stage is None or member not in stage.waits_for or not row.circle:
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


def opened(session: Session, round_id: str, alive: secure_sum.Alive) -> tuple[Circle, Survivors, secure_sum.Rebuilt]:
    """The secrets that take the masks off. Raises LinkError or TrustError when the shares do not give them."""
    row = session.get_one(MaskedRound, round_id)
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


def _circle(row: MaskedRound) -> Circle:
    return _read_circle(_there(row.circle, row.round_id, "cohort"))


# Every message of a stage asks for these two, and of a thousand boxes one is read in 60 ms. Never written to.
@lru_cache(maxsize=1)
def _read_circle(kept: bytes) -> Circle:
    return msgspec.msgpack.decode(kept, type=Circle)


@lru_cache(maxsize=1)
def _read_survivors(kept: bytes) -> Survivors:
    return _decoded(kept, Survivors)


def _sharing(row: MaskedRound) -> tuple[str, ...]:
    kept = _there(row.sharing, row.round_id, "list of those who shared")
    return msgspec.msgpack.decode(kept, type=tuple[str, ...])


def _survivors(row: MaskedRound) -> Survivors:
    return _read_survivors(_there(row.survivors, row.round_id, "survivors"))


def _there(kept: bytes | None, round_id: str, what: str) -> bytes:
    if not kept:
        raise SiteError(f"round {round_id} has no {what} yet", advice="report it: the stages are out of order")
    return kept
