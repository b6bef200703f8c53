"""Accuracy on the four real sets: the hybrid, its two cuts at equal parameters, and MONAI's DenseNet121.

Trains each for the same seconds on the training split; judges each once, on the validation split.
Never chooses anything by the validation split: temperature and threshold come from a part of the training split.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.network import images
from benchmarks.network.images import Collection
from benchmarks.network.results import Results, Row
from benchmarks.network.rivals import NETWORKS, MissingError
from models import calibration, scores
from models.archive_training import PLAN
from models.calibration import ALPHA
from models.examples import Example
from models.fitting import train
from models.network import TINY, Hybrid, config_of
from models.predicting import Predicted, predict

SIZES_PX = {"pneumonia": 64, "covid": 96, "ct": 96, "mri": 96}
FLOORS = {"pneumonia": 0.964, "covid": 0.845, "ct": 0.787, "mri": 0.844}  # a four-layer CNN; the data's README


@dataclass(frozen=True)
class Budget:
    seconds: float
    seeds: int


def rows(results: Results, budget: Budget) -> list[Row]:
    found = []
    for name in images.SETS:
        for rival in NETWORKS:
            for seed in range(budget.seeds):
                settings = {
                    "set": name,
                    "network": rival,
                    "size_px": SIZES_PX[name],
                    "budget_s": budget.seconds,
                    "seed": seed,
                    "threads": torch.get_num_threads(),
                }
                found.append(results.row("accuracy", settings, partial(_row, name, rival, seed, budget)))
    return found


def _row(name: str, rival: str, seed: int, budget: Budget) -> Row:
    collection = images.collection(name, SIZES_PX[name])
    try:
        network = new(rival, collection, seed)
    except MissingError as error:
        return {"left_out": str(error)}
    plan = replace(PLAN, seed=seed, budget_s=budget.seconds)
    fitted = train(network, collection.training, plan, lambda epoch, loss: None)
    trained = sum(value.numel() for key, value in network.named_parameters() if not key.startswith("ood_"))
    return {
        "parameters": trained,
        "epochs": len(fitted.loss_by_epoch),
        "images_seen": fitted.examples_seen,
        **judged(network, collection),
    }


def new(rival: str, collection: Collection, seed: int) -> Hybrid:
    torch.manual_seed(seed)
    return NETWORKS[rival](config_of(TINY, [collection.task], [collection.spec]))


def judged(network: Hybrid, collection: Collection) -> Row:
    """Calibrated on what was held back of the training split, then every score on the validation split."""
    held, seen = (_predicted(network, part) for part in (collection.calibration, collection.validation))
    temperature = calibration.fit_temperature(held.logits_NK, held.truth_N)
    threshold = calibration.conformal_threshold(calibration.softmax(held.logits_NK, temperature), held.truth_N)
    probabilities_NK = calibration.softmax(seen.logits_NK, temperature)
    found: Row = {name: scores.interval(score, probabilities_NK, seen.truth_N) for name, score in scores.SCORES.items()}
    return found | {
        "validation": len(seen.truth_N),
        "temperature": temperature,
        "threshold": threshold,
        "coverage": scores.coverage(probabilities_NK, seen.truth_N, threshold),
        "nominal": 1 - ALPHA,
        "floor": FLOORS[collection.name],
    }


def _predicted(network: Hybrid, examples: list[Example]) -> Predicted:
    (found,) = predict(network, examples).values()
    return found
