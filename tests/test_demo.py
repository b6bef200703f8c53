"""`./dev demo` as a user runs it: every claim that it prints, checked on what it leaves behind."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest

from benchmarks.house import House
from benchmarks.processes import HouseError, wait_for
from tests.edge_agent.report_support import complaints
from tests.privacy_support import found_in, patient_words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[1]
BOXES = ("north-1", "north-2", "south-1")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The work folder of one finished demonstration, outcome.json in it."""
    folder = tmp_path_factory.mktemp("demo")
    command = [
        sys.executable,
        "-m",
        "benchmarks.demo",
        "--work",
        str(folder / "work"),
        "--json",
        str(folder / "outcome.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def outcome(work: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((work / "outcome.json").read_text())
    return loaded


def test_every_study_was_read_and_both_its_results_are_in_the_pacs(outcome: dict[str, Any]) -> None:
    assert len(outcome["rows"]) > 200
    assert {row["box"] for row in outcome["rows"]} == set(BOXES)
    assert {row["modality"] for row in outcome["rows"]} == {"XR", "CT", "MR"}
    assert all(row["found"] and row["milliseconds"] > 0 for row in outcome["rows"])
    assert outcome["pacs_instances"] == 2 * len(outcome["rows"])


def test_the_release_is_better_on_images_never_trained_on(outcome: dict[str, Any]) -> None:
    overall = outcome["accuracy"]["all"]
    chance = overall["before"]["images"] / 3
    assert overall["before"]["right"] > 1.5 * chance
    assert overall["after"]["right"] > overall["before"]["right"]


def test_the_new_images_were_read_by_the_release(outcome: dict[str, Any]) -> None:
    release_version = outcome["round"]["release_version"]
    assert {row["release_version"] for row in outcome["rows"] if row["exam"] == "after"} == {release_version}
    assert release_version not in {row["release_version"] for row in outcome["rows"] if row["exam"] == "before"}


def test_every_box_sent_its_sealed_update(outcome: dict[str, Any]) -> None:
    members = {member["device"]: member for member in outcome["round"]["members"]}
    assert set(members) == set(BOXES)
    assert all(member["state"] == "unmasked" and member["bytes_received"] > 0 for member in members.values())


def test_results_pass_the_validator(work: Path) -> None:
    for box in BOXES:
        reports = sorted((work / "work" / box / "data" / "reports").glob("*.dcm"))
        assert reports
        for path in reports[::15]:
            assert complaints(path) == []


def test_nothing_of_a_patient_left_the_boxes(work: Path) -> None:
    sent = [pydicom.dcmread(path, stop_before_pixels=True) for path in (work / "work" / "scanner").rglob("*.dcm")]
    words = patient_words(sent)
    assert len(words) > 500
    assert found_in(work / "work" / "north-1" / "data" / "instances", words)  # the search finds what is there
    logs = [work / "work" / box / "edge-agent.log" for box in BOXES]
    assert [found_in(place, words) for place in (work / "work" / "hub", work / "work" / "hub.log", *logs)] == [
        set()
    ] * 5


def test_nothing_is_left_running(work: Path) -> None:
    mine = os.getpid()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
        assert int(process.name) == mine or str(work) not in command, command


def test_a_demonstration_that_stops_shows_what_every_process_said_last(tmp_path: Path) -> None:
    with pytest.raises(HouseError) as stopped:
        _lose_a_box(tmp_path / "house")
    (account,) = stopped.value.__notes__
    assert "hub runs" in account
    assert "north-1 does not run" in account
    assert "connected to localhost" in account


def _lose_a_box(folder: Path) -> None:
    with House(folder) as house:
        house.open_hub("north")
        box = house.add_box("north-1", "north")
        house.enroll(box)
        box.start()
        box.wait_ready()
        wait_for("word of the link", lambda: "connected to" in box.daemon.tail(), timeout_s=60.0)
        box.daemon.kill()
        house.must_run()
