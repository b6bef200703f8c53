"""Adaptive calibration: a site's reviewed cases move the temperature and the conformal threshold of a task.

Reads and writes a frozen state in memory: one case in, one state out; the newest WINDOW cases count.
Never changes weights; never learns from a case before it was judged by what was known until then.
Source: adaptive conformal inference (Gibbs & Candès 2021), temperature scaling (Guo 2017). Axes: N cases, K labels, G grid.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from models import calibration
from models.calibration import ALPHA, F64, softmax
from models.errors import CaseError
from models.spec import TaskSpec

# Measured on phantoms of the north and south looks and on an abrupt change to north after 100 cases (48 streams each),
# against split conformal over the last 200 cases, tracking of the quantile alone, and this rule over 100 and 200: this one
# was back first with sets as small. Over cases 51 to 100 coverage went from 0.75, 0.73, 0.72 to 0.91, 0.92, 0.91.
WINDOW = 50
STEP = 0.05  # gamma in the paper: how much one miss lowers the level
LOWEST_LEVEL, HIGHEST_LEVEL = 0.02, 0.15  # a long run of easy cases must not spend what a change of images will need
PRIOR_CASES = 9  # the bundle's threshold counts as this many cases: without any other it is the threshold
PRIOR_TEMPERATURE = 5.0  # the bundle's temperature counts as this many cases
_FACTORS = np.exp(np.linspace(-np.log(8.0), np.log(8.0), 121))  # times the bundle's temperature
_PRIOR_LOSS_G = PRIOR_TEMPERATURE * np.log(_FACTORS) ** 2 / 2


@dataclass(frozen=True)
class Calibration:
    """By what one series is judged."""

    temperature: float
    threshold: float  # label k is in the set where p_k >= this
    cases: int = 0  # reviewed cases of this site that it follows; 0 is the bundle's own


@dataclass(frozen=True)
class SiteState:
    """What is known of one task at one site, under one bundle. A new bundle starts anew: its logits mean something else."""

    task: TaskSpec
    calibration: Calibration
    level: float  # share of cases that the next threshold may leave out: alpha_t in the paper
    logits_NK: F64
    truth_N: NDArray[np.int64]
    losses_NG: F64  # of each case under each temperature


def bundled(task: TaskSpec) -> Calibration:
    return Calibration(task.temperature, task.conformal_threshold)


def start(task: TaskSpec) -> SiteState:
    """Judges exactly as the bundle does."""
    return SiteState(
        task=task,
        calibration=bundled(task),
        level=ALPHA,
        logits_NK=np.zeros((0, len(task.labels))),
        truth_N=np.zeros(0, np.int64),
        losses_NG=np.zeros((0, len(_FACTORS))),
    )


def learn(state: SiteState, logits_K: NDArray[np.floating], truth: int) -> SiteState:
    """One more reviewed case. A number added to all of its logits changes nothing.

    Raises CaseError for logits that are not finite or not the task's, and for a label that the task does not know.
    """
    _check(state.task, logits_K, truth)
    missed = not holds(state.calibration, logits_K, truth)
    level = float(np.clip(state.level + STEP * (ALPHA - missed), LOWEST_LEVEL, HIGHEST_LEVEL))
    logits_NK = np.concatenate([state.logits_NK, np.asarray(logits_K, np.float64)[None]])[-WINDOW:]
    truth_N = np.append(state.truth_N, truth)[-WINDOW:]
    losses_NG = np.concatenate([state.losses_NG, _losses(state.task, logits_K, truth)[None]])[-WINDOW:]
    temperature = state.task.temperature * float(_FACTORS[np.argmin(losses_NG.sum(0) + _PRIOR_LOSS_G)])
    scores_N = calibration.of_truth(softmax(logits_NK, temperature), truth_N)
    threshold = _threshold(np.concatenate([_prior_scores(state.task), scores_N]), level)
    return replace(
        state,
        calibration=Calibration(temperature, threshold, state.calibration.cases + 1),
        level=level,
        logits_NK=logits_NK,
        truth_N=truth_N,
        losses_NG=losses_NG,
    )


def holds(by: Calibration, logits_K: NDArray[np.floating], truth: int) -> bool:
    """The true label is in the set."""
    return bool(softmax(logits_K, by.temperature)[truth] >= by.threshold)


def raw_logits(probabilities_K: NDArray[np.floating], temperature: float) -> F64:
    """The logits behind probabilities, but for a number added to all of them."""
    return np.asarray(temperature * np.log(np.clip(np.asarray(probabilities_K, np.float64), 1e-300, 1.0)))


def coverage_over_time(
    logits_NK: NDArray[np.floating], truth_N: NDArray[np.integer], task: TaskSpec
) -> NDArray[np.bool_]:
    """held_N2: was case n's true label in the set of the bundle [:, 0], and of what cases 0..n-1 had taught [:, 1]?"""
    state, own = start(task), bundled(task)
    held_N2 = np.zeros((len(truth_N), 2), np.bool_)
    for n, (logits_K, truth) in enumerate(zip(logits_NK, truth_N, strict=True)):
        after = learn(state, logits_K, int(truth))
        held_N2[n] = holds(own, logits_K, int(truth)), holds(state.calibration, logits_K, int(truth))
        state = after
    return held_N2


def _threshold(scores_N: F64, level: float) -> float:
    """Not below the lowest score seen: one early miss must not put every label into every set."""
    lowest = min(float(scores_N.min()), calibration.MAX_THRESHOLD)
    return max(calibration.threshold_of(scores_N, level), lowest)


def _prior_scores(task: TaskSpec) -> F64:
    """What the bundle's threshold stands for: the rule at level ALPHA gives it back."""
    left_out = round((PRIOR_CASES + 1) * ALPHA)
    return np.repeat([task.conformal_threshold, 1.0], [left_out, PRIOR_CASES - left_out])


def _losses(task: TaskSpec, logits_K: NDArray[np.floating], truth: int) -> F64:
    """Negative log-likelihood under each temperature of the grid."""
    scaled_GK = np.asarray(logits_K, np.float64)[None] / (task.temperature * _FACTORS[:, None])
    scaled_GK = scaled_GK - scaled_GK.max(1, keepdims=True)
    return np.asarray(np.log(np.exp(scaled_GK).sum(1)) - scaled_GK[:, truth])


def _check(task: TaskSpec, logits_K: NDArray[np.floating], truth: int) -> None:
    if not 0 <= truth < len(task.labels):
        raise CaseError(f"the task {task.name} has no label {truth}", advice="the case is left out")
    if np.shape(logits_K) != (len(task.labels),) or not np.isfinite(logits_K).all():
        raise CaseError(f"not one finite logit for each label of {task.name}", advice="the case is left out")
