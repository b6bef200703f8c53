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
from cloud_hub.robust import ROBUST_MIN
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

STALE_MAX = 4  # releases, where nobody says another number
# Of a stage, for each invited box: the hub hears so many at least on two busy cores (`./dev bench scale`).
STAGE_S_EACH = 0.25


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
    bits: int | None = None,
    groups: int = 1,
    buffer: int = 0,
    stale_max: int | None = None,
) -> str:
    """Store a round over the newest release that everybody may run and give its id; `devices` None: every enrolled one.

    `noise`: standard deviation of what the boxes add to the sum of a masked round, over the clip norm. `share`: of all
    weights but heads and norms, those the boxes train and send; below 1 the plan's learning rate is the given one times
    round_layout.rate_factor. `bits`: of each value in an open round; None is round_layout.open_value_bits. `groups`: in
    which a masked round is summed apart, each of rounds.min_cohort boxes at least; `rule` is over their means. `buffer`:
    the round goes on with so many updates, the first that are ready, of which none is over a base more than `stale_max`
    releases older than the round's (None: STALE_MAX); 0: it waits for everybody.
    Raises SiteError when a round is on, or when this one could not end well.
    """
    active = active_round(session)
    if active is not None:
        raise SiteError(
            f"round {active.round_id} is on ({active.state})",
            advice=f"wait for its end: fleet round list; or end it: fleet round drop {active.round_id}",
        )
    _check_kind(kind, rule, noise, bits)
    _check_groups(kind, rule, groups)
    _check_buffer(buffer, rule, share, stale_max)
    base = _base(session)
    _check_trainable(config.paths.releases / f"{base.bundle_digest}{SUFFIX}")
    invited = _invited(session, devices)
    if groups > 1:
        _check_group_sizes(len(invited), groups, config.rounds.min_cohort)
        min_devices = max(min_devices, ROBUST_MIN * config.rounds.min_cohort)
    elif kind == "masked":
        min_devices = max(min_devices, config.rounds.min_cohort)
    elif rule != "fedavg":
        min_devices = max(min_devices, ROBUST_MIN)
    boxes_max = buffer or len(invited)
    _check_count(len(invited), max(min_devices, buffer), kind, boxes_max)
    if buffer and buffer < min_devices:
        raise SiteError(
            f"a buffer of {buffer} updates, and the round needs {min_devices}",
            advice="raise --buffer or lower --min-devices"
            + (" (a masked round never takes fewer than rounds.min_cohort)" if kind == "masked" else ""),
        )
    if kind == "masked":
        _check_fits(session, invited, boxes_max)
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
        buffer=buffer,
        bases=_bases(session, base, STALE_MAX if stale_max is None else stale_max) if buffer else (),
    )
    plan = _with_share(plan, share)
    if kind == "masked":
        plan = _with_sum(
            msgspec.structs.replace(plan, groups=groups),
            config,
            invited=boxes_max,
            min_cohort=min_devices if groups == 1 else config.rounds.min_cohort,
            noise=noise,
        )
    else:
        plan = _with_values(plan, bits)
    _add_rows(session, plan, invited, min_devices, now)
    if kind == "masked":
        masked.begin(session, plan.round_id, max(config.rounds.stage_s, STAGE_S_EACH * boxes_max), now)
        session.flush()
    log.info("round %s: invited %d devices, base is release %d", plan.round_id, len(invited), base.release_version)
    return plan.round_id


def _check_kind(kind: str, rule: Rule, noise: float, bits: int | None) -> None:
    if kind != "masked" and noise:
        raise SiteError(
            "only a masked round adds noise: in an open one the hub reads each update before any is added",
            advice="leave --noise out, or leave --unsafe-open out",
        )
    if kind == "masked" and bits is not None:
        raise SiteError(
            "the bits of a masked round's values follow from its words and its cohort",
            advice="leave --bits out, or start an open round: --unsafe-open",
        )


def _check_groups(kind: str, rule: Rule, groups: int) -> None:
    if kind != "masked" and groups != 1:
        raise SiteError(
            "only a masked round is summed in groups: an open one applies its rule to every box's update",
            advice="leave --groups out, or leave --unsafe-open out",
        )
    if kind == "masked" and rule != "fedavg" and groups == 1:
        raise SiteError(
            f"{rule} needs every box's update by itself, and a masked round shows the sum alone",
            advice="sum in groups, whose means it then sees: --groups; or leave --rule out; or start an open round: --unsafe-open",
        )
    if groups > 1 and rule == "fedavg":
        raise SiteError(
            f"the average of {groups} groups withstands no more than that of all boxes, and each sum is of fewer",
            advice="name a rule, --rule median; or leave --groups out",
        )
    if 1 < groups < ROBUST_MIN:
        raise SiteError(
            f"{rule} over {groups} groups cannot tell which is off, {ROBUST_MIN} are needed",
            advice=f"with the median, --groups {ROBUST_MIN} withstands one group that is off, --groups 5 two",
        )


def _check_buffer(buffer: int, rule: Rule, share: float, stale_max: int | None) -> None:
    if stale_max is not None and not buffer:
        raise SiteError(
            "only a buffered round takes updates over older releases",
            advice="say how many updates it waits for: --buffer; or leave --stale-max out",
        )
    if buffer and rule != "fedavg":
        raise SiteError(
            f"{rule} compares updates, and those of a buffered round differ in base and scale",
            advice="leave --rule out, or leave --buffer out",
        )
    if buffer and share < 1.0:
        raise SiteError(
            "a share of the weights is drawn anew in each round: no update would be of use in a later one",
            advice="give --share 1, or leave --buffer out",
        )


def _check_group_sizes(invited: int, groups: int, min_cohort: int) -> None:
    if groups * min_cohort > invited:
        raise SiteError(
            f"{invited} devices are invited, {groups} groups of {min_cohort} need {groups * min_cohort}",
            advice="enrol more boxes, or ask for fewer groups (rounds.min_cohort is the smallest a group may be)",
        )


def _check_count(invited: int, needed: int, kind: str, boxes_max: int) -> None:
    if invited < needed:
        raise SiteError(
            f"{invited} devices are invited, {needed} are needed",
            advice="enrol more boxes or lower --min-devices or --buffer"
            + (" (a masked round never takes fewer than rounds.min_cohort)" if kind == "masked" else ""),
        )
    if kind == "masked" and boxes_max > COHORT:
        raise SiteError(
            f"{boxes_max} devices are invited, a masked round has room for {COHORT}",
            advice="name the boxes with --device and make two rounds of them",
        )


def _check_fits(session: Session, invited: Sequence[str], boxes_max: int) -> None:
    """Else the round would end as soon as all have sent their keys; of a buffer, whichever boxes they are of."""
    rows = session.execute(select(Certificate.device, Certificate.pem).where(Certificate.device.in_(invited))).all()
    sizes = dict.fromkeys(invited, 0)
    for device, certificate in rows:
        sizes[device] = max(sizes[device], len(ssl.PEM_cert_to_DER_cert(certificate)))
    try:
        largest = sorted(sizes, key=lambda device: (len(device) + sizes[device], len(device)))[-boxes_max:]
        secure_sum.check_fits({device: sizes[device] for device in largest})
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


def _with_values(plan: RoundPlan, bits: int | None) -> RoundPlan:
    """What the values of an open round look like."""
    valued = msgspec.structs.replace(plan, value_bits=round_layout.open_value_bits(plan.share, bits))
    try:
        round_layout.check_open(valued, sealing.plan_digest(valued))
    except DeltaError as error:
        raise SiteError(f"no update can be sent: {error}", advice=error.advice) from error
    return valued


def _with_sum(plan: RoundPlan, config: Config, *, invited: int, min_cohort: int, noise: float) -> RoundPlan:
    """What the words of a masked sum look like. The smallest cohort's noise is enough: more boxes add more."""
    boxes_max = secure_sum.largest_group(invited, plan.groups, min_cohort)
    try:
        word_bits, value_bits = round_layout.numbers_for(boxes_max, noise)
        summed = msgspec.structs.replace(
            plan,
            min_cohort=min_cohort,
            word_bits=word_bits,
            value_bits=value_bits,
            boxes_max=boxes_max,
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


def _bases(session: Session, base: Release, stale_max: int) -> tuple[str, ...]:
    """The round's base, and those that led to it, newest first: what was halted is none of them."""
    digests = session.scalars(
        select(Release.bundle_digest)
        .where(Release.release_version <= base.release_version, Release.state != Stage.HALTED)
        .order_by(Release.release_version.desc())
    ).all()
    return tuple(dict.fromkeys((base.bundle_digest, *digests)))[: stale_max + 1]


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
