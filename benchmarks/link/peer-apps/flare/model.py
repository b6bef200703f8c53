# mypy: ignore-errors
"""The dummy network's tensors: as benchmarks.link.dummy.shapes. The bench replaces PARAMETERS."""

import numpy as np
import torch
from torch import nn

PARAMETERS = 5_000_000


def shapes() -> list[int]:
    raw = np.geomspace(64, 64 * 4000, 160)
    sizes = np.maximum(1, raw / raw.sum() * PARAMETERS).astype(int)
    sizes[-1] += PARAMETERS - sizes.sum()
    return [int(size) for size in sizes]


class Dummy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.randn(size)) for size in shapes()])

    def forward(self, x):
        return x
