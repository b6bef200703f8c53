"""Several processes that train as one: `torchrun -m models.training …` over the GPUs or the boxes of one site.

Reads the group that torchrun made; gives each process its share of every batch.
Never changes what is computed: the gradients are those of one process with the whole batch.
Source: DistributedDataParallel (Li 2020); gloo on CPUs, nccl on GPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from models.errors import ModelError
from models.examples import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Parallel:
    """This process among those that train together."""

    rank: int
    processes: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wrapped(self, module: nn.Module) -> nn.Module:
        return DistributedDataParallel(module, broadcast_buffers=False) if self.processes > 1 else module

    def part(self, batch: Batch) -> tuple[Batch, float]:
        """This process's series of a batch, and how often their loss counts.

        Gradients are averaged over the processes, where those of the parts should be added up. A batch with fewer series
        than processes is given whole to each of them.
        """
        count = len(batch.label_B)
        if self.processes == 1 or count < self.processes:
            return batch, 1.0
        mine_B = np.arange(self.rank, count, self.processes)
        lesion_BShw = batch.lesion_BShw
        part = replace(
            batch,
            slices_BSHW=batch.slices_BSHW[mine_B],
            slice_mask_BS=batch.slice_mask_BS[mine_B],
            modality_B=batch.modality_B[mine_B],
            label_B=batch.label_B[mine_B],
            lesion_BShw=None if lesion_BShw is None else lesion_BShw[mine_B],
        )
        return part, float(self.processes)

    def mean(self, value: Tensor) -> float:
        """Over the processes."""
        if self.processes > 1:
            distributed.all_reduce(value)
        return float(value) / self.processes

    def of_first(self, value: T) -> T:
        """The first process's value, in all of them: clocks and files differ, what follows from them must not."""
        if self.processes == 1:
            return value
        shared = [value]
        distributed.broadcast_object_list(shared, 0, device=self.device)
        return shared[0]

    def check_same(self, value: str) -> None:
        """Raises ModelError in every process unless all were given the same."""
        if self.processes == 1:
            return
        values: list[str] = [""] * self.processes
        distributed.all_gather_object(values, value)
        if len(set(values)) > 1:
            raise ModelError(
                "the processes were given different options, examples or weights",
                advice="start all with the same command, on the same bundle and example folder",
            )


ALONE = Parallel(0, 1, torch.device("cpu"))


@contextmanager
def joined(device: str) -> Iterator[Parallel]:
    """Join the group if torchrun started this process; `device` is "cpu", "cuda" or "auto" (the GPU where there is one).

    Raises ModelError for a GPU that is not there.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ModelError("no CUDA device is there", advice="use --device cpu, or install the driver and a CUDA torch")
    on_gpu = has_gpu and device != "cpu"
    if not distributed.is_torchelastic_launched():
        yield Parallel(0, 1, torch.device("cuda" if on_gpu else "cpu"))
        return
    place = torch.device("cuda", distributed.get_node_local_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Parallel(distributed.get_rank(), distributed.get_world_size(), place)
    finally:
        distributed.destroy_process_group()
