"""How far a training is: a JSON line for each epoch, for machines, and a bar where somebody watches.

Writes the lines to stdout; the bar to stderr, only where that is a terminal.
Never changes what is trained.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from models import fitting


@contextmanager
def shown(epochs: int | None, is_first: bool = True) -> "Iterator[fitting.Progress]":
    """Gives what to tell each epoch (from 1) and its mean loss; None where that is private.

    `epochs` is None where a budget of time ends the training. Only the first process shows a bar.
    """
    if not is_first or not sys.stderr.isatty():
        yield _print_line
        return
    with _bar() as bar:
        task = bar.add_task("epochs", total=epochs, loss="")

        def told(epoch: int, loss: float | None) -> None:
            _print_line(epoch, loss)
            bar.update(task, completed=epoch, loss="" if loss is None else f"loss {loss:.4f}")

        yield told


def _print_line(epoch: int, loss: float | None) -> None:
    print(json.dumps({"epoch": epoch} | ({} if loss is None else {"loss": round(loss, 5)})), flush=True)


def _bar() -> Progress:
    """Lines on the same terminal go above it; anywhere else stdout is left alone."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),
        refresh_per_second=2,
        speed_estimate_period=float("inf"),  # an epoch may take longer than rich's half minute
        expand=True,
    )
