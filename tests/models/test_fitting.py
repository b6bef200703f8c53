"""The training loop: repeats, resumes after any epoch to the same bits, ends in time, keeps the best."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from msgspec import structs

from models.delta import FIXED_PREFIX, trainable_names
from models.drawn import Drawn
from models.errors import ModelError
from models.examples import Example, batches, class_weights
from tests.models.learning import cases, fresh, quiet, same

if TYPE_CHECKING:
    from models.fitting import Fitted, Progress, TrainingPlan
    from models.network import Hybrid

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


class Stopped(Exception):  # noqa: N818  # as kill -9 would
    pass


def plan(**more: Any) -> "TrainingPlan":
    from models.augment import RADIOGRAPH
    from models.fitting import TrainingPlan

    return replace(TrainingPlan(3, 1e-3, 4, 7, augmentation=RADIOGRAPH, most_slices=2), **more)


def trained(
    of: "TrainingPlan",
    checkpoint: Path | None = None,
    progress: "Progress" = quiet,
    examples: Sequence[Example] | None = None,
) -> tuple[dict[str, np.ndarray], "Fitted"]:
    from models.fitting import train
    from models.restore import weights_of

    network = fresh()
    torch.manual_seed(np.random.default_rng().integers(1 << 30))  # nothing may depend on the global generator
    examples = cases("XR", 2) + cases("MR", 1) if examples is None else examples
    fitted = train(network, examples, of, progress, heldout=cases("XR", 1, 81_000_000), checkpoint=checkpoint)
    return weights_of(network), fitted


@pytest.mark.parametrize(
    "more",
    [
        {"trainable": "adapters", "averaging": 0.9, "patience": 2},
        {"proximal": 0.5},
        {"averaging": 0.9, "trainable": "norms"},
        {"share": 0.05, "share_seed": b"round seed", "averaging": 0.9},
    ],
)
def test_resumed_after_any_epoch_it_ends_with_the_same_bits(tmp_path: Path, more: dict[str, Any]) -> None:
    whole, fitted = trained(plan(**more))
    for last in (1, 2):
        checkpoint = tmp_path / f"after-{last}"

        def stop(epoch: int, loss: float | None, last: int = last) -> None:
            if epoch > last:
                raise Stopped

        with pytest.raises(Stopped):
            trained(plan(**more), checkpoint, stop)
        told: list[int] = []
        resumed, fitted_again = trained(plan(**more), checkpoint, lambda epoch, loss: told.append(epoch))  # noqa: B023
        assert told == list(range(last + 1, 4))
        assert same(resumed, whole)
        assert fitted_again == fitted
    again, _ = trained(plan(**more), checkpoint)
    assert same(again, whole)


def drawn() -> Drawn:
    shapes = {name: tuple(value.shape) for name, value in fresh().state_dict().items()}
    return Drawn({name: shapes[name] for name in trainable_names(shapes, "all")}, b"round seed", 0.05)


@pytest.mark.parametrize(
    "more",
    [
        {"weight_decay": 0.5},
        {"averaging": 0.9, "patience": 3},
        {"proximal": 0.5},
        {"private": True, "learning_rate": 1e-2},
    ],
)
def test_what_the_round_does_not_draw_keeps_its_bits(more: dict[str, Any]) -> None:
    more = dict(more)
    if more.pop("private", False):
        pytest.importorskip("opacus", reason="needs the extra `privacy`")
        from models.privacy import Privacy

        more["privacy"] = Privacy(8.0, 1e-2, test_seed=1)
    weights, _ = trained(plan(epochs=2, share=0.05, share_seed=b"round seed", **more))
    start = {name: value.numpy() for name, value in fresh().state_dict().items()}
    moved = 0
    for name, is_chosen in drawn().masks().items():
        has_moved = weights[name].view(np.uint32) != start[name].view(np.uint32)
        assert not (has_moved & ~is_chosen).any(), name
        moved += int(has_moved.sum())
    assert moved > 0.5 * drawn().chosen
    assert all(np.array_equal(weights[name], start[name]) for name in start if name.startswith(FIXED_PREFIX))


def test_what_is_not_drawn_counts_in_no_clipping_of_the_gradient() -> None:
    from models.restricted import Others

    network = fresh()
    others = Others(network, "all", 0.05, b"round seed")

    def gradients() -> dict[str, np.ndarray]:
        network.zero_grad()
        sum(parameter.sum() for parameter in network.parameters()).backward()
        return {name: network.get_parameter(name).grad.numpy() for name in drawn().names}

    restricted, masks = gradients(), drawn().masks()
    assert all(np.array_equal(restricted[name], masks[name].astype(np.float32)) for name in masks)
    others.let_go()
    assert all(gradient.all() for gradient in gradients().values())


def test_after_a_share_all_of_the_network_learns_again() -> None:
    from models.fitting import train

    network, examples = fresh(), cases("XR", 1)
    train(network, examples, plan(epochs=1, share=0.05, share_seed=b"round seed"), quiet)
    between = {name: value.numpy().copy() for name, value in network.state_dict().items()}
    train(network, examples, plan(epochs=1), quiet)
    for name, is_chosen in drawn().masks().items():
        if name.endswith("conv.weight"):
            assert (network.state_dict()[name].numpy() != between[name])[~is_chosen].any(), name


def test_no_share_of_adapters() -> None:
    with pytest.raises(ModelError, match=r"a share of 0\.5 of them cannot be drawn"):
        trained(plan(trainable="adapters", share=0.5, share_seed=b"round seed"))


def test_a_share_without_a_seed_is_refused() -> None:
    with pytest.raises(ModelError, match="a seed of 0 bytes"):
        trained(plan(share=0.5))


def test_another_seed_gives_other_weights() -> None:
    assert not same(trained(plan(epochs=1))[0], trained(plan(epochs=1, seed=8))[0])


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    trained(plan(epochs=1), checkpoint)
    for other, examples in ((plan(epochs=1, seed=8), None), (plan(epochs=1), cases("XR", 1))):
        with pytest.raises(ModelError, match="another plan, other examples or other weights"):
            trained(other, checkpoint, examples=examples)


@pytest.mark.parametrize(
    "harm", [lambda c: c[:-100], lambda c: b"PK\3\4", lambda c: b"no checkpoint at all", lambda c: b"\x80\x02}."]
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, harm: Callable[[bytes], bytes]) -> None:
    checkpoint = tmp_path / "checkpoint"
    trained(plan(epochs=1), checkpoint)
    checkpoint.write_bytes(harm(checkpoint.read_bytes()))
    with pytest.raises(ModelError, match="no checkpoint"):
        trained(plan(epochs=1), checkpoint)


def test_early_stopping_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    from models import fitting

    losses, seen = iter([3.0, float("inf"), 2.0, 2.5, 2.0, 1.0]), []

    def heldout_loss(network: "Hybrid", heldout: Sequence[Example]) -> float:
        seen.append({name: value.numpy().copy() for name, value in network.state_dict().items()})
        return next(losses)

    monkeypatch.setattr(fitting, "heldout_loss", heldout_loss)
    weights, fitted = trained(plan(epochs=9, patience=2))
    assert fitted.heldout_loss_by_epoch == [3.0, float("inf"), 2.0, 2.5, 2.0]
    assert (fitted.ended_early, fitted.epochs) == (True, 5)
    assert same(weights, seen[2])


def test_a_network_that_gives_nan_is_the_worst() -> None:
    from models.objective import heldout_loss

    network = fresh()
    with torch.no_grad():
        network.head.bias[:] = float("nan")
    assert heldout_loss(network, cases("XR", 1)) == float("inf")


def test_a_budget_of_time_ends_it_with_the_rate_at_nought() -> None:
    import time

    started = time.process_time()
    _, fitted = trained(plan(epochs=100_000, budget_s=1.0))
    assert 1 <= fitted.steps < 100_000
    assert fitted.epochs < 100_000
    assert time.process_time() - started >= 1.0


def test_the_running_mean_lies_between_the_weights_it_is_of() -> None:
    (last, _), (mean, _) = trained(plan()), trained(plan(averaging=0.9))
    start = {name: value.numpy() for name, value in fresh().state_dict().items()}
    moved = np.linalg.norm(last["head.weight"] - start["head.weight"])
    assert 0 < np.linalg.norm(mean["head.weight"] - start["head.weight"]) < moved


def test_the_proximal_term_pulls_to_the_start() -> None:
    start = {name: value.numpy() for name, value in fresh().state_dict().items()}

    def moved(proximal: float) -> float:
        weights, _ = trained(plan(proximal=proximal))
        return float(np.sqrt(sum(np.square(weights[name] - start[name]).sum() for name in start)))

    assert moved(100.0) < 0.7 * moved(0.0)


def test_class_weights_by_hand() -> None:
    normal, nodule, _ = cases("XR", 1)
    (weight_K,) = class_weights([normal] * 3 + [nodule]).values()
    np.testing.assert_allclose(weight_K, np.array([1.0, 3.0, 3.0]) / 1.5)
    (weight_K,) = class_weights([normal] * 99 + [nodule]).values()
    assert weight_K[1] == pytest.approx(4 * weight_K[0])


def test_a_rare_label_counts_more_in_the_loss() -> None:
    from models.objective import Objective

    network, (normal, nodule, _) = fresh(), cases("XR", 1)
    (rare,) = batches([nodule], 1)
    plain = Objective(network, {})(rare, rare).item()
    assert plain > 0
    weighted = Objective(network, class_weights([normal] * 3 + [nodule]))(rare, rare)
    assert weighted.item() == pytest.approx(2 * plain, rel=1e-5)


def test_norms_alone_are_trained_and_nothing_else() -> None:
    """In the memory format of the other ways to train, torch 2.13 dies of it at this size."""

    from models.delta import trainable_names
    from models.fitting import train
    from models.network import NANO, Hybrid, config_of
    from models.spec import InputSpec

    torch.manual_seed(0)
    own = structs.replace(cases("XR", 1)[0].task, offset=0)
    network = Hybrid(config_of(NANO, [own], [InputSpec("XR", size=64, max_slices=1, normalisation="percentile")]))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    example = cases("XR", 1)[0]
    small = replace(example, slices_SHW=example.slices_SHW[:1, :64, :64], task=own)
    train(network, [small], plan(trainable="norms"), quiet)
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert any("norm" in name for name in moved)
    assert moved <= set(trainable_names(before, "norms"))
