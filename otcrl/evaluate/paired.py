"""Two runs at the same questions: what changed, and whether chance alone could have changed it as much.

The shares of behaviour are those of arXiv:2504.14870 (v2, Table 3), of a run against a baseline run:

    more efficient    the same result (both right, or both wrong) with fewer calls
    less efficient    the same result with more calls
    more accurate     right where the baseline is wrong
    less accurate     wrong where the baseline is right
    accurate, fewer   right with fewer calls where the baseline is wrong: a part of `more accurate`
    unchanged         the same result with the same calls; it makes the first four add up to 1, as the paper's do:
                      3B OTC-GRPO on HotpotQA, 35.54 + 5.96 + 11.89 + 4.07, and 42.54 % that its text tells of

Tests are two-sided, and of pairs. Right against wrong: McNemar's exact test. Fewer calls against more, at the same
result: the exact sign test. EM, TC, TP and tokens: the bootstrap over questions, both runs drawn alike. None of them
is corrected for how many are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from otcrl.errors import DataError
from otcrl.evaluate.attempts import Attempt
from otcrl.evaluate.metrics import (
    CONFIDENCE,
    RATIOS,
    RESAMPLES,
    Estimate,
    Floats,
    check_counter,
    divide,
    question_sums,
    ratios,
    resampled,
)

COMPARED = ("em", "f1", "tc", "tp", "sampled_tokens")  # keys of RATIOS


@dataclass(frozen=True, slots=True)
class Difference:
    """A figure of both runs, the run's less the baseline's with its 95 % interval, and a p-value.

    None: undefined, as TP is where no call was made.
    """

    baseline: float | None
    run: float | None
    change: Estimate
    p: float | None  # of the bootstrap: at least 2 / (RESAMPLES + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """Shares of the questions: see above. The p-values ask whether a share could as well be its opposite."""

    more_efficient: Estimate
    less_efficient: Estimate
    more_accurate: Estimate
    less_accurate: Estimate
    accurate_fewer: Estimate
    unchanged: Estimate
    p_efficient: float  # more against less efficient, sign test
    p_accurate: float  # more against less accurate, McNemar


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A run against a baseline run, on one data set or on all of them."""

    questions: int
    void: int  # questions left out, since infrastructure spoilt an attempt of either run
    figures: dict[str, Difference]  # keys: COMPARED
    behaviour: Behaviour


Pair = tuple[Attempt, Attempt]  # at one question: the baseline's and the run's


def pairs(baseline: Sequence[Attempt], run: Sequence[Attempt], common: bool = False) -> list[Pair]:
    """The attempts at the same questions, in the baseline's order.

    Raises DataError, saying what differs, when the runs did not answer the same questions; with `common`, only
    when they share none, or when one id stands for two questions.
    """
    first, second = _by_id(baseline, "the baseline"), _by_id(run, "the run")
    only = {"the baseline": first.keys() - second.keys(), "the run": second.keys() - first.keys()}
    shared = [id for id in first if id in second]
    if not shared or (any(only.values()) and not common):
        differing = [f"{len(ids)} only in {who} ({min(ids)!r})" for who, ids in only.items() if ids]
        remedy = f": add common=true to compare on the {len(shared)} that both have" if shared else ""
        raise DataError(f"the runs answered different questions, {' and '.join(differing) or 'none at all'}{remedy}")
    for id in shared:
        for name in ("question", "answers", "source"):
            a, b = getattr(first[id], name), getattr(second[id], name)
            if a != b:
                raise DataError(f"{id!r} is not the same question in both runs: its {name}: {a!r} and {b!r}")
    return [(first[id], second[id]) for id in shared]


def _by_id(attempts: Sequence[Attempt], who: str) -> dict[str, Attempt]:
    id, times = Counter(a.id for a in attempts).most_common(1)[0] if attempts else ("", 0)
    if times > 1:
        raise DataError(f"{who} has {times} attempts at {id!r}, and pairs are made of one attempt each")
    return {a.id: a for a in attempts}


def compare(chosen: Sequence[Pair], counter: str, seed: int = 0) -> Comparison:
    """What the run does otherwise than the baseline. A pair with a void attempt is left out, and counted."""
    check_counter(counter)
    scored = [pair for pair in chosen if not any(attempt.is_void for attempt in pair)]
    baseline, run = [a for a, _ in scored], [b for _, b in scored]
    return Comparison(
        questions=len(scored),
        void=len(chosen) - len(scored),
        figures=differences(baseline, run, counter, seed),
        behaviour=behaviour(baseline, run, counter, seed),
    )


def differences(
    baseline: Sequence[Attempt], run: Sequence[Attempt], counter: str, seed: int = 0
) -> dict[str, Difference]:
    """Each of COMPARED, for attempts in one order: the k-th of both are at the same question."""
    sums = [question_sums(attempts, counter) for attempts in (baseline, run)]
    top_QK, bottom_QK = (
        np.stack([columns[RATIOS[name][part]] for columns in sums for name in COMPARED], axis=1) for part in (0, 1)
    )
    value_2F = divide(top_QK.sum(0), bottom_QK.sum(0)).reshape(2, -1)
    drawn_R2F = resampled(top_QK, bottom_QK, seed, RESAMPLES).reshape(RESAMPLES, 2, -1)
    return {
        name: _difference(value_2F[:, f], drawn_R2F[:, 1, f] - drawn_R2F[:, 0, f]) for f, name in enumerate(COMPARED)
    }


def _difference(value_2: Floats, change_R: Floats) -> Difference:
    baseline, run = (None if np.isnan(value) else float(value) for value in value_2)
    defined = change_R[~np.isnan(change_R)]
    if baseline is None or run is None or len(defined) == 0:
        return Difference(baseline, run, Estimate(None), None)
    low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Difference(baseline, run, Estimate(run - baseline, float(low), float(high)), _p_of_zero(defined))


def _p_of_zero(change_R: Floats) -> float:
    """Two-sided: how seldom the draws reach 0 from the side that they are on. One more draw, which does, is assumed."""
    below, above = np.sum(change_R <= 0), np.sum(change_R >= 0)
    return min(1.0, 2.0 * (1 + min(below, above)) / (1 + len(change_R)))


def behaviour(baseline: Sequence[Attempt], run: Sequence[Attempt], counter: str, seed: int = 0) -> Behaviour:
    """For attempts in one order. An answer that is right in part is not right."""
    right_a, right_b = (np.array([x.correct >= 1.0 for x in attempts], dtype=bool) for attempts in (baseline, run))
    calls_a, calls_b = (np.array([x.calls(counter) for x in attempts], dtype=int) for attempts in (baseline, run))
    same = right_a == right_b
    shown = {
        "more_efficient": same & (calls_b < calls_a),
        "less_efficient": same & (calls_b > calls_a),
        "more_accurate": right_b & ~right_a,
        "less_accurate": right_a & ~right_b,
        "accurate_fewer": right_b & ~right_a & (calls_b < calls_a),
        "unchanged": same & (calls_b == calls_a),
    }
    everything = np.ones(len(same))
    count = {name: int(where.sum()) for name, where in shown.items()}
    return Behaviour(
        **ratios({name: (where.astype(float), everything) for name, where in shown.items()}, seed),
        p_efficient=exact_sign_test(count["more_efficient"], count["less_efficient"]),
        p_accurate=exact_sign_test(count["more_accurate"], count["less_accurate"]),
    )


def exact_sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of `wins` against `losses` when each is as likely; of discordant pairs it is McNemar's.

    P = min(1, 2 * sum_{i <= min} C(n, i) / 2^n), in whole numbers.
    """
    count, tail, term = wins + losses, 0, 1
    for i in range(min(wins, losses) + 1):
        tail += term
        term = term * (count - i) // (i + 1)
    return min(1.0, 2 * tail / 2**count)
