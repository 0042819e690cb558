"""What training cost, from metrics.jsonl: calls, tokens, tool seconds and wall clock per step, and time to an EM.

EM in training is the share of right answers among the sampled trajectories of a step, averaged over the last
`window` steps: one step asks too few questions. Wall clock is the sum of the steps' seconds: cold start and
evaluations are not in it. Times of two runs compare where both had the same machine to themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from otcrl.errors import DataError
from otcrl.types import Metrics

WINDOW = 10  # steps
EM = "reward/correct"
FIGURES = {  # metric, averaged over steps -> what it is
    "time/rollout_s": "rollout seconds per step",
    "time/step_s": "seconds per step",
    "calls/well_formed": "calls per trajectory",
    "rollout/sampled_tokens": "response tokens per trajectory",
    "perf/tool_s": "tool seconds per trajectory",
}
PER_STEP = {  # means over a step's trajectories, of all of them together
    "calls/well_formed": "calls per step",
    "rollout/sampled_tokens": "response tokens per step",
    "perf/tool_s": "tool seconds per step",  # of calls that overlap: not time on the clock
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    steps: int
    seconds: float  # of all steps
    means: dict[str, float | None]  # keys: FIGURES; None: not logged
    last: dict[str, float | None]  # the same, of the last `window` steps
    per_step: dict[str, float | None]  # keys: PER_STEP, over all steps
    em: float | None  # of the last `window` steps


@dataclass(frozen=True, slots=True)
class Reached:
    """When the EM of training first was a given one."""

    step: int  # steps that were needed
    seconds: float
    at_most: bool  # the first window had it, so fewer steps may have been enough


def training(rows: Sequence[Metrics], window: int = WINDOW) -> Training:
    """The figures of a run's steps. Raises DataError when there are none."""
    if not rows:
        raise DataError("there are no steps of training to speak of")
    curve = em_curve(rows, window)
    return Training(
        steps=len(rows),
        seconds=sum(row["time/step_s"] for row in rows),
        means={name: _mean(rows, name) for name in FIGURES},
        last={name: _mean(rows[-window:], name) for name in FIGURES},
        per_step={name: _mean([_summed(row, name) for row in rows], name) for name in PER_STEP},
        em=curve[-1] if curve else None,
    )


def time_to(rows: Sequence[Metrics], em: float, window: int = WINDOW) -> Reached | None:
    """The first step after which the EM of the last `window` steps is at least `em`; None: it never was."""
    first = min(window, len(rows))
    for step, reached in enumerate(em_curve(rows, window), start=first):
        if reached >= em:
            return Reached(step, sum(row["time/step_s"] for row in rows[:step]), at_most=step == first)
    return None


def em_curve(rows: Sequence[Metrics], window: int = WINDOW) -> list[float]:
    """EM over each stretch of `window` steps, of all steps where there are fewer; [] where it was not logged."""
    values = [row[EM] for row in rows if EM in row]
    if not rows or len(values) < len(rows):
        return []
    window = min(window, len(rows))
    return [fmean(values[end - window : end]) for end in range(window, len(rows) + 1)]


def _summed(row: Metrics, name: str) -> Metrics:
    """A mean over a step's trajectories times their number, which follows from their tokens: no metric has it."""
    if name not in row or "perf/tokens_per_s" not in row:
        return {}
    trajectories = round(row["perf/tokens_per_s"] * row["time/step_s"] / row["rollout/tokens"])
    return {name: row[name] * trajectories}


def _mean(rows: Sequence[Metrics], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return fmean(values) if values else None
