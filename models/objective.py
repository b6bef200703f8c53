"""What training lowers: each label's loss, the pull of attention to known lesions, the loss on held-out examples.

Reads batches and runs a network; changes no weight.
Never knows an optimizer, nor how many processes share a batch.
Source: label smoothing (Szegedy 2016). Axes as in models.network.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from models import calibration
from models.examples import Batch, Example
from models.network import Hybrid
from models.predicting import device_of, graph_inputs, own_logits, predict


class Objective(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """A batch's loss as a module, so that DistributedDataParallel sees one forward pass.

    `weights` has weights_K by task name; a task without them counts all its labels alike.
    """

    def __init__(
        self,
        network: Hybrid,
        weights: Mapping[str, NDArray[np.float32]],
        *,
        attention_weight: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = network
        self._weights = {name: torch.from_numpy(weight_K) for name, weight_K in weights.items()}
        self._attention_weight, self._label_smoothing = attention_weight, label_smoothing

    def forward(self, part: Batch, whole: Batch) -> Tensor:
        """What `part` adds to the mean loss of the `whole` batch: over all parts these add up to it."""
        device = device_of(self.network)
        seen = self.network.attended(*graph_inputs(part, device))
        label_B = torch.from_numpy(part.label_B).to(device)
        logits_BK = own_logits(self.network.head(seen.pooled_BD), part)
        each_B = functional.cross_entropy(logits_BK, label_B, reduction="none", label_smoothing=self._label_smoothing)
        weight_K = self._weights.get(part.task.name)
        if weight_K is not None:
            each_B = each_B * weight_K.to(device)[label_B]
        loss = each_B.sum() / len(whole.label_B)
        if self._attention_weight and part.lesion_BShw is not None and whole.lesion_BShw is not None:
            lesion_BShw = torch.from_numpy(part.lesion_BShw).to(device)
            series_with_lesion = max(1, int(whole.lesion_BShw.any((1, 2, 3)).sum()))
            missed_B = _missed(seen.weights_BSAhw, lesion_BShw)
            loss = loss + self._attention_weight * missed_B.sum() / series_with_lesion
        return loss


def heldout_loss(network: Hybrid, heldout: Sequence[Example]) -> float:
    """Mean negative log-likelihood over the examples of all tasks; infinite where the network gives NaN."""
    network.eval()
    predicted = predict(network, heldout).values()
    total = sum(
        calibration.negative_log_likelihood(calibration.softmax(task.logits_NK), task.truth_N) * len(task.truth_N)
        for task in predicted
    )
    return float(np.nan_to_num(total / len(heldout), nan=np.inf))


def _missed(weights_BSAhw: Tensor, lesion_BShw: Tensor) -> Tensor:
    """How little of each series' attention lies on its lesion: -log of that share; 0 where there is no lesion."""
    places_BShw = functional.adaptive_max_pool2d(lesion_BShw, weights_BSAhw.shape[-2:])
    share_B = (weights_BSAhw.mean(2) * places_BShw).sum((1, 2, 3))
    return -(share_B + 1e-4).log() * (places_BShw.sum((1, 2, 3)) > 0).float()
