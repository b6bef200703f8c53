"""What a network says of examples: logits and out-of-distribution scores by task, and the looks these are fitted on.

Reads examples in memory and runs the network without gradients.
Never changes a weight.
Axes: N examples, K labels of one task, D features of a look.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.examples import Batch, Example, batches
from models.network import Hybrid

_BATCH = 16


@dataclass(frozen=True)
class Predicted:
    """What the network says about one task's examples."""

    logits_NK: NDArray[np.float32]  # of the task's own labels
    truth_N: NDArray[np.int64]
    ood_N: NDArray[np.float32]


def predict(network: Hybrid, examples: Sequence[Example]) -> dict[str, Predicted]:
    """By task name, in the order of the examples."""
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for batch in batches(examples, _BATCH):
        with torch.no_grad():
            slices_BSHW, slice_mask_BS, modality_B = graph_inputs(batch, device_of(network))
            logits_BK = network.head(network.attended(slices_BSHW, slice_mask_BS, modality_B).pooled_BD)
            ood_B = network.distance(network.look(slices_BSHW, slice_mask_BS), modality_B)
        label_B = torch.from_numpy(batch.label_B)
        found.setdefault(batch.task.name, []).append((own_logits(logits_BK, batch).cpu(), label_B, ood_B.cpu()))
    return {
        name: Predicted(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))
        for name, parts in found.items()
    }


def correct(network: Hybrid, examples: Sequence[Example]) -> int:
    predicted = predict(network, examples).values()
    return sum(int((task.logits_NK.argmax(1) == task.truth_N).sum()) for task in predicted)


def looks(network: Hybrid, examples: Sequence[Example]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """look_ND and the column of each example's true label: what the out-of-distribution score is fitted on."""
    features, columns = [], []
    for batch in batches(examples, _BATCH):
        with torch.no_grad():
            slices_BSHW, slice_mask_BS, _ = graph_inputs(batch, device_of(network))
            features.append(network.look(slices_BSHW, slice_mask_BS).cpu().numpy())
        columns.append(batch.label_B + batch.task.offset)
    return np.concatenate(features), np.concatenate(columns)


def graph_inputs(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The graph's inputs."""
    return (
        torch.from_numpy(batch.slices_BSHW).to(device),
        torch.from_numpy(batch.slice_mask_BS).to(device),
        torch.from_numpy(batch.modality_B).to(device),
    )


def device_of(network: Hybrid) -> torch.device:
    return network.head.weight.device


def own_logits(logits_BK: Tensor, batch: Batch) -> Tensor:
    return logits_BK[:, batch.task.offset : batch.task.offset + len(batch.task.labels)]
