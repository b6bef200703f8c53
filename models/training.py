"""Training: `python -m models.training pretrain …` or `… images …` in the laboratory, `… finetune …` on a box.

Reads a bundle and an example folder; writes weights.safetensors and report.json, progress as models.progress shows it.
Never runs inside the box's main process; never writes anything but weights and counts, the report last.
Axes as in models.network.
"""

import argparse
import json
import os
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import torch
from safetensors import numpy as safetensors_numpy
from torch import distributed

from models import progress
from models.augment import SITE
from models.bundle import Bundle, read_bundle, write_durably
from models.delta import Trainable
from models.errors import ModelError, VolumeError
from models.examples import read_examples
from models.fitting import TrainingPlan, train
from models.network import BASE, NANO, SMALL, TINY
from models.parallel import ALONE, Parallel, joined
from models.predicting import correct
from models.privacy import Privacy
from models.restore import network_of, weights_of


def finetune(
    bundle: Bundle,
    examples_folder: Path,
    out: Path,
    plan: TrainingPlan,
    parallel: Parallel = ALONE,
    checkpoint: Path | None = None,
) -> None:
    """Train on the folder's examples. Of several processes the first writes weights and report."""
    started = time.monotonic()
    training, heldout = read_examples(examples_folder, bundle.manifest)
    if not training:
        raise VolumeError("there is no example to train on", advice="review studies first")
    network = network_of(bundle)
    before = correct(network, heldout) if parallel.is_first else 0
    with progress.shown(plan.epochs, parallel.is_first) as told:
        fitted = train(network, training, plan, told, heldout=heldout, checkpoint=checkpoint, parallel=parallel)
    if not parallel.is_first:
        return
    report = {
        "examples": len(training),
        "heldout": len(heldout),
        "heldout_correct_before": before,
        "heldout_correct_after": correct(network, heldout),
        "epochs": fitted.epochs,
        "ended_early": fitted.ended_early,
        "loss_by_epoch": fitted.loss_by_epoch,
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if fitted.spent is not None:
        report["privacy"] = asdict(fitted.spent)
    (out / "report.json").unlink(missing_ok=True)  # never beside weights that are not its own
    write_durably(out / "weights.safetensors", safetensors_numpy.save(weights_of(network)))
    write_durably(out / "report.json", json.dumps(report, indent=1).encode())


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with a fixed workspace only
    try:
        if options.action == "pretrain":
            from models import pretraining  # the laboratory's half is not needed on a box

            if distributed.is_torchelastic_launched():
                raise ModelError("pretrain runs in one process", advice="start it without torchrun")
            with progress.shown(pretraining.PLAN.epochs) as told:
                pretraining.pretrain(options.out, options.seed, options.scale, told, options.resume)
        elif options.action == "images":
            _train_images(options)
        else:
            plan = _plan(options)
            with joined(options.device) as parallel:
                finetune(read_bundle(options.bundle), options.examples, options.out, plan, parallel, options.resume)
    except ModelError as error:
        print(json.dumps({"error": str(error), "advice": error.advice}), file=sys.stderr)
        return 1
    return 0


def _train_images(options: argparse.Namespace) -> None:
    from models import archive_training  # of the laboratory, as pretraining is

    if distributed.is_torchelastic_launched():
        raise ModelError("images runs in one process", advice="start it without torchrun")
    course = archive_training.Course(options.network, options.size, options.budget_minutes * 60, options.seed)
    with progress.shown(None) as told:
        archive_training.train_images(options.tasks, options.data, options.out, course, told, options.resume)


def _plan(options: argparse.Namespace) -> TrainingPlan:
    return TrainingPlan(
        epochs=options.epochs,
        learning_rate=options.lr,
        batch=options.batch,
        seed=options.seed,
        trainable=options.trainable,
        share=options.share,
        share_seed=options.share_seed,
        warmup=options.warmup,
        augmentation=SITE,
        averaging=options.averaging,
        proximal=options.proximal,
        patience=options.patience,
        rank=options.rank,
        bfloat16=options.bfloat16,
        privacy=_privacy(options),
    )


def _privacy(options: argparse.Namespace) -> Privacy | None:
    given = {"delta": options.dp_delta, "clip_norm": options.dp_clip, "test_seed": options.dp_test_seed}
    asked = {name: value for name, value in given.items() if value is not None}
    if options.dp_epsilon is not None:
        return Privacy(options.dp_epsilon, **asked)
    if asked:
        raise ModelError("a delta or a clip alone is no privacy budget", advice="give --dp-epsilon too")
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.training",
        description="Train a bundle's weights: from nothing in the laboratory, or on a box's reviewed examples.",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    pretrain = actions.add_parser(
        "pretrain",
        help="train the shipped bundle on phantoms",
        description="Draw phantoms, train on them, calibrate, measure, and write a bundle with its model card.",
    )
    finetune_ = actions.add_parser(
        "finetune",
        help="train a bundle's weights on a box's reviewed examples",
        description="Train a bundle's weights on reviewed examples. Prints one JSON line for each epoch, and shows a bar on "
        "stderr where that is a terminal; an error is one JSON line on stderr with what to do, and exit status 1. Several "
        "processes train as one under torchrun, with the gradients of one process: "
        "torchrun --nproc-per-node 2 -m models.training finetune …",
    )
    pretrain.add_argument("--out", type=Path, required=True, help="the bundle file to write")
    pretrain.add_argument("--scale", type=_positive, default=1.0, help="share of the full number of phantoms (1)")
    images = actions.add_parser(
        "images",
        help="train a bundle on archives of labelled images",
        description="Train on the archives that a task file names, calibrate on a part held back, measure on the split "
        "'val', and write a bundle with its model card. models/bundles/chest-small.toml is a task file.",
    )
    _add_images(images)
    _add_files(finetune_)
    _add_course(finetune_)
    _add_scope(finetune_)
    _add_privacy(finetune_)
    _add_machine(pretrain)
    _add_machine(images, "of the first weights and the order; the weights depend on the machine's speed too (0)")
    machine = _add_machine(finetune_)
    machine.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="auto: a GPU if there is one")
    machine.add_argument("--bfloat16", action="store_true", help="mixed precision; faster on GPUs, slower on most CPUs")
    return parser


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", type=Path, required=True, metavar="FILE", help="the TOML file that names the tasks")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="holds the archives (.npz)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the bundle file to write")
    parser.add_argument("--network", choices=(NANO, TINY, SMALL, BASE), default=SMALL, help=f"its size ({SMALL})")
    parser.add_argument("--size", type=_count, default=96, help="side of the network's input, in pixels (96)")
    parser.add_argument(
        "--budget-minutes", type=_positive, required=True, metavar="M", help="CPU time of each thread for the training"
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("what it reads and writes")
    files.add_argument("--bundle", type=Path, required=True, metavar="FILE", help="the bundle whose weights to train")
    files.add_argument("--examples", type=Path, required=True, metavar="FOLDER", help="holds examples.json and arrays")
    files.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="for weights.safetensors, then report.json"
    )


def _add_course(parser: argparse.ArgumentParser) -> None:
    course = parser.add_argument_group("how it learns")
    course.add_argument("--epochs", type=_count, default=12, help="passes over the examples (12)")
    course.add_argument("--lr", type=_positive, default=5e-4, help="highest learning rate (5e-4)")
    course.add_argument("--batch", type=_count, default=4, help="series in each step, over all processes (4)")
    course.add_argument("--warmup", type=_share, default=0.1, help="share of the steps in which the rate rises (0.1)")
    course.add_argument(
        "--averaging",
        type=_share,
        default=0.0,
        help="keep a running mean of the weights with this decay, e.g. 0.99 (0)",
    )
    course.add_argument(
        "--patience",
        type=_whole,
        default=0,
        help="end after so many epochs without a lower loss on the held-out examples, and keep the best weights; "
        "0: all epochs, the last weights (0)",
    )


def _add_scope(parser: argparse.ArgumentParser) -> None:
    scope = parser.add_argument_group("what may change")
    scope.add_argument(
        "--trainable",
        choices=get_args(Trainable),
        default="all",
        help="all weights; the heads alone; norms and heads; or low-rank adapters of the transformer and heads (all)",
    )
    scope.add_argument(
        "--share",
        type=_part,
        default=1.0,
        help="of the weights but heads and norms, train these alone and leave the others as they are, to the bit (1)",
    )
    scope.add_argument(
        "--share-seed", type=bytes.fromhex, default=b"", metavar="HEX", help="what draws them: 8 bytes at least"
    )
    scope.add_argument("--rank", type=_count, default=8, help="of the adapters (8)")
    scope.add_argument(
        "--proximal", type=_weight, default=0.0, help="weight of the pull to the bundle's weights, FedProx's mu (0)"
    )


def _add_privacy(parser: argparse.ArgumentParser) -> None:
    privacy = parser.add_argument_group(
        "differential privacy",
        "With --dp-epsilon no training series can be recognised in the weights beyond the budget (DP-SGD; one series "
        "with all its slices counts as one). Needs the extra 'privacy'. The noise comes from a secret of the operating "
        "system, not from --seed, so no two runs are equal; the file of --resume holds it: remove that afterwards. "
        "--batch is then the expected number of series in a step. The report says what this run spent, to which earlier "
        "runs on the same series add, and leaves the losses out; its counts of right answers are of the held-out "
        "examples, which no budget covers. One process on a CPU; not with --patience or --bfloat16.",
    )
    privacy.add_argument("--dp-epsilon", type=_positive, metavar="E", help="the budget; without it there is no privacy")
    privacy.add_argument(
        "--dp-delta", type=_positive, metavar="D", help="chance to exceed it, well below 1 / series (1e-5)"
    )
    privacy.add_argument("--dp-clip", type=_positive, metavar="C", help="largest norm of one series' gradient (1)")
    privacy.add_argument("--dp-test-seed", type=_whole, help=argparse.SUPPRESS)  # repeatable noise protects no one


def _add_machine(
    parser: argparse.ArgumentParser, seed_help: str = "equal seeds give equal weights (0)"
) -> argparse._ArgumentGroup:
    machine = parser.add_argument_group("how it runs")
    machine.add_argument("--seed", type=_whole, default=0, help=seed_help)
    machine.add_argument("--threads", type=_count, default=1, help="no more than cores that are free: threads spin (1)")
    machine.add_argument(
        "--resume", type=Path, metavar="FILE", help="keep each epoch here, and go on after the last one kept"
    )
    return machine


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _weight(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _part(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to below 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
