"""The poisoning bench: its attacks by hand, and that it tells a rule that holds from one that does not. Not its figures."""

import numpy as np
import pytest
import torch

from benchmarks import poisoned_scenes as scenes
from benchmarks import poisoned_sums, poisoning
from benchmarks.poisoned_scenes import Scene, Site, Turn
from models import delta

HONEST = [{"w": np.array(values, np.float32)} for values in ([1.0, 2.0], [3.0, 2.0], [2.0, 8.0])]


def halves(count: int, seed: int) -> Site:
    """Label 1 where the lower half is the bright one."""
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.arange(count) % 2
    images_N1HW = torch.randn(count, 1, scenes.SIZE_PX, scenes.SIZE_PX, generator=generator)
    images_N1HW[label_N == 1, :, scenes.SIZE_PX // 2 :] += 1.0
    images_N1HW[label_N == 0, :, : scenes.SIZE_PX // 2] += 1.0
    return Site(images_N1HW, label_N)


@pytest.fixture(scope="module")
def scene() -> Scene:
    torch.manual_seed(0)
    network = scenes.network_of(2)
    sites = [halves(32, seed) for seed in range(poisoning.BOXES)]
    return Scene(sites, halves(64, 99), 2, network, scenes.weights_of(network))


@pytest.fixture
def turn(scene: Scene) -> Turn:
    return Turn(scene, {"w": np.zeros(2, np.float32)}, 0, HONEST)


def test_sign_flips_by_hand(turn: Turn) -> None:
    loud, quiet = scenes.sign_flip(turn), scenes.quiet_sign_flip(turn)
    assert len(loud) == len(quiet) == scenes.HOSTILE
    assert np.allclose(loud[0]["w"], [-20.0, -40.0])
    assert delta.norm(quiet[0]) == pytest.approx(np.sqrt(68.0))
    assert quiet[0]["w"][1] == pytest.approx(2 * quiet[0]["w"][0])


def test_noise_is_as_loud_as_it_says(turn: Turn) -> None:
    one, other = scenes.noise(turn)
    mean_norm = (np.sqrt(5.0) + np.sqrt(13.0) + np.sqrt(68.0)) / 3
    assert delta.norm(one) == pytest.approx(10 * mean_norm, rel=1e-5)
    assert not np.allclose(one["w"], other["w"])


def test_a_little_by_hand(turn: Turn) -> None:
    spread = np.sqrt(np.array([2.0 / 3.0, 8.0]))
    assert np.allclose(scenes.a_little(turn)[0]["w"], np.array([2.0, 4.0]) - 1.5 * spread, rtol=1e-5)


def test_dealt_images_are_all_there_once() -> None:
    whole = Site(torch.arange(200.0).reshape(200, 1, 1, 1), torch.arange(200) % 4)
    sites = scenes.dealt(whole, 4, np.random.default_rng(0), poisoning.BOXES)
    assert len(sites) == poisoning.BOXES
    dealt_N = torch.cat([site.images_N1HW.flatten() for site in sites]).long()
    assert sorted(dealt_N.tolist()) == list(range(200))
    assert all((site.label_N == site.images_N1HW.flatten().long() % 4).all() for site in sites)


@pytest.mark.slow
def test_loud_sign_flip_breaks_the_mean_and_not_the_median(scene: Scene) -> None:
    loud = next(name for name, attack in scenes.ATTACKS.items() if attack is scenes.sign_flip)
    assert poisoning._attacked(scene, "none", "fedavg", 2) > 0.9
    assert poisoning._attacked(scene, loud, "fedavg", 2) < 0.6
    assert poisoning._attacked(scene, loud, "median", 2) > 0.9


@pytest.fixture(scope="module")
def larger(scene: Scene) -> Scene:
    """As many boxes as a masked round of the bench has."""
    sites = [halves(32, seed) for seed in range(poisoned_sums.BOXES)]
    return Scene(sites, scene.validation, scene.labels, scene.network, scene.base)


@pytest.mark.slow
def test_words_at_the_bound_turn_the_one_sum_and_not_the_median_of_groups(larger: Scene) -> None:
    attack = next(name for name, made in poisoned_sums.ATTACKS.items() if made is poisoned_sums._words_at_the_bound)
    assert poisoned_sums._attacked_masked(larger, "none", "one sum", 3)[0] > 0.9
    assert poisoned_sums._attacked_masked(larger, "none", "median", 3)[0] > 0.9
    one_sum, lost = poisoned_sums._attacked_masked(larger, attack, "one sum", 3)
    assert one_sum < 0.6
    assert lost == 0
    assert poisoned_sums._attacked_masked(larger, attack, "median", 3)[0] > 0.9


@pytest.mark.slow
def test_any_words_cost_the_one_sum_its_round_and_the_groups_nothing(larger: Scene) -> None:
    assert poisoned_sums._attacked_masked(larger, "any words", "one sum", 2)[1] == 2
    accuracy, lost = poisoned_sums._attacked_masked(larger, "any words", "median", 3)
    assert lost == 0
    assert accuracy > 0.9
