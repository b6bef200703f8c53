"""What the demonstration found, as tables and JSON: each study, accuracy before and after, milliseconds, bytes, memory.

Reads rows gathered during the run; writes to the terminal and a JSON file.
Never rounds a figure into a better one: an abstention counts as neither right nor wrong, and is shown.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.studies import Study, predicted


@dataclass(frozen=True)
class StudyRow:
    """One study: what was sent, what the box said, how long it took."""

    box: str
    modality: str
    seed: int
    sent: str
    found: str  # most likely label, also where the box abstained; "" where the series failed
    probability: float
    abstained: bool
    verdict: str  # of the reviewer, where there was one
    exam: str | None  # "before" and "after" are the same images; None: a study to learn from
    release_version: int
    milliseconds: float  # from the last instance to both results in the PACS
    reason: str

    @classmethod
    def of(cls, study: Study, row: dict[str, Any], verdict: str, exam: str | None) -> "StudyRow":
        findings = json.loads(row["findings"]) if row["findings"] else {}
        return cls(
            box=study.box,
            modality=study.modality,
            seed=study.seed,
            sent=study.label,
            found=predicted(row),
            probability=max((label["probability"] for label in findings.get("labels", [])), default=0.0),
            abstained=bool(row["abstained"]),
            verdict=verdict,
            exam=exam,
            release_version=row["release_version"] or 0,
            milliseconds=1000 * (row["delivered_at"] - row["last_instance_at"])
            if row["delivered_at"]
            else float("nan"),
            reason=row["reason"],
        )

    @property
    def right(self) -> bool:
        return self.found == self.sent


@dataclass(frozen=True)
class Outcome:
    rows: list[StudyRow]
    round: dict[str, Any]
    peak_memory_bytes: dict[str, int]
    pacs_instances: int
    seconds: float


def print_report(console: Console, outcome: Outcome) -> None:
    console.print(_studies_table(outcome.rows))
    console.print(_accuracy_table(outcome.rows))
    console.print(_latency_table(outcome.rows))
    console.print(_round_table(outcome))
    console.print(
        f"The PACS holds {outcome.pacs_instances} result objects (an SR and a Secondary Capture for each study). "
        f"{outcome.seconds:.0f} s in all.",
        highlight=False,
    )


def write_json(outcome: Outcome, path: Path) -> None:
    summary = {"accuracy": _accuracy(outcome.rows), "latency_ms": _latency(outcome.rows)}
    path.write_text(json.dumps({**asdict(outcome), **summary}, indent=1), "utf-8")


def _studies_table(rows: Sequence[StudyRow]) -> Table:
    """One line an image; one that was kept apart was read twice, by the shipped model and by the release."""
    table = _table(
        "Each study", "box", "", "image", "sent", "found", "p", "ms", "release found", "p ", "ms ", "reviewer"
    )
    by_image: dict[tuple[str, str, int], list[StudyRow]] = {}
    for row in rows:
        by_image.setdefault((row.box, row.modality, row.seed), []).append(row)
    for (box, modality, seed), readings in by_image.items():
        cells = [
            cell for row in readings for cell in (_found(row), f"{row.probability:.2f}", f"{row.milliseconds:.0f}")
        ]
        cells += [""] * (6 - len(cells))
        table.add_row(
            box, modality, str(seed), readings[0].sent, *cells, readings[0].verdict or "[dim]kept apart[/dim]"
        )
    return table


def _found(row: StudyRow) -> str:
    if not row.found:
        return f"[red]{row.reason}[/red]"
    if row.abstained:
        return f"[dim]{row.found}, abstained[/dim]"
    return row.found if row.right else f"[yellow]{row.found}[/yellow]"


def _accuracy(rows: Sequence[StudyRow]) -> dict[str, dict[str, dict[str, int]]]:
    """Counts by box (and all) and exam: images, right, abstained, right among those answered."""

    def counts(some: list[StudyRow]) -> dict[str, int]:
        answered = [row for row in some if not row.abstained]
        return {
            "images": len(some),
            "right": sum(row.right for row in some),
            "answered": len(answered),
            "answered_right": sum(row.right for row in answered),
        }

    boxes = [*dict.fromkeys(row.box for row in rows), "all"]
    return {
        box: {
            exam: counts([row for row in rows if row.exam == exam and box in (row.box, "all")])
            for exam in ("before", "after")
        }
        for box in boxes
    }


def _accuracy_table(rows: Sequence[StudyRow]) -> Table:
    table = _table(
        "Images never trained on, read by the shipped model and by the release",
        *(
            "site",
            "images",
            "right before",
            "right after",
            "answered before",
            "answered after",
            "right of those, before",
            "after",
        ),
    )
    for box, exams in _accuracy(rows).items():
        before, after = exams["before"], exams["after"]
        table.add_row(
            box,
            str(before["images"]),
            _share(before["right"], before["images"]),
            f"[bold]{_share(after['right'], after['images'])}[/bold]",
            _share(before["answered"], before["images"]),
            _share(after["answered"], after["images"]),
            _share(before["answered_right"], before["answered"]),
            _share(after["answered_right"], after["answered"]),
        )
    return table


def _latency(rows: Sequence[StudyRow]) -> dict[str, dict[str, float]]:
    def of(some: Iterable[StudyRow]) -> dict[str, float]:
        times = sorted(row.milliseconds for row in some if row.milliseconds == row.milliseconds)
        if len(times) < 2:
            return {"median": times[0] if times else 0.0, "p95": times[-1] if times else 0.0}
        return {"median": statistics.median(times), "p95": statistics.quantiles(times, n=20, method="inclusive")[-1]}

    return {modality: of(row for row in rows if row.modality == modality) for modality in ("XR", "CT", "MR")}


def _latency_table(rows: Sequence[StudyRow]) -> Table:
    table = _table(
        "Milliseconds from the last instance to both results in the PACS", "modality", "studies", "median", "p95"
    )
    for modality, figures in _latency(rows).items():
        count = sum(row.modality == modality for row in rows)
        table.add_row(modality, str(count), f"{figures['median']:.0f}", f"{figures['p95']:.0f}")
    return table


def _round_table(outcome: Outcome) -> Table:
    round_id = outcome.round["round_id"]
    table = _table(
        f"Round {round_id}: what each box sent", "box", "examples", "sealed update, bytes", "peak memory, MiB"
    )
    by_device = {device["device"]: device for device in outcome.round["members"]}
    for name, peak in outcome.peak_memory_bytes.items():
        device = by_device.get(name, {})
        table.add_row(
            name,
            str(device.get("examples", "")),
            f"{device['bytes_received']:,}" if device else "",
            f"{peak / 2**20:.0f}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    numeric: Callable[[str], bool] = lambda name: name.strip() in ("p", "ms", "images", "studies", "median", "p95")  # noqa: E731
    for column in columns:
        table.add_column(column, justify="right" if numeric(column) else "left")
    return table


def _share(part: int, whole: int) -> str:
    return f"{part}/{whole} ({100 * part / whole:.0f} %)" if whole else "–"
