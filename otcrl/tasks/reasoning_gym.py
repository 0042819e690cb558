"""Any of reasoning_gym's data sets by name, judged by their own verifiers.

Some of these verifiers run the answer as Python (`eval`, sympy's parser), and the answer is whatever a policy wrote: so
those that are more than a comparison of texts run in the sandbox, with a deadline, where an answer may compute and call
nothing (reasoning_gym_verifier.py). What an answer prints there is no score, for a score must be signed.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from otcrl.errors import ConfigError, ToolUnavailable, nearest
from otcrl.protocols import Demo, Dialect
from otcrl.rewards.given_up import GIVEN_UP
from otcrl.tasks.records import check_unique, shuffled_epochs
from otcrl.tools.sandbox.execution import Program, State
from otcrl.tools.sandbox.pool import Pool
from otcrl.types import Problem

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

MAX_ANSWER_CHARS = 10_000  # longer is no answer
QUESTIONS = Path(__file__).with_name("reasoning_gym_questions.py").read_text()  # as a file it would import this one
SCORE = Path(__file__).with_name("reasoning_gym_verifier.py").read_text()


@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    datasets: Sequence[str]  # names of reasoning_gym
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # of a data set, by its name
    train_size: int = 1000  # questions of each to practise on
    test_size: int = 100  # questions of each for evaluation, none of which is practised
    seed: int = 0
    timeout_s: float = 10.0  # for a verifier; an answer that takes longer to check is wrong
    memory_mb: int = 512  # for a verifier, on top of reasoning_gym itself
    isolation: str = "bubblewrap"  # of verifiers, as of the python tool

    def __post_init__(self) -> None:
        for name in ("train_size", "test_size"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.datasets:
            raise ConfigError("datasets names none of reasoning_gym's")
        for name in self.options.keys() - set(self.datasets):
            raise ConfigError(f"options: {name!r} is not in datasets.{nearest(name, self.datasets)}")
        _ = self._made  # refuses here what does not exist
        check_unique([*self._train, *self._test], "task")

    def sample(self, step: int, count: int) -> list[Problem]:
        """The `count` problems of `step`, every problem once an epoch. Raises ConfigError when there are none."""
        if not self._train:
            raise ConfigError("train_size is 0, and training needs some questions")
        chosen = shuffled_epochs(len(self._train), step * count, count, f"{self.seed}/train")
        return [self._train[i] for i in chosen]

    def held_out(self) -> list[Problem]:
        return list(self._test)

    def correct(self, answer: str, problem: Problem) -> float:
        """The verifier's score, 0.0 to 1.0; in between where it gives partial credit."""
        if answer in problem.answers:
            return 1.0
        if len(answer) > MAX_ANSWER_CHARS or not answer.strip():
            return 0.0
        dataset = self._made[problem.source]
        if problem.answers and is_plain(dataset):
            return bounded(dataset.score_answer(answer, {"answer": problem.answers[0]}))
        return bounded(self._sandboxed(problem, answer))

    def demonstrations(self, step: int, count: int, dialect: Dialect) -> list[Demo]:
        raise ConfigError("reasoning_gym's questions come without anything to demonstrate: set sft.steps=0")

    @cached_property
    def _made(self) -> dict[str, ProceduralDataset]:
        try:
            from reasoning_gym.factory import DATASETS, create_dataset
        except ImportError as error:
            raise ConfigError("its questions come from reasoning_gym: pip install 'otcrl[reasoning]'") from error
        made = {}
        for name in self.datasets:
            if name not in DATASETS:
                raise ConfigError(f"datasets: reasoning_gym has no {name!r}.{nearest(name, DATASETS)}")
            known = {each.name for each in fields(DATASETS[name][1])} - {"seed", "size"}
            for option in self.options.get(name, {}):
                if option not in known:
                    raise ConfigError(f"options.{name}: there is no {option!r}.{nearest(option, known)}")
            try:
                made[name] = create_dataset(name, **self._settings(name))
            except (AssertionError, ValueError, TypeError) as error:  # how reasoning_gym refuses options
                raise ConfigError(f"options.{name} {dict(self.options.get(name, {}))}: {error}") from error
        return made

    def _settings(self, name: str) -> dict[str, object]:
        return {**self.options.get(name, {}), "seed": self.seed, "size": self.train_size + self.test_size}

    @cached_property
    def _train(self) -> list[Problem]:
        return [p for name in self.datasets for p in self._problems(name, "train", 0, self.train_size)]

    @cached_property
    def _test(self) -> list[Problem]:
        """Small data sets make a question again: none that is practised is asked here."""
        practised = {(problem.source, problem.question) for problem in self._train}
        asked: dict[tuple[str, str], Problem] = {}
        for name in self.datasets:
            for problem in self._problems(name, "test", self.train_size, self.train_size + self.test_size):
                asked.setdefault((name, problem.question), problem)
        return [problem for key, problem in asked.items() if key not in practised]

    def _problems(self, name: str, split: str, start: int, end: int) -> list[Problem]:
        return [
            Problem(
                id=f"{name}/{split}/{index}",
                question=question,
                answers=() if answer is None else (answer,),  # many are right, and only the verifier knows them
                source=name,
                meta={"index": index},
            )
            for index, (question, answer) in enumerate(self._questions[name][start:end], start)
        ]

    @cached_property
    def _questions(self) -> Mapping[str, Sequence[tuple[str, str | None]]]:
        """Of each data set, in its order: the question and the answer that it knows, if any."""
        asked = json.dumps({name: self._settings(name) for name in self.datasets})
        with tempfile.TemporaryDirectory(prefix="otcrl-") as folder:
            file = Path(folder) / "questions.json"
            made = subprocess.run(
                [sys.executable, "-c", QUESTIONS, str(file)], input=asked, capture_output=True, text=True, check=False,
                env=os.environ | {"PYTHONHASHSEED": "0"},
            )  # fmt: skip
            if made.returncode:
                last = (made.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise ConfigError(f"reasoning_gym could not make the questions: {last}")
            return json.loads(file.read_text(encoding="utf-8"))

    # -- verifiers that run what the policy wrote -----------------------------------------------------------

    def _sandboxed(self, problem: Problem, answer: str) -> float:
        signature = secrets.token_hex(16)
        name = problem.source
        asked = {"dataset": name, "options": self._settings(name), "index": problem.meta["index"], "answer": answer}
        program = Program(
            code=SCORE,
            timeout_s=self.timeout_s,
            memory_mb=self.memory_mb,
            max_bytes=10_000,
            stdin=json.dumps(asked | {"signature": signature}),
        )
        try:
            execution = self._thread.submit(lambda: asyncio.run(self._pool.run(program))).result()
        except ToolUnavailable as error:  # a broken checker must not look like wrong answers
            raise ConfigError(f"reasoning_gym's verifier of {name} cannot be run: {error}") from error
        if execution.state in (State.TIMEOUT, State.MEMORY, State.KILLED):
            GIVEN_UP.add(answer, f"of {name} ended with {execution.state}")
        signed = [line.split()[1] for line in execution.stdout.splitlines() if line.startswith(f"{signature} ")]
        return float(signed[-1]) if len(signed) == 1 else 0.0

    @cached_property
    def _pool(self) -> Pool:
        return Pool(1, ("reasoning_gym",), self.isolation)  # its processes end with this one

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        """Rewards are counted in whichever thread; the sandbox is awaited in one that has no event loop."""
        return ThreadPoolExecutor(1, thread_name_prefix="verifier")


def is_plain(dataset: ProceduralDataset) -> bool:
    """Whether the verifier is reasoning_gym's own comparison of texts, which runs nothing."""
    from reasoning_gym.dataset import ProceduralDataset

    return type(dataset).score_answer is ProceduralDataset.score_answer


def bounded(score: float) -> float:
    return min(1.0, max(0.0, score)) if math.isfinite(score) else 0.0
