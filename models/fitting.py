"""The training loop: one or several processes, CPU or GPU, from a seed to the same weights, resumable after any epoch.

Reads examples in memory; changes the network's weights in place; writes a checkpoint where it is asked to.
Never knows whether it runs in the laboratory or on a box, nor draws from torch's global generator.
Source: AdamW (Loshchilov 2019); weight averaging (Polyak 1992); proximal term (FedProx, Li 2020). Axes as in models.network.
"""

import hashlib
import io
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from models.augment import NONE, Augmentation, augmented
from models.bundle import write_durably
from models.delta import Trainable, trainable_names
from models.errors import ModelError
from models.examples import Batch, Example, batches, class_weights
from models.lowrank import Adapted
from models.network import Hybrid
from models.objective import Objective, heldout_loss
from models.parallel import ALONE, Parallel
from models.privacy import Privacy, PrivateSteps, Spent, noise_multiplier, secret_generator, torch_generator
from models.restricted import Others

_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class TrainingPlan:
    epochs: int
    learning_rate: float
    batch: int
    seed: int
    trainable: Trainable = "all"
    share: float = 1.0  # of the weights but heads and norms, those that move, as models.drawn has it
    share_seed: bytes = b""  # what draws them; public
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of the steps
    augmentation: Augmentation = NONE
    attention_weight: float = 0.0  # of the loss that pulls attention to known lesions
    label_smoothing: float = 0.0
    most_slices: int | None = None  # per series and step
    averaging: float = 0.0  # decay of the running mean of the weights, kept at the end; 0: the last ones are
    proximal: float = 0.0  # weight of half the squared distance to the weights at the start
    patience: int = 0  # epochs without a lower held-out loss before it ends; 0: never early
    schedule: Literal["cosine", "constant"] = "cosine"  # of the rate, after the warm-up
    budget_s: float = 0.0  # CPU time of each thread for the epochs, the rate falling with it; 0: all epochs
    rank: int = 8  # of the adapters, where trainable is "adapters"
    bfloat16: bool = False  # autocast; for GPUs
    privacy: Privacy | None = None


@dataclass
class Fitted:
    """How a training went. With a privacy budget there are no losses: they would tell what the weights do not."""

    epochs: int = 0
    loss_by_epoch: list[float] = field(default_factory=list)
    heldout_loss_by_epoch: list[float] = field(default_factory=list)
    steps: int = 0
    examples_seen: int = 0
    ended_early: bool = False
    spent: Spent | None = None


Progress = Callable[[int, float | None], None]  # epoch (from 1), mean loss unless that is private
Best = tuple[float, dict[str, Tensor]]  # lowest held-out loss, the weights that had it


def train(
    network: Hybrid,
    examples: Sequence[Example],
    plan: TrainingPlan,
    progress: Progress,
    *,
    heldout: Sequence[Example] = (),
    checkpoint: Path | None = None,
    parallel: Parallel = ALONE,
) -> Fitted:
    """Change the network's weights in place. Equal seeds give equal weights, whatever stopped and resumed in between;
    with a budget of time they do not, as the rate follows the time spent.

    With `patience`, what is kept are the weights with the lowest loss on `heldout`. With `checkpoint`, each epoch is kept
    there and a later call goes on after it; the file is removed by the caller. With `privacy`, no two runs are equal.
    Raises ModelError for weights that are not finite at the end, for a checkpoint of another plan, other examples or other
    weights, for processes that were given different ones, for what a privacy budget does not allow, and for a share of
    adapters.
    """
    _check_private(plan, parallel)
    identity = _identity(network, examples, plan) if checkpoint is not None or parallel.processes > 1 else ""
    parallel.check_same(identity)
    run = _Run(network, examples, plan, parallel)
    fitted, best = Fitted(), None
    kept = checkpoint.read_bytes() if checkpoint is not None and parallel.is_first and checkpoint.exists() else b""
    if content := parallel.of_first(kept):
        fitted, best = run.resume(content, identity)
    network.train()
    while fitted.epochs < plan.epochs and not fitted.ended_early and not run.is_over():
        loss = run.epoch(fitted)
        if parallel.is_first:
            progress(fitted.epochs, loss)
        if plan.patience and heldout:
            best = run.judge(heldout, fitted, best)
        if checkpoint is not None and parallel.is_first:
            write_durably(checkpoint, run.kept(fitted, best, identity))
    fitted.spent = run.finish(fitted, best)
    network.eval()
    if not all(torch.isfinite(value).all() for value in network.state_dict().values()):
        raise ModelError("training diverged: weights are not finite", advice="lower the learning rate")
    return fitted


class _Run:
    """One training: the optimizer, its schedule, the running mean of the weights, the generators."""

    def __init__(self, network: Hybrid, examples: Sequence[Example], plan: TrainingPlan, parallel: Parallel) -> None:
        self._network, self._examples, self._plan, self._parallel = network, examples, plan, parallel
        self._device = parallel.device
        # Norms alone: torch 2.13 crashes in GroupNorm's backward pass over a channels-last input that needs no gradient.
        layout = torch.contiguous_format if plan.trainable == "norms" else torch.channels_last
        network.to(self._device, memory_format=layout)
        self._adapted = Adapted(network, plan.rank, plan.seed) if plan.trainable == "adapters" else None
        self._parameters = self._choose_parameters()
        self._others = Others(network, plan.trainable, plan.share, plan.share_seed) if plan.share < 1.0 else None
        self._start = [parameter.detach().clone() for parameter in self._parameters] if plan.proximal else []
        self._optimizer = torch.optim.AdamW(_decayed(self._parameters, plan.weight_decay), lr=plan.learning_rate)
        self._spent_s = 0.0
        if plan.privacy is None:
            self._generator = np.random.default_rng(plan.seed)
            self._torch_generator = torch.Generator().manual_seed(plan.seed)
            self._steps_per_epoch = _batch_count(examples, plan.batch)
            self._private, weights = None, class_weights(examples)
        else:  # no class weights: they tell how many series have a label
            self._generator = secret_generator(plan.privacy)
            self._torch_generator = torch_generator(self._generator)
            self._steps_per_epoch = -(-len(examples) // plan.batch)
            self._private, weights = self._private_steps(plan.privacy), {}
        objective = Objective(
            network, weights, attention_weight=plan.attention_weight, label_smoothing=plan.label_smoothing
        )
        self._loss = parallel.wrapped(objective)
        self._mean = AveragedModel(network, avg_fn=_averaging(plan.averaging)) if plan.averaging else None

    def epoch(self, fitted: Fitted) -> float | None:
        """One pass over the examples, or as far as the budget goes. Gives the mean loss unless it is private."""
        started, before_s = time.process_time(), self._spent_s
        losses = []
        for drawn in self._drawn():
            self._set_rate(fitted.steps)
            if self._private is None:
                losses.append(self._step(drawn[0]))
            else:
                self._private_step(drawn, self._private)
            fitted.steps += 1
            fitted.examples_seen += sum(len(batch.label_B) for batch in drawn)
            if self._plan.budget_s:
                spent_s = before_s + (time.process_time() - started) / torch.get_num_threads()
                self._spent_s = self._parallel.of_first(spent_s)
            if self.is_over():
                break
        fitted.epochs += 1
        if not losses:
            return None
        fitted.loss_by_epoch.append(self._parallel.mean(torch.stack(losses).mean()))
        return fitted.loss_by_epoch[-1]

    def is_over(self) -> bool:
        """Whether a budget is spent: in CPU time of each thread, which a busy machine does not shorten."""
        return bool(self._plan.budget_s) and self._spent_s >= self._plan.budget_s

    def judge(self, heldout: Sequence[Example], fitted: Fitted, best: Best | None) -> Best:
        network = self._mean.module if self._mean is not None else self._network
        loss = self._parallel.of_first(heldout_loss(network, heldout))
        self._network.train()
        fitted.heldout_loss_by_epoch.append(loss)
        if best is None or loss < best[0]:
            return loss, {name: value.detach().clone() for name, value in network.state_dict().items()}
        since = len(fitted.heldout_loss_by_epoch) - 1 - int(np.argmin(fitted.heldout_loss_by_epoch))
        fitted.ended_early = since >= self._plan.patience
        return best

    def finish(self, fitted: Fitted, best: Best | None) -> Spent | None:
        """Put the weights that are kept into the network: the best, else the running mean, else the last.

        Gives the privacy spent, if any was asked for.
        """
        if best is not None:
            self._network.load_state_dict(best[1])
        elif self._mean is not None:
            self._network.load_state_dict(self._mean.module.state_dict())
        if self._adapted is not None:
            self._adapted.merge()
        if self._others is not None:
            self._others.let_go()
        self._network.requires_grad_(True)
        self._network.to("cpu", memory_format=torch.contiguous_format)
        return self._private.spent(fitted.steps) if self._private is not None else None

    def kept(self, fitted: Fitted, best: Best | None, identity: str) -> bytes:
        """All that the next epoch depends on."""
        content = {
            "identity": identity,
            "network": self._network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "mean": self._mean.state_dict() if self._mean is not None else None,
            "generator": self._generator.bit_generator.state,
            "torch_generator": self._torch_generator.get_state(),
            "private": self._private.state() if self._private is not None else None,
            "fitted": vars(fitted),
            "best": best,
            "spent_s": self._spent_s,
        }
        file = io.BytesIO()
        torch.save(content, file)
        return file.getvalue()

    def resume(self, kept: bytes, identity: str) -> tuple[Fitted, Best | None]:
        try:
            content: dict[str, Any] = torch.load(io.BytesIO(kept), map_location=self._device, weights_only=True)
            belongs = content["identity"] == identity
        except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, pickle.UnpicklingError) as error:
            raise ModelError(f"the file to resume from is no checkpoint: {error}", advice="remove it") from error
        if not belongs:
            raise ModelError(
                "the checkpoint belongs to another plan, other examples or other weights",
                advice="remove it to start anew, or give the same options",
            )
        self._network.load_state_dict(content["network"])
        self._optimizer.load_state_dict(content["optimizer"])
        if self._mean is not None:
            self._mean.load_state_dict(content["mean"])
        self._generator.bit_generator.state = content["generator"]
        self._torch_generator.set_state(content["torch_generator"].cpu())
        if self._private is not None:
            self._private.restore(content["private"])
        self._spent_s = content["spent_s"]
        return Fitted(**content["fitted"]), content["best"]

    def _drawn(self) -> Iterator[list[Batch]]:
        """What each step of an epoch learns from: a batch, or single series where privacy asks for it."""
        plan, generator = self._plan, self._generator
        if self._private is None:
            for batch in batches(self._examples, plan.batch, generator, most_slices=plan.most_slices):
                yield [augmented(batch, plan.augmentation, self._torch_generator)]
            return
        for _ in range(self._steps_per_epoch):
            alone = ([self._examples[index]] for index in self._private.draw(generator))
            series = (next(batches(example, 1, generator, most_slices=plan.most_slices)) for example in alone)
            yield [augmented(one, plan.augmentation, self._torch_generator) for one in series]

    def _step(self, batch: Batch) -> Tensor:
        part, times = self._parallel.part(batch)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._plan.bfloat16):
            loss = self._loss(part, batch) * times
        pulled = loss
        if self._start:
            pulled = loss + self._plan.proximal / 2 * _distance(self._parameters, self._start)
        self._optimizer.zero_grad()
        pulled.backward()
        nn.utils.clip_grad_norm_(self._parameters, _GRADIENT_NORM)
        self._change_weights()
        return loss.detach()

    def _private_step(self, series: Sequence[Batch], private: PrivateSteps) -> None:
        private.differentiate(self._loss(one, one) for one in series)
        for parameter, start in zip(self._parameters, self._start, strict=False):  # knows no series: after the noise
            parameter.grad.add_(parameter.detach() - start, alpha=self._plan.proximal)
        self._change_weights()

    def _change_weights(self) -> None:
        self._optimizer.step()
        if self._others is not None:
            self._others.put_back()
        if self._mean is not None:
            self._mean.update_parameters(self._network)

    def _set_rate(self, step: int) -> None:
        """Linear warm-up over steps, then as the schedule says: a cosine to zero over the steps or the budget."""
        plan, steps = self._plan, self._plan.epochs * self._steps_per_epoch
        warm = max(1, int(steps * plan.warmup))
        if plan.budget_s:
            warm, done = min(warm, 50), min(1.0, self._spent_s / plan.budget_s)
        else:
            done = min(1.0, max(0, step - warm) / max(1, steps - warm))
        left = 0.5 * (1.0 + float(np.cos(np.pi * done))) if plan.schedule == "cosine" else 1.0
        rate = plan.learning_rate * min(1.0, (step + 1) / warm) * left
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def _choose_parameters(self) -> list[nn.Parameter]:
        named = dict(self._network.named_parameters())
        if self._adapted is not None:
            chosen = self._adapted.trained_names()
        else:
            chosen = set(trainable_names(named, self._plan.trainable))
        for name, parameter in named.items():
            parameter.requires_grad_(name in chosen)
        return [parameter for name, parameter in named.items() if name in chosen]

    def _private_steps(self, privacy: Privacy) -> PrivateSteps:
        series, plan = len(self._examples), self._plan
        sample_rate = min(1.0, plan.batch / series)
        noise = noise_multiplier(privacy, sample_rate, plan.epochs * self._steps_per_epoch, series)
        return PrivateSteps(
            self._optimizer, privacy, series=series, sample_rate=sample_rate, noise=noise, generator=self._generator
        )


def _check_private(plan: TrainingPlan, parallel: Parallel) -> None:
    """Raises ModelError for options that a privacy budget cannot answer for."""
    if plan.privacy is None:
        return
    refused = {
        "patience: the held-out series would choose the weights, outside the budget": plan.patience > 0,
        "a budget of time: how long a step takes depends on the series": plan.budget_s > 0,
        "bfloat16: the bound on a series' gradient would be rounded": plan.bfloat16,
        "several processes: each would draw its own noise": parallel.processes > 1,
        "a GPU: its generator keeps too small a secret": parallel.device.type != "cpu",
    }
    for reason, is_asked in refused.items():
        if is_asked:
            raise ModelError(f"a privacy budget excludes {reason}", advice="leave out one of the two")


def _identity(network: Hybrid, examples: Sequence[Example], plan: TrainingPlan) -> str:
    """A digest of all that decides how a training goes."""
    digest = hashlib.sha256(repr(plan).encode())
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    for example in examples:
        digest.update(f"{example.task.name} {example.label} {example.slices_SHW.shape}".encode())
        digest.update(example.slices_SHW.tobytes())
    return digest.hexdigest()


def _batch_count(examples: Sequence[Example], size: int) -> int:
    return sum(-(-count // size) for count in Counter(example.task.modality for example in examples).values())


def _distance(parameters: Sequence[Tensor], start: Sequence[Tensor]) -> Tensor:
    return torch.stack([(p - s).square().sum() for p, s in zip(parameters, start, strict=True)]).sum()


def _decayed(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Norms and biases are not pulled to zero."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _averaging(decay: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A running mean that forgets its first steps quickly."""

    def mean(averaged: Tensor, current: Tensor, count: Tensor) -> Tensor:
        kept = min(decay, (1.0 + float(count)) / (10.0 + float(count)))
        return averaged.lerp(current.to(averaged.dtype), 1.0 - kept)

    return mean
