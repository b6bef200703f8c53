"""Drift: other scanners are seen within 50 readings, and readings like the reference raise no alarm."""

import msgspec
import numpy as np
import pytest

from models import drift
from models.bundle import Bundle
from models.errors import CaseError
from models.spec import Code, Label, Reference, TaskSpec
from tests.models.conftest import SessionRun
from tests.models.look_support import Readings, readings

pytestmark = pytest.mark.slow

CODE = Code("1", "99TEST", "test")
TASK = TaskSpec("task", "XR", 0, tuple(Label(name, CODE, name != "a") for name in "abc"), temperature=0.8)


def watched(task: TaskSpec, seen: Readings) -> TaskSpec:
    return msgspec.structs.replace(task, reference=drift.reference(seen.logits_NK, seen.ood_N, task.temperature))


def drawn(seed: int, cases: int, *, scale: float = 2.0, distance: float = 1.0) -> Readings:
    generator = np.random.default_rng(seed)
    return Readings(
        generator.normal(0, scale, (cases, 3)), np.zeros(cases, int), distance * generator.gamma(9.0, 1 / 9, cases)
    )


def judged(task: TaskSpec, seen: Readings) -> drift.Verdict:
    verdict = drift.judge(task, seen.logits_NK, seen.ood_N)
    assert verdict is not None
    return verdict


# --- by hand


def test_the_statistic_by_hand() -> None:
    assert drift.greatest_distance(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, 4.0])) == 0.0
    assert drift.greatest_distance(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 1.0
    assert drift.greatest_distance(np.array([1.0, 2.0, 3.0, 4.0]), np.array([3.0, 3.0])) == 0.5


def test_the_limit_falls_with_more_readings() -> None:
    assert drift.distance_limit(50, 300) == pytest.approx(0.388, abs=0.001)
    assert drift.distance_limit(30, 300) > drift.distance_limit(50, 300) > drift.distance_limit(50, 3000)


def test_the_reference_holds_quantiles() -> None:
    made = drift.reference(np.zeros((101, 3)), np.arange(101.0), 1.0)
    assert made.cases == 101
    assert made.ood_Q[:2] == (0.5, 1.5)
    assert set(made.confidence_Q) == {round(float(np.log(0.5)), 4)}  # one in three, as log odds
    assert msgspec.json.decode(msgspec.json.encode(made), type=Reference) == made


def test_confidence_is_that_of_the_bundles_temperature_whatever_is_added_to_the_logits() -> None:
    logits_NK = np.array([[2.0, 0.0, 0.0], [800.0, 0.0, 0.0]])
    np.testing.assert_allclose(drift.confidence(logits_NK, 2.0), [1.0 - np.log(2.0), 12.0])
    np.testing.assert_allclose(drift.confidence(logits_NK - 5.0, 2.0), drift.confidence(logits_NK, 2.0))


def test_no_verdict_without_reference_or_with_few_readings() -> None:
    few, enough = drawn(1, drift.ENOUGH - 1), drawn(1, drift.ENOUGH)
    task = watched(TASK, drawn(0, 300))
    assert drift.judge(TASK, enough.logits_NK, enough.ood_N) is None
    assert drift.judge(task, few.logits_NK, few.ood_N) is None
    assert drift.judge(task, np.zeros((0, 3)), np.zeros(0)) is None
    assert judged(task, enough).readings == drift.ENOUGH


def test_equal_readings_everywhere_are_no_trouble() -> None:
    same = Readings(np.zeros((60, 3)), np.zeros(60, int), np.ones(60))
    assert judged(watched(TASK, same), same).statistic == 0.0
    assert judged(watched(TASK, drawn(0, 300)), same).drifted


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    seen, task = drawn(1, 40), watched(TASK, drawn(0, 300))
    odd_ood_N, odd_NK = seen.ood_N.copy(), seen.logits_NK.copy()
    odd_ood_N[39], odd_NK[39, 0] = bad, np.nan
    for logits_NK, ood_N in ((seen.logits_NK, odd_ood_N), (odd_NK, seen.ood_N)):
        with pytest.raises(CaseError, match="not finite"):
            drift.judge(task, logits_NK, ood_N)
        with pytest.raises(CaseError, match="not finite"):
            drift.reference(logits_NK, ood_N, 1.0)


def test_a_reference_needs_cases() -> None:
    with pytest.raises(CaseError, match="29 cases are too few"):
        drift.reference(np.zeros((29, 3)), np.zeros(29), 1.0)


# --- what it promises


def test_over_500_readings_like_the_reference_at_most_one_box_in_a_hundred_hears_an_alarm() -> None:
    alarms = 0
    for seed in range(200):
        task = watched(TASK, drawn(10_000 + seed, 300))
        seen = drawn(seed, 500)
        alarms += any(
            judged(task, seen.take(np.arange(max(0, n - drift.WINDOW), n))).drifted for n in range(drift.ENOUGH, 501, 5)
        )
    assert alarms <= 2


@pytest.mark.parametrize(
    ("scale", "distance", "of"), [(0.6, 1.0, "confidence"), (2.0, 1.5, "out-of-distribution score")]
)
def test_each_kind_of_shift_is_seen_within_50_readings_and_named(scale: float, distance: float, of: str) -> None:
    task = watched(TASK, drawn(0, 300))
    verdicts = [judged(task, drawn(seed, drift.WINDOW, scale=scale, distance=distance)) for seed in range(1, 51)]
    assert np.mean([verdict.drifted for verdict in verdicts]) >= 0.95
    assert {verdict.of for verdict in verdicts if verdict.drifted} == {of}


def test_old_readings_do_not_hide_new_ones() -> None:
    task, before, after = watched(TASK, drawn(0, 300)), drawn(1, 2000), drawn(2, 50, distance=2.0)
    both = Readings(
        np.concatenate([before.logits_NK, after.logits_NK]),
        np.zeros(2050, int),
        np.concatenate([before.ood_N, after.ood_N]),
    )
    assert judged(task, both).drifted


@pytest.mark.parametrize("look", ["north", "south"])
def test_other_hospitals_scanners_are_seen_and_the_own_one_is_not(
    shipped: Bundle, run_shipped: SessionRun, look: str
) -> None:
    """The reference from one half of the phantoms of the own scanner, judged on the other half and on the others' phantoms."""
    task = shipped.manifest.tasks[0]
    own, other = readings(shipped, run_shipped, task, "base"), readings(shipped, run_shipped, task, look)
    drifted_at_home, drifted_away = [], []
    for seed in range(50):
        order_N = np.random.default_rng(seed).permutation(len(own.ood_N))
        task_N = watched(task, own.take(order_N[:150]))
        drifted_at_home.append(judged(task_N, own.take(order_N[150:200])).drifted)
        drifted_away.append(judged(task_N, other.take(order_N[:50])).drifted)
    assert sum(drifted_at_home) == 0
    assert sum(drifted_away) == 50
