"""Site calibration: verdicts in the database move what the next series is judged by, and nothing else does."""

import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_agent import (
    catalog,
    cli,
    config,
    database,
    findings,
    instances,
    reviews,
    site_calibration,
    status,
    task_status,
)
from edge_agent.bundles import Active, ActiveBundle
from edge_agent.infer import Reader
from edge_agent.pipeline import Pipeline
from edge_agent.site_calibration import SiteCalibration, standing
from models import adaptive
from models.adaptive import Calibration, bundled
from models.bundle import SHIPPED, read_bundle
from models.phantom_dicom import write_series
from models.phantoms import phantom
from tests.edge_agent.reading_support import add_result, add_review
from tests.edge_agent.review_support import make_box, served, sign_in

BUNDLE = read_bundle(SHIPPED)
TASK, OTHER = BUNDLE.manifest.tasks[:2]
NAMES = [label.name for label in TASK.labels]


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    opened = database.connect(tmp_path)
    yield opened
    opened.close()


def reviewed(
    db: sqlite3.Connection, cases: int, seed: int = 0, by: Calibration | None = None
) -> list[tuple[np.ndarray, int]]:
    """Cases that are surer than right; gives what was said and what was true."""
    generator = np.random.default_rng(seed)
    told = []
    for _ in range(cases):
        logits_K, truth = generator.normal(0, 3, 3), int(generator.integers(3))
        add_review(db, add_result(db, BUNDLE.digest, TASK, list(logits_K), by=by), NAMES[truth])
        told.append((logits_K, truth))
    return told


def by_hand(told: list[tuple[np.ndarray, int]]) -> Calibration:
    state = adaptive.start(TASK)
    for logits_K, truth in told:
        state = adaptive.learn(state, logits_K, truth)
    return state.calibration


def test_without_verdicts_it_is_the_bundles(db: sqlite3.Connection) -> None:
    add_result(db, BUNDLE.digest, TASK, [1.0, 2.0, 3.0])
    assert standing(db, BUNDLE.digest, TASK).site == bundled(TASK)


@pytest.mark.parametrize("by", [None, Calibration(2.5, 0.1, 7)])
def test_it_follows_the_verdicts_in_order_whatever_the_results_were_judged_by(
    db: sqlite3.Connection, by: Calibration | None
) -> None:
    told = reviewed(db, 25, by=by)
    now = standing(db, BUNDLE.digest, TASK)
    assert now.site.cases == 25
    assert now.site.threshold < TASK.conformal_threshold
    assert now.site.temperature > TASK.temperature
    expected = by_hand(told)
    assert (now.site.temperature, now.site.threshold) == pytest.approx((expected.temperature, expected.threshold))


def test_it_counts_how_often_the_set_that_was_shown_held_the_label(db: sqlite3.Connection) -> None:
    wide = Calibration(TASK.temperature, 0.0, 3)
    add_review(db, add_result(db, BUNDLE.digest, TASK, [9.0, 0.0, 0.0], by=wide), NAMES[1])
    add_review(db, add_result(db, BUNDLE.digest, TASK, [9.0, 0.0, 0.0]), NAMES[0])
    add_review(db, add_result(db, BUNDLE.digest, TASK, [9.0, 0.0, 0.0]), NAMES[1])
    now = standing(db, BUNDLE.digest, TASK)
    assert (now.held, now.held_by_bundle, now.site.cases) == (2, 1, 3)


def test_the_newest_verdict_of_a_series_counts_once(db: sqlite3.Connection) -> None:
    series_no = add_result(db, BUNDLE.digest, TASK, [9.0, 0.0, 0.0])
    add_review(db, series_no, NAMES[1])
    add_review(db, series_no, NAMES[0])
    now = standing(db, BUNDLE.digest, TASK)
    assert (now.site.cases, now.held_by_bundle) == (1, 1)


def test_other_tasks_and_other_bundles_do_not_count(db: sqlite3.Connection) -> None:
    add_review(db, add_result(db, BUNDLE.digest, OTHER, [9.0, 0.0, 0.0]), OTHER.labels[1].name)
    add_review(db, add_result(db, "cd" * 32, TASK, [9.0, 0.0, 0.0]), NAMES[1])
    assert standing(db, BUNDLE.digest, TASK).site == bundled(TASK)
    assert standing(db, BUNDLE.digest, OTHER).site.cases == 1


def test_what_cannot_be_used_is_left_out_and_logged(db: sqlite3.Connection, caplog: pytest.LogCaptureFixture) -> None:
    told = reviewed(db, 3)
    add_review(db, add_result(db, BUNDLE.digest, TASK, [9.0, 0.0, 0.0]), "gout")
    broken = [add_result(db, BUNDLE.digest, TASK, [9.0, 0.0, 0.0]) for _ in range(2)]
    for series_no in broken:
        add_review(db, series_no, NAMES[0])
    db.execute(
        "UPDATE results SET findings = json_set(findings, '$.labels[0].probability', NULL) WHERE series_no = ?",
        (broken[0],),
    )
    db.execute(
        "UPDATE results SET findings = json_set(findings, '$.labels[0].name', 'x') WHERE series_no = ?", (broken[1],)
    )
    now, expected = standing(db, BUNDLE.digest, TASK).site, by_hand(told)
    assert now.cases == 3
    assert (now.temperature, now.threshold) == pytest.approx((expected.temperature, expected.threshold))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["series 4", "series 5", "series 6"]


def test_old_cases_are_not_read_for_ever(db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_calibration, "MAX_CASES", 10)
    told = reviewed(db, 15)
    now, expected = standing(db, BUNDLE.digest, TASK).site, by_hand(told[5:])
    assert now.cases == 10
    assert (now.temperature, now.threshold) == pytest.approx((expected.temperature, expected.threshold))


def test_it_is_the_same_after_a_crash_and_follows_the_next_verdict(db: sqlite3.Connection) -> None:
    reviewed(db, 5)
    kept = SiteCalibration()
    before = kept.of(db, BUNDLE, TASK)
    assert SiteCalibration().of(db, BUNDLE, TASK) == before == kept.of(db, BUNDLE, TASK)
    reviewed(db, 1, seed=1)
    assert kept.of(db, BUNDLE, TASK).cases == 6
    assert kept.of(db, BUNDLE, OTHER).cases == 0
    assert kept.of(db, replace(BUNDLE, digest="cd" * 32), TASK) == bundled(TASK)


# --- on the box


def read_two(tmp_path: Path, *, adapt: bool) -> tuple[sqlite3.Connection, config.Config]:
    """Two X-ray series; the reviewer calls the first normal before the second is read."""
    settings = config.parse(
        {"box": {"data_dir": "."}, "dicom": {"quiet_time_s": 0.0}, "inference": {"adapt": adapt}}, folder=tmp_path
    )
    reader = Reader.open(SHIPPED, ["CPUExecutionProvider"], 1, tmp_path / "engines")
    taken = Pipeline(settings, ActiveBundle(Active(reader, reader.bundle.digest, 0)), time.time)
    db = database.connect(tmp_path)
    db.execute("INSERT INTO bundles VALUES (?, 0, ?, 'active', '', 0)", (BUNDLE.digest, str(SHIPPED)))
    for seed in (1, 2):
        (path,) = write_series(phantom("XR", "nodule", seed), tmp_path / "sent", patient_seed=seed)
        kept = instances.keep(tmp_path, [path.read_bytes()], min_free_bytes=0)
        catalog.add_instance(db, instances.read_file_header(path), kept, calling_ae="CR", now=time.time() - 1)
        assert taken.step(db)
        if seed == 1:
            reviews.record(db, 1, reviews.CORRECTED, "normal", "r", 0.0)
    return db, settings


def said(db: sqlite3.Connection, series_no: int) -> dict[str, float]:
    (text,) = db.execute("SELECT findings FROM results WHERE series_no = ?", (series_no,)).fetchone()
    calibration: dict[str, float] = json.loads(text)["calibration"]
    return calibration


def test_the_next_series_is_judged_by_what_the_verdict_taught(tmp_path: Path) -> None:
    db, settings = read_two(tmp_path, adapt=True)
    assert said(db, 1) == {"temperature": TASK.temperature, "threshold": TASK.conformal_threshold, "cases": 0}
    second = said(db, 2)
    assert second["cases"] == 1
    assert second["temperature"] > TASK.temperature
    assert second["threshold"] < TASK.conformal_threshold
    row = db.execute("SELECT findings, maps_path FROM results WHERE series_no = 2").fetchone()
    restored = findings.restore(row["findings"], tmp_path / row["maps_path"])
    assert restored.calibration == Calibration(**second)  # type: ignore[arg-type]
    told = task_status.gather(db, settings)[0]
    assert (told.task, told.reviewed, told.covered) == (TASK.name, 1, 0)
    assert (told.threshold_of_bundle, told.threshold) == (TASK.conformal_threshold, second["threshold"])
    assert told.drift_said == "fewer than 30 readings"


def test_a_site_may_keep_the_bundles_calibration(tmp_path: Path) -> None:
    db, settings = read_two(tmp_path, adapt=False)
    assert said(db, 2) == said(db, 1)
    told = task_status.gather(db, settings)[0]
    assert (told.reviewed, told.threshold, told.temperature) == (1, TASK.conformal_threshold, TASK.temperature)


def test_status_prints_each_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    db, settings = read_two(tmp_path, adapt=True)
    db.close()
    gathered = status.gather(settings)
    assert json.loads(json.dumps(gathered.to_dict()))["tasks"][0]["reviewed"] == 1
    cli.out.width = 200
    cli._print_status(gathered)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(TASK.name)]
    assert "0%" in line
    assert f"0.50→{gathered.tasks[0].threshold:.2f}" in line


@pytest.mark.parametrize(
    ("calibration", "phrase"),
    [
        (None, "the bundle's"),
        (Calibration(1.0, 0.2, 0), "the bundle's"),
        (Calibration(1.0, 0.2, 1), "this site's, from 1 reviewed case<"),
        (Calibration(1.0, 0.2, 34), "this site's, from 34 reviewed cases<"),
    ],
)
def test_the_page_says_whose_calibration_it_was(tmp_path: Path, calibration: Calibration | None, phrase: str) -> None:
    box = make_box(tmp_path)
    series_no = add_result(box.db, BUNDLE.digest, TASK, [1.0, 2.0, 3.0], by=calibration)
    with served(box) as url, sign_in(url) as browser:
        page = browser.get(f"/series/{series_no}").text
    assert phrase in page.replace("&#39;", "'")
    box.db.close()
