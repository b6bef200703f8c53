"""Which device is offered which release now: canaries first, everybody once it runs there in good health.

Reads and writes nothing; `coordinator` gathers the facts and stores the decision.
Never offers a release again to a device that has reported on it, nor anything to a revoked device.
Source: ARCHITECTURE.md, "Releases".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """State of one release."""

    CANARY = "canary"  # offered to the canaries only
    EVERYONE = "everyone"  # every canary runs it in good health
    HALTED = "halted"  # a canary refused it or rolled back; nobody new is offered it


@dataclass(frozen=True)
class DeviceFacts:
    """An enrolled device that is not revoked, as its heartbeat and report on this release tell."""

    device: str
    bundle_digest: str  # of its last heartbeat; "" before the first
    healthy: bool  # its last heartbeat is recent and carries no alarm
    outcome: str  # of its report on this release; "" before it reported
    reason: str = ""


@dataclass(frozen=True)
class Decision:
    stage: Stage
    offers: tuple[str, ...]  # devices
    reason: str = ""


def next_offers(stage: Stage, bundle_digest: str, devices: Sequence[DeviceFacts], *, canaries: int) -> Decision:
    """Decide on one release. `devices` are those enrolled and not revoked, in any order."""
    first = _canaries(devices, canaries)
    if stage is Stage.HALTED or not first:
        return Decision(stage, ())
    refusing = next((d for d in first if d.outcome in ("refused", "rolled-back")), None)
    if stage is Stage.CANARY and refusing is not None:
        reason = f"canary {refusing.device} {refusing.outcome}: {refusing.reason}"
        return Decision(Stage.HALTED, (), reason[:500])
    if stage is Stage.CANARY and all(d.bundle_digest == bundle_digest and d.healthy for d in first):
        stage = Stage.EVERYONE
    asked = first if stage is Stage.CANARY else devices
    return Decision(stage, tuple(sorted(d.device for d in asked if _lacks(d, bundle_digest))))


def _canaries(devices: Sequence[DeviceFacts], count: int) -> list[DeviceFacts]:
    """By name: those that have reported on the release, then those that have ever been heard."""
    by_name = sorted(devices, key=lambda d: d.device)
    reported = [d for d in by_name if d.outcome]
    heard = [d for d in by_name if d.bundle_digest and not d.outcome]
    return (reported + heard)[:count]


def _lacks(device: DeviceFacts, bundle_digest: str) -> bool:
    return not device.outcome and device.bundle_digest != bundle_digest
