"""The link's bench: its smallest cases, each sum checked against what the boxes made up. Not its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.link import bench, cost, dummy, flare, hub_cost, ours, peers, rounds, updates
from benchmarks.link.ours import Kind, Scene
from benchmarks.link.wire import HUB, Count, Wire
from benchmarks.network.results import Results
from benchmarks.processes import HouseError
from models.bundle import read_bundle
from tests.cloud_hub.hub_support import needs_mosquitto

PARAMETERS = 20_000


def test_the_dummy_network_has_its_parameters_in_160_tensors(tmp_path: Path) -> None:
    for parameters in (100_000, 5_000_000, 25_000_000):
        sizes = [size for (size,) in dummy.shapes(parameters).values()]
        assert (len(sizes), sum(sizes)) == (160, parameters)
        assert min(sizes) >= 1
    bundle = read_bundle(dummy.write_dummy_bundle(tmp_path / "dummy.bundle", PARAMETERS))
    assert {name: value.shape for name, value in bundle.weights.items()} == dummy.shapes(PARAMETERS)
    assert bundle.manifest.is_trainable


def test_a_wrong_mean_is_told() -> None:
    of = dummy.shapes(PARAMETERS)
    before = {name: np.zeros(shape, np.float32) for name, shape in of.items()}
    changes = [dummy.change(device, 7, of, 10.0) for device in ("a", "b")]
    mean = {name: (changes[0][name] + changes[1][name]) / 2 for name in of}
    assert dummy.error_of_mean(mean, before, ["a", "b"], 7, 10.0) < 1e-6
    assert dummy.error_of_mean(changes[0], before, ["a", "b"], 7, 10.0) > 0.9  # one box's alone
    assert dummy.error_of_mean(mean, before, ["a", "b"], 8, 10.0) > 0.9  # another round's


@pytest.mark.parametrize("case", ["open", "masked", "numpy", "torch"])
def test_each_case_of_the_hub_cost_adds_up(tmp_path: Path, case: str) -> None:
    kind = hub_cost.OURS[case]
    folder = updates.written(tmp_path, kind, PARAMETERS, 8).path if kind else tmp_path
    row = worker(case, folder)
    assert row["error"] < 0.05
    assert row["add_ms"] >= 0.0
    assert row["peak_bytes"] >= row["base_bytes"] > 0


def test_a_damaged_update_gives_no_figure(tmp_path: Path) -> None:
    folder = updates.written(tmp_path, "masked", PARAMETERS, 8)
    other = updates.written(tmp_path / "other", "masked", PARAMETERS, 8)
    folder.update("box-1").write_bytes(other.update("box-1").read_bytes())
    with pytest.raises(subprocess.CalledProcessError):
        worker("masked", folder.path)


def worker(case: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.link.hub_cost_worker", case, str(PARAMETERS), "8", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def test_costs_are_those_of_the_process_and_what_it_started() -> None:
    shell = subprocess.Popen(["bash", "-c", "setsid sleep 60 & sleep 60"], start_new_session=True)
    try:
        while len(cost.family(shell.pid)) < 3:
            assert shell.poll() is None
        family = cost.family(shell.pid)
        assert shell.pid in family
        assert os.getpid() not in family
        assert all(cost.peak_bytes(pid) > 0 for pid in family)
    finally:
        for pid in cost.family(shell.pid):
            os.kill(pid, 9)
        shell.wait()
    assert cost.peak_bytes(shell.pid) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
def test_the_wire_counts_what_one_end_sends_and_leaves_nothing() -> None:
    with Wire(["box-1", "box-2"]) as wire:
        if not wire.is_apart:
            pytest.skip("no namespace may be made here")
        before = {end: counted(wire, end) for end in wire.ends}
        script = (
            "import socket,sys; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM);"
            "[s.sendto(bytes(1400),(sys.argv[1],9)) for _ in range(10)]"
        )
        subprocess.run([*wire.inside("box-1"), sys.executable, "-c", script, wire.hub_address], check=True)
        made = {end: counted(wire, end) - before[end] for end in wire.ends}
        assert made["box-1"].sent >= 14_000
        assert made["box-2"].sent < 5_000
        names = [path.name for path in Path("/run/netns").glob(f"wl{os.getpid()}-*")]
        assert len(names) == 3
        assert wire.inside(HUB)[-1] in names
    assert not list(Path("/run/netns").glob(f"wl{os.getpid()}-*"))
    assert not list(Path("/etc/netns").glob(f"wl{os.getpid()}-*"))
    assert not list(Path("/sys/class/net").glob(f"wl{os.getpid()}-*"))


def counted(wire: Wire, end: str) -> Count:
    count = wire.count(end)
    assert count is not None
    return count


def test_a_peer_that_is_not_here_has_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "FOLDER", tmp_path / "peers")

    def left_out(*_: object) -> dict[str, Any]:
        raise HouseError("not here\nmore words")

    monkeypatch.setattr(ours, "measured", left_out)
    results = Results(tmp_path / "rows", lambda text: None, code="x")
    extent = rounds.Extent((PARAMETERS,), (4,), 1, install=False)
    made = list(rounds.rows(results, results, extent, tmp_path))
    assert [row["what"] for row in made] == ["ours, open", "ours, masked", "Flower 1.42", "NVIDIA FLARE 2.9"]
    assert [row["left_out"] for row in made] == ["not here"] * 2 + ["not installed: run without --quick"] * 2
    assert not list(tmp_path.glob("rows/*"))  # measured again the next time
    shown = bench.table({"on": {"cores": 2, "load_average": 0.0}, "rounds": made, "hub_cost": []})
    assert [table.row_count for table in shown.renderables] == [4, 0]  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.timeout(400)
@needs_mosquitto
@pytest.mark.parametrize("kind", ["unsafe_open", "masked"])
def test_a_round_gives_the_sum_of_what_the_boxes_made_up(tmp_path: Path, kind: Kind) -> None:
    row = ours.measured(Scene(kind, boxes=3, parameters=PARAMETERS, rounds=1), tmp_path)
    assert row["sum_error"] < ours.SUM_ERROR_MAX
    assert row["round_s"] > row["summed_s"] > 0.0
    assert row["up_bytes"] > PARAMETERS * (1 if kind == "unsafe_open" else 2)  # int8; words of 16 bits
    assert not list(tmp_path.iterdir())


def test_the_starts_of_a_peers_rounds_are_read_from_its_log_and_stay(tmp_path: Path) -> None:
    log = tmp_path / "job" / "log.txt"
    log.parent.mkdir()
    banner = "\n   ****\n        Round {number} started.        \n   ****\n"
    first = "2026-11-30 08:55:30,100 - FedAvg - INFO - " + banner.format(number=0)
    log.write_text(first + "2026-11-30 08:55:31,000 - FedAvg - INFO - Round 0 is told in passing\n")
    starts = flare.Starts(tmp_path)
    assert starts.count() == 1
    log.write_text(log.read_text() + "2026-11-30 08:55:32,600 - FedAvg - INFO - " + banner.format(number=1))
    assert starts.count() == 2
    log.unlink()
    assert starts.count() == 2
    assert (starts.at[1] - starts.at[0]).total_seconds() == 2.5
