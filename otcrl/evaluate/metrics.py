"""What an evaluation measures, each figure with its bootstrap interval.

    EM  accuracy: mean of `correct`             TC  tool calls per question
    TP  tool productivity: total correct / total calls (arXiv:2504.14870, section 4.1)

Every figure is a ratio of two sums over questions, so one resampling of questions serves them all, and
TP is resampled as the ratio it is. A ratio over nothing (TP when no call was made) is None, never 0.
The average over data sets (macro) gives each of them the same weight, the overall figure each question.
Void trajectories are counted and left out. Several attempts at one question count as one question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from otcrl.errors import ConfigError, nearest
from otcrl.evaluate.attempts import Attempt, Correct, attempt
from otcrl.types import COUNTERS, Trajectory

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 2000
_CHUNK = 4_000_000  # resampled questions held in memory at once


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % percentile bootstrap interval over questions."""

    value: float | None  # None: undefined, a ratio over nothing
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of one data set, or of all of them. Means are per attempt."""

    questions: int  # with at least one attempt that is not void
    attempts: int  # that are not void
    void: int  # attempts that infrastructure spoilt
    em: Estimate
    f1: Estimate  # of words, best over the gold answers
    tc: Estimate  # calls of the configured kind
    tp: Estimate  # None: no call was made
    emitted: Estimate  # calls, as all below: see types.COUNTERS
    executed: Estimate
    failed: Estimate
    invalid: Estimate
    sampled_tokens: Estimate
    total_tokens: Estimate
    optimum: Estimate  # TC of the best policy; None unless every question's optimum is known
    over_call: Estimate  # share of attempts with more calls than the optimum, where it is known
    under_call: Estimate  # share with fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """The figures of several data sets, as if each of them had the same number of questions."""

    sets: int
    em: Estimate
    f1: Estimate
    tc: Estimate
    tp: Estimate  # mean EM / mean TC; None: no call was made


RATIOS = {  # figure -> (summed column, column it is divided by)
    "em": ("correct", "attempts"),
    "f1": ("f1", "attempts"),
    "tc": ("calls", "attempts"),
    "tp": ("correct", "calls"),
    "emitted": ("emitted", "attempts"),
    "executed": ("executed", "attempts"),
    "failed": ("failed", "attempts"),
    "invalid": ("invalid", "attempts"),
    "sampled_tokens": ("sampled_tokens", "attempts"),
    "total_tokens": ("total_tokens", "attempts"),
    "optimum": ("optimal_calls", "with_optimum"),
    "over_call": ("over", "with_optimum"),
    "under_call": ("under", "with_optimum"),
}


def summarize(trajectories: Sequence[Trajectory], correct: Correct, counter: str, seed: int = 0) -> Summary:
    """The figures of the trajectories together; `counter` (a key of COUNTERS) says which calls TC and TP count."""
    return figures([attempt(t, correct) for t in trajectories], counter, seed)


def figures(attempts: Sequence[Attempt], counter: str, seed: int = 0) -> Summary:
    """The figures of the attempts together."""
    check_counter(counter)
    scored = [a for a in attempts if not a.is_void]
    columns = question_sums(scored, counter)
    estimates = ratios({name: (columns[top], columns[bottom]) for name, (top, bottom) in RATIOS.items()}, seed)
    if any(a.optimal_calls is None for a in scored):
        estimates["optimum"] = Estimate(None)
    return Summary(
        questions=len(columns["attempts"]),
        attempts=len(scored),
        void=len(attempts) - len(scored),
        **estimates,
    )


def average(sets: Sequence[Sequence[Attempt]], counter: str, seed: int = 0) -> Average:
    """EM, F1 and TC of each data set averaged over the data sets, and TP as their ratio.

    Each set is resampled by itself. A mean of the sets' own TPs would be that of the set with the fewest calls.
    """
    check_counter(counter)
    means, draws = [], []
    for number, attempts in enumerate(sets):
        columns = question_sums([a for a in attempts if not a.is_void], counter)
        top_QK = np.stack([columns["correct"], columns["f1"], columns["calls"]], axis=1)
        bottom_QK = np.stack([columns["attempts"]] * 3, axis=1)
        means.append(divide(top_QK.sum(0), bottom_QK.sum(0)))
        draws.append(resampled(top_QK, bottom_QK, [seed, number], RESAMPLES))
    value_K, drawn_RK = np.mean(means, axis=0), np.mean(draws, axis=0)
    value_K = np.append(value_K, divide(value_K[:1], value_K[2:]))
    drawn_RK = np.hstack([drawn_RK, divide(drawn_RK[:, :1], drawn_RK[:, 2:])])
    return Average(sets=len(sets), **_estimates(["em", "f1", "tc", "tp"], value_K, drawn_RK))


def check_counter(counter: str) -> None:
    if counter not in COUNTERS:
        raise ConfigError(f"the counter of TC and TP is {counter!r}.{nearest(counter, COUNTERS)}")


def by_source(trajectories: Sequence[Trajectory]) -> dict[str, list[Trajectory]]:
    """The trajectories of each data set, data sets in order of appearance."""
    found: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        found.setdefault(trajectory.problem.source, []).append(trajectory)
    return found


def _columns(a: Attempt, counter: str) -> dict[str, float]:
    calls, optimum = a.calls(counter), a.optimal_calls
    known = optimum is not None
    return {
        "attempts": 1.0,
        "correct": a.correct,
        "f1": a.f1,
        "calls": calls,
        **{kind: a.calls(kind) for kind in ("emitted", "executed", "failed", "invalid")},
        "sampled_tokens": a.sampled_tokens,
        "total_tokens": a.total_tokens,
        "with_optimum": float(known),
        "optimal_calls": optimum if known else 0.0,
        "over": float(known and calls > optimum),
        "under": float(known and calls < optimum),
    }


def question_sums(attempts: Sequence[Attempt], counter: str) -> dict[str, Floats]:
    """Each column summed over the attempts at one question: name -> [questions]."""
    rows = [_columns(a, counter) for a in attempts]
    place = {question: i for i, question in enumerate(dict.fromkeys(a.id for a in attempts))}
    index = np.array([place[a.id] for a in attempts], dtype=np.int64)
    names = {name for ratio in RATIOS.values() for name in ratio}
    return {
        name: np.bincount(index, weights=np.array([row[name] for row in rows]), minlength=len(place)).astype(float)
        for name in names
    }


def ratios(sums: Mapping[str, tuple[Floats, Floats]], seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Estimate]:
    """For each (numerator_Q, denominator_Q): sum / sum over all questions Q, and its interval.

    Questions are drawn with replacement, the same draws for every ratio. Draws in which a denominator is 0
    say nothing about its ratio and are left out of its interval.
    """
    top_QK = np.stack([top for top, _ in sums.values()], axis=1)
    bottom_QK = np.stack([bottom for _, bottom in sums.values()], axis=1)
    value_K = divide(top_QK.sum(0), bottom_QK.sum(0))
    return _estimates(list(sums), value_K, resampled(top_QK, bottom_QK, seed, resamples))


def _estimates(names: Sequence[str], value_K: Floats, drawn_RK: Floats) -> dict[str, Estimate]:
    """Values with the percentiles of what was drawn; a draw that is nan says nothing."""
    estimates = {}
    for name, value, drawn_R in zip(names, value_K, drawn_RK.T, strict=True):
        defined = drawn_R[~np.isnan(drawn_R)]
        if np.isnan(value) or len(defined) == 0:
            estimates[name] = Estimate(None)
        else:
            low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
            estimates[name] = Estimate(float(value), float(low), float(high))
    return estimates


def resampled(top_QK: Floats, bottom_QK: Floats, seed: int | Sequence[int], resamples: int) -> Floats:
    """The ratios of `resamples` draws of questions with replacement: [R, K], nan where undefined."""
    generator, num_questions = np.random.default_rng(seed), len(top_QK)
    if num_questions == 0:
        return np.full((resamples, top_QK.shape[1]), np.nan)
    even = np.full(num_questions, 1 / num_questions)
    size = max(1, _CHUNK // num_questions)
    parts = []
    for start in range(0, resamples, size):
        times_drawn_RQ = generator.multinomial(num_questions, even, min(size, resamples - start)).astype(float)
        parts.append(divide(times_drawn_RQ @ top_QK, times_drawn_RQ @ bottom_QK))
    return np.concatenate(parts)


def divide(top: Floats, bottom: Floats) -> Floats:
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom != 0)
