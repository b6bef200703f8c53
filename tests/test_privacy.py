"""PHI never leaves the box: searched for in what one box says to the hub, in its log and in its error texts."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest

from benchmarks import studies
from benchmarks.house import Box, House, run_command
from benchmarks.processes import Daemon, wait_for
from benchmarks.studies import Order, Reviewer, Study
from tests.privacy_support import found_in, patient_words
from tests.twin_support import Twins, hub_row

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SETTINGS: dict[str, object] = {
    "hub.heartbeat_s": 1.0,
    "policy.min_examples": 1,
    "dicom.quiet_time_s": 1.0,
    "box.log_level": "DEBUG",
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One box after a masked round, with broken files sent to it and a PACS that is away: every text it has to say was said."""
    with House(tmp_path_factory.mktemp("privacy") / "house") as house:
        house.open_hub("north")
        box = house.add_box("north-1", "north", SETTINGS)
        house.enroll(box)
        box.add_user("reader", "phantoms-only")
        tapped = [sys.executable, "-m", "tests.wiretap", str(house.folder / "tap"), "--"]
        daemon = Daemon([*tapped, "edge-agent", "run", "--config", str(box.config_path)], box.daemon.log_path)
        box.daemon = daemon
        box.start()
        box.wait_ready()
        _go_through_a_round(house, box)
        yield house


def test_nothing_of_a_patient_is_in_messages_updates_or_log(house: House) -> None:
    (box,) = house.boxes
    words = patient_words(pydicom.dcmread(path, force=True) for path in (house.folder / "scanner").rglob("*.dcm"))
    assert len(words) > 30
    assert found_in(box.data_dir / "instances", words)  # the search finds what is there
    tap = house.folder / "tap"
    assert tap.stat().st_size > 500_000  # heartbeats, answers, every stage, the whole update
    for place in (tap, box.daemon.log_path, house.hub.data_dir, house.hub.daemon.log_path):
        assert found_in(place, words) == set(), place


def test_status_and_doctor_name_no_patient(house: House, tmp_path: Path) -> None:
    (box,) = house.boxes
    words = patient_words(pydicom.dcmread(path, force=True) for path in (house.folder / "scanner").rglob("*.dcm"))
    said = tmp_path / "said"
    said.write_text(run_command("edge-agent", "status", "--config", str(box.config_path)))
    assert "Quarantine" in said.read_text()
    assert found_in(said, words) == set()


def _go_through_a_round(house: House, box: Box) -> None:
    sent = studies.make(Order(box, "north", ("XR",), 2, 50), house.folder / "scanner")
    studies.send_all([box], sent)
    _send_broken(box, sent[0], house.folder / "scanner")
    read = "SELECT s.series_no, s.SeriesInstanceUID, r.findings FROM series s JOIN results r USING (series_no)"
    wait_for("results", lambda: len(box.query(read)) >= len(sent), timeout_s=60.0)
    labels = {study.SeriesInstanceUID: study.label for study in sent}
    reviewer = Reviewer(box, "reader", "phantoms-only")
    for row in box.query(read):
        reviewer.review(row["series_no"], labels[row["SeriesInstanceUID"]], studies.predicted(row))
    reviewer.close()
    _learn(house)


def _learn(house: House) -> None:
    twins = Twins(house, "south-1", "west-1")
    twins.join_masked_rounds()
    round_id = house.hub.fleet("round", "start", "--min-examples", "1", "--epochs", "1")["round_id"]

    def is_released() -> bool:
        twins.step()
        shown = hub_row(house, "SELECT state, reason FROM rounds WHERE round_id = ?", round_id)
        assert shown["state"] != "dropped", shown["reason"]
        return bool(shown["state"] == "released")

    wait_for("release", is_released, timeout_s=180.0, every_s=0.02)
    twins.close()


def _send_broken(box: Box, study: Study, folder: Path) -> None:
    """The same patient's image with another content, cut pixels, a bad window and a name in the wrong place."""
    for number, spoil in enumerate((_other_content, _cut_pixels, _odd_values)):
        ds = pydicom.dcmread(study.files[0])
        spoil(ds)
        path = folder / f"broken-{number}.dcm"
        ds.save_as(path)
        command = ["storescu", "-aec", box.ae_title, "127.0.0.1", str(box.dicom_port), str(path)]
        subprocess.run(command, capture_output=True, check=False, timeout=60)
    wait_for("quarantine", lambda: box.query("SELECT 1 FROM quarantine"), timeout_s=30.0)
    wait_for("failed series", lambda: box.query("SELECT 1 FROM series WHERE state = 'failed'"), timeout_s=30.0)


def _other_content(ds: pydicom.Dataset) -> None:
    ds.StudyDescription = "changed"


def _cut_pixels(ds: pydicom.Dataset) -> None:
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    ds.SeriesInstanceUID = pydicom.uid.generate_uid()
    ds.PixelData = ds.PixelData[:1000]


def _odd_values(ds: pydicom.Dataset) -> None:
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    ds.SeriesInstanceUID = pydicom.uid.generate_uid()
    ds.Modality = "SURNAME"
    ds.Manufacturer = str(ds.PatientName)
