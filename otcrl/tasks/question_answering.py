"""Questions with short answers, checked by exact match, and demonstrations: of traces, or of searching.

A demonstration of searching needs no search engine: its observations hold the gold passages that the data set names
among random others, so what it teaches is the form of a search and how to read one, not what to remember.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from otcrl.errors import ConfigError, DataError, nearest
from otcrl.protocols import Demo, Dialect, Segment, Tool
from otcrl.rewards.matching import MAX_MATH_CHARS, exact_match, math_equal, mentions
from otcrl.tasks.records import check_unique, read_problems, read_rows, shuffled_epochs
from otcrl.tasks.traces import Trace, demonstrate, read_traces
from otcrl.types import Problem

SEARCH, PYTHON = "search", "python"  # the tools that demonstrations call
MATCHES = {"words": exact_match, "math": lambda answer, answers: max(math_equal(answer, gold) for gold in answers)}


class Passage(NamedTuple):
    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering:
    train: Sequence[str] = ()  # files or hub data sets (`owner/name:split`) to practise on
    test: Sequence[str] = ()  # the same, for evaluation
    in_domain: Sequence[
        str
    ] = ()  # names of evaluation sets whose like is trained on; reports tell them from the others
    max_train: int | None = None  # problems of each training source, a seeded subset; null: all
    max_test: int | None = None  # problems of each evaluation source; null: all
    reader: str = "auto"  # of the rows, a name of READERS; auto: by the columns of a file's first row
    skip_bad_rows: bool = False  # True: go on without rows that hold no question or answer; False: stop at the first
    match: Literal["words", "math"] = (
        "words"  # words: Search-R1's exact match | math: the same mathematical object, by math-verify
    )
    seed: int = 0
    traces: Sequence[
        str
    ] = ()  # files or hub data sets of whole solutions with programs; the demonstrations, if there are any
    corpus: Sequence[str] = ()  # files {id, title, text} that `gold_ids` point into; for demonstrations only
    demo_direct: float = 0.0  # share of demonstrations that answer without a call
    demo_extra: float = 0.0  # share of demonstrations with one redundant call
    demo_query: Literal["title", "question"] = "title"  # what a demonstration searches for; a redundant call: the other
    demo_passages: int = 3  # passages in an observation: the gold one and random others
    demo_max_words: int = 100  # words of a passage that are shown; 0: all
    thoughts: bool = False  # True: demonstrations say in <think> tags what they look up, and why they stop
    template: str = "Doc {i}(Title: {title}) {text}\n"  # one passage in an observation, as the search tool writes it
    tools: Mapping[str, Tool] = field(repr=False, default_factory=dict)  # wired by build, for the prompt

    wired = frozenset({"tools"})

    def __post_init__(self) -> None:
        if min(self.demo_direct, self.demo_extra) < 0 or self.demo_direct + self.demo_extra > 1:
            raise ConfigError(
                "demo_direct and demo_extra are shares of the demonstrations and must add up to at most 1, "
                f"got {self.demo_direct} and {self.demo_extra}"
            )
        for name, least in (("demo_passages", 1), ("demo_max_words", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        try:
            self.template.format(i=1, title="", text="")
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(f"template may hold {{i}}, {{title}} and {{text}}, got {self.template!r}") from error
        check_unique([*self._train, *self._test], "task.train and task.test together")
        sources = {problem.source for problem in (*self._train, *self._test)}
        for name in self.in_domain if self.train else ():  # who only evaluates may leave sets out
            if name not in sources:
                raise ConfigError(f"in_domain: there is no data set {name!r}.{nearest(name, sources)}")

    # -- problems ------------------------------------------------------------------------------------

    def sample(self, step: int, count: int) -> list[Problem]:
        """The `count` problems of `step`, every problem once an epoch. Raises ConfigError without `train`."""
        if not self._train:
            raise ConfigError("task.train names no data, and training needs some")
        chosen = shuffled_epochs(len(self._train), step * count, count, f"{self.seed}/train")
        return [self._train[i] for i in chosen]

    def held_out(self) -> list[Problem]:
        return list(self._test)

    def correct(self, answer: str, problem: Problem) -> float:
        return MATCHES[self.match](answer, problem.answers)

    @cached_property
    def _train(self) -> list[Problem]:
        return self._read(self.train, self.max_train)

    @cached_property
    def _test(self) -> list[Problem]:
        return self._read(self.test, self.max_test)

    def _read(self, sources: Sequence[str], limit: int | None) -> list[Problem]:
        read = (read_problems(s, limit, self.seed, self.skip_bad_rows, self.reader) for s in sources)
        found = [problem for problems in read for problem in problems]
        if self.match == "math":
            for problem in found:
                check_gold(problem)
        return found

    # -- demonstrations ------------------------------------------------------------------------------

    def demonstrations(self, step: int, count: int, dialect: Dialect) -> list[Demo]:
        """The `traces`; answers alone, if `demo_direct` is 1; or searches for each gold passage, then the answer.

        Raises ConfigError when no training problem has `gold_ids` or there is no tool, though demonstrations are to
        search; DataError when a gold id is not in the corpus.
        """
        if self.traces and self.demo_direct < 1:
            chosen = shuffled_epochs(len(self._solved), step * count, count, f"{self.seed}/demonstrations")
            self._check_tool(PYTHON)
            return [demonstrate(self._solved[i], PYTHON, dialect, self.tools) for i in chosen]
        if self.demo_direct < 1:
            self._check_tool(SEARCH)
        if not self._demonstrable:
            raise ConfigError(
                "demonstrations need training rows with `gold_ids` and without `gold_missing`, and task.train has none"
            )
        chosen = shuffled_epochs(len(self._demonstrable), step * count, count, f"{self.seed}/demonstrations")
        return [
            self._demonstrate(self._demonstrable[i], dialect, random.Random(f"{self.seed}/demonstrations/{step}/{k}"))
            for k, i in enumerate(chosen)
        ]

    def _check_tool(self, name: str) -> None:
        if name not in self.tools:
            raise ConfigError(f"demonstrations call {name!r}, which is not in tools: {', '.join(self.tools) or 'none'}")

    @cached_property
    def _solved(self) -> list[Trace]:
        return [trace for source in self.traces for trace in read_traces(source, self.skip_bad_rows)]

    @cached_property
    def _demonstrable(self) -> list[Problem]:
        """Those with all of their gold passages: an answer after half of them would teach to guess."""
        return [
            problem
            for problem in self._train
            if self.demo_direct == 1 or (problem.meta.get("gold_ids") and not problem.meta.get("gold_missing"))
        ]

    @cached_property
    def passages(self) -> dict[str, Passage]:
        """id -> passage of every corpus file. Raises DataError when two passages share an id."""
        found: dict[str, Passage] = {}
        for source in self.corpus:
            for row in read_rows(source, ("id", "title", "text")):
                key = str(row["id"])
                if key in found:
                    raise DataError(f"{source}: a passage with the id {key!r} was already read from task.corpus")
                found[key] = Passage(str(row["title"]), str(row["text"]))
        return found

    @cached_property
    def _passage_ids(self) -> list[str]:
        return list(self.passages)

    def _demonstrate(self, problem: Problem, dialect: Dialect, rng: random.Random) -> Demo:
        segments = [Segment(dialect.prompt(problem, self.tools), False)]
        for query, gold in self._searches(problem, rng):
            thought = self._thought(f"I need to look up {query}.")
            segments.append(Segment(thought + dialect.write_call(SEARCH, query), True))
            segments.append(Segment(dialect.observation(self._result(gold, rng)), False))
        thought = self._thought("I know the answer." if len(segments) == 1 else "I have found the answer.")
        return [*segments, Segment(thought + dialect.write_answer(problem.answers[0]), True)]

    def _searches(self, problem: Problem, rng: random.Random) -> list[tuple[str, Passage]]:
        """(query, the gold passage it finds), in the order they are made."""
        draw = rng.random()
        if draw < self.demo_direct:
            return []
        read = reading_order(problem, self._gold(problem))
        asks_titles = self.demo_query == "title"
        searches = [(passage.title if asks_titles else problem.question, passage) for passage in read]
        if draw < self.demo_direct + self.demo_extra:  # asks again for what it has just read
            searches.append((problem.question if asks_titles else read[-1].title, read[-1]))
        return searches

    def _gold(self, problem: Problem) -> list[Passage]:
        ids = problem.meta["gold_ids"]
        if not isinstance(ids, Sequence) or isinstance(ids, str):
            raise DataError(f"{problem.id}: gold_ids must be a list of passage ids, got {ids!r}")
        keys = [str(key) for key in ids]  # a corpus may number its passages
        for key in keys:
            if key not in self.passages:
                near = nearest(key, self.passages) if len(self.passages) < 1000 else ""
                raise DataError(f"{problem.id}: gold passage {key!r} is not in task.corpus {list(self.corpus)}.{near}")
        return [self.passages[key] for key in keys]

    def _result(self, gold: Passage, rng: random.Random) -> str:
        """What a search engine would have shown: the gold passage among random others, in random order."""
        others = [
            self.passages[key] for key in rng.sample(self._passage_ids, min(self.demo_passages, len(self.passages)))
        ]
        shown = [gold, *[other for other in others if other != gold][: self.demo_passages - 1]]
        rng.shuffle(shown)
        blocks = (
            self.template.format(i=i, title=p.title, text=self._cut(p.text)) for i, p in enumerate(shown, start=1)
        )
        return "".join(blocks).strip()

    def _cut(self, text: str) -> str:
        words = text.split()
        return text if not 0 < self.demo_max_words < len(words) else " ".join(words[: self.demo_max_words]) + " ..."

    def _thought(self, text: str) -> str:
        return f"<think> {text} </think>\n" if self.thoughts else ""


def check_gold(problem: Problem) -> None:
    """Raises DataError for an answer that `math_equal` cannot check, before a run rather than in its middle."""
    if long := next((answer for answer in problem.answers if len(answer) > MAX_MATH_CHARS), None):
        raise DataError(
            f"problem {problem.id!r}: task.match=math checks answers of at most {MAX_MATH_CHARS} characters, "
            f"and this one has {len(long)}: {long[:60]!r}..."
        )


def reading_order(problem: Problem, passages: Sequence[Passage]) -> list[Passage]:
    """The passages in an order that somebody who knows only the question could find them in.

    Data sets list them in any order. A title that the question names can be looked up at once; of the rest,
    the passage that holds the answer comes last, so that another has led there.
    """

    def late(passage: Passage) -> tuple[bool, bool]:
        named = mentions(problem.question, passage.title.split(" (")[0])
        return not named, any(mentions(passage.text, answer) for answer in problem.answers)

    return sorted(passages, key=late)
