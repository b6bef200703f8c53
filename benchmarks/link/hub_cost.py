"""What one update costs the hub: ours beside bare addition and the peers' own aggregation, and memory as updates grow in number.

Runs each case in a process of its own, in this environment or the peer's; reads the JSON that it prints.
Never measures the network: rounds.py does.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.link import peers, updates
from benchmarks.link.updates import Kind
from benchmarks.network.results import Results
from benchmarks.processes import HouseError

Row = dict[str, Any]

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 1800.0
OURS: dict[str, Kind | None] = {"open": "unsafe_open", "masked": "masked", "numpy": None, "torch": None}
SHOWN_AS = {
    "open": "ours, open",
    "masked": "ours, masked",
    "numpy": "numpy alone",
    "torch": "torch alone",
} | peers.SHOWN_AS
_FLOWER_COPIES = 1.5  # of every reply at once, at least
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Extent:
    parameters: tuple[int, ...]
    updates: tuple[int, ...]
    install: bool  # peers that are missing


def rows(results: Results, extent: Extent, work: Path) -> Iterator[Row]:
    for parameters, count, case in product(extent.parameters, extent.updates, SHOWN_AS):
        settings = {"what": SHOWN_AS[case], "parameters": parameters, "updates": count}
        try:
            command = _command(case, parameters, count, extent.install, work)
            yield results.row("hub-cost", settings, lambda command=command: _run(command))  # type: ignore[misc]
        except (peers.MissingError, HouseError) as error:
            yield settings | {"left_out": str(error)}


def _command(case: str, parameters: int, count: int, install: bool, work: Path) -> list[str]:
    """Raises MissingError."""
    if case in peers.SHOWN_AS:
        if case == "flower" and (needed := 4 * parameters * count * _FLOWER_COPIES) > _available_bytes():
            raise peers.MissingError(f"all updates at once: {needed / 2**30:.0f} GiB at least, more than there are")
        python = str(peers.environment(case, install=install) / "python")
        return [python, str(peers.APPS / "aggregate.py"), case, str(parameters), str(count)]
    kind = OURS[case]
    folder = updates.written(work / "updates", kind, parameters, count).path.resolve() if kind else Path("/")
    worker = [sys.executable, "-m", "benchmarks.link.hub_cost_worker"]
    return [*worker, case, str(parameters), str(count), str(folder)]


def _run(command: list[str]) -> Row:
    environment = os.environ | _ONE_THREAD | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise HouseError(f"exited with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
