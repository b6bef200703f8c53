# mypy: ignore-errors
"""The dummy network's tensors: as benchmarks.link.dummy.shapes."""

import numpy as np


def shapes(parameters: int) -> list[int]:
    raw = np.geomspace(64, 64 * 4000, 160)
    sizes = np.maximum(1, raw / raw.sum() * parameters).astype(int)
    sizes[-1] += parameters - sizes.sum()
    return [int(size) for size in sizes]
