"""Drift on the box: an alarm while the newest readings are unlike the reference, told to hub, status and doctor."""

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest

from edge_agent import config, database, doctor, drift, health
from edge_agent.bundles import Active, ActiveBundle
from edge_agent.doctor import Level
from edge_agent.infer import Reader
from edge_agent.pipeline import Pipeline
from models.adaptive import Calibration
from models.bundle import SHIPPED, Bundle, read_bundle
from tests.edge_agent.reading_support import add_result, expected, with_reference

BY = Calibration(3.0, 0.1, 12)  # a site's own; drift is judged without it
FIRST_ALARM = "drift of chest-xray"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_reference(tmp_path_factory.mktemp("bundle") / "x.bundle")


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    opened = database.connect(tmp_path)
    yield opened
    opened.close()


def read(db: sqlite3.Connection, bundle: Bundle, cases: int, distance: float, digest: str = "") -> None:
    for logits_K, ood in zip(*expected(1, cases, distance), strict=True):
        add_result(db, digest or bundle.digest, bundle.manifest.tasks[0], list(logits_K), by=BY, ood=float(ood))


def alarm_names(db: sqlite3.Connection) -> list[str]:
    return [row["name"] for row in db.execute("SELECT name FROM alarms")]


def test_readings_like_the_reference_raise_nothing(db: sqlite3.Connection, bundle: Bundle) -> None:
    read(db, bundle, 50, 1.0)
    drift.watch(db, bundle, 1.0)
    assert alarm_names(db) == []


def test_an_alarm_comes_once_and_goes_when_the_readings_are_as_before(db: sqlite3.Connection, bundle: Bundle) -> None:
    read(db, bundle, 30, 2.0)
    drift.watch(db, bundle, 1.0)
    drift.watch(db, bundle, 2.0)
    (alarm,) = db.execute("SELECT * FROM alarms").fetchall()
    assert (alarm["name"], alarm["raised_at"]) == (FIRST_ALARM, 1.0)
    assert alarm["text"].startswith("chest-xray: out-of-distribution score has drifted by 0.")
    assert len(alarm["text"]) <= health.MAX_ALARM_CHARACTERS
    read(db, bundle, 50, 1.0)
    drift.watch(db, bundle, 3.0)
    assert alarm_names(db) == []


def test_a_bundle_without_reference_ends_the_alarm_of_the_one_before(db: sqlite3.Connection, bundle: Bundle) -> None:
    read(db, bundle, 50, 2.0)
    drift.watch(db, bundle, 1.0)
    database.raise_alarm(db, "provider", "another's", 1.0)
    drift.watch(db, read_bundle(SHIPPED), 2.0)
    assert alarm_names(db) == ["provider"]


def test_few_readings_and_those_of_other_bundles_and_tasks_are_not_judged(
    db: sqlite3.Connection, bundle: Bundle
) -> None:
    read(db, bundle, 29, 2.0)
    read(db, bundle, 40, 2.0, digest="cd" * 32)
    other = bundle.manifest.tasks[1]
    for _ in range(40):
        add_result(db, bundle.digest, other, [9.0, 0.0, 0.0], ood=9.0)
    assert drift.verdicts(db, bundle.digest, bundle.manifest) == {
        "chest-xray": None,
        "chest-ct": None,
        "brain-mr": None,
    }


def test_a_reading_of_an_older_version_of_a_series_is_not_counted(db: sqlite3.Connection, bundle: Bundle) -> None:
    read(db, bundle, 30, 2.0)
    db.execute("UPDATE series SET version = 2 WHERE series_no = 1")
    assert drift.verdicts(db, bundle.digest, bundle.manifest)["chest-xray"] is None


def test_a_reading_that_is_no_number_is_left_out_and_logged(
    db: sqlite3.Connection, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    read(db, bundle, 31, 2.0)
    db.execute("UPDATE results SET findings = json_set(findings, '$.ood', NULL) WHERE series_no = 5")
    drift.watch(db, bundle, 1.0)
    assert alarm_names(db) == [FIRST_ALARM]
    assert "series 5: its result is left out" in caplog.text


def test_the_box_watches_from_its_start_and_tells_hub_and_doctor(tmp_path: Path, bundle: Bundle) -> None:
    settings = config.parse(
        {"box": {"data_dir": "."}, "inference": {"bundle": str(bundle.path)}, "hub": {"enabled": False}},
        folder=tmp_path,
    )
    db = database.connect(tmp_path)
    db.execute("INSERT INTO bundles VALUES (?, 0, ?, 'active', '', 0)", (bundle.digest, str(bundle.path)))
    read(db, bundle, 50, 2.0)
    active = Active(Reader.open(bundle.path, ["CPUExecutionProvider"], 1, tmp_path / "engines"), bundle.digest, 0)
    stop = _StopsAtTheFirstWait()
    Pipeline(settings, ActiveBundle(active), time.time).run(stop)
    said_to_hub = health.heartbeat(db, settings, active, 1.0, ())
    assert said_to_hub.alarms == ()  # a drifted box needs the next release more than others
    (notice,) = said_to_hub.notices
    assert notice.startswith("chest-xray: ")
    said = [check for check in doctor.examine(settings) if check.name == "drift"]
    assert [(check.level, check.advice) for check in said] == [
        (Level.WARNING, drift.ADVICE), (Level.OK, ""), (Level.OK, "")
    ]  # fmt: skip
    assert said[1].finding == "chest-ct: no reference"
    db.close()


class _StopsAtTheFirstWait(Event):
    def wait(self, timeout: float | None = None) -> bool:
        self.set()
        return True
