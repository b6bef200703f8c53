"""Weighted mean of the devices' weight deltas, as a running sum.

Reads and writes nothing; one float64 array per tensor and a few KiB, whatever the number of devices: memory is O(model).
Never keeps a single device's delta once it is added.
Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks", Algorithm 1 (FedAvg).
"""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from fleet_link.errors import TrustError
from models.delta import Quantised

Shapes = Mapping[str, tuple[int, ...]]
Delta = Mapping[str, NDArray[np.floating]]

_CHUNK = 1 << 15  # coordinates added at once: stays in the processor's cache


class RunningSum:
    """Σ n_i·Δ_i and Σ n_i. The order of adding changes the mean by no more than float64 rounding."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = dict(shapes)
        self._sum = {name: np.zeros(shape, dtype=np.float64) for name, shape in shapes.items()}
        self._spare = np.empty(_CHUNK)
        self._weight = 0
        self.updates = 0

    def add(self, delta: Delta, weight: int) -> None:
        """Add one device's delta, all of it or nothing. Raises TrustError as check_update does."""
        check_update(delta, weight, self._shapes)
        for name, total in self._sum.items():
            # In float64: float32 would lose the small deltas of many devices.
            if isinstance(delta, Quantised):
                _add(total, delta.levels[name], weight * delta.steps[name], self._spare)
            else:
                _add(total, delta[name], weight, self._spare)
        self._weight += weight
        self.updates += 1

    def mean(self) -> Mapping[str, NDArray[np.float32]]:
        """Of what is added by then: each tensor is made when it is asked for. Raises TrustError when nothing was added."""
        if self._weight == 0:
            raise TrustError("no update to average", advice="wait for devices to deliver")
        return _Mean(self._sum, self._weight)


class _Mean(Mapping[str, NDArray[np.float32]]):
    """The sum stays as it is: a copy of the whole mean would be half of it once more."""

    def __init__(self, total: Mapping[str, NDArray[np.float64]], weight: int) -> None:
        self._total, self._weight = total, weight

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return np.asarray(self._total[name] / self._weight, np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._total)

    def __len__(self) -> int:
        return len(self._total)


def check_update(delta: Delta, weight: int, shapes: Shapes) -> None:
    """Raises TrustError on a missing or foreign tensor, a wrong shape, NaN or infinity, or no weight."""
    if weight < 1:
        raise TrustError(f"an update of {weight} examples has no weight", advice="inspect the device")
    if delta.keys() != shapes.keys():
        names = sorted(delta.keys() ^ shapes.keys())
        raise TrustError(f"tensors do not match the base: {', '.join(names)[:200]}", advice="inspect the device")
    for name in delta:
        values = delta.levels[name] if isinstance(delta, Quantised) else delta[name]
        if values.shape != tuple(shapes[name]):
            raise TrustError(
                f"{name} has shape {values.shape}, the base has {tuple(shapes[name])}", advice="inspect the device"
            )
        if not np.isfinite(delta.steps[name] if isinstance(delta, Quantised) else values).all():
            raise TrustError(f"{name} holds NaN or infinity", advice="inspect the device's training")


def _add(total: NDArray[np.float64], values: NDArray[np.generic], factor: float, spare: NDArray[np.float64]) -> None:
    """total += factor · values."""
    flat, added = total.reshape(-1), values.reshape(-1)
    for begin in range(0, flat.size, _CHUNK):
        part = flat[begin : begin + _CHUNK]
        scaled = spare[: len(part)]
        np.copyto(scaled, added[begin : begin + _CHUNK])
        np.multiply(scaled, factor, out=scaled)
        np.add(part, scaled, out=part)
