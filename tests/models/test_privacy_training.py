"""Differential privacy: one series moves the noiseless mean by no more than clip / batch, and the noise is what was asked."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from models.bundle import Bundle
from models.errors import ModelError
from models.examples import Example, batches
from tests.models.learning import cases, fresh, quiet, same, write_fresh_bundle
from tests.models.test_training import write_examples

if TYPE_CHECKING:
    from models.fitting import Fitted, Progress, TrainingPlan
    from models.network import Hybrid
    from models.privacy import Privacy, PrivateSteps

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
pytest.importorskip("opacus", reason="differential privacy needs the extra `privacy`")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CLIP, SERIES, EXPECTED = 0.5, 8, 4.0


def private_steps(network: "Hybrid", noise: float, seed: int = 0) -> "PrivateSteps":
    from models.privacy import Privacy, PrivateSteps, secret_generator

    privacy = Privacy(epsilon=1.0, clip_norm=CLIP, test_seed=seed)
    optimizer = torch.optim.AdamW([p for name, p in network.named_parameters() if not name.startswith("ood_")])
    return PrivateSteps(
        optimizer,
        privacy,
        series=SERIES,
        sample_rate=EXPECTED / SERIES,
        noise=noise,
        generator=secret_generator(privacy),
    )


def gradient(steps: "PrivateSteps", network: "Hybrid", examples: Sequence[Example], scale: float = 1.0) -> Any:
    from models.objective import Objective

    objective = Objective(network, {})
    series = [next(batches([example], 1)) for example in examples]
    losses = [(scale if n == len(series) - 1 else 1.0) * objective(one, one) for n, one in enumerate(series)]
    steps.differentiate(losses)
    trained = (p for name, p in network.named_parameters() if not name.startswith("ood_"))
    return torch.cat([parameter.grad.flatten() for parameter in trained]).numpy().copy()


@pytest.mark.parametrize("scale", [1.0, 1e6, float("inf"), float("nan")])
def test_one_series_moves_the_mean_by_no_more_than_clip_over_batch(scale: float) -> None:
    network = fresh()
    steps = private_steps(network, noise=0.0)
    examples = cases("MR", 2)
    without, with_outlier = (gradient(steps, network, some, scale) for some in (examples[:-1], examples))
    moved = np.linalg.norm(with_outlier - without)
    assert moved <= CLIP / EXPECTED * 1.0001
    assert np.linalg.norm(without) > 0.0
    if scale == 1e6:
        assert moved == pytest.approx(CLIP / EXPECTED, rel=1e-3)


def test_the_unit_is_a_series_not_its_slices() -> None:
    network = fresh()
    (example, *_) = cases("MR", 1)
    assert len(example.slices_SHW) > 1
    assert np.linalg.norm(gradient(private_steps(network, 0.0), network, [example], 1e6)) == pytest.approx(
        CLIP / EXPECTED, rel=1e-3
    )


def test_without_a_series_drawn_there_is_noise_of_the_size_asked() -> None:
    network = fresh()
    noise = gradient(private_steps(network, noise=3.0), network, [])
    assert noise.std() == pytest.approx(3.0 * CLIP / EXPECTED, rel=0.01)
    assert abs(noise.mean()) < 5 * noise.std() / len(noise) ** 0.5


def test_the_noise_is_new_in_each_step_and_repeats_with_a_test_seed_only() -> None:
    network = fresh()
    steps = private_steps(network, 1.0, seed=1)
    first, second = gradient(steps, network, []), gradient(steps, network, [])
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(gradient(private_steps(network, 1.0, seed=1), network, []), first)
    assert not np.array_equal(gradient(private_steps(network, 1.0, seed=2), network, []), first)


def test_each_series_is_drawn_with_its_chance_and_on_its_own() -> None:
    steps = private_steps(fresh(), 1.0)
    generator = np.random.default_rng(0)
    drawn = [steps.draw(generator) for _ in range(4000)]
    sizes = np.array([len(indices) for indices in drawn])
    assert sizes.mean() == pytest.approx(EXPECTED, rel=0.05)
    assert sizes.var() == pytest.approx(SERIES * 0.5 * 0.5, rel=0.1)  # binomial
    assert 0 in sizes


def test_more_than_a_seed_of_32_bits_decides_the_noise() -> None:
    from models.privacy import torch_generator

    def bits(generator: Any) -> Any:
        return torch.empty(2000, dtype=torch.int64).random_(0, 1 << 16, generator=generator).tolist()

    words_W = np.random.default_rng(1 << 90).integers(0, 1 << 32, 624, dtype=np.uint64)
    reference = np.random.MT19937()
    reference.state = {"bit_generator": "MT19937", "state": {"key": words_W.astype(np.uint32), "pos": 624}}
    assert bits(torch_generator(np.random.default_rng(1 << 90))) == (reference.random_raw(2000) % (1 << 16)).tolist()


def budget() -> "Privacy":
    from models.privacy import Privacy

    return Privacy(4.0, 1e-3, CLIP, test_seed=5)


def plan(epochs: int = 2, **more: Any) -> "TrainingPlan":
    from models.fitting import TrainingPlan

    return replace(TrainingPlan(epochs, 1e-3, 3, 0, privacy=budget(), most_slices=2), **more)


def trained(
    of: "TrainingPlan", checkpoint: Path | None = None, progress: "Progress" = quiet
) -> tuple[dict[str, np.ndarray], "Fitted"]:
    from models.fitting import train
    from models.restore import weights_of

    network = fresh()
    fitted = train(network, cases("XR", 3) + cases("MR", 1), of, progress, checkpoint=checkpoint)
    return weights_of(network), fitted


def test_what_is_spent_is_within_the_budget_and_grows_with_the_epochs() -> None:
    from models.privacy import noise_multiplier

    _, fitted = trained(plan())
    spent = fitted.spent
    assert spent is not None
    assert 0.97 * 4.0 < spent.epsilon <= 4.0
    assert (spent.delta, spent.clip_norm, spent.sample_rate, spent.steps) == (1e-3, CLIP, 3 / 12, 8)
    assert spent.noise_multiplier == noise_multiplier(budget(), 3 / 12, 8, 12)
    assert (fitted.loss_by_epoch, fitted.epochs) == ([], 2)
    steps = private_steps(fresh(), noise=1.0)
    assert 0 == steps.spent(0).epsilon < steps.spent(4).epsilon < steps.spent(8).epsilon
    assert noise_multiplier(budget(), 3 / 12, 80, 12) > spent.noise_multiplier


def test_a_test_seed_repeats_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    from models.augment import SITE

    of = plan(augmentation=SITE, trainable="adapters", proximal=0.1, averaging=0.9)
    whole, _ = trained(of)

    def stop(epoch: int, loss: float | None) -> None:
        if epoch == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        trained(of, tmp_path / "checkpoint", stop)
    resumed, fitted = trained(of, tmp_path / "checkpoint")
    assert same(resumed, whole)
    assert fitted.spent is not None
    assert fitted.spent.steps == 8


def test_without_a_test_seed_no_two_runs_are_equal() -> None:
    from models.privacy import Privacy

    of = plan(1, trainable="heads", privacy=Privacy(4.0, 1e-3, CLIP))
    (one, _), (other, _) = trained(of), trained(of)
    assert not same(one, other)


def test_the_plans_public_seed_decides_nothing() -> None:
    from models.augment import SITE

    (one, _), (other, _) = (trained(plan(1, augmentation=SITE, seed=seed)) for seed in (1, 2))
    assert same(one, other)


def test_the_labels_of_others_do_not_weigh_a_series_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from models import fitting

    monkeypatch.setattr(fitting, "class_weights", lambda examples: pytest.fail("a count of labels left the budget"))
    trained(plan(1, trainable="heads"))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"patience": 1}, "held-out series would choose"),
        ({"budget_s": 1.0}, "how long a step takes"),
        ({"bfloat16": True}, "bfloat16"),
    ],
)
def test_what_a_budget_cannot_answer_for_is_refused(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        trained(plan(**more))


def test_several_processes_and_gpus_are_refused() -> None:
    from models.fitting import train
    from models.parallel import Parallel

    for parallel, reason in (
        (Parallel(0, 2, torch.device("cpu")), "several processes"),
        (Parallel(0, 1, torch.device("cuda")), "GPU"),
    ):
        with pytest.raises(ModelError, match=reason):
            train(fresh(), cases("XR", 1), plan(), quiet, parallel=parallel)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"delta": 0.1}, "publish one of 12 series"),
        ({"delta": 0.0}, "publish"),
        ({"epsilon": 0.0}, "above 0"),
        ({"clip_norm": 0.0}, "above 0"),
        ({"epsilon": 1e-9}, "no noise keeps"),
    ],
)
def test_a_budget_that_is_none_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as refused:
        trained(plan(privacy=replace(budget(), **change)))
    assert refused.value.advice


def test_without_opacus_the_option_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants.utils", None)
    with pytest.raises(ModelError, match="opacus") as refused:
        trained(plan())
    assert "wardround[privacy]" in refused.value.advice


def test_with_a_generous_budget_it_learns_another_hospitals_images(shipped: Bundle) -> None:
    from models.fitting import TrainingPlan, train
    from models.predicting import correct
    from models.privacy import Privacy
    from models.restore import network_of

    network, examples, unseen = network_of(shipped), cases("CT", 12), cases("CT", 12, 83_000_000)
    before = correct(network, unseen)
    generous = Privacy(epsilon=50.0, delta=1e-3, test_seed=0)
    fitted = train(network, examples, TrainingPlan(6, 5e-4, 8, 0, most_slices=3, privacy=generous), quiet)
    after = correct(network, unseen)
    print(f"{before} -> {after} of {len(unseen)}")
    assert after > before
    assert fitted.spent is not None
    assert fitted.spent.epsilon <= 50.0


def test_the_program_reports_what_was_spent_and_no_loss(tmp_path: Path) -> None:
    bundle, examples = write_fresh_bundle(tmp_path / "fresh.bundle"), write_examples(tmp_path / "examples", per_label=2)
    command = [sys.executable, "-m", "models.training", "finetune", "--bundle", str(bundle), "--examples"]
    command += [str(examples), "--out", str(tmp_path / "out"), "--epochs", "2", "--trainable", "heads"]
    refused = subprocess.run([*command, "--dp-clip", "1"], capture_output=True, text=True, timeout=240)
    assert refused.returncode == 1
    assert "--dp-epsilon" in json.loads(refused.stderr)["advice"]
    done = subprocess.run(
        [*command, "--dp-epsilon", "8", "--dp-delta", "1e-3", "--dp-clip", "0.7"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"epoch": 1}, {"epoch": 2}]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["loss_by_epoch"] == []
    assert set(report["privacy"]) == {
        *("epsilon", "delta", "noise_multiplier", "clip_norm"),
        *("sample_rate", "steps", "accountant", "unit"),
    }
    assert 0 < report["privacy"]["epsilon"] <= 8
    assert (report["privacy"]["accountant"], report["privacy"]["unit"]) == ("rdp", "series")
