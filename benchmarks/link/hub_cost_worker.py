"""`python -m benchmarks.link.hub_cost_worker CASE PARAMETERS UPDATES FOLDER`: one case in a process of its own; prints JSON.

Reads the updates that updates.py wrote, one file at a time and again and again; measures this process's own processor time.
Never gives a figure of a sum that is wrong. numpy and torch: bare addition of arrays that lie in memory already.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.link import cost, dummy, updates
from benchmarks.link.dummy import Arrays
from benchmarks.link.updates import Folder
from cloud_hub import memory
from cloud_hub.aggregation import RunningSum
from cloud_hub.collection import Reader
from cloud_hub.secure_sum import MaskedSum
from cloud_hub.update import MaskedOpener, Opener, open_masked, open_update
from fleet_link import masking, sealing
from models import addable, round_layout

Row = dict[str, Any]

ERROR_MAX = 0.05  # of the mean's norm


def main() -> int:
    case, parameters, count, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Folder(Path(sys.argv[4]))
    if case in ("open", "masked"):
        memory.keep_freed()  # as the hub does
    print(json.dumps(CASES[case](parameters, count, folder)))
    return 0


class Stopwatch:
    """Milliseconds of processor time by what was done."""

    def __init__(self) -> None:
        self.times_ms: dict[str, list[float]] = {}
        self.base_bytes = cost.resident_bytes(os.getpid())
        cost.forget_peak(os.getpid())

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        begin = time.process_time()
        yield
        self.times_ms.setdefault(what, []).append((time.process_time() - begin) * 1e3)

    def row(self) -> Row:
        figures = {f"{what}_ms": median(times) for what, times in self.times_ms.items()}
        return figures | {"base_bytes": self.base_bytes, "peak_bytes": cost.peak_bytes(os.getpid())}


def _open(parameters: int, count: int, folder: Folder) -> Row:
    """As an open round's intake: read, verify, unseal, decode, clip; add; at the end the mean, a tensor at a time."""
    shapes, plan, now = dummy.shapes(parameters), folder.plan, time.time()
    opener = Opener(plan, shapes, folder.sealing_key, folder.trust, updates.EXAMPLES)
    total, reader = RunningSum(shapes), Reader()
    watch = Stopwatch()
    for name in islice(cycle(updates.NAMES), count):
        with watch.of("open"):
            opened = open_update(reader.read(folder.update(name)), opener, sender=name, now=now)
        with watch.of("add"):
            total.add(opened.delta, opened.weight)
        del opened
    mean = total.mean()
    with watch.of("end"):
        for name in mean:
            _ = mean[name]
    row = watch.row()
    return row | {"unseal_ms": _unseal_ms(folder), "error": _checked(dict(mean), parameters, plan.seed)}


def _masked(parameters: int, count: int, folder: Folder) -> Row:
    """As a masked round's: read, verify, unseal, count the words; add; then a mask off for each, and the sum decoded."""
    plan, now = folder.plan, time.time()
    layout = round_layout.layout_of(plan, sealing.plan_digest(plan), dummy.shapes(parameters))
    opener = MaskedOpener(plan, layout, folder.sealing_key, folder.trust)
    total, reader = MaskedSum(layout.word_count, plan.word_bits), Reader()
    watch = Stopwatch()
    for name in islice(cycle(updates.NAMES), count):
        with watch.of("open"):
            opened = open_masked(reader.read(folder.update(name)), opener, sender=name, now=now)
        with watch.of("add"):
            total.add(opened.words)
        del opened
    reader.forget()
    keys = [updates.mask_key(name) for name in islice(cycle(updates.NAMES), count)]
    with watch.of("masks_off"):
        masking.apply(total.words, [], keys)
    with watch.of("end"):
        mean = addable.decode_sum(masking.as_integers(total.words), layout)
    row = watch.row()
    row["unmask_ms"] = row.pop("masks_off_ms") / count
    return row | {
        "word_bits": plan.word_bits,
        "unseal_ms": _unseal_ms(folder),
        "error": _checked(mean, parameters, plan.seed),
    }


def _numpy(parameters: int, count: int, folder: Folder) -> Row:
    """Weighted float32 addition in blocks that stay in the processor's cache."""
    shapes, block = dummy.shapes(parameters), 1 << 15
    arrays = [dummy.change(name, 1, shapes, 1.0) for name in updates.NAMES]
    total = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    spare, weight = np.empty(block, np.float32), np.float32(1.0 / count)

    def add(array: NDArray[np.float32], to: NDArray[np.float32]) -> None:
        for begin in range(0, len(array), block):
            part = array[begin : begin + block]
            np.multiply(part, weight, out=spare[: len(part)])
            np.add(to[begin : begin + block], spare[: len(part)], out=to[begin : begin + block])

    watch = Stopwatch()
    for made in islice(cycle(arrays), count):
        with watch.of("add"):
            for name in total:
                add(made[name], total[name])
    return watch.row() | {"error": _checked(total, parameters, 1, clip_norm=1.0)}


def _torch(parameters: int, count: int, folder: Folder) -> Row:
    """`add_` with a weight, in one thread."""
    import torch

    torch.set_num_threads(1)
    shapes = dummy.shapes(parameters)
    arrays = [
        {key: torch.from_numpy(value) for key, value in dummy.change(name, 1, shapes, 1.0).items()}
        for name in updates.NAMES
    ]
    total = {name: torch.zeros(shape) for name, shape in shapes.items()}
    watch = Stopwatch()
    for made in islice(cycle(arrays), count):
        with watch.of("add"):
            for name, value in total.items():
                value.add_(made[name], alpha=1.0 / count)
    row = watch.row()
    return row | {
        "error": _checked({name: value.numpy() for name, value in total.items()}, parameters, 1, clip_norm=1.0)
    }


CASES: dict[str, Callable[[int, int, Folder], Row]] = {
    "open": _open,
    "masked": _masked,
    "numpy": _numpy,
    "torch": _torch,
}


def _unseal_ms(folder: Folder) -> float:
    """Certificate, signature and HPKE of one update: a part of "open"."""
    key, trust, plan, watch = folder.sealing_key, folder.trust, folder.plan, Stopwatch()
    for name in updates.NAMES:
        blob = folder.update(name).read_bytes()
        with watch.of("unseal"):
            sealing.open_update(blob, private_key=key, trust=trust, sender=name, plan=plan, now=time.time())
    return median(watch.times_ms["unseal"])


def _checked(mean: Arrays, parameters: int, seed: int, clip_norm: float = updates.CLIP_NORM) -> float:
    """Raises ValueError where it is not the mean of what the boxes made up."""
    zeros = {name: np.zeros(shape, np.float32) for name, shape in dummy.shapes(parameters).items()}
    error = dummy.error_of_mean(mean, zeros, updates.NAMES, seed, clip_norm)
    if not error < ERROR_MAX:
        raise ValueError(f"the sum is wrong: {error:.2g} of the mean's norm")
    return error


if __name__ == "__main__":
    sys.exit(main())
