"""The bench of bytes: what it counts, and that a site moves only what its round chose. Not its figures."""

import numpy as np
import pytest

from benchmarks import bytes as bench
from benchmarks import exchanges
from benchmarks.bytes import FEDAVG
from benchmarks.exchanges import Arm
from models import addable
from models.layout import Layout


def row(scene: str, arm: Arm, seed: int, accuracy: float, size: float) -> dict[str, object]:
    return {
        "scene": scene,
        "arm": arm.name,
        "codec": arm.codec,
        "seed": seed,
        "accuracy": accuracy,
        "bytes": size,
        "validation": 282,
    }


def test_differences_are_taken_seed_by_seed_and_the_goal_is_judged() -> None:
    masked, sparse = Arm("addable", share=0.04), Arm("sparse", share=0.01)
    rows = [
        row("mri", FEDAVG, 0, 0.80, 1000.0),
        row("mri", FEDAVG, 1, 0.70, 1000.0),
        row("mri", masked, 0, 0.80, 20.0),
        row("mri", masked, 1, 0.694, 20.0),
        row("mri", sparse, 0, 0.75, 10.0),
    ]
    base, met, missed = bench.summary(rows)
    assert (base["factor"], base["points"], base["goal"]) == (1.0, 0.0, "")
    assert met["factor"] == 50.0
    assert met["points"] == pytest.approx(-0.3)
    assert met["spread"] == pytest.approx(0.6 / 2**0.5)
    assert met["goal"] == "met"
    assert missed["points"] == pytest.approx(-5.0)
    assert missed["goal"] == "missed: bytes: below 200 ×, accuracy"


def test_what_is_chosen_is_what_the_sum_moves() -> None:
    layout = Layout({"a": (5, 7), "b": (11,)}, b"12345678", 1.0, 2, 32, 16, 0.25)
    change = {"a": np.full((5, 7), 0.1, np.float32), "b": np.full(11, -0.1, np.float32)}
    words, _ = addable.encode(change, layout, 1.0, np.random.default_rng(0))
    moved = addable.decode_sum(words, layout)
    chosen = exchanges.chosen_of(layout)
    assert sum(int(value.sum()) for value in chosen.values()) == layout.chosen
    for name, value in moved.items():
        np.testing.assert_array_equal(value != 0, chosen[name] == 1)


@pytest.mark.slow
def test_a_site_moves_only_what_its_round_chose() -> None:
    import torch

    from models.examples import Example
    from models.fitting import TrainingPlan, train
    from models.network import NANO, Hybrid, config_of
    from models.restore import weights_of
    from models.tasks import INPUTS, TASKS

    torch.manual_seed(0)
    network = Hybrid(config_of(NANO, TASKS, INPUTS))
    before = weights_of(network)
    names = [name for name in before if name.startswith("stem")]
    movable = {name: np.zeros_like(before[name]) for name in names}
    movable["stem.conv.weight"][0] = 1.0
    side = INPUTS[0].size
    noise = np.random.default_rng(0).normal(size=(4, 1, side, side)).astype(np.float16)
    examples = [Example(each, TASKS[0], k % 2) for k, each in enumerate(noise)]
    with bench._restricted(network, movable):
        train(network, examples, TrainingPlan(1, 1e-2, 2, 0, weight_decay=0.0), lambda epoch, loss: None)
    after = weights_of(network)
    for name in names:
        np.testing.assert_array_equal((after[name] != before[name]) & (movable[name] == 0), False)
    assert (after["stem.conv.weight"][0] != before["stem.conv.weight"][0]).any()
    assert (after["head.weight"] != before["head.weight"]).any()
