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

Where a run has several attempts at a question, their mean is the question's figure, and its behaviour that of all pairs
of an attempt of each run. A question is for the side that has more of those pairs: the tests count questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest

import numpy as np
from numpy.typing import NDArray

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

Bools, Ints = NDArray[np.bool_], NDArray[np.int_]

COMPARED = ("em", "f1", "tc", "tp", "sampled_tokens")  # keys of RATIOS
SHARES = ("more_efficient", "less_efficient", "more_accurate", "less_accurate", "accurate_fewer", "unchanged")


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
    attempts: int  # at them, of both runs
    void: int  # questions left out, since infrastructure spoilt every attempt of a run
    figures: dict[str, Difference]  # keys: COMPARED
    behaviour: Behaviour


Pair = tuple[list[Attempt], list[Attempt]]  # at one question: the baseline's and the run's


def pairs(baseline: Sequence[Attempt], run: Sequence[Attempt], common: bool = False) -> list[Pair]:
    """The attempts at the same questions, in the baseline's order.

    Raises DataError, saying what differs, when the runs did not answer the same questions; with `common`, only
    when they share none, or when one id stands for two questions.
    """
    first, second = _by_id(baseline), _by_id(run)
    only = {"the baseline": first.keys() - second.keys(), "the run": second.keys() - first.keys()}
    shared = [id for id in first if id in second]
    if not shared or (any(only.values()) and not common):
        differing = [f"{len(ids)} only in {who} ({min(ids)!r})" for who, ids in only.items() if ids]
        remedy = f": add common=true to compare on the {len(shared)} that both have" if shared else ""
        raise DataError(f"the runs answered different questions, {' and '.join(differing) or 'none at all'}{remedy}")
    for id in shared:
        one, *others = first[id] + second[id]
        for other, name in product(others, ("question", "answers", "source")):
            a, b = getattr(one, name), getattr(other, name)
            if a != b:
                raise DataError(f"{id!r} is not the same question everywhere: its {name}: {a!r} and {b!r}")
    return [(first[id], second[id]) for id in shared]


def _by_id(attempts: Sequence[Attempt]) -> dict[str, list[Attempt]]:
    found: dict[str, list[Attempt]] = {}
    for a in attempts:
        found.setdefault(a.id, []).append(a)
    return found


def compare(chosen: Sequence[Pair], counter: str, seed: int = 0) -> Comparison:
    """What the run does otherwise than the baseline. A question with only void attempts is left out, and counted."""
    check_counter(counter)
    valid = [([a for a in first if not a.is_void], [b for b in second if not b.is_void]) for first, second in chosen]
    scored = [pair for pair in valid if all(pair)]
    return Comparison(
        questions=len(scored),
        attempts=sum(len(first) + len(second) for first, second in scored),
        void=len(chosen) - len(scored),
        figures=differences(scored, counter, seed),
        behaviour=behaviour(scored, counter, seed),
    )


def differences(chosen: Sequence[Pair], counter: str, seed: int = 0) -> dict[str, Difference]:
    """Each of COMPARED."""
    sums = [question_sums([a for pair in chosen for a in pair[side]], counter) for side in (0, 1)]
    top_QK, bottom_QK = (
        np.stack([own[RATIOS[name][part]] / own["attempts"] for own in sums for name in COMPARED], axis=1)
        for part in (0, 1)
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


def behaviour(chosen: Sequence[Pair], counter: str, seed: int = 0) -> Behaviour:
    """An answer that is right in part is not right."""
    count = {name: np.zeros(len(chosen), dtype=int) for name in SHARES}  # of each question's pairs of attempts
    own = (list(_attempts([pair[side] for pair in chosen], counter)) for side in (0, 1))
    for (is_a, right_a, calls_a), (is_b, right_b, calls_b) in product(*own):
        same = right_a == right_b
        shown = {
            "more_efficient": same & (calls_b < calls_a),
            "less_efficient": same & (calls_b > calls_a),
            "more_accurate": right_b & ~right_a,
            "less_accurate": right_a & ~right_b,
            "accurate_fewer": right_b & ~right_a & (calls_b < calls_a),
            "unchanged": same & (calls_b == calls_a),
        }
        for name, where in shown.items():
            count[name] += where & is_a & is_b
    num_pairs = np.array([len(first) * len(second) for first, second in chosen])
    everything = np.ones(len(chosen))
    return Behaviour(
        **ratios({name: (pairs / num_pairs, everything) for name, pairs in count.items()}, seed),
        p_efficient=_sign_test(count["more_efficient"], count["less_efficient"]),
        p_accurate=_sign_test(count["more_accurate"], count["less_accurate"]),
    )


def _attempts(attempts_Q: Sequence[list[Attempt]], counter: str) -> Iterator[tuple[Bools, Bools, Ints]]:
    """Of the first attempt at each question, then of the second, ...: [Q] is there one, is it right, its calls."""
    for row in zip_longest(*attempts_Q):
        yield (
            np.array([a is not None for a in row], dtype=bool),
            np.array([a is not None and a.correct >= 1.0 for a in row], dtype=bool),
            np.array([0 if a is None else a.calls(counter) for a in row], dtype=int),
        )


def _sign_test(for_Q: Ints, against_Q: Ints) -> float:
    return exact_sign_test(int(np.sum(for_Q > against_Q)), int(np.sum(for_Q < against_Q)))


def exact_sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of `wins` against `losses` when each is as likely; of discordant pairs it is McNemar's.

    P = min(1, 2 * sum_{i <= min} C(n, i) / 2^n), in whole numbers.
    """
    count, tail, term = wins + losses, 0, 1
    for i in range(min(wins, losses) + 1):
        tail += term
        term = term * (count - i) // (i + 1)
    return min(1.0, 2 * tail / 2**count)
