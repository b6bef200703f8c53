"""Gradient inversion: the image that best explains a change of the weights, and how like the true one it is.

Reads and writes arrays in memory.
Never knows more than a hub does: the base weights, the round's plan, a label, the change, and that it is a chest X-ray.
Source: Zhu 2019 (deep leakage from gradients), Geiping 2020 (cosine distance, total variation), Liu 1989 (L-BFGS).
Axes: N images, H W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from models import delta
from models.delta import Arrays
from models.network import NANO, Hybrid
from models.phantoms import LABELS, phantom
from models.preprocess import prepare
from models.restore import new_network
from models.tasks import INPUTS, TASKS

SIDE_PX = 32  # 1024 unknowns against 730,000 weights: the attacker's best case
PHANTOM_PX = 64
SPECS = tuple(msgspec.structs.replace(spec, size=SIDE_PX) for spec in INPUTS)
LEARNING_RATE = 0.1
EVALUATIONS = 80
SMOOTHNESS = 1e-5  # weight of the total variation
POPULATION_SEED = 1000
POPULATION = 60

Image = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    image_HW: Image
    label: int


@cache
def network() -> Hybrid:
    """Not yet trained, as before a first round."""
    return new_network(NANO, TASKS, SPECS, seed=0).eval()


def case(seed: int) -> Case:
    """A chest X-ray as a box would feed it to the network."""
    label = seed % len(LABELS["XR"])
    volume = phantom("XR", LABELS["XR"][label], seed, size=PHANTOM_PX).volume
    return Case(prepare(volume, SPECS[0]).slices_SHW[0], label)


@cache
def population() -> NDArray[np.float32]:
    """Images of others: what the attacker knows of chests in general, and what a reconstruction must be no liker to."""
    return np.stack([case(POPULATION_SEED + number).image_HW for number in range(POPULATION)])


def trained() -> dict[str, torch.nn.Parameter]:
    named = dict(network().named_parameters())
    return {name: named[name] for name in delta.trainable_names(named, "all")}


def shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in trained().items()}


def one_step(cases: Sequence[Case]) -> Arrays:
    """The change that one step of gradient descent on these images makes."""
    gradients = torch.autograd.grad(loss(cases), list(trained().values()), materialize_grads=True)
    return {name: -LEARNING_RATE * gradient.numpy() for name, gradient in zip(trained(), gradients, strict=True)}


def loss(cases: Sequence[Case]) -> Tensor:
    """Mean over the images: what a box without class weights lowers."""
    images_NHW = torch.from_numpy(np.stack([each.image_HW for each in cases]))
    return _loss(images_NHW, torch.tensor([each.label for each in cases]))


def invert(change: Mapping[str, NDArray[np.floating]], labels: Sequence[int], evaluations: int = EVALUATIONS) -> Image:
    """images_NHW, one for each label: those whose gradient points where the change came from.

    Starts at the mean chest, and gives the best found after so many gradients.
    """
    wanted = [torch.from_numpy(np.ascontiguousarray(-change[name], dtype=np.float32)) for name in trained()]
    wanted_norm = _norm(wanted).clamp(min=1e-12)
    start_NHW = np.repeat(population().mean(0, keepdims=True), len(labels), 0)
    images_NHW = torch.from_numpy(start_NHW).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [images_NHW],
        max_iter=evaluations,
        max_eval=evaluations,
        history_size=50,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )

    def distance() -> Tensor:
        gradients = torch.autograd.grad(
            _loss(images_NHW, torch.tensor(labels)), list(trained().values()), create_graph=True, materialize_grads=True
        )
        product = torch.stack([(a * b).sum() for a, b in zip(wanted, gradients, strict=True)]).sum()
        cosine = product / (wanted_norm * _norm(gradients))
        far = 1e3 * (1.0 - cosine + SMOOTHNESS * _total_variation(images_NHW))
        (images_NHW.grad,) = torch.autograd.grad(far, [images_NHW])
        return far.detach()

    optimizer.step(distance)
    return images_NHW.detach().numpy()


def similarity(one_HW: Image, other_HW: Image) -> float:
    """Normalised cross-correlation of what each has beyond the mean chest: 1 the same, 0 nothing in common."""
    mean_HW = population().mean(0)
    one, other = (np.ravel(image_HW - mean_HW) for image_HW in (one_HW, other_HW))
    one, other = one - one.mean(), other - other.mean()
    return float(one @ other / max(float(np.linalg.norm(one) * np.linalg.norm(other)), 1e-12))


@dataclass(frozen=True)
class Likeness:
    """Of the reconstruction that is likest: to the true images, and to the population, which was never trained on."""

    true: tuple[float, ...]
    control: float


def likeness(found_NHW: Image, truth: Sequence[Case]) -> Likeness:
    def best(image_HW: Image) -> float:
        return max(similarity(found_HW, image_HW) for found_HW in found_NHW)

    return Likeness(tuple(best(each.image_HW) for each in truth), max(best(image_HW) for image_HW in population()))


def _loss(images_NHW: Tensor, labels_N: Tensor) -> Tensor:
    count = len(images_NHW)
    mask_BS, modality_B = torch.ones(count, 1, dtype=torch.bool), torch.zeros(count, dtype=torch.int64)
    seen = network().attended(images_NHW.unsqueeze(1), mask_BS, modality_B)
    logits_BK = network().head(seen.pooled_BD)[:, : len(LABELS["XR"])]
    return functional.cross_entropy(logits_BK, labels_N)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt()


def _total_variation(images_NHW: Tensor) -> Tensor:
    rows, columns = images_NHW.diff(dim=1), images_NHW.diff(dim=2)
    return rows.abs().mean() + columns.abs().mean()
