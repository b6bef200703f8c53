"""kill -9 of a box at each hand-over on a study's way: after the restart the PACS has each result once, and nothing is lost."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import studies
from benchmarks.house import Box, House
from benchmarks.processes import HouseError, wait_for
from tests.crash_support import DEATH_TIMEOUT_S, Point, dying_box

pytestmark = pytest.mark.slow

POINTS = [
    Point("after", "edge_agent.instances:keep", 3),  # bytes durable, no row, no answer to the scanner
    Point("after", "edge_agent.catalog:add_instance", 8),  # row there, the last instance not answered
    Point("before", "edge_agent.catalog:association_ended"),
    Point("after", "edge_agent.decode:to_volume"),
    Point("after", "edge_agent.findings:write_maps"),  # arrays on disk, no result row
    Point("after", "edge_agent.pipeline:keep_result"),  # result row there, no report
    Point("after", "edge_agent.report:write"),  # report files there, not in the outbox
    Point("before", "edge_agent.pacs:PacsSender.store", 1),
    Point("after", "edge_agent.pacs:PacsSender.store", 1),  # the PACS has the SR, the box does not know
    Point("before", "edge_agent.delivery:mark_delivered", 2),
]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with House(tmp_path / "house") as house:
        house.pacs.start()
        house.pacs.wait_ready()
        yield house


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_study_survives(house: House, point: Point) -> None:
    box = house.add_box("north-1", "north", {"hub.enabled": False, "dicom.quiet_time_s": 1.0})
    (study,) = studies.make(studies.Order(box, "base", ("CT",), 1, 7), house.folder / "scanner")[:1]

    dying = dying_box(box, point)
    dying.start()
    wait_for("box", lambda: box.listening, timeout_s=60.0)
    was_told_success = _send(box, study)
    assert dying.wait_end(DEATH_TIMEOUT_S) == -signal.SIGKILL

    box.start()
    box.wait_ready()
    if not was_told_success:
        assert _send(box, study)  # what a scanner does with instances that it got no answer for
    rows = studies.wait_read([box], [study], timeout_s=60.0)

    row = rows[study.SeriesInstanceUID]
    assert row["state"] == "reported"
    assert studies.predicted(row) == study.label
    assert box.query("SELECT count(*) AS n FROM instances")[0]["n"] == len(study.files)
    assert box.query("SELECT * FROM quarantine") == []
    assert sorted(tags["Modality"] for tags in house.pacs.instances()) == ["OT", "SR"]
    assert list(box.data_dir.rglob("*.tmp")) == []


def _send(box: Box, study: studies.Study) -> bool:
    """True if every instance was answered with success."""
    try:
        studies.send_dicom(box, study.files)
    except HouseError:
        return False
    return True
