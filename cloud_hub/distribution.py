"""Releases on their way to the boxes: gather facts, let `rollout` decide, store offers and what boxes report.

Reads and writes the tables releases, canaries and device_releases; reads heartbeats.
Never decides who is offered what (rollout.py) and never signs (releases.py).
Source: ARCHITECTURE.md, "Releases".
"""

import logging
from collections.abc import Mapping, Sequence, Set

import msgspec
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from cloud_hub import rollout
from cloud_hub.config import Config
from cloud_hub.database import Canary, Database, Device, DeviceRelease, Release, record_refusal
from cloud_hub.rollout import DeviceFacts, Stage
from fleet_link.messages import Heartbeat, ReleaseReport

log = logging.getLogger(__name__)

OFFERED = "offered"


class Distribution:
    """Owned by the hub's loop. `decide` when a heartbeat, a report or a release is new."""

    def __init__(self, config: Config, database: Database) -> None:
        self._config = config
        self._database = database
        self.offers: Mapping[str, Release] = {}  # device -> the release it may take now
        self._since = 0.0  # the first decision: before it nobody could be heard

    def decide(self, now: float) -> set[str]:
        """Bring stages and offers up to date. Gives the devices that have a new offer."""
        self._since = self._since or now
        with self._database.writing() as session:
            offers = self._decide(session, now)
            versions = {release.release_version for release in offers.values()}
            known = {(row.device, row.release_version) for version in versions for row in _rows(session, version)}
            for device, release in offers.items():
                if (device, release.release_version) not in known:
                    session.add(
                        DeviceRelease(
                            device=device, release_version=release.release_version, outcome=OFFERED, offered_at=now
                        )
                    )
        before, self.offers = self.offers, offers
        return {
            device
            for device, release in offers.items()
            if device not in before or before[device].release_version != release.release_version
        }

    def reported(self, device: str, report: ReleaseReport, now: float) -> tuple[bool, str]:
        """Store what became of a release on a box that was offered it; a later word replaces an earlier one."""
        with self._database.writing() as session:
            release = session.get(Release, report.release_version)
            if release is None or release.bundle_digest != report.bundle_digest:
                reason = f"there is no release {report.release_version} with the bundle {report.bundle_digest[:12]}"
                record_refusal(session, device=device, what="report", reason=reason, now=now)
                return False, reason
            row = session.get(DeviceRelease, (device, report.release_version))
            if row is None or row.offered_at is None:
                reason = f"release {report.release_version} was never offered to {device}"
                record_refusal(session, device=device, what="report", reason=reason, now=now)
                return False, reason
            row.outcome, row.reason, row.reported_at = report.outcome, report.reason, now
            if report.heldout or not row.heldout:  # a repeated report without figures does not wipe them out
                row.heldout = report.heldout
                row.heldout_correct_before = report.heldout_correct_before
                row.heldout_correct_after = report.heldout_correct_after
        log.info("release %d: %s on %s", report.release_version, report.outcome, device)
        return True, ""

    def _decide(self, session: Session, now: float) -> dict[str, Release]:
        """The newest release that may go to a device is the one it is offered."""
        offers: dict[str, Release] = {}
        devices = session.scalars(select(Device).where(Device.revoked_at.is_(None))).all()
        heartbeats = {d.device: _heartbeat(d) for d in devices}
        for release in session.scalars(select(Release).order_by(Release.release_version.desc())):
            rows = {row.device: row for row in _rows(session, release.release_version)}
            facts = [self._facts(d, heartbeats[d.device], release, rows.get(d.device), now) for d in devices]
            chosen = set(session.scalars(select(Canary.device).filter_by(release_version=release.release_version)))
            decision = rollout.next_offers(
                Stage(release.state),
                release.bundle_digest,
                [fact for fact in facts if fact is not None],
                chosen=chosen,
                canaries=self._config.rollout.canaries,
            )
            self._store_canaries(session, release, chosen, set(decision.canaries))
            self._store(session, release, decision, now)
            for device in decision.offers:
                offers.setdefault(device, release)
            if decision.stage is Stage.EVERYONE:
                break  # older ones are superseded
        return offers

    def _facts(
        self, device: Device, heartbeat: Heartbeat | None, release: Release, row: DeviceRelease | None, now: float
    ) -> DeviceFacts | None:
        """None for a device that runs a newer release than this one: it is not taken back."""
        if heartbeat is not None and heartbeat.release_version > release.release_version:
            return None
        reported = row is not None and row.outcome != OFFERED
        last_seen_at, max_age_s = device.last_seen_at or 0.0, self._config.rollout.heartbeat_max_age_s
        return DeviceFacts(
            device=device.device,
            bundle_digest=heartbeat.bundle_digest if heartbeat is not None else "",
            healthy=now - last_seen_at <= max_age_s and heartbeat is not None and not heartbeat.alarms,
            silent=now - max(last_seen_at, self._since) > max_age_s,
            outcome=row.outcome if row is not None and reported else "",
            reason=row.reason if row is not None else "",
        )

    def _store_canaries(self, session: Session, release: Release, before: Set[str], after: Set[str]) -> None:
        if before == after:
            return
        version = release.release_version
        session.execute(delete(Canary).where(Canary.release_version == version, Canary.device.in_(before - after)))
        session.add_all(Canary(release_version=version, device=device) for device in sorted(after - before))
        log.info("release %d: canaries are %s", version, ", ".join(sorted(after)) or "none")

    def _store(self, session: Session, release: Release, decision: rollout.Decision, now: float) -> None:
        if decision.stage == release.state:
            return
        release.state, release.reason = decision.stage, decision.reason
        log.info(
            "release %d: %s%s", release.release_version, decision.stage, decision.reason and f" ({decision.reason})"
        )
        if decision.stage is Stage.HALTED:
            reason = f"{release.release_version}: {decision.reason}"
            record_refusal(session, device="", what="release", reason=reason, now=now)


def _rows(session: Session, release_version: int) -> Sequence[DeviceRelease]:
    """Of all devices at once: a thousand single queries take half a second."""
    return session.scalars(select(DeviceRelease).filter_by(release_version=release_version)).all()


def _heartbeat(device: Device) -> Heartbeat | None:
    """The last one, as the link stored it."""
    return msgspec.json.decode(device.heartbeat, type=Heartbeat) if device.heartbeat else None
