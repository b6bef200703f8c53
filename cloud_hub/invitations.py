"""The start of a round: its base, its plan, whom it invites.

Reads releases, the base's bundle, devices and the hub's sealing key; writes the tables rounds and round_devices.
Never starts a round beside another, nor one that could not end well.
Source: ARCHITECTURE.md, "Rounds"; the box's end is edge_agent/invitations.py.
"""

import logging
import secrets
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from cloud_hub import masked, secure_sum
from cloud_hub.config import Config
from cloud_hub.database import Certificate, Device, Release, Round, RoundDevice
from cloud_hub.ledger import active_round
from cloud_hub.rollout import Stage
from cloud_hub.rounds import Member, State
from fleet_link import messages, sealing
from fleet_link.errors import LinkError, SiteError
from fleet_link.messages import COHORT, RoundPlan, Rule
from models import round_layout
from models.bundle import SUFFIX, read_manifest
from models.delta import Trainable
from models.errors import BundleError, DeltaError

log = logging.getLogger(__name__)

STAGE_S_EACH = (
    0.25  # of a stage for each invited box: the hub hears so many at least on two busy cores (`./dev bench scale`)
)
ROBUST_MIN = 3  # updates: with two no rule can tell who is off


def start_round(
    session: Session,
    config: Config,
    *,
    kind: Literal["unsafe_open", "masked"],
    rule: Rule,
    trainable: Trainable,
    epochs: int,
    learning_rate: float,
    clip_norm: float,
    min_examples: int,
    min_devices: int,
    deadline_s: float,
    noise: float,
    share: float,
    devices: Sequence[str] | None,
    now: float,
) -> str:
    """Store a round over the newest release that everybody may run and give its id; `devices` None: every enrolled one.

    `noise`: standard deviation of what the boxes add to the sum, over the clip norm. `share`: of all weights but heads and
    norms, those the boxes train and send; below 1 the plan's learning rate is the given one times
    round_layout.rate_factor. Both in masked rounds only.
    Raises SiteError when a round is on, or when this one could not end well.
    """
    active = active_round(session)
    if active is not None:
        raise SiteError(
            f"round {active.round_id} is on ({active.state})",
            advice=f"wait for its end: fleet round list; or end it: fleet round drop {active.round_id}",
        )
    _check_kind(kind, rule, noise, share)
    base = _base(session)
    _check_trainable(config.paths.releases / f"{base.bundle_digest}{SUFFIX}")
    invited = _invited(session, devices)
    if kind == "masked":
        min_devices = max(min_devices, config.rounds.min_cohort)
    elif rule != "fedavg":
        min_devices = max(min_devices, ROBUST_MIN)
    _check_count(len(invited), min_devices, kind)
    if kind == "masked":
        _check_fits(session, invited)
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
    if kind == "masked":
        plan = _with_sum(_with_share(plan, share), config, invited=len(invited), min_cohort=min_devices, noise=noise)
    _add_rows(session, plan, invited, min_devices, now)
    if kind == "masked":
        masked.begin(session, plan.round_id, max(config.rounds.stage_s, STAGE_S_EACH * len(invited)), now)
        session.flush()
    log.info("round %s: invited %d devices, base is release %d", plan.round_id, len(invited), base.release_version)
    return plan.round_id


def _check_kind(kind: str, rule: Rule, noise: float, share: float) -> None:
    if kind == "masked" and rule != "fedavg":
        raise SiteError(
            f"{rule} needs every box's update by itself, and a masked round shows the sum alone",
            advice="leave --rule out, or start an open round: --unsafe-open",
        )
    if kind != "masked" and noise:
        raise SiteError(
            "only a masked round adds noise: in an open one the hub reads each update before any is added",
            advice="leave --noise out, or leave --unsafe-open out",
        )
    if kind != "masked" and share != 1.0:
        raise SiteError(
            "only a masked round trains a share of the weights: an open one sends them all in 8 bits each",
            advice="leave --share out, or leave --unsafe-open out",
        )


def _check_count(invited: int, needed: int, kind: str) -> None:
    if invited < needed:
        raise SiteError(
            f"{invited} devices are invited, {needed} are needed",
            advice="enrol more boxes or lower --min-devices"
            + (" (a masked round never takes fewer than rounds.min_cohort)" if kind == "masked" else ""),
        )
    if kind == "masked" and invited > COHORT:
        raise SiteError(
            f"{invited} devices are invited, a masked round has room for {COHORT}",
            advice="name the boxes with --device and make two rounds of them",
        )


def _check_fits(session: Session, invited: Sequence[str]) -> None:
    """Else the round would end as soon as all have sent their keys."""
    rows = session.execute(select(Certificate.device, Certificate.pem).where(Certificate.device.in_(invited))).all()
    sizes = dict.fromkeys(invited, 0)
    for device, certificate in rows:
        sizes[device] = max(sizes[device], len(ssl.PEM_cert_to_DER_cert(certificate)))
    try:
        secure_sum.check_fits(sizes)
    except LinkError as error:
        raise SiteError(
            f"{len(invited)} devices are invited: {error}",
            advice="name fewer boxes with --device and make two rounds of them: long device names leave less room",
        ) from error


def _with_share(plan: RoundPlan, share: float) -> RoundPlan:
    if share == 1.0:
        return plan
    rate = min(1.0, plan.learning_rate * round_layout.rate_factor(share))
    return msgspec.structs.replace(plan, share=share, learning_rate=rate)


def _with_sum(plan: RoundPlan, config: Config, *, invited: int, min_cohort: int, noise: float) -> RoundPlan:
    """What the words of a masked sum look like. The smallest cohort's noise is enough: more boxes add more."""
    try:
        word_bits, value_bits = round_layout.numbers_for(invited, noise)
        summed = msgspec.structs.replace(
            plan,
            min_cohort=min_cohort,
            word_bits=word_bits,
            value_bits=value_bits,
            boxes_max=invited,
            examples_cap=config.rounds.examples_cap,
            noise=noise,
            noise_boxes=min_cohort if noise else 0,
        )
        round_layout.check(summed, sealing.plan_digest(summed))
    except DeltaError as error:
        raise SiteError(f"no masked sum can be made: {error}", advice=error.advice) from error
    return summed


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
