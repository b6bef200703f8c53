"""Adapters: the change is of low rank, names and order are as before, and only what was announced changes."""

from typing import Any

import numpy as np
import pytest

from models import delta
from tests.models.learning import cases, fresh, quiet, same

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

RANK = 2


def trained(trainable: delta.Trainable, **more: Any) -> tuple[delta.Arrays, delta.Arrays]:
    from models.fitting import TrainingPlan, train
    from models.restore import weights_of

    network = fresh()
    torch.manual_seed(1)
    for parameter in network.parameters():  # as if it had learned: fresh transformer blocks let no gradient through
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    before, order = weights_of(network), list(network.state_dict())
    plan = TrainingPlan(2, 1e-2, 4, 0, trainable=trainable, rank=RANK, **more)
    train(network, cases("XR", 2), plan, quiet, heldout=cases("XR", 1, 81_000_000))
    assert list(network.state_dict()) == order
    assert all(value.is_contiguous() for value in network.state_dict().values())
    return before, weights_of(network)


@pytest.mark.parametrize("more", [{}, {"averaging": 0.9}, {"patience": 1}, {"proximal": 0.1}])
def test_the_change_is_of_low_rank(more: dict[str, Any]) -> None:
    before, after = trained("adapters", **more)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == set(delta.trainable_names(before, "adapters"))
    for name in changed - {"head.weight", "head.bias"}:
        sizes = np.linalg.svd(after[name].astype(np.float64) - before[name], compute_uv=False)
        assert sizes[0] > 1e-4, name
        assert sizes[RANK] < 1e-2 * sizes[0], name  # what rounding to float32 leaves


@pytest.mark.parametrize("trainable", ["all", "norms", "heads"])
def test_only_what_was_announced_changes(trainable: delta.Trainable) -> None:
    before, after = trained(trainable)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == set(delta.trainable_names(before, trainable))
    assert not any(name.startswith("ood_") for name in changed)


def test_adapters_that_learn_nothing_change_nothing() -> None:
    from models.lowrank import Adapted
    from models.restore import weights_of

    network = fresh()
    before, order = weights_of(network), list(network.state_dict())
    adapted = Adapted(network, RANK, seed=0)
    assert "context.0.project.parametrizations.weight.0.up_OR" in adapted.trained_names()
    adapted.merge()
    assert same(weights_of(network), before)
    assert list(network.state_dict()) == order
