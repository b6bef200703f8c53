"""Low-rank adapters: a box with few reviews changes the transformer only along a few directions.

Reads and changes a network in memory; torch, so only child processes import it.
Never stays in the network: after training the product is added to the weights, whose names and shapes are as before.
Source: LoRA (Hu 2021). Axes: O outputs, I inputs, R rank.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.delta import ADAPTED, HEAD_PREFIX
from models.network import Hybrid


class Adapted:
    """The transformer's linear layers of a network, with adapters until `merge`."""

    def __init__(self, network: Hybrid, rank: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._network = network
        self._layers = [
            module
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear) and any(part in name.split(".") for part in ADAPTED)
        ]
        for layer in self._layers:
            parametrize.register_parametrization(layer, "weight", _LowRank(layer, rank, generator))

    def trained_names(self) -> set[str]:
        """The parameters to train: the adapters and the heads."""
        names = (name for name, _ in self._network.named_parameters())
        return {name for name in names if name.startswith(HEAD_PREFIX) or "parametrizations.weight.0" in name}

    def merge(self) -> None:
        """Add the products to the weights, which keep their names and their order."""
        for layer in self._layers:
            parametrize.remove_parametrizations(layer, "weight")
            bias = layer.bias
            del layer.bias
            layer.bias = bias  # after the weight again


class _LowRank(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """weight_OI -> weight_OI + up_OR @ down_RI; nothing is added at the start."""

    def __init__(self, layer: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = layer.weight.shape
        down_RI = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        self.down_RI = nn.Parameter(down_RI.to(layer.weight.device))
        self.up_OR = nn.Parameter(torch.zeros(outputs, rank, device=layer.weight.device))

    def forward(self, weight_OI: Tensor) -> Tensor:
        return weight_OI + self.up_OR @ self.down_RI
