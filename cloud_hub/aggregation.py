"""Weighted mean of the devices' weight deltas, as a running sum.

Reads and writes nothing; one float64 array per tensor, whatever the number of devices: memory is O(model).
Never keeps a single device's delta once it is added.
Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks", Algorithm 1 (FedAvg).
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fleet_link.errors import TrustError

Shapes = Mapping[str, tuple[int, ...]]


class RunningSum:
    """Σ n_i·Δ_i and Σ n_i. The order of adding changes the mean by no more than float64 rounding."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = dict(shapes)
        self._sum = {name: np.zeros(shape, dtype=np.float64) for name, shape in shapes.items()}
        self._weight = 0
        self.updates = 0

    def add(self, delta: Mapping[str, NDArray[np.float32]], weight: int) -> None:
        """Add one device's delta, all of it or nothing. Raises TrustError as check_update does."""
        check_update(delta, weight, self._shapes)
        for name, values in delta.items():
            # One tensor's product at a time: float32 would lose the small deltas of many devices.
            self._sum[name] += np.multiply(values, weight, dtype=np.float64)
        self._weight += weight
        self.updates += 1

    def mean(self) -> dict[str, NDArray[np.float32]]:
        """Raises TrustError when nothing was added."""
        if self._weight == 0:
            raise TrustError("no update to average", advice="wait for devices to deliver")
        return {name: (total / self._weight).astype(np.float32) for name, total in self._sum.items()}


def check_update(delta: Mapping[str, NDArray[np.floating]], weight: int, shapes: Shapes) -> None:
    """Raises TrustError on a missing or foreign tensor, a wrong shape, NaN or infinity, or no weight."""
    if weight < 1:
        raise TrustError(f"an update of {weight} examples has no weight", advice="inspect the device")
    if delta.keys() != shapes.keys():
        names = sorted(delta.keys() ^ shapes.keys())
        raise TrustError(f"tensors do not match the base: {', '.join(names)[:200]}", advice="inspect the device")
    for name, values in delta.items():
        if values.shape != tuple(shapes[name]):
            raise TrustError(
                f"{name} has shape {values.shape}, the base has {tuple(shapes[name])}", advice="inspect the device"
            )
        if not np.isfinite(values).all():
            raise TrustError(f"{name} holds NaN or infinity", advice="inspect the device's training")
