"""The poisoning bench: its attacks by hand, and that it tells a rule that holds from one that does not. Not its figures."""

import numpy as np
import pytest
import torch

from benchmarks import poisoning
from benchmarks.poisoning import Scene, Site, Turn
from models import delta

HONEST = [{"w": np.array(values, np.float32)} for values in ([1.0, 2.0], [3.0, 2.0], [2.0, 8.0])]


def halves(count: int, seed: int) -> Site:
    """Label 1 where the lower half is the bright one."""
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.arange(count) % 2
    images_N1HW = torch.randn(count, 1, poisoning.SIZE_PX, poisoning.SIZE_PX, generator=generator)
    images_N1HW[label_N == 1, :, poisoning.SIZE_PX // 2 :] += 1.0
    images_N1HW[label_N == 0, :, : poisoning.SIZE_PX // 2] += 1.0
    return Site(images_N1HW, label_N)


@pytest.fixture(scope="module")
def scene() -> Scene:
    torch.manual_seed(0)
    network = poisoning._network(2)
    sites = [halves(32, seed) for seed in range(poisoning.BOXES)]
    return Scene(sites, halves(64, 99), 2, network, poisoning._weights(network))


@pytest.fixture
def turn(scene: Scene) -> Turn:
    return Turn(scene, {"w": np.zeros(2, np.float32)}, 0, HONEST)


def test_sign_flips_by_hand(turn: Turn) -> None:
    loud, quiet = poisoning._sign_flip(turn), poisoning._quiet_sign_flip(turn)
    assert len(loud) == len(quiet) == poisoning.HOSTILE
    assert np.allclose(loud[0]["w"], [-20.0, -40.0])
    assert delta.norm(quiet[0]) == pytest.approx(np.sqrt(68.0))
    assert quiet[0]["w"][1] == pytest.approx(2 * quiet[0]["w"][0])


def test_noise_is_as_loud_as_it_says(turn: Turn) -> None:
    one, other = poisoning._noise(turn)
    mean_norm = (np.sqrt(5.0) + np.sqrt(13.0) + np.sqrt(68.0)) / 3
    assert delta.norm(one) == pytest.approx(10 * mean_norm, rel=1e-5)
    assert not np.allclose(one["w"], other["w"])


def test_a_little_by_hand(turn: Turn) -> None:
    spread = np.sqrt(np.array([2.0 / 3.0, 8.0]))
    assert np.allclose(poisoning._a_little(turn)[0]["w"], np.array([2.0, 4.0]) - 1.5 * spread, rtol=1e-5)


def test_dealt_images_are_all_there_once() -> None:
    whole = Site(torch.arange(200.0).reshape(200, 1, 1, 1), torch.arange(200) % 4)
    sites = poisoning._dealt(whole, 4, np.random.default_rng(0))
    assert len(sites) == poisoning.BOXES
    dealt_N = torch.cat([site.images_N1HW.flatten() for site in sites]).long()
    assert sorted(dealt_N.tolist()) == list(range(200))
    assert all((site.label_N == site.images_N1HW.flatten().long() % 4).all() for site in sites)


@pytest.mark.slow
def test_loud_sign_flip_breaks_the_mean_and_not_the_median(scene: Scene) -> None:
    loud = next(name for name, attack in poisoning.ATTACKS.items() if attack is poisoning._sign_flip)
    assert poisoning._attacked(scene, "none", "fedavg", 2) > 0.9
    assert poisoning._attacked(scene, loud, "fedavg", 2) < 0.6
    assert poisoning._attacked(scene, loud, "median", 2) > 0.9
