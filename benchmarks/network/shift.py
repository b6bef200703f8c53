"""Another hospital: chest X-rays of a source that training never saw, before and after the site adapts.

Trains on the covid set without that source; then reads its images as a box would, in their order.
Never lets a case change the threshold before it is judged.
Source: adaptive conformal inference (Gibbs 2021).
"""

from dataclasses import replace

import numpy as np
import torch

from benchmarks.network import images
from benchmarks.network.results import Results, Row
from models import adaptive, calibration, scores
from models.archive_training import PLAN
from models.fitting import TrainingPlan, train
from models.laboratory import calibrated_task, fit_ood
from models.network import TINY, Hybrid, config_of
from models.predicting import predict

SIZE_PX = 96
REVIEWED = 50  # cases after which coverage must be back
FINETUNE = TrainingPlan(epochs=15, learning_rate=5e-4, batch=8, seed=0, augmentation=PLAN.augmentation)


def rows(results: Results, budget_s: float) -> list[Row]:
    settings = {"trained_without": images.OTHER_HOSPITAL, "budget_s": budget_s, "threads": torch.get_num_threads()}
    return [results.row("shift", settings, lambda: _row(budget_s))]


def _row(budget_s: float) -> Row:
    collection = images.collection("covid", SIZE_PX, keep_apart=images.OTHER_HOSPITAL)
    torch.manual_seed(0)
    network = Hybrid(config_of(TINY, [collection.task], [collection.spec]))
    train(network, collection.training, replace(PLAN, budget_s=budget_s), lambda epoch, loss: None)
    fit_ood(network, collection.training)
    task = calibrated_task(collection.task, predict(network, collection.calibration)[collection.task.name])
    home = predict(network, collection.validation)[task.name]
    away = predict(network, collection.other)[task.name]
    ood_N = np.concatenate([home.ood_N, away.ood_N])
    is_away_N = np.arange(len(ood_N)) >= len(home.ood_N)
    probabilities_NK = calibration.softmax(away.logits_NK, task.temperature)
    covered_N = adaptive.coverage_over_time(away.logits_NK, away.truth_N, task)
    half = len(collection.other) // 2
    train(network, collection.training + collection.other[:half], FINETUNE, lambda epoch, loss: None)
    after = predict(network, collection.other[half:])[task.name]
    home_after = predict(network, collection.validation)[task.name]
    right_N = away.logits_NK.argmax(1) == away.truth_N
    return {
        "cases": len(away.truth_N),
        "ood_auc": scores.auc(ood_N, is_away_N),
        "coverage_home": scores.coverage(
            calibration.softmax(home.logits_NK, task.temperature), home.truth_N, task.conformal_threshold
        ),
        "coverage_before": scores.coverage(probabilities_NK, away.truth_N, task.conformal_threshold),
        "coverage_after": float(covered_N[REVIEWED:].mean()),
        "nominal": 1 - calibration.ALPHA,
        "accuracy_before": float(right_N[half:].mean()),
        "accuracy_after": float((after.logits_NK.argmax(1) == after.truth_N).mean()),
        "accuracy_home_before": float((home.logits_NK.argmax(1) == home.truth_N).mean()),
        "accuracy_home_after": float((home_after.logits_NK.argmax(1) == home_after.truth_N).mean()),
    }
