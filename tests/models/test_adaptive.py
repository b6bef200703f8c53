"""Adaptive calibration: coverage comes back after the images shift, and few or odd cases do no harm."""

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from models import adaptive, calibration
from models.bundle import Bundle
from models.calibration import softmax
from models.errors import CaseError
from models.spec import Code, Label, TaskSpec
from tests.models.conftest import SessionRun
from tests.models.look_support import Readings, readings

pytestmark = pytest.mark.slow

CODE = Code("1", "99TEST", "test")
LABELS = tuple(Label(name, CODE, name != "a") for name in "abc")
TASK = TaskSpec("task", "XR", 0, LABELS, temperature=0.8, conformal_threshold=0.4)
SEEDS = range(12)


def learned(task: TaskSpec, logits_NK: NDArray[np.floating], truth_N: NDArray[np.integer]) -> adaptive.SiteState:
    state = adaptive.start(task)
    for logits_K, truth in zip(logits_NK, truth_N, strict=True):
        state = adaptive.learn(state, logits_K, int(truth))
    return state


def drawn(seed: int, cases: int, signal: float, scale: float = 3.0) -> Readings:
    """Logits that point at the truth by `signal`, in noise of 1, all times `scale`: overconfident where that is large."""
    generator = np.random.default_rng(seed)
    truth_N = generator.integers(0, 3, cases)
    logits_NK = generator.normal(0, 1, (cases, 3))
    logits_NK[np.arange(cases), truth_N] += signal
    return Readings(logits_NK * scale, truth_N, np.zeros(cases))


def calibrated(task: TaskSpec, seen: Readings) -> TaskSpec:
    temperature = calibration.fit_temperature(seen.logits_NK, seen.truth_N)
    threshold = calibration.conformal_threshold(softmax(seen.logits_NK, temperature), seen.truth_N)
    return msgspec.structs.replace(task, temperature=temperature, conformal_threshold=threshold)


def mean_coverage(streams: list[Readings], task: TaskSpec, cases: slice) -> NDArray[np.float64]:
    """Before and after adaptation."""
    held = [adaptive.coverage_over_time(stream.logits_NK, stream.truth_N, task)[cases] for stream in streams]
    return np.asarray(np.concatenate(held).mean(0))


def set_sizes(stream: Readings, task: TaskSpec) -> NDArray[np.int64]:
    """Of the bundle and of the site, as each case came."""
    state, sizes = adaptive.start(task), []
    for logits_K, truth in zip(stream.logits_NK, stream.truth_N, strict=True):
        both = (adaptive.bundled(task), state.calibration)
        sizes.append([int((softmax(logits_K, by.temperature) >= by.threshold).sum()) for by in both])
        state = adaptive.learn(state, logits_K, int(truth))
    return np.array(sizes)


# --- one case at a time, by hand


def test_without_cases_it_judges_as_the_bundle() -> None:
    state = adaptive.start(TASK)
    assert state.calibration == adaptive.Calibration(0.8, 0.4, 0) == adaptive.bundled(TASK)
    assert adaptive.coverage_over_time(np.zeros((0, 3)), np.zeros(0, int), TASK).shape == (0, 2)


def test_the_first_easy_case_changes_no_threshold() -> None:
    """Of 10 scores at level 0.105, the lowest is left out: the one that stands for the bundle's threshold."""
    state = adaptive.learn(adaptive.start(TASK), np.array([5.0, 0.0, 0.0]), 0)
    assert state.level == pytest.approx(0.105)
    assert state.calibration.threshold == 0.4
    assert state.calibration.cases == 1


def test_a_miss_lowers_the_level_and_the_threshold() -> None:
    """floor(11 · 0.055) = 0 of 10 may be left out: the threshold is the lowest score seen, not below it."""
    state = adaptive.learn(adaptive.start(TASK), np.array([5.0, 0.0, 0.0]), 1)
    assert state.level == pytest.approx(0.055)
    assert state.calibration.temperature > 0.8
    assert state.calibration.threshold == softmax(np.array([5.0, 0.0, 0.0]), state.calibration.temperature)[1] > 0.0


def test_level_and_temperature_stay_within_bounds() -> None:
    sure_NK = np.tile([30.0, 0.0, 0.0], (80, 1))
    right, wrong = learned(TASK, sure_NK, np.zeros(80, int)), learned(TASK, sure_NK, np.ones(80, int))
    assert right.level == adaptive.HIGHEST_LEVEL
    assert right.calibration.threshold <= calibration.MAX_THRESHOLD
    assert wrong.calibration.temperature == pytest.approx(0.8 * 8)
    assert len(wrong.truth_N) == adaptive.WINDOW
    assert wrong.calibration.cases == 80
    falling = np.stack([np.arange(80.0), np.zeros(80), np.zeros(80)], 1)  # each case worse than all before it
    assert learned(TASK, falling, np.ones(80, int)).level == adaptive.LOWEST_LEVEL


def test_a_confident_label_is_never_outside_of_its_set() -> None:
    sure = learned(TASK, np.tile([9.0, 0.0, 0.0], (200, 1)), np.zeros(200, int))
    assert 0.0 < sure.calibration.threshold <= calibration.MAX_THRESHOLD


def test_equal_scores_are_no_trouble() -> None:
    even = learned(TASK, np.zeros((60, 3)), np.arange(60) % 3)
    assert even.calibration.threshold == pytest.approx(1 / 3)
    assert adaptive.holds(even.calibration, np.zeros(3), 2)


def test_a_number_added_to_all_logits_changes_nothing() -> None:
    seen = drawn(0, 30, 2.0)
    moved = learned(TASK, seen.logits_NK + 7.0, seen.truth_N).calibration
    own = learned(TASK, seen.logits_NK, seen.truth_N).calibration
    assert (moved.temperature, moved.threshold) == pytest.approx((own.temperature, own.threshold))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_raw_logits_undo_the_temperature(temperature: float) -> None:
    logits_K = np.array([4.0, -1.0, 0.5])
    back_K = adaptive.raw_logits(softmax(logits_K, temperature), temperature)
    np.testing.assert_allclose(back_K - back_K.max(), logits_K - logits_K.max(), atol=1e-9)
    assert np.isfinite(adaptive.raw_logits(np.array([1.0, 0.0, 0.0]), temperature)).all()


@pytest.mark.parametrize(
    ("logits", "truth", "reason"),
    [
        ([1.0, 0.0, 0.0], 3, "has no label 3"),
        ([1.0, 0.0, 0.0], -1, "has no label -1"),
        ([np.nan, 0.0, 0.0], 0, "not one finite logit"),
        ([np.inf, 0.0, 0.0], 0, "not one finite logit"),
        ([1.0, 0.0], 0, "not one finite logit"),
    ],
)
def test_an_odd_case_is_refused(logits: list[float], truth: int, reason: str) -> None:
    with pytest.raises(CaseError, match=reason) as refused:
        adaptive.learn(adaptive.start(TASK), np.array(logits), truth)
    assert refused.value.advice


# --- what it promises


@pytest.mark.parametrize("signal", [0.5, 1.0, 1.5])
def test_coverage_comes_back_when_the_scores_shift(signal: float) -> None:
    task = calibrated(TASK, drawn(99, 2000, 3.0))
    before, after = mean_coverage([drawn(seed, 100, signal) for seed in SEEDS], task, slice(50, 100))
    assert before < 0.8
    assert after >= 0.87


def test_coverage_comes_back_when_the_scores_shift_after_a_long_quiet_time() -> None:
    task = calibrated(TASK, drawn(99, 2000, 3.0))
    streams = [joined(drawn(seed, 150, 3.0), drawn(1000 + seed, 100, 1.0)) for seed in SEEDS]
    quiet = mean_coverage(streams, task, slice(100, 150))
    before, after = mean_coverage(streams, task, slice(200, 250))
    assert quiet.min() >= 0.87
    assert before < 0.8
    assert after >= 0.87


def test_without_a_shift_it_keeps_coverage_and_set_size() -> None:
    task = calibrated(TASK, drawn(99, 2000, 2.0))
    streams = [drawn(seed, 200, 2.0) for seed in SEEDS]
    before, after = mean_coverage(streams, task, slice(50, 200))
    assert after == pytest.approx(0.9, abs=0.03)
    assert after == pytest.approx(before, abs=0.03)
    sizes_N2 = np.concatenate([set_sizes(stream, task)[50:] for stream in streams])
    assert sizes_N2[:, 1].mean() <= sizes_N2[:, 0].mean() + 0.1


def test_the_temperature_follows_many_cases_and_hardly_a_few() -> None:
    task = calibrated(TASK, drawn(99, 2000, 2.0))
    louder = drawn(1, 50, 2.0, scale=9.0)  # three times as sure, no more right
    many = learned(task, louder.logits_NK, louder.truth_N).calibration.temperature
    few = learned(task, louder.logits_NK[:2], louder.truth_N[:2]).calibration.temperature
    assert many / task.temperature == pytest.approx(3.0, rel=0.4)
    assert 0.7 <= few / task.temperature <= 1.5


def test_the_calibration_error_falls_on_a_site_that_is_surer_than_right() -> None:
    task = calibrated(TASK, drawn(99, 2000, 3.0))
    seen, unseen = drawn(1, 50, 1.0), drawn(2, 2000, 1.0)
    site = learned(task, seen.logits_NK, seen.truth_N).calibration
    before, after = (
        calibration.expected_calibration_error(softmax(unseen.logits_NK, temperature), unseen.truth_N)
        for temperature in (task.temperature, site.temperature)
    )
    assert after < before / 2


@pytest.mark.parametrize("look", ["north", "south"])
def test_coverage_comes_back_at_other_hospitals(shipped: Bundle, run_shipped: SessionRun, look: str) -> None:
    """The shipped bundle on phantoms of scanners that it never saw: within three points of 0.9 after 50 reviewed cases."""
    task = chest_ct(shipped)
    seen = readings(shipped, run_shipped, task, look)
    before, after = mean_coverage([shuffled(seen, seed, 100) for seed in SEEDS], task, slice(50, 100))
    assert before < 0.8
    assert after >= 0.87


def test_coverage_comes_back_when_the_scanner_is_changed(shipped: Bundle, run_shipped: SessionRun) -> None:
    task = chest_ct(shipped)
    own, north = (readings(shipped, run_shipped, task, look) for look in ("base", "north"))
    streams = [joined(shuffled(own, seed, 100), shuffled(north, seed, 100)) for seed in SEEDS]
    before, after = mean_coverage(streams, task, slice(150, 200))
    assert before < 0.8
    assert after >= 0.87


def test_at_home_it_changes_nothing_to_speak_of(shipped: Bundle, run_shipped: SessionRun) -> None:
    task = shipped.manifest.tasks[0]
    own = readings(shipped, run_shipped, task, "base")
    before, after = mean_coverage([shuffled(own, seed, 100) for seed in SEEDS], task, slice(0, 100))
    assert before >= 0.97
    assert after >= before - 0.02


def chest_ct(bundle: Bundle) -> TaskSpec:
    """The task that other hospitals' scanners disturb most, by the bundle's card."""
    return next(task for task in bundle.manifest.tasks if task.name == "chest-ct")


def shuffled(seen: Readings, seed: int, cases: int) -> Readings:
    return seen.take(np.random.default_rng(seed).permutation(len(seen.truth_N))[:cases])


def joined(first: Readings, then: Readings) -> Readings:
    return Readings(
        np.concatenate([first.logits_NK, then.logits_NK]),
        np.concatenate([first.truth_N, then.truth_N]),
        np.concatenate([first.ood_N, then.ood_N]),
    )
