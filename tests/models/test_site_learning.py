"""A round without the wire: three boxes of two hospitals learn, the mean of their deltas serves every site.

Printed with `-s`: accuracy before and after, on phantoms that no box has learned from.
"""

from dataclasses import replace

import numpy as np
import pytest

from models import delta
from models.bundle import Bundle
from models.phantoms import LABELS, LOOKS, phantom
from models.tasks import TASKS

pytest.importorskip("torch", reason="training needs the extra `train`")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

BOXES = (("north", ("XR", "CT"), 4), ("north", ("MR", "XR"), 4), ("south", ("XR", "CT", "MR"), 3))  # as in the demo
UNSEEN_PER_LABEL = 12


def examples(look: str, modalities: tuple[str, ...], per_label: int, first_seed: int) -> list:
    from models.pretraining import example_of

    return [
        replace(example_of(phantom(task.modality, label, first_seed + n, LOOKS[look]), task, k), lesion_Shw=None)
        for task in TASKS
        if task.modality in modalities
        for k, label in enumerate(LABELS[task.modality])
        for n in range(per_label)
    ]


def test_the_mean_of_three_boxes_deltas_serves_both_hospitals(shipped: Bundle) -> None:
    from models.augment import SITE
    from models.fitting import TrainingPlan, train
    from models.predicting import correct, predict
    from models.restore import load_weights, network_of, weights_of

    base = shipped.weights
    names = delta.trainable_names(base, "all")
    shapes = {name: base[name].shape for name in names}
    unseen = {look: examples(look, ("XR", "CT", "MR"), UNSEEN_PER_LABEL, 70_000_000) for look in ("north", "south")}
    before = {look: correct(network_of(shipped), cases) / len(cases) for look, cases in unseen.items()}
    total: dict[str, np.ndarray] = {name: np.zeros(shape) for name, shape in shapes.items()}
    weight = 0
    for number, (look, modalities, per_label) in enumerate(BOXES):
        own = examples(look, modalities, per_label, 71_000_000 + 1000 * number)
        network = network_of(shipped)
        train(network, own, TrainingPlan(12, 5e-4, 4, number, augmentation=SITE), lambda epoch, loss: None)
        change, _ = delta.clip(delta.subtract(weights_of(network), base, names), 10.0)
        sent = delta.decode(delta.encode(change, seed=number), shapes)
        total = {name: total[name] + len(own) * sent[name] for name in names}
        weight += len(own)
    network = network_of(shipped)
    load_weights(network, delta.apply(base, {name: value / weight for name, value in total.items()}))
    for look, cases in unseen.items():
        after = correct(network, cases) / len(cases)
        ood_N = np.concatenate([seen.ood_N for seen in predict(network, cases).values()])
        print(f"{look}: {before[look]:.3f} -> {after:.3f} of {len(cases)} unseen")
        assert after > before[look]
        assert np.mean(ood_N <= shipped.manifest.ood_threshold) >= 0.9
