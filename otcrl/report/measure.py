"""What the trajectories of a run say together: calls against the fewest that suffice, offloading, tools.

Pure functions of attempts, whose results are plain values for the page. Void trajectories count only for tools.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from otcrl.report.attempts import Attempt
from otcrl.types import Outcome

EXCESS = ("fewer", "n", "n+1", "n+2", "n+3 or more", "no right answer known")  # calls against n
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
BINS_PER_DECADE = 4  # of the histogram of latencies
MOST_ERRORS = 20  # different messages that are listed
MESSAGE = 300  # characters of each

By = dict[int, list[Attempt]]  # step -> attempts


def by_step(attempts: Iterable[Attempt]) -> By:
    found: By = defaultdict(list)
    for a in attempts:
        found[a.step].append(a)
    return {step: found[step] for step in sorted(found)}


# -- calls against n -------------------------------------------------------------------------------


def excess(attempt: Attempt, n: Mapping[str, int]) -> int:
    """Its class: an index of EXCESS."""
    least = n.get(attempt.id)
    return len(EXCESS) - 1 if least is None else min(max(attempt.count - least, -1), 3) + 1


def calls(attempts: Sequence[Attempt], n: Mapping[str, int]) -> dict[str, Any]:
    """By step: shares of the classes of EXCESS, and how many attempts at questions of each n made m calls."""
    steps = by_step(a for a in attempts if not a.is_void)
    shares, tables = [], []
    for own in steps.values():
        classes = Counter(excess(a, n) for a in own)
        shares.append([classes[k] / len(own) for k in range(len(EXCESS))])
        pairs = Counter((n[a.id], a.count) for a in own if a.id in n)
        tables.append([[least, m, count] for (least, m), count in sorted(pairs.items())])
    return {"steps": [*steps], "classes": [*EXCESS], "shares": shares, "tables": tables}


def questions(attempts: Sequence[Attempt], n: Mapping[str, int]) -> list[list[Any]]:
    """[id, source, n, attempts, share right, calls on average: in all steps, in its first, in its last] of each."""
    found: dict[str, list[Attempt]] = defaultdict(list)
    for a in attempts:
        if not a.is_void:
            found[a.id].append(a)
    rows = []
    for name, own in found.items():
        steps = [*by_step(own).values()]
        means = [fmean(a.count for a in each) for each in (own, steps[0], steps[-1])]
        rows.append([name, own[0].source, n.get(name), len(own), fmean(a.right for a in own), *means])
    return rows


# -- offloading ------------------------------------------------------------------------------------


def offloading(attempts: Sequence[Attempt], n: Mapping[str, int]) -> dict[str, Any]:
    """Over training, what `evaluate.offloading` measures with passes of its own, from siblings instead.

    known        a right answer without a call has been seen, of all
    over_call    called all the same, of those
    wrong_without_call  wrong, and no call made, of all
    under_call   a sibling that called was right, of those
    """
    names = ("known", "over_call", "wrong_without_call", "under_call")
    series: dict[str, list[float | None]] = {name: [] for name in names}
    steps = by_step(a for a in attempts if not a.is_void)
    for own in steps.values():
        helped = {a.siblings for a in own if a.right and a.count}
        known = [a for a in own if n.get(a.id) == 0]
        guessed = [a for a in own if not a.right and not a.count]
        series["known"].append(share(own, lambda a: n.get(a.id) == 0))
        series["over_call"].append(share(known, lambda a: a.count > 0))
        series["wrong_without_call"].append(share(own, lambda a: not a.right and not a.count))
        series["under_call"].append(share(guessed, lambda a, helped=helped: a.siblings in helped))
    return {"steps": [*steps], **series}


def share(attempts: Sequence[Attempt], holds: Callable[[Attempt], bool]) -> float | None:
    """Of the attempts; None when there are none."""
    return fmean(holds(a) for a in attempts) if attempts else None


# -- tools -----------------------------------------------------------------------------------------


def tools(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Each tool's calls by outcome and latency, over all steps and by step; and what went wrong most often.

    A call that was answered from the cache, or that never ran, has no latency.
    """
    made = [call for a in attempts for call in a.calls]
    steps = by_step(attempts)
    calls_S = [[call for a in own for call in a.calls] for own in steps.values()]
    return {
        "outcomes": [outcome.value for outcome in Outcome],
        "tools": {name: tool(own) for name, own in grouped(made).items()},
        "steps": [*steps],
        "shares": [[share_of(own, outcome) for outcome in Outcome] for own in calls_S],
        "latency": {label: [quantile(latencies(own), q) for own in calls_S] for label, q in QUANTILES.items()},
        "seconds": [fmean(sum(call["seconds"] for call in a.calls) for a in own) for own in steps.values()],
        "errors": errors(made),
    }


def grouped(made: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for call in made:
        found[call["tool"]].append(call)
    return found


def tool(made: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = latencies(made)
    return {
        "calls": len(made),
        "outcomes": [sum(call["outcome"] == outcome for call in made) for outcome in Outcome],
        "cached": sum(call["cached"] for call in made),
        "latency": {label: quantile(seconds, q) for label, q in QUANTILES.items()}
        | {"max": max(seconds, default=None)},
        "histogram": histogram(seconds),
    }


def share_of(made: Sequence[Mapping[str, Any]], outcome: Outcome) -> float | None:
    return fmean(call["outcome"] == outcome for call in made) if made else None


def latencies(made: Iterable[Mapping[str, Any]]) -> list[float]:
    ran = (Outcome.OK, Outcome.MODEL_ERROR, Outcome.INFRA_ERROR)
    return [call["seconds"] for call in made if call["outcome"] in ran and not call["cached"]]


def quantile(values: Sequence[float], q: float) -> float | None:
    return float(np.quantile(values, q)) if values else None


def histogram(seconds: Sequence[float]) -> list[list[float]]:
    """[from, to, count] of logarithmic bins, seconds; those between the first and the last that are not empty."""
    if not seconds:
        return []
    places = Counter(np.floor(np.log10(np.maximum(seconds, 1e-6)) * BINS_PER_DECADE).astype(int).tolist())
    edge = lambda place: 10 ** (place / BINS_PER_DECADE)  # noqa: E731
    return [[edge(k), edge(k + 1), places[k]] for k in range(min(places), max(places) + 1)]


def errors(made: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """[tool, outcome, message, times] of the messages that came most often."""
    fine = (Outcome.OK, Outcome.OVER_BUDGET)
    said = Counter(
        (call["tool"], call["outcome"], call["result"][:MESSAGE]) for call in made if call["outcome"] not in fine
    )
    return [[*what, times] for what, times in said.most_common(MOST_ERRORS)]
