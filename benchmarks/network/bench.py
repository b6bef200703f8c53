"""Accuracy, federation, explanation, shift and speed of the network beside its rivals.

Reads ../shared/data and the shipped bundle; keeps each row under .bench/models as soon as it is measured.
Never starts anew what an earlier run of the same code has measured: a bench that was stopped goes on.
"""

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from benchmarks.network import accuracy, explanation, federated, images, precision, shift
from benchmarks.network.results import Results, Row

FOLDER = Path(".bench") / "models"


@dataclass(frozen=True)
class Extent:
    """How long each part takes."""

    accuracy_s: float  # training seconds of each network on each set
    explained_s: float  # of the network whose maps are judged, on each set
    seeds: int
    rounds: int
    share: float  # of the training images in the federated arms
    cases: int  # judged by deletion and insertion, each set
    repeats: int  # of each timed call
    with_compile: bool  # torch.compile takes minutes


FULL = Extent(
    accuracy_s=150.0, explained_s=60.0, seeds=1, rounds=20, share=1.0, cases=40, repeats=21, with_compile=True
)
QUICK = Extent(accuracy_s=6.0, explained_s=6.0, seeds=1, rounds=2, share=0.1, cases=5, repeats=3, with_compile=False)


def measure(*, quick: bool) -> dict[str, Any]:
    """All tables. Raises SystemExit where the real images are not beside the repository."""
    if not images.are_here():
        sys.exit(f"the labelled images are not at {images.FOLDER}: this bench needs them (see README, Measure)")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    extent, results = QUICK if quick else FULL, Results(FOLDER, lambda text: print(text, file=sys.stderr, flush=True))
    parts: dict[str, Callable[[], list[Row]]] = {
        "accuracy": lambda: accuracy.rows(results, accuracy.Budget(extent.accuracy_s, extent.seeds)),
        "explanation": lambda: explanation.rows(results, extent.explained_s, extent.cases),
        "shift": lambda: shift.rows(results, extent.accuracy_s),
        "federated": lambda: federated.rows(results, extent.rounds, extent.share),
        "speed": lambda: _speed(results, extent),
    }
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return {"extent": vars(extent), "on": machine} | {name: part() for name, part in parts.items()}


def _speed(results: Results, extent: Extent) -> list[Row]:
    threads = sorted({1, torch.get_num_threads()})

    def measured() -> Row:
        return {"rows": precision.rows(threads=threads, rounds=extent.repeats, with_compile=extent.with_compile)}

    rows: list[Row] = results.row("speed", {"repeats": extent.repeats, "threads": threads}, measured)["rows"]
    return rows


def table(result: dict[str, Any]) -> Group:
    return Group(
        _accuracy(result["accuracy"]),
        _plain("Federated: accuracy after the last round", result["federated"], _FEDERATED),
        _plain("Explanation", result["explanation"], None),
        _plain("Another hospital", result["shift"], None),
        _plain("Speed", result["speed"], None),
    )


_FEDERATED = ("scene", "arm", "rounds", "accuracy", "bytes_sent")


def _accuracy(rows: list[Row]) -> Table:
    shown = Table(title="Validation accuracy after the same training seconds (95 % interval)")
    for column in (
        "set",
        "network",
        "params",
        "images seen",
        "accuracy",
        "balanced",
        "AUC",
        "ECE",
        "coverage",
        "floor",
    ):
        shown.add_column(column, justify="left" if column in ("set", "network") else "right")
    for row in rows:
        if "left_out" in row:
            shown.add_row(row["set"], row["network"], row["left_out"])
            continue
        scored = [
            f"{row[name][0]:.3f} ({row[name][1]:.3f}–{row[name][2]:.3f})"
            for name in ("accuracy", "balanced", "auc", "ece")
        ]
        shown.add_row(
            row["set"],
            row["network"],
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['images_seen']:,}",
            *scored,
            f"{row['coverage']:.3f} of {row['nominal']:.2f}",
            f"{row['floor']:.3f}",
        )
    return shown


def _plain(title: str, rows: list[Row], columns: tuple[str, ...] | None) -> Table:
    names = columns or tuple(dict.fromkeys(name for row in rows for name in row))
    shown = Table(title=title)
    for name in names:
        shown.add_column(name)
    for row in rows:
        shown.add_row(*(_text(row.get(name, "")) for name in names))
    return shown


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
