"""The bench of bytes: what it counts, and that what sites train is what arrives. Not its figures."""

import numpy as np
import pytest

from benchmarks import bytes as bench
from benchmarks.bytes import FEDAVG
from benchmarks.exchanges import Arm, exchange_of
from benchmarks.network.federated import SITES
from models.drawn import Drawn


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


SHAPES = {"body": (5, 7), "head.bias": (11,)}


@pytest.mark.parametrize(
    "arm",
    [
        Arm("addable", share=0.25, value_bits=12, word_bits=16, trains_chosen=True),
        Arm("drawn", share=0.25, value_bits=3, trains_chosen=True),
    ],
)
def test_what_sites_train_is_what_arrives(arm: Arm) -> None:
    exchange = exchange_of(arm, SHAPES, seed=0)
    drawn = Drawn(SHAPES, exchange.begin(0), arm.share)
    change = {name: np.where(mask, np.float32(0.01), 0) for name, mask in drawn.masks().items()}
    sent = [exchange.send(site, change, 1.0) for site in range(SITES)]
    assert len(set(sent)) == 1
    for name, value in exchange.mean().items():
        assert value[drawn.masks()[name]] == pytest.approx(0.01, abs=1e-3)
        assert not value[~drawn.masks()[name]].any()
    assert (drawn.chosen, exchange.begin(1) != drawn.seed) == (9 + 11, True)


def test_where_sites_train_all_the_share_is_taken_afterwards() -> None:
    exchange = exchange_of(Arm("addable", share=0.25, value_bits=12, word_bits=16), SHAPES, seed=0)
    assert exchange.begin(0) == b""
    exchange.send(0, {name: np.full(shape, 0.01, np.float32) for name, shape in SHAPES.items()}, 1.0)
    assert np.count_nonzero(exchange.mean()["body"]) == 9
