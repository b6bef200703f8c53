"""What each rule over updates costs beside numpy's mean: processor time, passes over the updates, peak memory.

Reads nothing; arrays in memory.
Never opens a sealed update: that comes on top, in every pass.
Source: the rules are those of cloud_hub/robust.py.
"""

import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloud_hub.aggregation import Shapes
from cloud_hub.robust import Delta, Read, Updates
from models.delta import Arrays

PARAMETERS = 5_000_000
TENSORS = 10

Measured = dict[str, Any]
Means = Mapping[str, Callable[[Updates], Arrays]]


def costs(means: Means, boxes: int, repetitions: int) -> list[Measured]:
    x_BC = np.random.default_rng(0).standard_normal((boxes, PARAMETERS), np.float32)
    numpy_s = min(_cpu_s(lambda: x_BC.mean(0)) for _ in range(repetitions))
    rows: list[Measured] = [{"rule": "numpy mean", "cpu_s": numpy_s, "passes": 1}]
    rows[0]["peak_mib"] = _peak_mib(lambda: x_BC.mean(0))
    for name, mean in means.items():
        read, passes = _counted(x_BC)
        over = partial(mean, Updates(read, boxes, _shapes()))
        rows.append({"rule": name, "peak_mib": _peak_mib(over), "passes": len(passes)})
        rows[-1]["cpu_s"] = min(_cpu_s(over) for _ in range(repetitions))
    return [row | {"boxes": boxes, "times_numpy": row["cpu_s"] / numpy_s} for row in rows]


def _shapes() -> Shapes:
    return {f"tensor-{number}": (PARAMETERS // TENSORS,) for number in range(TENSORS)}


def _counted(x_BC: NDArray[np.float32]) -> tuple[Read, list[int]]:
    """Updates that are views of x_BC, and a list that grows by one for each pass over them."""
    passes: list[int] = []

    def read() -> Iterator[tuple[Delta, int]]:
        passes.append(len(x_BC))
        for row_C in x_BC:
            yield dict(zip(_shapes(), np.split(row_C, TENSORS), strict=True)), 1

    return read, passes


def _cpu_s(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def _peak_mib(call: Callable[[], object]) -> float:
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / (1 << 20)
