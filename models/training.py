"""Training: `python -m models.training pretrain …` in the laboratory, `… finetune …` on a box.

Reads a bundle and an example folder; writes weights.safetensors and report.json, progress as JSON lines on stdout.
Never runs inside the box's main process; never writes anything but weights and counts.
Axes as in models.network.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from models.bundle import Bundle, read_bundle
from models.delta import Trainable, trainable_names
from models.errors import ModelError, VolumeError
from models.examples import Batch, Example, batches, class_weights, read_examples
from models.network import Hybrid, config_of
from models.spec import InputSpec, TaskSpec

_EVALUATION_BATCH = 16
_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class TrainingPlan:
    epochs: int
    learning_rate: float
    batch: int
    seed: int
    trainable: Trainable = "all"
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of the steps
    attention_weight: float = 0.0  # of the loss that pulls attention to known lesions
    label_smoothing: float = 0.0
    most_slices: int | None = None  # per series and step


@dataclass(frozen=True)
class Predicted:
    """What the network says about one task's examples."""

    logits_NK: NDArray[np.float32]  # of the task's own labels
    truth_N: NDArray[np.int64]
    ood_N: NDArray[np.float32]


Progress = Callable[[int, float], None]  # epoch (from 1), mean loss


def train(network: Hybrid, examples: Sequence[Example], plan: TrainingPlan, progress: Progress) -> list[float]:
    """Change the network's weights in place; give the mean loss of each epoch. Equal seeds give equal weights."""
    torch.manual_seed(plan.seed)
    generator = np.random.default_rng(plan.seed)
    weights = {name: torch.from_numpy(weight_K) for name, weight_K in class_weights(examples).items()}
    parameters = _choose_parameters(network, plan.trainable)
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    steps = plan.epochs * sum(1 for _ in batches(examples, plan.batch))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, plan.warmup))
    loss_by_epoch = []
    network.train()
    for epoch in range(1, plan.epochs + 1):
        losses = []
        for batch in batches(examples, plan.batch, generator, most_slices=plan.most_slices):
            loss = _loss(network, batch, weights[batch.task.name], plan)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        loss_by_epoch.append(float(np.mean(losses)))
        progress(epoch, loss_by_epoch[-1])
    network.eval()
    return loss_by_epoch


def predict(network: Hybrid, examples: Sequence[Example]) -> dict[str, Predicted]:
    """By task name, in the order of the examples."""
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for batch in batches(examples, _EVALUATION_BATCH):
        with torch.no_grad():
            logits_BK, _map, _weights, ood_B = network(*graph_inputs(batch))
        label_B = torch.from_numpy(batch.label_B)
        found.setdefault(batch.task.name, []).append((_own_logits(logits_BK, batch), label_B, ood_B))
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
    for batch in batches(examples, _EVALUATION_BATCH):
        with torch.no_grad():
            slices_BSHW, slice_mask_BS, _ = graph_inputs(batch)
            features.append(network.look(slices_BSHW, slice_mask_BS).numpy())
        columns.append(batch.label_B + batch.task.offset)
    return np.concatenate(features), np.concatenate(columns)


def graph_inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The graph's inputs."""
    return (
        torch.from_numpy(batch.slices_BSHW),
        torch.from_numpy(batch.slice_mask_BS),
        torch.from_numpy(batch.modality_B),
    )


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
    return {name: value.numpy().copy() for name, value in network.state_dict().items()}


def finetune(bundle: Bundle, examples_folder: Path, out: Path, plan: TrainingPlan) -> dict[str, object]:
    """Train on the folder's examples; write weights and report; give the report."""
    started = time.monotonic()
    training, heldout = read_examples(examples_folder, bundle.manifest)
    if not training:
        raise VolumeError("there is no example to train on", advice="review studies first")
    network = network_of(bundle)
    before = correct(network, heldout)
    loss_by_epoch = train(network, training, plan, _print_progress)
    if not all(torch.isfinite(value).all() for value in network.state_dict().values()):
        raise ModelError("training diverged: weights are not finite", advice="lower the learning rate")
    report: dict[str, object] = {
        "examples": len(training),
        "heldout": len(heldout),
        "heldout_correct_before": before,
        "heldout_correct_after": correct(network, heldout),
        "loss_by_epoch": loss_by_epoch,
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), out / "weights.safetensors")
    (out / "report.json").write_text(json.dumps(report, indent=1))
    return report


def _loss(network: Hybrid, batch: Batch, weight_K: Tensor, plan: TrainingPlan) -> Tensor:
    seen = network.attended(*graph_inputs(batch))
    label_B = torch.from_numpy(batch.label_B)
    logits_BK = _own_logits(network.head(seen.pooled_BD), batch)
    each_B = functional.cross_entropy(logits_BK, label_B, reduction="none", label_smoothing=plan.label_smoothing)
    loss = (each_B * weight_K[label_B]).mean()
    if plan.attention_weight and batch.lesion_BShw is not None:
        loss = loss + plan.attention_weight * _attention_loss(seen.weights_BSAhw, torch.from_numpy(batch.lesion_BShw))
    return loss


def _attention_loss(weights_BSAhw: Tensor, lesion_BShw: Tensor) -> Tensor:
    """How little of the attention lies on the lesion, where there is one: -log of that share."""
    places_BShw = functional.adaptive_max_pool2d(lesion_BShw, weights_BSAhw.shape[-2:])
    share_B = (weights_BSAhw.mean(2) * places_BShw).sum((1, 2, 3))
    has_lesion_B = (places_BShw.sum((1, 2, 3)) > 0).float()
    return -((share_B + 1e-4).log() * has_lesion_B).sum() / has_lesion_B.sum().clamp(min=1.0)


def _own_logits(logits_BK: Tensor, batch: Batch) -> Tensor:
    return logits_BK[:, batch.task.offset : batch.task.offset + len(batch.task.labels)]


def _choose_parameters(network: Hybrid, trainable: Trainable) -> list[torch.nn.Parameter]:
    chosen = set(trainable_names((name for name, _ in network.named_parameters()), trainable))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [parameter for name, parameter in network.named_parameters() if name in chosen]


def _rate(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    start = max(1, int(steps * warmup))
    if step < start:
        return (step + 1) / start
    return 0.5 * (1.0 + float(np.cos(np.pi * min(1.0, (step - start) / max(1, steps - start)))))


def _print_progress(epoch: int, loss: float) -> None:
    print(json.dumps({"epoch": epoch, "loss": round(loss, 5)}), flush=True)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    try:
        if options.action == "pretrain":
            from models import pretraining  # the laboratory's half is not needed on a box

            pretraining.pretrain(options.out, options.seed, options.scale, _print_progress)
        else:
            plan = TrainingPlan(
                options.epochs, options.lr, options.batch, options.seed, options.trainable, warmup=options.warmup
            )
            finetune(read_bundle(options.bundle), options.examples, options.out, plan)
    except ModelError as error:
        print(json.dumps({"error": str(error), "advice": error.advice}), file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.training", description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    pretrain = actions.add_parser("pretrain", help="train the shipped bundle on phantoms")
    pretrain.add_argument("--out", type=Path, required=True, help="the bundle file to write")
    pretrain.add_argument("--scale", type=float, default=1.0, help="share of the full number of phantoms")
    finetune_ = actions.add_parser("finetune", help="train a bundle's weights on a box's reviewed examples")
    finetune_.add_argument("--bundle", type=Path, required=True)
    finetune_.add_argument("--examples", type=Path, required=True, help="folder with examples.json")
    finetune_.add_argument("--out", type=Path, required=True, help="folder for weights.safetensors and report.json")
    finetune_.add_argument("--epochs", type=int, default=12)
    finetune_.add_argument("--lr", type=float, default=5e-4)
    finetune_.add_argument("--batch", type=int, default=4, help="series per step")
    finetune_.add_argument("--warmup", type=float, default=0.1, help="share of steps with rising rate")
    finetune_.add_argument("--trainable", choices=("all", "heads"), default="all")
    for action in (pretrain, finetune_):
        action.add_argument("--seed", type=int, default=0)
        action.add_argument("--threads", type=int, default=1, help="no more than cores that are free: threads spin")
    return parser


if __name__ == "__main__":
    sys.exit(main())
