"""Calls to imitate: a turn is right when it makes the calls of the published one. Nothing runs.

ToolRL's rows hold the turn to imitate; BFCL's the functions and the values that each argument may have. A dialogue that
goes before is part of the prompt. Needs a dialect with `calls: imitate`, whose answer is the whole turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from otcrl.errors import ConfigError
from otcrl.protocols import Demo, Dialect, Segment
from otcrl.rewards.call_matching import accepted_calls, same_calls
from otcrl.tasks.records import check_unique, read_problems, shuffled_epochs
from otcrl.types import Problem


@dataclass(frozen=True, kw_only=True)
class ToolCalls:
    train: Sequence[str] = ()  # files or hub data sets (`owner/name:split`) to practise on
    test: Sequence[str] = ()  # the same, for evaluation
    max_train: int | None = None  # problems of each training source, a seeded subset; null: all
    max_test: int | None = None  # problems of each evaluation source; null: all
    reader: str = "auto"  # of the rows: toolrl, bfcl, or plain for what `otcrl data` wrote of them
    skip_bad_rows: bool = False  # True: go on without rows that hold no calls to imitate; False: stop at the first
    seed: int = 0

    imitates: ClassVar[bool] = True  # so the dialect must too

    def __post_init__(self) -> None:
        check_unique([*self._train, *self._test], "task.train and task.test together")
        for problem in (*self._train, *self._test):
            if "messages" not in problem.meta:
                raise ConfigError(f"problem {problem.id!r} holds no calls to imitate: its rows are for task=qa")

    def sample(self, step: int, count: int) -> list[Problem]:
        """The `count` problems of `step`, every problem once an epoch. Raises ConfigError without `train`."""
        if not self._train:
            raise ConfigError("task.train names no data, and training needs some")
        chosen = shuffled_epochs(len(self._train), step * count, count, f"{self.seed}/train")
        return [self._train[i] for i in chosen]

    def held_out(self) -> list[Problem]:
        return list(self._test)

    def correct(self, answer: str, problem: Problem) -> float:
        """1.0 if the turn `answer` makes the wanted calls and no others, else 0.0; of a response only that it calls
        nothing."""
        if "accepted" in problem.meta:
            functions = problem.meta["functions"]
            listed = [each for each in functions if isinstance(each, Mapping)] if isinstance(functions, list) else []
            return accepted_calls(answer, problem.meta["accepted"], listed)
        return same_calls(answer, problem.answers[0])

    def demonstrations(self, step: int, count: int, dialect: Dialect) -> list[Demo]:
        """The published turns of ToolRL's rows. Raises ConfigError where rows hold none."""
        chosen = self.sample(step, count)
        for problem in chosen:
            if "accepted" in problem.meta:
                raise ConfigError(f"problem {problem.id!r} has no published turn to demonstrate, only accepted values")
        return [[Segment(dialect.prompt(p, {}), False), Segment(p.answers[0], True)] for p in chosen]

    @cached_property
    def _train(self) -> list[Problem]:
        return self._read(self.train, self.max_train)

    @cached_property
    def _test(self) -> list[Problem]:
        return self._read(self.test, self.max_test)

    def _read(self, sources: Sequence[str], limit: int | None) -> list[Problem]:
        read = (read_problems(s, limit, self.seed, self.skip_bad_rows, self.reader) for s in sources)
        return [problem for problems in read for problem in problems]
