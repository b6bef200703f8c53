"""The start of a round: its base, its plan, whom it invites.

Reads releases, the base's bundle, devices and the hub's sealing key; writes the tables rounds and round_devices.
Never starts a round beside another, nor one that could not end well.
Source: ARCHITECTURE.md, "Rounds"; the box's end is edge_agent/invitations.py.
"""

import logging
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from cloud_hub.config import Config
from cloud_hub.database import Certificate, Device, Release, Round, RoundDevice
from cloud_hub.ledger import active_round
from cloud_hub.rollout import Stage
from cloud_hub.rounds import Member, State
from fleet_link import messages, sealing
from fleet_link.errors import SiteError
from fleet_link.messages import RoundPlan
from models.bundle import SUFFIX, read_manifest
from models.delta import Trainable
from models.errors import BundleError

log = logging.getLogger(__name__)


def start_round(
    session: Session,
    config: Config,
    *,
    kind: Literal["unsafe_open", "masked"],
    rule: Literal["fedavg"],
    trainable: Trainable,
    epochs: int,
    learning_rate: float,
    clip_norm: float,
    min_examples: int,
    min_devices: int,
    deadline_s: float,
    devices: Sequence[str] | None,
    now: float,
) -> str:
    """Store a round over the newest release that everybody may run and give its id; `devices` None: every enrolled one.

    Raises SiteError when a round is on, or when this one could not end well.
    """
    if kind == "masked":
        raise SiteError("this version of the hub knows no masked rounds", advice="start an unsafe_open round")
    active = active_round(session)
    if active is not None:
        raise SiteError(
            f"round {active.round_id} is on ({active.state})",
            advice=f"wait for its end: fleet round list; or end it: fleet round drop {active.round_id}",
        )
    base = _base(session)
    _check_trainable(config.paths.releases / f"{base.bundle_digest}{SUFFIX}")
    invited = _invited(session, devices)
    if len(invited) < min_devices:
        raise SiteError(
            f"{len(invited)} devices are invited, {min_devices} are needed",
            advice="enrol more boxes or lower --min-devices",
        )
    plan = RoundPlan(
        message_id=secrets.token_hex(16),
        round_id=_new_id(session),
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
    log.info("round %s: invited %d devices, base is release %d", plan.round_id, len(invited), base.release_version)
    return plan.round_id


def _base(session: Session) -> Release:
    """The newest release at stage EVERYONE, else the first not halted: one stuck on trial holds no round back."""
    newest_first = select(Release).order_by(Release.release_version.desc())
    base = session.scalars(newest_first.where(Release.state == Stage.EVERYONE)).first()
    oldest_first = select(Release).where(Release.state != Stage.HALTED).order_by(Release.release_version)
    base = base or session.scalars(oldest_first).first()
    if base is None:
        raise SiteError("there is no release to start from", advice="complete the hub: hub init")
    return base


def _check_trainable(path: Path) -> None:
    try:
        manifest = read_manifest(path)
    except BundleError as error:
        raise SiteError(f"the round's base cannot be read: {error}", advice=error.advice) from error
    if not manifest.is_trainable:
        raise SiteError(
            f"the round's base, {manifest.name} {manifest.version}, is an imported network: there is nothing to train",
            advice="release a bundle that was trained or exported here, to everybody, and start the round then",
        )


def _new_id(session: Session) -> str:
    """A number for people, and chance: a hub restored from a backup counts again, but its boxes know the old rounds."""
    count = session.scalar(select(func.count()).select_from(Round)) or 0
    return f"r{count + 1:04d}-{secrets.token_hex(4)}"


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
