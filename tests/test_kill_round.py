"""kill -9 of a box, the hub and Mosquitto at each hand-over of a round: it ends as if nothing had happened.

One house for all: each case is a round of its own, in which the box dies once and the hub dies once.
"""

import os
import signal
from collections.abc import Iterator

import pytest

from benchmarks.house import House
from benchmarks.processes import HouseError, wait_for
from tests.crash_support import Point, dying_box, dying_hub, taught_house

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROUND_TIMEOUT_S = 240.0
SETTINGS: dict[str, object] = {
    "pacs.enabled": False,
    "hub.heartbeat_s": 1.0,
    "policy.allow_unsafe_open_rounds": True,
    "policy.min_examples": 1,
    "learning.heldout_fraction": 0.4,
}

# (where the box dies, where the hub dies) in the same round
CASES = [
    (
        Point("after", "edge_agent.invitations:take"),  # plan on disk, nothing answered
        Point("after", "cloud_hub.intake:Intake.answered"),  # answer stored, no receipt
    ),
    (
        Point("before", "edge_agent.learn:train"),
        Point("before", "cloud_hub.intake:Intake.take_update"),  # whole file there, not opened
    ),
    (
        Point("after", "edge_agent.learn:train"),  # trained, nothing kept
        Point("after", "cloud_hub.collection:Collection.add"),  # in the sum, no row: must not count twice
    ),
    (
        Point("after", "edge_agent.update:build"),  # sealed in memory
        Point("after", "cloud_hub.intake:Intake.take_update"),  # counted, no receipt
    ),
    (
        Point("before", "edge_agent.transfers:Transfers.on_progress"),  # offered, nothing sent
        Point("before", "cloud_hub.coordinator:Coordinator._publish"),  # candidate ready
    ),
    (
        Point("before", "edge_agent.transfers:Transfers.on_receipt"),  # counted by the hub, not yet known here
        Point("after", "cloud_hub.releases:Repository.publish"),  # metadata signed, no row
    ),
    (
        Point("after", "edge_agent.releases:take_offer"),  # verified, not asked for
        Point("before", "cloud_hub.distribution:Distribution.reported", 1),
    ),
    (
        Point("after", "edge_agent.releases:evaluate"),  # fetched and judged, not in use
        Point("after", "cloud_hub.candidate:Export.poll"),  # the export child runs
    ),
    (
        Point("before", "edge_agent.bundles:ActiveBundle.swap"),  # the row says active, the process does not
        Point("after", "cloud_hub.distribution:Distribution.reported", 1),
    ),
]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A hub and one box that has eight reviewed X-rays."""
    with taught_house(tmp_path_factory.mktemp("kill") / "house", SETTINGS) as house:
        yield house


@pytest.mark.parametrize(("box_dies", "hub_dies"), CASES, ids=str)
def test_round_survives(house: House, box_dies: Point, hub_dies: Point) -> None:
    (box,) = house.boxes
    before = _releases(house)
    mortal = {"box": dying_box(box, box_dies), "hub": dying_hub(house.hub, hub_dies)}
    anew = {"box": box.daemon, "hub": house.hub.daemon}
    for name, daemon in anew.items():
        daemon.stop()
        mortal[name].start()
    wait_for("hub", lambda: house.hub.listening, timeout_s=60.0)
    round_id = _start_round(house)

    deaths: set[str] = set()

    def over() -> bool:
        for name in mortal.keys() - deaths:
            if not mortal[name].running:
                assert mortal[name].wait_end(1.0) == -signal.SIGKILL, mortal[name].tail()
                deaths.add(name)
                anew[name].start()
        return len(deaths) == len(mortal) and _is_over(house, round_id)

    try:
        wait_for("end of the round", over, timeout_s=ROUND_TIMEOUT_S, every_s=0.3)
    finally:
        for daemon in mortal.values():
            daemon.stop()
    _check_as_if_nothing_had_happened(house, round_id, before)


def test_broker_dies_in_mid_transfer(house: House) -> None:
    (box,) = house.boxes
    before = _releases(house)
    round_id = _start_round(house)
    pid_file = house.hub.data_dir / "broker" / "mosquitto.pid"
    uploading = "SELECT 1 FROM rounds WHERE round_id = ? AND state = 'uploading'"
    wait_for("upload", lambda: box.query(uploading, round_id), timeout_s=90.0, every_s=0.005)
    first = pid_file.read_text()
    os.kill(int(first), signal.SIGKILL)
    wait_for("another broker", lambda: pid_file.exists() and pid_file.read_text() not in ("", first), timeout_s=30.0)
    wait_for("end of the round", lambda: _is_over(house, round_id), timeout_s=ROUND_TIMEOUT_S, every_s=0.3)
    _check_as_if_nothing_had_happened(house, round_id, before)


def _start_round(house: House) -> str:
    options = ("--unsafe-open", "--min-devices", "1", "--min-examples", "1", "--epochs", "1", "--trainable", "heads")
    return str(house.hub.fleet("round", "start", *options)["round_id"])


def _releases(house: House) -> list[int]:
    return [release["release_version"] for release in house.hub.fleet("release", "list")]


def _is_over(house: House, round_id: str) -> bool:
    """The hub has finished the round, and the box has answered for the release that came of it."""
    try:
        shown = house.hub.fleet("round", "show", round_id)
        if shown["state"] != "released":
            assert shown["state"] != "dropped", shown["reason"]
            return False
        release = house.hub.fleet("release", "show", str(shown["release_version"]))
    except HouseError:
        return False  # the hub is dead or not up again yet
    (box,) = house.boxes
    closed = box.query("SELECT 1 FROM rounds WHERE round_id = ? AND state = 'closed'", round_id)
    return bool(closed) and [report["outcome"] for report in release["devices"]] == ["activated"]


def _check_as_if_nothing_had_happened(house: House, round_id: str, before: list[int]) -> None:
    (box,) = house.boxes
    shown = house.hub.fleet("round", "show", round_id)
    (member,) = shown["members"]
    train = box.query("SELECT count(*) AS n FROM examples WHERE split = 'train'")[0]["n"]
    assert (member["state"], member["examples"]) == ("delivered", train)
    assert _releases(house) == [max(before) + 1, *before]  # one more, and no other
    (active,) = box.query("SELECT * FROM bundles WHERE state = 'active'")
    assert active["release_version"] == max(before) + 1
    waiting = "SELECT message_id FROM link_outbox UNION ALL SELECT transfer_id FROM transfers_out"
    wait_for("receipt of everything the box said", lambda: not box.query(waiting), timeout_s=30.0)
    assert list((box.data_dir / "updates").iterdir()) == []
    assert house.hub.fleet("refusals") == []
