"""Facts, offers and reports of releases on the tables: who is offered what, and what is kept of it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from cloud_hub import registry
from cloud_hub.database import Canary, Device, DeviceRelease, Refusal, Release
from cloud_hub.distribution import Distribution
from cloud_hub.rollout import Stage
from fleet_link.messages import Heartbeat, ReleaseReport
from tests.cloud_hub.hub_support import HubFiles, make_hub_files

NOW = time.time()
ID = "0" * 32


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubFiles]:
    made = make_hub_files(tmp_path / "hub")
    for name in ("a", "b"):
        made.add_device(name)
    for version in (1, 2):
        add_release(made, version)
    yield made
    made.database.close()


def digest(version: int) -> str:
    return f"{version:064x}"


def add_release(hub: HubFiles, version: int, state: Stage = Stage.CANARY) -> None:
    with hub.database.writing() as session:
        session.add(
            Release(
                release_version=version, bundle_digest=digest(version), path="", size=1, created_at=NOW, state=state
            )
        )


def set_stage(hub: HubFiles, version: int, state: Stage) -> None:
    with hub.database.writing() as session:
        session.get_one(Release, version).state = state


def canaries(hub: HubFiles, version: int) -> list[str]:
    with hub.database.reading() as session:
        return [row.device for row in session.query(Canary).filter_by(release_version=version).order_by(Canary.device)]


def beat(
    hub: HubFiles,
    name: str,
    runs: int,
    *,
    version: int | None = None,
    at: float = NOW,
    alarms: tuple[str, ...] = (),
    notices: tuple[str, ...] = (),
) -> None:
    heartbeat = Heartbeat(
        message_id=ID, software_version="test", bundle_digest=digest(runs),
        release_version=runs if version is None else version, provider="CPUExecutionProvider", uptime_s=1,
        series_read=0, series_abstained=0, series_failed=0, quarantined=0, reviews=0, reviews_agreed=0,
        outbox_pending=0, disk_free_bytes=1, alarms=alarms, notices=notices,
    )  # fmt: skip
    with hub.database.writing() as session:
        row = session.get_one(Device, name)
        row.last_seen_at, row.heartbeat = at, msgspec.json.encode(heartbeat).decode()


def report(
    version: int, outcome: Literal["activated", "refused", "rolled-back"], *, heldout: int = 0, reason: str = ""
) -> ReleaseReport:
    return ReleaseReport(
        message_id=ID, release_version=version, bundle_digest=digest(version), outcome=outcome, reason=reason,
        heldout=heldout, heldout_correct_before=heldout // 2, heldout_correct_after=heldout,
    )  # fmt: skip


def offers(distribution: Distribution) -> dict[str, int]:
    return {device: release.release_version for device, release in distribution.offers.items()}


def stage(hub: HubFiles, version: int) -> str:
    with hub.database.reading() as session:
        return session.get_one(Release, version).state


def test_canary_then_everybody(hub: HubFiles) -> None:
    distribution = Distribution(hub.config, hub.database)
    for name in ("a", "b"):
        beat(hub, name, 1, version=0)
    assert distribution.decide(NOW) == {"a"}
    assert distribution.decide(NOW) == set()  # nothing new
    assert offers(distribution) == {"a": 2}
    assert distribution.reported("a", report(2, "activated"), NOW) == (True, "")
    beat(hub, "a", 2)
    assert distribution.decide(NOW) == {"b"}
    assert (offers(distribution), stage(hub, 2)) == ({"b": 2}, "everyone")


def test_notice_does_not_hold_a_release_back(hub: HubFiles) -> None:
    distribution = Distribution(hub.config, hub.database)
    for name in ("a", "b"):
        beat(hub, name, 1, version=0, notices=("the certificate ends in 12 days",))
    distribution.decide(NOW)
    distribution.reported("a", report(2, "activated"), NOW)
    beat(hub, "a", 2, notices=("chest-xray: out-of-distribution score has drifted",))
    assert distribution.decide(NOW) == {"b"}


def test_silent_canary_is_not_a_healthy_one(hub: HubFiles) -> None:
    distribution = Distribution(hub.config, hub.database)
    beat(hub, "a", 1)
    distribution.decide(NOW)
    distribution.reported("a", report(2, "activated"), NOW)
    beat(hub, "a", 2)
    late = NOW + hub.config.rollout.heartbeat_max_age_s + 1
    beat(hub, "b", 1, at=late)
    distribution.decide(late)
    assert (stage(hub, 2), canaries(hub, 2)) == ("canary", ["a"])


def test_canary_is_a_healthy_device_and_stays_over_a_restart(hub: HubFiles) -> None:
    beat(hub, "a", 1, alarms=("the disk is nearly full",))
    beat(hub, "b", 1)
    Distribution(hub.config, hub.database).decide(NOW)
    assert canaries(hub, 2) == ["b"]
    beat(hub, "a", 1)  # well again
    away = NOW + 10 * hub.config.rollout.heartbeat_max_age_s  # the hub was off: b could not be heard
    beat(hub, "a", 1, at=away)
    restarted = Distribution(hub.config, hub.database)
    restarted.decide(away)
    assert (canaries(hub, 2), offers(restarted)) == (["b"], {"b": 2})


def test_canary_that_goes_silent_before_it_reported_is_replaced(hub: HubFiles) -> None:
    distribution = Distribution(hub.config, hub.database)
    for name in ("a", "b"):
        beat(hub, name, 1)
    distribution.decide(NOW)
    late = NOW + hub.config.rollout.heartbeat_max_age_s + 1
    beat(hub, "b", 1, at=late)
    assert distribution.decide(late) == {"b"}
    assert (canaries(hub, 2), offers(distribution)) == (["b"], {"b": 2})
    distribution.reported("b", report(2, "activated"), late)
    beat(hub, "b", 2, at=late)
    distribution.decide(late)
    assert stage(hub, 2) == "everyone"


def test_box_of_a_newer_release_is_not_taken_back(hub: HubFiles) -> None:
    distribution = Distribution(hub.config, hub.database)
    add_release(hub, 3)
    beat(hub, "a", 3)
    beat(hub, "b", 1)
    distribution.decide(NOW)
    assert offers(distribution) == {"b": 3}


def test_after_a_halt_newcomers_get_the_last_good_release(hub: HubFiles) -> None:
    distribution = Distribution(hub.config, hub.database)
    set_stage(hub, 2, Stage.EVERYONE)
    beat(hub, "a", 2)
    beat(hub, "b", 1)
    distribution.decide(NOW)
    add_release(hub, 3)
    distribution.decide(NOW)
    assert offers(distribution) == {"a": 3, "b": 2}
    distribution.reported("a", report(3, "refused", reason="worse"), NOW)
    distribution.decide(NOW)
    assert (offers(distribution), stage(hub, 3)) == ({"b": 2}, "halted")
    with hub.database.reading() as session:
        assert session.get_one(Release, 3).reason == "canary a refused: worse"
        assert [row.what for row in session.query(Refusal)] == ["release"]


def test_revoked_device_is_offered_nothing(hub: HubFiles) -> None:
    distribution = Distribution(hub.config, hub.database)
    for name in ("a", "b"):
        beat(hub, name, 1)
    with hub.database.writing() as session:
        registry.revoke(session, "a", now=NOW)
    distribution.decide(NOW)
    assert offers(distribution) == {"b": 2}


def test_report_is_kept_and_a_repeat_without_figures_does_not_wipe_them_out(hub: HubFiles) -> None:
    distribution = Distribution(hub.config, hub.database)
    beat(hub, "a", 1)
    distribution.decide(NOW)
    distribution.reported("a", report(2, "activated", heldout=8), NOW)
    distribution.reported("a", report(2, "activated"), NOW + 1)
    with hub.database.reading() as session:
        row = session.get_one(DeviceRelease, ("a", 2))
    assert (row.outcome, row.heldout, row.heldout_correct_before, row.heldout_correct_after) == ("activated", 8, 4, 8)


def test_report_with_a_foreign_digest_is_refused(hub: HubFiles) -> None:
    distribution = Distribution(hub.config, hub.database)
    wrong = msgspec.structs.replace(report(2, "activated"), bundle_digest=digest(9))
    accepted, reason = distribution.reported("a", wrong, NOW)
    assert (accepted, reason[:20]) == (False, "there is no release ")


@pytest.mark.parametrize("outcome", ["activated", "refused", "rolled-back"])
def test_device_that_was_not_offered_a_release_neither_halts_nor_passes_it(
    hub: HubFiles, outcome: Literal["activated", "refused", "rolled-back"]
) -> None:
    distribution = Distribution(hub.config, hub.database)
    for name in ("a", "b"):
        beat(hub, name, 1)
    distribution.decide(NOW)
    assert distribution.reported("b", report(2, outcome), NOW) == (False, "release 2 was never offered to b")
    beat(hub, "b", 2)
    distribution.decide(NOW)
    assert (stage(hub, 2), offers(distribution)) == ("canary", {"a": 2})
    with hub.database.reading() as session:
        assert [(row.device, row.what) for row in session.query(Refusal)] == [("b", "report")]
        assert session.get(DeviceRelease, ("b", 2)) is None


def test_decisions_survive_a_restart(hub: HubFiles) -> None:
    for name in ("a", "b"):
        beat(hub, name, 1)
    first, second = (Distribution(hub.config, hub.database) for _ in range(2))
    first.decide(NOW)
    assert second.decide(NOW) == {"a"}
    assert offers(first) == offers(second)
