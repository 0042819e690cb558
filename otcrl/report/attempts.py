"""A line of a transcript as the report sees it: what an earlier otcrl did not write is inferred, or is None."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from otcrl.rewards.matching import exact_match
from otcrl.types import COUNTERS, Stop

TRAIN = "training"  # the split that is no evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One trajectory. `tokens` is what docs/report.md says of it; an earlier otcrl wrote two counts alone."""

    split: str  # TRAIN, or the name of an evaluation
    step: int
    group: int | None  # of the problem in the run's stream; None: not known
    id: str
    source: str
    question: str
    answers: Sequence[str]
    optimum: int | None  # calls that suffice, where that is known
    response: str
    answer: str | None
    right: bool
    stop: str
    violations: Sequence[str]
    reward: float | None
    parts: Mapping[str, float]
    calls: Sequence[Mapping[str, Any]]
    count: int  # of the calls that count
    tokens: Mapping[str, Any]
    timings: Mapping[str, float]

    @property
    def is_void(self) -> bool:
        return self.stop == Stop.VOID

    @property
    def siblings(self) -> tuple[str, int, int | str]:
        """What the trajectories of its group have in common."""
        return self.split, self.step, self.id if self.group is None else self.group


def read_attempt(row: Mapping[str, Any], split: str, counter: str) -> Attempt:
    parts, answer = row.get("parts") or {}, row.get("answer")
    right = row.get("correct", parts.get("correct"))
    if right is None:  # an evaluation of an earlier otcrl: right as most data sets mean it
        right = 0.0 if answer is None else exact_match(answer, row["answers"])
    calls = row.get("calls") or []
    return Attempt(
        split=split,
        step=row["step"],
        group=row.get("group"),
        id=row["id"],
        source=row.get("source") or row["id"].partition("/")[0],
        question=row["question"],
        answers=row["answers"],
        optimum=row.get("optimal_calls"),
        response=row["response"],
        answer=answer,
        right=right >= 1,
        stop=row["stop"],
        violations=row.get("violations") or [],
        reward=row.get("reward"),
        parts=parts,
        calls=calls,
        count=sum(call["outcome"] in COUNTERS[counter] for call in calls),
        tokens=row.get("tokens") or {},
        timings=row.get("timings") or {},
    )


def fewest_calls(attempts: Iterable[Attempt], table: Mapping[str, int]) -> dict[str, int]:
    """Problem -> n: the optimum where it is known, else the least calls of a right answer, seen here or in `table`."""
    n = dict(table)
    optima: dict[str, int] = {}
    for a in attempts:
        if a.optimum is not None:
            optima[a.id] = a.optimum
        if a.right and not a.is_void:
            n[a.id] = min(a.count, n.get(a.id, a.count))
    return n | optima
