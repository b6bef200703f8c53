"""`./dev bench scale`: a thousand boxes on one hub, and rounds in a row in which hub, broker and a box are killed -9.

Starts everything on loopback, below a temporary folder. Needs Mosquitto.
Never beside a peer: Flower's and NVIDIA FLARE's rounds are in `./dev bench link`.
"""

import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from benchmarks.fleet import scale, series
from benchmarks.fleet.slow_box import TRAINING_S

Row = dict[str, Any]

FOLDER = Path(".bench") / "scale"
PREFIX = "house-"
CROWD, QUICK_CROWD = scale.Extent(boxes=1000, processes=4, heartbeats_s=60.0), scale.Extent(50, 2, 15.0)
SERIES = series.Extent(rounds=8, hub_killed_in=3, box_killed_in=5)
QUICK_SERIES = series.Extent(rounds=2, hub_killed_in=2, box_killed_in=0)


def measure(*, quick: bool) -> Row:
    """Raises HouseError where a box or an update is lost, a round repeated, or a sum wrong."""
    return {
        "on": {"machine": platform.machine(), "cores": os.cpu_count()},
        "crowd": _row("boxes on one hub", scale.measured, QUICK_CROWD if quick else CROWD),
        "series": _row("rounds in a row", series.measured, QUICK_SERIES if quick else SERIES),
    }


def _row(what: str, measured: Any, extent: scale.Extent | series.Extent) -> Row:
    print(f"{time.strftime('%H:%M:%S')} {what}: {extent}", file=sys.stderr, flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    _clear_dead()
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", dir=FOLDER.resolve()) as work:
        row: Row = measured(extent, Path(work) / "work")
    return row | {"load_average": os.getloadavg()[0]}


def _clear_dead() -> None:
    """What a killed bench left."""
    for path in FOLDER.glob(f"{PREFIX}*"):
        if not Path("/proc", path.name.split("-")[1]).exists():
            shutil.rmtree(path, ignore_errors=True)


def table(result: Row) -> Group:
    return Group(
        crowd_table(result["crowd"], result["on"]["cores"]), series_table(result["series"], result["on"]["cores"])
    )


def crowd_table(row: Row, cores: int) -> Table:
    shown = Table(
        title=f"{row['boxes']} boxes on one hub, all on one machine ({cores} cores, load {row['load_average']:.1f} at the end)",
        caption=f"Boxes: {row['processes']} processes, real connections, certificates, secrets and masks, no training. "
        f"At most {row['descriptors']} open files a process. Processor time of the hub and its broker alone; the times by "
        "the clock hold the boxes' own work too, which a fleet does on its own machines.",
    )
    shown.add_column("what")
    shown.add_column("figure", justify="right")
    for what, figure in _crowd_figures(row):
        shown.add_row(what, figure)
    return shown


def _crowd_figures(row: Row) -> list[tuple[str, str]]:
    away = ", ".join(f"{each:.1f}" for each in row["away_s"])
    return [
        ("all connected, s", f"{row['connect_s']:.1f} ({row['boxes'] / row['connect_s']:.0f} a second)"),
        ("all heard by the hub, s", f"{row['heard_s']:.1f}"),
        ("heartbeats alone: hub, broker, % of a core", f"{row['quiet_hub']:.1%}, {row['quiet_broker']:.1%}"),
        ("one masked round, until the sum, s", f"{row['round_s']:.1f}"),
        *((f"    {state}", f"{seconds:.1f}") for state, seconds in row["stages_s"].items()),
        ("broker killed -9 twice in it: all back after, s", away),
        ("boxes in the sum", f"{row['counted']} of {row['boxes']}"),
        ("hub CPU in the round, s", f"{row['hub_cpu_s']:.1f} ({row['hub_ms_a_box']:.0f} ms a box)"),
        ("broker CPU in the round, s", f"{row['broker_cpu_s']:.1f}"),
        ("hub peak, MiB", f"{row['hub_peak_bytes'] / 2**20:.0f}"),
        ("broker peak, MiB", f"{row['broker_peak_bytes'] / 2**20:.0f}"),
    ]


def series_table(result: Row, cores: int) -> Table:
    delays = ", ".join(f"{what}: {seconds:+.1f} s" for what, seconds in result["delays_s"].items())
    shown = Table(
        title=f"Rounds in a row, {result['boxes']} real boxes, {cores} cores, load {result['load_average']:.1f} at the end",
        caption=f"Each round trains for {TRAINING_S:.0f} s and is released to all boxes. {len(result['rounds'])} of {len(result['rounds'])} "
        f"ended, none repeated, each update once in its sum. Against the median of the others ({result['usual_s']:.1f} s): {delays}.",
    )
    for column in ("round", "killed -9", "until the sum, s", "until every box runs it, s", "error of the sum"):
        shown.add_column(column, justify="left" if column == "killed -9" else "right")
    for row in result["rounds"]:
        shown.add_row(
            str(row["number"]),
            row["killed"] or "–",
            f"{row['round_s']:.1f}",
            f"{row['release_s']:.1f}",
            f"{row['sum_error']:.4f}",
        )
    return shown
