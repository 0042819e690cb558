"""A task: whose number is it? Some people's numbers are in the search tool's passages, and none is known by heart.

otcrl train conf=quickstart task=phonebook
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from otcrl.protocols import Demo, Dialect, Segment, Tool
from otcrl.tasks.records import shuffled_epochs
from otcrl.types import Problem

TAGS = "<search> </search> <python> </python> <observation> </observation> <answer> </answer> Error:"


@dataclass(frozen=True, kw_only=True)
class Phonebook:
    people: int  # every fourth of them is asked about in evaluation only
    seed: int
    tools: Mapping[str, Tool] = field(repr=False, default_factory=dict)  # otcrl wires them in, for the prompt

    wired = frozenset({"tools"})

    def __post_init__(self) -> None:
        if self.people < 4:
            raise ValueError(f"people must be at least 4, got {self.people}")

    @cached_property
    def problems(self) -> list[Problem]:
        rng = random.Random(f"{self.seed}/numbers")
        return [
            Problem(
                id=f"phonebook/{'test' if i % 4 == 0 else 'train'}/{i}",  # unique: what is least known is kept by it
                question=f"number of person_{i} ?",
                answers=(str(rng.randrange(1000, 2000)),),
                source="phonebook",
                optimal_calls=1,  # what a table of results sets TC against; leave it out where it is not known
            )
            for i in range(self.people)
        ]

    def sample(self, step: int, count: int) -> list[Problem]:
        """The problems of a step: the same step, the same problems, without walking up to it."""
        train = [p for p in self.problems if "/train/" in p.id]
        return [train[i] for i in shuffled_epochs(len(train), step * count, count, f"{self.seed}/train")]

    def held_out(self) -> list[Problem]:
        return [p for p in self.problems if "/test/" in p.id]

    def correct(self, answer: str, problem: Problem) -> float:
        return float(answer.strip() in problem.answers)

    def demonstrations(self, step: int, count: int, dialect: Dialect) -> list[Demo]:
        """A search and what it found, twice for good measure: what the reward is there to take away."""
        return [self.demonstrate(problem, dialect) for problem in self.sample(step, count)]

    def demonstrate(self, problem: Problem, dialect: Dialect) -> Demo:
        query = problem.question.removesuffix(" ?")
        search = Segment(dialect.write_call("search", query), True)  # True: trained on
        found = Segment(dialect.observation(f"{query} is {problem.answers[0]}"), False)
        answer = Segment(dialect.write_answer(problem.answers[0]), True)
        return [Segment(dialect.prompt(problem, self.tools), False), search, found, search, found, answer]

    # -- not needed by every task ----------------------------------------------------------------------

    def own_corpus(self) -> list[tuple[str, str, str]]:
        """(id, title, text): passages of the search tool, where it has no others."""
        queries = [(p.question.removesuffix(" ?"), p.answers[0]) for p in self.problems]
        return [(query, query, f"{query} is {number}") for query, number in queries]

    def words(self) -> list[str]:
        """What the quickstart's model, which has one token for each word, must be able to read and write."""
        text = [text for _, _, text in self.own_corpus()]
        return [*TAGS.split(), "?", *" ".join(text).split()]
