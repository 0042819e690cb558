"""What one attempt at one question counts for: the row that every figure of an evaluation is a sum over.

An evaluation makes it from a trajectory; `otcrl compare` reads it from the transcripts that the evaluation left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from otcrl.errors import ConfigError, DataError, nearest
from otcrl.jsonlines import read_json_lines
from otcrl.rewards.matching import f1
from otcrl.types import COUNTERS, Outcome, Problem, Stop, Trajectory

Correct = Callable[[str, Problem], float]

TRANSCRIPTS = "transcripts.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    id: str  # Problem.id
    question: str
    answers: tuple[str, ...]  # any of them is right
    source: str  # data set
    optimal_calls: int | None  # least calls that suffice, where it is known
    is_void: bool  # infrastructure spoilt it
    correct: float  # 0.0 without an answer
    f1: float  # of words, best over the gold answers
    outcomes: Mapping[Outcome, int]  # of its calls
    sampled_tokens: int
    total_tokens: int

    def calls(self, counter: str) -> int:
        """Calls of one kind, a key of `types.COUNTERS`."""
        return sum(self.outcomes.get(outcome, 0) for outcome in COUNTERS[counter])


def is_right(trajectory: Trajectory, correct: Correct) -> float:
    """How right the answer is; 0.0 when there is none."""
    return 0.0 if trajectory.answer is None else correct(trajectory.answer, trajectory.problem)


def attempt(trajectory: Trajectory, correct: Correct) -> Attempt:
    problem, answer = trajectory.problem, trajectory.answer
    return Attempt(
        id=problem.id,
        question=problem.question,
        answers=problem.answers,
        source=problem.source,
        optimal_calls=problem.optimal_calls,
        is_void=trajectory.stop is Stop.VOID,
        correct=is_right(trajectory, correct),
        f1=0.0 if answer is None else f1(answer, problem.answers),
        outcomes=Counter(call.outcome for call in trajectory.tool_calls),
        sampled_tokens=sum(trajectory.action_mask),
        total_tokens=len(trajectory.token_ids),
    )


# -- how hard a question is ----------------------------------------------------------------------------


def difficulty(problem: Problem, column: str | None) -> str | None:
    """What `column` of its row says; without a column, its least number of calls. None: nothing says it."""
    if column is not None:
        value = problem.meta.get(column)
        return None if value is None else str(value)
    n = problem.optimal_calls
    return None if n is None else f"{n} call{'' if n == 1 else 's'}"


def check_column(problems: Sequence[Problem], column: str | None) -> None:
    """Raises ConfigError where no problem has the `column` that is to say how hard it is."""
    if column is not None and not any(column in problem.meta for problem in problems):
        columns = {name for problem in problems for name in problem.meta}
        hint = nearest(column, columns) or " Their rows have no columns beside question and answers."
        raise ConfigError(f"evaluate.difficulty: no evaluation problem has a column {column!r}.{hint}")


# -- from the files of an evaluation ---------------------------------------------------------------------


def read_attempts(folder: Path) -> list[Attempt]:
    """The attempts of the evaluation that is saved in `folder`, in its order. Raises DataError where it cannot say."""
    return [_read(row, where) for where, row in read_json_lines(folder / TRANSCRIPTS)]


def _read(row: object, where: str) -> Attempt:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected a transcript, got {str(row)[:60]!r}")
    try:
        answers, answer = tuple(row["answers"]), row["answer"]
        found = Attempt(
            id=row["id"],
            question=row["question"],
            answers=answers,
            source=row["source"],
            optimal_calls=row["optimal_calls"],
            is_void=row["stop"] == Stop.VOID,
            correct=row["correct"],
            f1=0.0 if answer is None else f1(answer, answers),
            outcomes=Counter(Outcome(call["outcome"]) for call in row["calls"]),
            sampled_tokens=row["tokens"]["sampled"],
            total_tokens=row["tokens"]["total"],
        )
    except KeyError as error:
        raise DataError(f"{where} has no {error}: an earlier otcrl wrote it; evaluate again with otcrl eval") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: not a transcript of an evaluation: {error}") from error
    if not (found.is_void or isinstance(found.correct, float | int)):
        raise DataError(f"{where} does not say whether its answer is right, as a transcript of an evaluation does")
    return found
