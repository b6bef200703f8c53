"""The bench of scale: its smallest cases, with every box counted and each sum checked. Not its figures."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.fleet import bench, scale, series
from benchmarks.processes import HouseError
from tests.cloud_hub.hub_support import needs_mosquitto
from tests.cloud_hub.round_support import needs_bundle

pytestmark = [needs_bundle, needs_mosquitto, pytest.mark.slow]


def test_every_box_is_in_the_sum_of_a_round_whose_broker_is_killed_twice(tmp_path: Path) -> None:
    row = scale.measured(scale.Extent(boxes=6, processes=2, heartbeats_s=1.0), tmp_path / "work")
    assert row["counted"] == 6
    assert row["sum_error"] < scale.RELATIVE_ERROR_MAX
    assert len(row["away_s"]) == 2
    assert set(row["stages_s"]) <= set(scale.STAGES)  # as far as the hub's database was looked at in them
    assert 0.0 < sum(row["stages_s"].values()) <= row["round_s"]
    assert row["hub_cpu_s"] > 0.0
    assert row["hub_peak_bytes"] > row["broker_peak_bytes"] > 0


def test_a_box_that_never_comes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "READY_TIMEOUT_S", 5.0)
    monkeypatch.setattr("benchmarks.fleet.crowd.Crowd.go", lambda crowd: None)
    with pytest.raises(HouseError, match="no all connections"):
        scale.measured(scale.Extent(boxes=2, processes=1, heartbeats_s=1.0), tmp_path / "work")


def test_a_round_of_real_boxes_is_released_and_shown(tmp_path: Path) -> None:
    row = series.measured(series.Extent(rounds=1, hub_killed_in=0, box_killed_in=0), tmp_path / "work")
    (one,) = row["rounds"]
    assert one["sum_error"] < series.SUM_ERROR_MAX
    assert one["release_s"] > one["round_s"] > 0.0
    shown = io.StringIO()
    Console(file=shown, width=160).print(bench.series_table(row | {"load_average": 0.0}, cores=2))
    assert "1 of 1 ended" in shown.getvalue()
