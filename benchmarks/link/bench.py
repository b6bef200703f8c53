"""Round time and the hub's cost per update, beside Flower and NVIDIA FLARE in the same run.

Ours is real but for the training: hub, Mosquitto, boxes' daemons, mutual TLS, sealing, masks; see box.py. Keeps each row
under .bench/link as soon as it is measured, peers' environments under .bench/peers.
Never counts the download of the base in our round: a release brings it once; the peers send it in every round.
"""

import hashlib
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from benchmarks.link import hub_cost, rounds
from benchmarks.network.results import Results, Row

FOLDER = Path(".bench") / "link"
ROOT = Path(__file__).parents[2]
OURS = ("cloud_hub", "edge_agent", "fleet_link", "models", "benchmarks/link")
SIZES, QUICK_SIZES = (5_000_000, 25_000_000), (5_000_000,)
BYTES_A_PARAMETER = 4


def measure(*, quick: bool) -> dict[str, Any]:
    """Both tables. --quick installs no peers."""

    def tell(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    ours = Results(FOLDER, tell, code=_digest(*OURS))
    peers = Results(FOLDER, tell, code=_digest("benchmarks/link"))
    sizes, install = QUICK_SIZES if quick else SIZES, not quick
    round_extent = rounds.Extent(sizes, (4,) if quick else (4, 8), 1 if quick else 3, install)
    cost_extent = hub_cost.Extent(sizes, (8,) if quick else (8, 32, 256), install)
    return {
        "on": {"machine": platform.machine(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0]},
        "rounds": list(rounds.rows(ours, peers, round_extent, FOLDER / "work")),
        "hub_cost": list(hub_cost.rows(ours, cost_extent, FOLDER)),
    }


def table(result: dict[str, Any]) -> Group:
    return Group(_rounds(result["rounds"], result["on"]), _hub_cost(result["hub_cost"]))


def _rounds(rows: Sequence[Row], on: dict[str, Any]) -> Table:
    wires = ", ".join(sorted({row["wire"] for row in rows if "wire" in row}))
    shown = Table(
        title=f"One round, no training: median ({on['cores']} cores, load {on['load_average']:.1f} at the end)",
        caption="Ours: from `round start` on the hub's clock until the next weights are on its disk; collected: until the last "
        "update is in the sum (masked: until the last share is here; the sum is made after that); base: a release's bundle, from the offer until the slowest box "
        "has it whole, all boxes at once, and in no round. Flower: from making the messages to the aggregated weights; "
        "FLARE: from a round's start to the next one's; both send the weights down in every round. Processor seconds: a peer's "
        "hub with all its processes; of one box. Peak: the hub's processes together. Flower's clients are not authenticated, "
        f"its default. Boxes: {wires}.",
    )
    for column in (
        "what",
        "parameters",
        "boxes",
        "round, s",
        "collected, s",
        "base, s",
        "hub CPU, s",
        "broker CPU, s",
        "box CPU, s",
        "hub peak, MiB",
        "× weights",
        "up, MB a box",
        "down, MB a box",
    ):
        shown.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        begin = [row["what"], f"{row['parameters'] / 1e6:g} M", str(row["boxes"])]
        if "left_out" in row:
            shown.add_row(*begin, row["left_out"])
            continue
        weights = BYTES_A_PARAMETER * row["parameters"]
        shown.add_row(
            *begin,
            *(_figure(row.get(key)) for key in ("round_s", "summed_s", "release_s")),
            *(_figure(row.get(key)) for key in ("hub_cpu_s", "broker_cpu_s", "box_cpu_s")),
            f"{row['hub_peak_bytes'] / 2**20:.0f}",
            f"{row['hub_peak_bytes'] / weights:.1f}",
            *(_figure(row.get(key), 1e6) for key in ("up_bytes", "down_bytes")),
        )
    return shown


def _hub_cost(rows: Iterable[Row]) -> Table:
    shown = Table(
        title="The hub's cost of one update, ms of processor time in one thread",
        caption="Open: read, certificate, signature, unseal, decode, clip; of an open update the mean is made a tensor at a time. Unseal: "
        "certificate, signature and HPKE alone. Flower: all replies in memory, deserialised and added; FLARE: added as they "
        "come, four in memory in turn, nothing to deserialise. Peak: above what the process had before.",
    )
    for column in (
        "what",
        "parameters",
        "updates",
        "open",
        "of it unseal",
        "add",
        "mask off",
        "at the end",
        "peak, MiB",
        "× weights",
    ):
        shown.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        begin = [row["what"], f"{row['parameters'] / 1e6:g} M", str(row["updates"])]
        if "left_out" in row:
            shown.add_row(*begin, row["left_out"])
            continue
        peak = row["peak_bytes"] - row["base_bytes"]
        shown.add_row(
            *begin,
            *(_figure(row.get(key)) for key in ("open_ms", "unseal_ms", "add_ms", "unmask_ms", "end_ms")),
            f"{peak / 2**20:.0f}",
            f"{peak / (BYTES_A_PARAMETER * row['parameters']):.1f}",
        )
    return shown


def _figure(value: float | None, unit: float = 1.0) -> str:
    return "–" if value is None else f"{value / unit:.2f}"


def _digest(*folders: str) -> str:
    """Of the code that figures depend on; what runs in other processes is not loaded here."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
