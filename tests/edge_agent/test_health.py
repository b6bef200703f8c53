"""Facts of a heartbeat: counted by newest result and newest verdict; full disks and distrust are alarms."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent import database, health, ledger
from edge_agent.rounds import Event
from fleet_link import messages
from fleet_link.errors import SiteError
from tests.edge_agent.link_support import Box, make_box, make_plan
from tests.fleet_link.mosquitto_support import TestAuthority

AUTHORITY = TestAuthority()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = make_box(tmp_path, AUTHORITY)
    yield made
    made.db.close()


def beat(box: Box, *alarms: str) -> messages.Heartbeat:
    return health.heartbeat(box.db, box.config, box.holder.current, 12.7, alarms)


def test_a_new_box(box: Box) -> None:
    said = beat(box)
    assert (said.series_read, said.reviews, said.rounds, said.alarms) == (0, 0, (), ())
    assert (said.bundle_digest, said.release_version) == (box.holder.current.digest, 0)
    assert said.provider == "CPUExecutionProvider"
    assert said.uptime_s == 12
    assert said.disk_free_bytes > 0
    assert messages.decode(messages.encode(said)) == said


def test_newest_result_and_newest_verdict_count(box: Box) -> None:
    first = box.add_reviewed("p1", bright=True, label="nodule")
    box.add_reviewed("p2", bright=True, label="nodule")
    box.db.execute("UPDATE reviews SET verdict = 'corrected' WHERE series_no = ?", (first,))
    box.review(first, "nodule")
    box.db.execute(
        "INSERT INTO results SELECT 90, series_no, 2, bundle_digest, 0, provider, '{}', '', 1, 0, 0 FROM results"
        " WHERE series_no = ?",
        (first,),
    )
    box.db.execute("UPDATE series SET state = 'failed' WHERE series_no <> ?", (first,))
    said = beat(box)
    assert (said.series_read, said.series_abstained, said.series_failed) == (2, 1, 1)
    assert (said.reviews, said.reviews_agreed) == (2, 2)


def test_open_rounds_are_told_and_closed_ones_are_not(box: Box) -> None:
    for number in range(20):
        ledger.invite(box.db, make_plan("b" * 64, b"k" * 32, round_id=f"r{number}"), time.time())
    ledger.apply(box.db, box.data_dir, "r1", Event.CLOSED_BY_HUB, 0.0)
    ledger.apply(box.db, box.data_dir, "r2", Event.REFUSED_HERE, 0.0, ledger.Outcome(reason="not here"))
    ledger.apply(box.db, box.data_dir, "r3", Event.ADMITTED, 0.0)
    said = beat(box).rounds
    assert len(said) == health.MAX_ROUNDS
    assert (said[0].round_id, said[0].state) == ("r3", "training")
    assert "r1" not in {status.round_id for status in said}


def test_a_declined_round_tells_its_reason(box: Box) -> None:
    ledger.invite(box.db, make_plan("b" * 64, b"k" * 32), time.time())
    ledger.apply(box.db, box.data_dir, "round-1", Event.REFUSED_HERE, 0.0, ledger.Outcome(reason="x" * 900))
    (status,) = beat(box).rounds
    assert (status.state, len(status.reason)) == ("declined", ledger.MAX_REASON_CHARACTERS)


def test_a_certificate_that_was_not_renewed_is_told(box: Box) -> None:
    """A life of 91 days: renewed from day 60.7 on, told from day 75.8 on."""
    start, ends = box.enrolled.life
    assert round((ends - start) / 86400.0) == 91
    assert health.certificate_notices(box.enrolled.life, start + 75.5 * 86400.0) == []
    (soon,) = health.certificate_notices(box.enrolled.life, start + 76.5 * 86400.0)
    assert "ends in 14 days" in soon
    assert "enroll --replace" in soon
    (late,) = health.certificate_notices(box.enrolled.life, ends + 1.0)
    assert "has expired" in late


def test_the_site_s_trouble_is_told_until_it_is_over(box: Box) -> None:
    error = SiteError("no space", advice="free some")
    ledger.hold_up(box.db, "release 2", error, time.time())
    assert beat(box, "from the link").alarms == ("from the link", "release 2 waits: no space")
    database.end_alarm(box.db, "release 2")
    assert beat(box).alarms == ()


def test_alarms(tmp_path: Path) -> None:
    box = make_box(tmp_path, AUTHORITY, dicom={"min_free_bytes": 2**62})
    said = beat(box, *(f"alarm {number} " + "x" * 600 for number in range(30)))
    assert len(said.alarms) == health.MAX_ALARMS
    assert said.alarms[-1].startswith("disk: ")
    assert messages.decode(messages.encode(said)) == said
