"""Which device is offered which release now: canaries first, everybody once it runs there in good health.

Reads and writes nothing; `distribution` gathers the facts and stores the decision.
Never offers a release again to a device that has reported on it, nor anything to a revoked device.
Source: ARCHITECTURE.md, "Releases".
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """State of one release."""

    CANARY = "canary"  # on trial: offered to the canaries only
    EVERYONE = "everyone"  # every canary took it and runs it in good health; or every device runs it anyway
    HALTED = "halted"  # a device refused it or rolled back while it was on trial; nobody new is offered it


@dataclass(frozen=True)
class DeviceFacts:
    """An enrolled device that is not revoked, as its heartbeat and report on this release tell."""

    device: str
    bundle_digest: str  # of its last heartbeat; "" before the first
    healthy: bool  # its last heartbeat is recent and carries no alarm
    silent: bool  # no recent heartbeat, though the hub was there to hear one
    outcome: str  # of its report on this release, which it was offered; "" before it reported
    reason: str = ""


@dataclass(frozen=True)
class Decision:
    stage: Stage
    canaries: tuple[str, ...]  # devices; to be kept and given again as `chosen`
    offers: tuple[str, ...]  # devices
    reason: str = ""


def next_offers(
    stage: Stage, bundle_digest: str, devices: Sequence[DeviceFacts], *, chosen: Collection[str], canaries: int
) -> Decision:
    """Decide on one release. `devices` are those enrolled and not revoked, `chosen` its canaries so far, in any order."""
    by_name = sorted(devices, key=lambda d: d.device)
    if stage is Stage.CANARY:
        return _try(bundle_digest, by_name, chosen, canaries)
    asked = by_name if stage is Stage.EVERYONE else []
    return Decision(stage, tuple(sorted(chosen)), _offers(asked, bundle_digest))


def _try(bundle_digest: str, devices: Sequence[DeviceFacts], chosen: Collection[str], canaries: int) -> Decision:
    first = _canaries(bundle_digest, devices, chosen, canaries)
    names = tuple(sorted(d.device for d in first))
    refusing = next((d for d in devices if d.outcome in ("refused", "rolled-back")), None)
    if refusing is not None:
        reason = f"canary {refusing.device} {refusing.outcome}: {refusing.reason}"
        return Decision(Stage.HALTED, names, (), reason[:500])
    heard = [d for d in devices if d.bundle_digest]
    everywhere = bool(heard) and all(d.bundle_digest == bundle_digest for d in heard)
    if everywhere or (first and all(_has_passed(d, bundle_digest) for d in first)):
        return Decision(Stage.EVERYONE, names, _offers(devices, bundle_digest))
    # One that says it runs the release but whose report is not here is asked too: it answers at once.
    return Decision(Stage.CANARY, names, tuple(sorted(d.device for d in first if not d.outcome)))


def _canaries(
    bundle_digest: str, devices: Sequence[DeviceFacts], chosen: Collection[str], count: int
) -> list[DeviceFacts]:
    """Those chosen before, but for one that went silent with nothing said; then healthy ones that can still try it."""
    before = [d for d in devices if d.device in chosen]
    kept = [d for d in before if not d.silent or d.outcome]
    fit = [d for d in devices if d.device not in chosen and d.healthy and (d.outcome or _lacks(d, bundle_digest))]
    fit.sort(key=lambda d: not d.outcome)
    return (kept + fit)[:count] or before


def _has_passed(device: DeviceFacts, bundle_digest: str) -> bool:
    """A heartbeat alone is not enough: any device can say that it runs something it was never offered."""
    return device.outcome == "activated" and device.bundle_digest == bundle_digest and device.healthy


def _offers(devices: Sequence[DeviceFacts], bundle_digest: str) -> tuple[str, ...]:
    return tuple(sorted(d.device for d in devices if _lacks(d, bundle_digest)))


def _lacks(device: DeviceFacts, bundle_digest: str) -> bool:
    return not device.outcome and device.bundle_digest != bundle_digest
