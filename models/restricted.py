"""Training of the coordinates that a round draws: all others keep the value they began with, to the bit.

Reads and changes a network in memory; torch, so only child processes import it.
Never leaves a hook behind after `let_go`.
Source: models.drawn.
"""

from functools import partial

import torch
from torch import Tensor

from models.delta import Trainable, trainable_names
from models.drawn import Drawn
from models.errors import ModelError
from models.network import Hybrid


class Others:
    """The coordinates that the round does not move: without a gradient, and put back after each step.

    Without a gradient they count in no clipping; weight decay and the noise of a privacy budget move them all the same.
    """

    def __init__(self, network: Hybrid, trainable: Trainable, share: float, seed: bytes) -> None:
        """Raises ModelError for a share of adapters, or without a seed."""
        if trainable == "adapters":
            raise ModelError(
                f"adapters change whole matrices: a share of {share} of them cannot be drawn",
                advice="train all weights, or a share of 1",
            )
        shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        chosen = {name: shapes[name] for name in trainable_names(shapes, trainable)}
        masks = Drawn(chosen, seed, share).masks()
        self._kept, self._hooks = [], []
        for name, parameter in network.named_parameters():
            if name in masks and not masks[name].all():
                is_other = torch.from_numpy(~masks[name]).to(parameter.device)
                self._kept.append((parameter, is_other, parameter.detach().clone()))
                self._hooks.append(parameter.register_hook(partial(_without, is_other)))

    def put_back(self) -> None:
        with torch.no_grad():
            for parameter, is_other, start in self._kept:
                parameter.copy_(torch.where(is_other, start, parameter))

    def let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _without(is_other: Tensor, gradient: Tensor) -> Tensor:
    return gradient.masked_fill(is_other, 0.0)
