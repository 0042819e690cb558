"""Arithmetic of mixed size, from reasoning_gym: some of it needs no tool, some of it does.

An answer must be a plain number. The general `math_equal` would take the question itself for its answer
(`3 + 4` is equal to 7), and a policy finds that out.
"""

from __future__ import annotations

import ast
import operator
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import cycle, islice
from typing import Literal

from otcrl.errors import ConfigError, DataError, nearest
from otcrl.protocols import Demo, Dialect, Segment, Tool
from otcrl.rewards.matching import as_number
from otcrl.tasks.records import shuffled_epochs
from otcrl.tasks.traces import drill
from otcrl.types import Problem

PYTHON = "python"  # the tool that demonstrations call
OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One sort of question in the mixture."""

    dataset: str  # of reasoning_gym; its questions must carry an `expression` of + - * ( ) and whole numbers
    weight: float  # how often it is asked, relative
    size: Literal["small", "large"]  # small: demonstrated without a tool; large: with one
    options: Mapping[str, object] = field(default_factory=dict)  # of the data set

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(f"weight must be above 0, got {self.weight}")


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    kinds: Mapping[str, Kind]
    train_size: int = 4000  # problems in an epoch; kinds with fewer questions repeat theirs
    test_size: int = 400  # problems in an evaluation, none twice
    test_share: float = 0.1  # of all questions; these are never practised
    generated: int = 8000  # questions made of each kind, before repeated ones are dropped
    demo_overcall: float = 0.0  # share of demonstrations of small problems that call python all the same
    drill_share: float = 0.0  # share of SFT examples that teach small results, held-out ones too, in the answer's place
    seed: int = 0
    tools: Mapping[str, Tool] = field(repr=False, default_factory=dict)  # wired by build, for the prompt

    wired = frozenset({"tools"})

    def __post_init__(self) -> None:
        for name in ("test_share", "demo_overcall", "drill_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be a share between 0 and 1, got {getattr(self, name)}")
        if not self._train:
            raise ConfigError(f"there is nothing to practise: train_size {self.train_size}, kinds {list(self.kinds)}")
        if self.drill_share and not self._small:
            raise ConfigError("drill_share is a share of small results, and no kind is of size small")

    # -- problems ------------------------------------------------------------------------------------

    def sample(self, step: int, count: int) -> list[Problem]:
        return self._chosen(self._train, step, count, "train")

    def _chosen(self, problems: Sequence[Problem], step: int, count: int, what: str) -> list[Problem]:
        """The `count` of them that are step's turn, every one once an epoch."""
        return [problems[i] for i in shuffled_epochs(len(problems), step * count, count, f"{self.seed}/{what}")]

    def held_out(self) -> list[Problem]:
        return [
            p for name, share in self._shares.items() for p in self._pool(name, "test")[: round(share * self.test_size)]
        ]

    def correct(self, answer: str, problem: Problem) -> float:
        value = as_number(answer)
        return float(value is not None and value == as_number(problem.answers[0]))

    @cached_property
    def _train(self) -> list[Problem]:
        """An epoch: of every kind its share, a kind's questions over again where it has too few."""
        counts = {name: round(share * self.train_size) for name, share in self._shares.items()}
        return [p for name, count in counts.items() for p in islice(cycle(self._pool(name, "train")), count)]

    @cached_property
    def _shares(self) -> dict[str, float]:
        total = sum(kind.weight for kind in self.kinds.values())
        return {name: kind.weight / total for name, kind in self.kinds.items()}

    def _pool(self, name: str, split: str) -> list[Problem]:
        return [p for p in self._problems if p.source == name and p.meta["split"] == split]

    @cached_property
    def _problems(self) -> list[Problem]:
        """Every question once, whichever kinds it belongs to; its text alone decides about its split."""
        found: dict[str, Problem] = {}
        for name, kind in self.kinds.items():
            for expression, answer in _questions(name, kind, self.generated, self.seed):
                is_test = zlib.crc32(f"{self.seed}/{expression}".encode()) % 10_000 < 10_000 * self.test_share
                split = "test" if is_test else "train"
                problem = Problem(
                    id=f"arithmetic/{split}/{expression}",
                    question=f"What is {expression}?",
                    answers=(answer,),
                    source=name,
                    meta={"expression": expression, "size": kind.size, "split": split},
                )
                found.setdefault(expression, problem)
        return list(found.values())

    # -- demonstrations ------------------------------------------------------------------------------

    def demonstrations(self, step: int, count: int, dialect: Dialect) -> list[Demo]:
        """Small problems answered at once (or, for `demo_overcall` of them, with a call); large ones by python; drills.

        A drill puts a result into the weights and says nothing about calling: the answer's opening stands there, and
        only what follows is learned. Raises ConfigError when there is no python tool.
        """
        if PYTHON not in self.tools:
            raise ConfigError(
                f"demonstrations call {PYTHON!r}, which is not in tools: {', '.join(self.tools) or 'none'}"
            )
        drills = round(count * self.drill_share)
        shown = self._chosen(self._train, step, count - drills, "demonstrations")
        drilled = self._chosen(self._small, step, drills, "drills")
        rng = random.Random(f"{self.seed}/demonstrations/{step}")
        return [
            *(self._demonstrate(problem, dialect, rng.random() < self.demo_overcall) for problem in shown),
            *(drill(problem, dialect, self.tools) for problem in drilled),
        ]

    def _demonstrate(self, problem: Problem, dialect: Dialect, overcall: bool) -> Demo:
        segments = [Segment(dialect.prompt(problem, self.tools), False)]
        if problem.meta["size"] == "large" or overcall:
            expression = str(problem.meta["expression"])
            segments.append(Segment(dialect.write_call(PYTHON, f"print({expression})"), True))
            segments.append(Segment(dialect.observation(str(evaluate(expression))), False))
        return [*segments, Segment(dialect.write_answer(problem.answers[0]), True)]

    @cached_property
    def _small(self) -> list[Problem]:
        return [problem for problem in self._problems if problem.meta["size"] == "small"]


def evaluate(expression: str) -> int:
    """The value of an expression of + - * ( ) and whole numbers. Raises DataError for anything else.

    >>> evaluate("-( 2 + 3 ) * 4")
    -20
    """

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)) if not isinstance(number, bool):
                return number
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
        raise DataError(f"only + - * ( ) and whole numbers can be evaluated, got {expression!r}")

    try:
        return value(ast.parse(expression, mode="eval").body)
    except SyntaxError as error:
        raise DataError(f"only + - * ( ) and whole numbers can be evaluated, got {expression!r}") from error


def _questions(name: str, kind: Kind, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """(expression, answer) of `count` questions, repeated ones included; each answer is checked."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ConfigError("arithmetic problems come from reasoning_gym: pip install 'otcrl[reasoning]'") from error
    if kind.dataset not in DATASETS:
        raise ConfigError(
            f"kinds.{name}.dataset: reasoning_gym has no {kind.dataset!r}.{nearest(kind.dataset, DATASETS)}"
        )
    known = {f.name for f in fields(DATASETS[kind.dataset][1])} - {"seed", "size"}
    for option in kind.options:
        if option not in known:
            raise ConfigError(f"kinds.{name}.options: {kind.dataset} has no {option!r}.{nearest(option, known)}")
    try:
        dataset = create_dataset(kind.dataset, seed=seed, size=count, **kind.options)
    except AssertionError as error:  # how reasoning_gym refuses options
        raise ConfigError(f"kinds.{name}.options {dict(kind.options)}: {error}") from error
    for item in dataset:
        expression, answer = item["metadata"].get("expression"), item["answer"]
        if expression is None:
            raise DataError(
                f"kinds.{name}: the questions of {kind.dataset} carry no `expression`; try chain_sum or products"
            )
        if str(evaluate(expression)) != answer:
            raise DataError(f"kinds.{name}: {kind.dataset} says that {expression!r} is {answer}, and it is not")
        yield expression, answer
