"""Refusals of strangers: a few are written, a flood is counted, and nothing of theirs gets into the database."""

import logging
from pathlib import Path

import pytest

from cloud_hub.database import Refusal
from cloud_hub.strangers import BURST, PER_MINUTE, Strangers
from tests.cloud_hub.hub_support import HubFiles, make_hub_files


class Door:
    """Strangers at a hub whose seconds the test counts."""

    def __init__(self, hub: HubFiles) -> None:
        self.hub = hub
        self.seconds = 0.0
        self.strangers = Strangers(hub.database, clock=lambda: 1e9 + self.seconds, seconds=lambda: self.seconds)

    def knock(self, times: int, *, device: str = "", reason: str = "no") -> None:
        for _ in range(times):
            self.strangers.refused(device=device, what="api", reason=reason)

    def rows(self) -> dict[tuple[str, str, str], int]:
        with self.hub.database.reading() as session:
            return {(row.device, row.what, row.reason): row.count for row in session.query(Refusal)}


@pytest.fixture
def door(tmp_path: Path) -> Door:
    hub = make_hub_files(tmp_path)
    hub.add_device("box-a")
    return Door(hub)


def test_a_flood_is_written_up_to_the_burst_and_the_rest_told_once(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        door.knock(BURST + 1000)
        assert door.rows() == {("", "api", "no"): BURST}
        door.strangers.tell()
    assert door.rows() == {
        ("", "api", "no"): BURST,
        ("", "strangers", "more than are written one by one"): 1000,
    }
    assert len(caplog.records) == BURST + 1
    assert "1000 more" in caplog.records[-1].message
    door.strangers.tell()
    assert sum(door.rows().values()) == BURST + 1000


def test_after_a_while_refusals_are_written_again_at_the_rate(door: Door) -> None:
    door.knock(BURST)
    door.seconds += 60.0
    door.knock(BURST + 5, reason="later")
    assert door.rows()["", "api", "later"] == min(BURST, PER_MINUTE)
    door.seconds += 3600.0
    door.knock(2 * BURST, reason="much later")
    assert door.rows()["", "api", "much later"] == BURST


def test_only_a_known_device_is_named(door: Door) -> None:
    door.knock(1, device="box-a")
    door.knock(1, device="call-0900-attacker")
    assert door.rows() == {("box-a", "api", "no"): 1, ("", "api", "no"): 1}
