"""What API and hub page show of the fleet: plain values, made from the tables.

Reads every table of the hub; writes nothing.
Never shows a secret, a key or a sealed update; there are no patients here to show.
Source: ARCHITECTURE.md, "Five paths", presence.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from cloud_hub import ledger
from cloud_hub.database import (
    Certificate,
    Device,
    DeviceRelease,
    MaskedGroup,
    MaskedPart,
    Refusal,
    Release,
    Round,
    RoundDevice,
    Site,
    Transfer,
)
from cloud_hub.registry import NotFoundError, certificate_alarm, find_device
from models import round_layout

View = dict[str, Any]
STAGES_OF_MASKED = ("keys", "shares", "updates", "signed", "unmasked")

# --- sites and devices ----------------------------------------------------------------------------


def sites(session: Session) -> list[View]:
    counts = dict(session.execute(select(Device.site, func.count()).group_by(Device.site)).all())
    rows = session.scalars(select(Site).order_by(Site.site))
    return [{"site": row.site, "created_at": row.created_at, "devices": counts.get(row.site, 0)} for row in rows]


def devices(session: Session, *, now: float, max_age_s: float) -> list[View]:
    ends = dict(
        session.execute(
            select(Certificate.device, func.max(Certificate.not_after))
            .where(Certificate.revoked_at.is_(None))
            .group_by(Certificate.device)
        ).all()
    )
    rows = session.scalars(select(Device).order_by(Device.site, Device.device))
    return [_device(row, ends.get(row.device), now=now, max_age_s=max_age_s) for row in rows]


def device(session: Session, name: str, *, now: float, max_age_s: float) -> View:
    """As in `devices`, with its releases and rounds. Raises NotFoundError."""
    row = find_device(session, name)
    end = session.scalar(
        select(func.max(Certificate.not_after)).where(Certificate.device == name, Certificate.revoked_at.is_(None))
    )
    reports = session.scalars(
        select(DeviceRelease).filter_by(device=name).order_by(DeviceRelease.release_version.desc())
    )
    parts = session.scalars(
        select(RoundDevice).filter_by(device=name).order_by(RoundDevice.changed_at.desc()).limit(50)
    )
    return {
        **_device(row, end, now=now, max_age_s=max_age_s),
        "releases": [_report(report, row.site) for report in reports],
        "rounds": [{"round_id": part.round_id, **_member(part, row, None)} for part in parts],
    }


def _device(row: Device, certificate_ends_at: float | None, *, now: float, max_age_s: float) -> View:
    heartbeat: View = json.loads(row.heartbeat) if row.heartbeat else {}
    ends = certificate_alarm(certificate_ends_at, now=now) if row.revoked_at is None else ""
    return {
        "device": row.device,
        "site": row.site,
        "state": _device_state(row, certificate_ends_at, now, max_age_s),
        "created_at": row.created_at,
        "revoked_at": row.revoked_at,
        "last_seen_at": row.last_seen_at,
        "certificate_ends_at": certificate_ends_at,
        "release_version": heartbeat.get("release_version"),
        "bundle_digest": heartbeat.get("bundle_digest"),
        "alarms": [*heartbeat.get("alarms", []), *heartbeat.get("notices", []), *([ends] if ends else [])],
        "heartbeat": heartbeat or None,
    }


def _device_state(row: Device, certificate_ends_at: float | None, now: float, max_age_s: float) -> str:
    """revoked · awaited (no certificate yet, or never heard) · expired · online · away."""
    if row.revoked_at is not None:
        return "revoked"
    if row.last_seen_at is not None and now - row.last_seen_at <= max_age_s:
        return "online"
    if certificate_ends_at is not None and certificate_ends_at <= now:
        return "expired"
    return "awaited" if row.last_seen_at is None else "away"


# --- rounds ---------------------------------------------------------------------------------------


def rounds(session: Session) -> list[View]:
    """Newest first."""
    states: dict[str, Counter[str]] = defaultdict(Counter)
    for round_id, state, count in session.execute(
        select(RoundDevice.round_id, RoundDevice.state, func.count()).group_by(RoundDevice.round_id, RoundDevice.state)
    ).all():
        states[round_id][state] = count
    made = dict(session.execute(select(Release.round_id, Release.release_version)).all())
    came = _came(session)
    rows = session.scalars(select(Round).order_by(Round.created_at.desc()))
    return [_round(row, states[row.round_id], made.get(row.round_id), came[row.round_id]) for row in rows]


def round_(session: Session, round_id: str) -> View:
    """As in `rounds`, with the state, reason and bytes of each device, and the groups it was dealt into. Raises NotFoundError."""
    row = ledger.find(session, round_id)
    pairs = session.execute(
        select(RoundDevice, Device)
        .join(Device, Device.device == RoundDevice.device)
        .where(RoundDevice.round_id == round_id)
        .order_by(Device.site, Device.device)
    ).all()
    moving = {
        transfer.device: transfer
        for transfer in session.scalars(select(Transfer).filter_by(kind="update", subject=round_id))
    }
    members = [_member(part, device, moving.get(device.device)) for part, device in pairs]
    made = session.scalar(select(Release.release_version).where(Release.round_id == round_id))
    states = Counter(member["state"] for member in members)
    cohorts = session.scalars(select(MaskedGroup).filter_by(round_id=round_id).order_by(MaskedGroup.group_no))
    return {
        **_round(row, states, made, _came(session)[round_id]),
        "members": members,
        "cohorts": [
            {"group": cohort.group_no, "devices": cohort.devices.split(), "reason": cohort.reason} for cohort in cohorts
        ],
    }


def _came(session: Session) -> dict[str, Counter[str]]:
    """What has come in each round: updates in or for the sum, and of a masked round the messages of its stages."""
    came: dict[str, Counter[str]] = defaultdict(Counter)
    updates = select(RoundDevice.round_id, func.count(RoundDevice.counted_at)).group_by(RoundDevice.round_id)
    for round_id, count in session.execute(updates).all():
        came[round_id]["updates"] = count
    columns = {
        "keys": MaskedPart.keys,
        "shares": MaskedPart.shares,
        "signed": MaskedPart.signature,
        "unmasked": MaskedPart.unmask,
    }
    counts = [func.count(column) for column in columns.values()]
    for round_id, *numbers in session.execute(select(MaskedPart.round_id, *counts).group_by(MaskedPart.round_id)).all():
        came[round_id].update(dict(zip(columns, numbers, strict=True)))
    return came


def _round(row: Round, states: Counter[str], release_version: int | None, came: Counter[str]) -> View:
    plan = ledger.plan_of(row)
    return {
        "round_id": row.round_id,
        "state": row.state,
        "reason": row.reason,
        "kind": plan.kind,
        "rule": plan.rule,
        "trainable": plan.trainable,
        "epochs": plan.epochs,
        "learning_rate": plan.learning_rate,
        "clip_norm": plan.clip_norm,
        "min_examples": plan.min_examples,
        "min_devices": row.min_devices,
        "base_digest": row.base_digest,
        "candidate_digest": row.candidate_digest,
        "release_version": release_version,
        "created_at": row.created_at,
        "changed_at": row.changed_at,
        "deadline": row.deadline,
        "device_states": dict(states),
        "noise": plan.noise,
        "share": plan.share,
        "groups": plan.groups,
        "buffer": plan.buffer,
        "stale_max": len(plan.bases) - 1 if plan.buffer else None,
        "bits": round_layout.open_bits(plan) if plan.kind == "unsafe_open" else None,
        "min_cohort": plan.min_cohort if plan.kind == "masked" else None,
        "came": {name: came[name] for name in (STAGES_OF_MASKED if plan.kind == "masked" else ("updates",))},
    }


def _member(part: RoundDevice, device: Device, transfer: Transfer | None) -> View:
    heartbeat = json.loads(device.heartbeat) if device.heartbeat else {}
    own: View = next((r for r in heartbeat.get("rounds", []) if r["round_id"] == part.round_id), {})
    return {
        "device": part.device,
        "site": device.site,
        "state": part.state,
        "device_says": own.get("state", ""),  # the box's own word, from its last heartbeat
        "examples": part.examples,
        "staleness": own.get("staleness", 0),  # of its sealed update, in releases: its own word too
        "reason": part.reason or own.get("reason", ""),
        "bytes_received": max(part.bytes_received, transfer.bytes_moved if transfer else 0),
        "bytes_expected": transfer.size if transfer else None,
        "counted_at": part.counted_at,
        "changed_at": part.changed_at,
    }


# --- releases -------------------------------------------------------------------------------------


def releases(session: Session) -> list[View]:
    """Newest first."""
    reports = _reports_by_version(session)
    rows = session.scalars(select(Release).order_by(Release.release_version.desc()))
    return [_release(row, reports[row.release_version]) for row in rows]


def release(session: Session, release_version: int) -> View:
    """As in `releases`, with what each device and site reported. Raises NotFoundError."""
    row = session.get(Release, release_version)
    if row is None:
        raise NotFoundError(f"there is no release {release_version}", advice="fleet release list shows all")
    reports = _reports_by_version(session)[release_version]
    return {**_release(row, reports), "devices": reports, "sites": _by_site(reports)}


def accuracy_by_release(session: Session) -> list[View]:
    """Oldest first; only releases that a device judged on held-out reviews: total and each site."""
    reports = _reports_by_version(session)
    rows = session.scalars(select(Release).order_by(Release.release_version))
    judged = [(row, [r for r in reports[row.release_version] if r["heldout"]]) for row in rows]
    return [
        {
            "release_version": row.release_version,
            "round_id": row.round_id,
            "total": _accuracy(of_row),
            "sites": _by_site(of_row),
        }
        for row, of_row in judged
        if of_row
    ]


def _reports_by_version(session: Session) -> dict[int, list[View]]:
    pairs = session.execute(
        select(DeviceRelease, Device.site)
        .join(Device, Device.device == DeviceRelease.device)
        .order_by(Device.site, Device.device)
    ).all()
    by_version: dict[int, list[View]] = defaultdict(list)
    for report, site in pairs:
        by_version[report.release_version].append(_report(report, site))
    return by_version


def _report(row: DeviceRelease, site: str) -> View:
    return {
        "device": row.device,
        "site": site,
        "release_version": row.release_version,
        "outcome": row.outcome,
        "reason": row.reason,
        "heldout": row.heldout,
        "heldout_correct_before": row.heldout_correct_before,
        "heldout_correct_after": row.heldout_correct_after,
        "reported_at": row.reported_at,
    }


def _release(row: Release, reports: Sequence[View]) -> View:
    return {
        "release_version": row.release_version,
        "bundle_digest": row.bundle_digest,
        "round_id": row.round_id,
        "size": row.size,
        "state": row.state,
        "reason": row.reason,
        "created_at": row.created_at,
        "outcomes": dict(Counter(report["outcome"] for report in reports)),
        "accuracy": _accuracy(reports),
    }


def _by_site(reports: Iterable[View]) -> dict[str, View]:
    grouped: dict[str, list[View]] = defaultdict(list)
    for report in reports:
        grouped[report["site"]].append(report)
    return {site: _accuracy(of_site) for site, of_site in sorted(grouped.items())}


def _accuracy(reports: Iterable[View]) -> View:
    """Held-out reviews, and how many of them the former and the new bundle read right."""
    heldout = before = after = 0
    for report in reports:
        heldout += report["heldout"]
        before += report["heldout_correct_before"]
        after += report["heldout_correct_after"]
    return {
        "heldout": heldout,
        "correct_before": before,
        "correct_after": after,
        "before": before / heldout if heldout else None,
        "after": after / heldout if heldout else None,
    }


# --- refusals -------------------------------------------------------------------------------------


def refusals(session: Session, *, limit: int) -> list[View]:
    """Latest first."""
    rows = session.scalars(select(Refusal).order_by(Refusal.at.desc(), Refusal.refusal_no.desc()).limit(limit))
    return [
        {"at": row.at, "device": row.device, "what": row.what, "reason": row.reason, "count": row.count} for row in rows
    ]
