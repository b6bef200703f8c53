"""Networks and their weights: new from a seed, from a bundle, from arrays, and back to arrays.

Reads and writes arrays in memory; torch, so only child processes import it.
Never opens a file itself: a bundle has been read and checked before.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from models.bundle import Bundle
from models.network import Hybrid, config_of
from models.spec import InputSpec, TaskSpec


def new_network(network: str, tasks: Sequence[TaskSpec], inputs: Sequence[InputSpec], seed: int) -> Hybrid:
    torch.manual_seed(seed)
    return Hybrid(config_of(network, tasks, inputs))


def network_of(bundle: Bundle) -> Hybrid:
    network = Hybrid(config_of(bundle.manifest.network, bundle.manifest.tasks, bundle.manifest.inputs))
    load_weights(network, bundle.weights)
    network.eval()
    return network


def load_weights(network: Hybrid, weights: Mapping[str, NDArray[np.float32]]) -> None:
    network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})


def weights_of(network: Hybrid) -> dict[str, NDArray[np.float32]]:
    return {name: value.cpu().numpy().copy() for name, value in network.state_dict().items()}
