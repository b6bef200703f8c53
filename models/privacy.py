"""Example-level differential privacy: no series can be recognised in the trained weights beyond a stated budget.

Reads one loss for each drawn series; leaves clipped and noised gradients in the parameters.
Never repeats its draws from a public seed, and never clips slices alone: the unit is one series with all its slices.
Source: DP-SGD (Abadi 2016) with Opacus' optimizer; Poisson sampling and Rényi accountant (Mironov 2019).
"""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.errors import ModelError

ACCOUNTANT = "rdp"
_MISSING = "pip install 'wardround[privacy]', or train without a privacy budget"
_STATE_OFFSET_BYTES, _STATE_WORDS = 24, 624  # of the Mersenne Twister within torch's generator state


@dataclass(frozen=True)
class Privacy:
    """The budget asked for. Neighbours are two sets of series that differ by one; how many there are is public."""

    epsilon: float
    delta: float = 1e-5
    clip_norm: float = 1.0  # of one series' gradient
    test_seed: int | None = None  # makes the noise repeatable, and worthless


@dataclass(frozen=True)
class Spent:
    """What the steps done so far have cost."""

    epsilon: float
    delta: float
    noise_multiplier: float  # standard deviation of the noise on the sum, over clip_norm
    clip_norm: float
    sample_rate: float  # chance of each series to be in a step
    steps: int
    accountant: str = ACCOUNTANT
    unit: str = "series"


def noise_multiplier(privacy: Privacy, sample_rate: float, steps: int, series: int) -> float:
    """The least noise that keeps `steps` within the budget. Raises ModelError for a budget that is none."""
    if not (privacy.epsilon > 0 and privacy.clip_norm > 0):
        raise ModelError("a privacy budget and its clip are above 0", advice="raise epsilon or the clip")
    if not 0 < privacy.delta < 1 / series:
        raise ModelError(
            f"delta {privacy.delta:g} would allow to publish one of {series} series",
            advice=f"use a delta above 0 and well below {1 / series:.2g}",
        )
    try:
        from opacus.accountants.utils import get_noise_multiplier
    except ImportError as error:
        raise ModelError("a privacy budget needs opacus, which is not installed", advice=_MISSING) from error
    try:
        return float(
            get_noise_multiplier(
                target_epsilon=privacy.epsilon,
                target_delta=privacy.delta,
                sample_rate=sample_rate,
                steps=steps,
                accountant=ACCOUNTANT,
                epsilon_tolerance=privacy.epsilon / 1000,
            )
        )
    except ValueError as error:
        raise ModelError(
            f"no noise keeps {steps} steps within epsilon {privacy.epsilon:g}",
            advice="raise epsilon, train fewer epochs, or wait for more reviews",
        ) from error


def secret_generator(privacy: Privacy) -> np.random.Generator:
    """128 bits from the operating system, for the sampling, the augmentation and the noise alike.

    Augmentation too: were its draws known, leaving one series out would change those of all that follow it.
    """
    seed = secrets.randbits(128) if privacy.test_seed is None else privacy.test_seed
    return np.random.default_rng(seed)


def torch_generator(generator: np.random.Generator) -> torch.Generator:
    """A torch generator (CPU) whose whole state is drawn: of a seed torch keeps 32 bits, few enough to try them all."""
    drawn = torch.Generator().manual_seed(0)
    state = drawn.get_state()
    end = _STATE_OFFSET_BYTES + 8 * _STATE_WORDS
    words_W = state.numpy()[_STATE_OFFSET_BYTES:end].view(np.uint64)
    words_W[:] = generator.integers(0, 1 << 32, _STATE_WORDS, dtype=np.uint64)
    drawn.set_state(state)
    return drawn


class PrivateSteps:
    """The private half of a training: which series are drawn, and the gradient that may be seen of them."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        privacy: Privacy,
        *,
        series: int,
        sample_rate: float,
        noise: float,
        generator: np.random.Generator,
    ) -> None:
        from opacus.optimizers import DPOptimizer  # noise_multiplier has refused before where there is none

        self._privacy, self._series, self._sample_rate, self._noise = privacy, series, sample_rate, noise
        self._noise_generator = torch_generator(generator)
        self._parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self._optimizer = DPOptimizer(
            optimizer,
            noise_multiplier=noise,
            max_grad_norm=privacy.clip_norm,
            expected_batch_size=series * sample_rate,
            generator=self._noise_generator,
            secure_mode=True,  # sums several normals: the bits of one tell what it was added to (Casacuberta 2022)
        )

    def draw(self, generator: np.random.Generator) -> Sequence[int]:
        """Indices of one step's series: each with the same chance, so there may be none."""
        chosen: list[int] = np.flatnonzero(generator.random(self._series) < self._sample_rate).tolist()
        return chosen

    def differentiate(self, losses: Iterable[Tensor]) -> None:
        """Put the noised mean of the clipped gradients of each series' loss where an optimizer looks for it.

        One series at a time, so memory does not grow with the batch. A gradient that is not finite counts as far as it is.
        """
        for loss in losses:
            self._optimizer.zero_grad()
            loss.backward()
            for parameter in self._parameters:
                parameter.grad_sample = parameter.grad.nan_to_num(0.0, 0.0, 0.0).unsqueeze(0)
            self._optimizer.signal_skip_step(True)
            self._optimizer.pre_step()
        self._optimizer.zero_grad()
        for parameter in self._parameters:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
        self._optimizer.signal_skip_step(False)
        self._optimizer.pre_step()

    def spent(self, steps: int) -> Spent:
        from opacus.accountants import create_accountant

        accountant = create_accountant(ACCOUNTANT)
        accountant.history = [(self._noise, self._sample_rate, steps)] if steps else []
        epsilon = float(accountant.get_epsilon(self._privacy.delta)) if steps else 0.0
        privacy = self._privacy
        return Spent(epsilon, privacy.delta, self._noise, privacy.clip_norm, self._sample_rate, steps)

    def state(self) -> Any:
        return self._noise_generator.get_state()

    def restore(self, state: Any) -> None:
        self._noise_generator.set_state(state)
