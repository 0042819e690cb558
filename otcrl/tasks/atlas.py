"""Atlas: a seeded world whose questions have a known least number of tool calls.

    kind         question                      least calls  because
    known        color of bakilu ?             0            the policy knows it by heart
    hidden       food of bakilu ?              1 search     only the corpus knows it
    two_hop      food of mentor of bakilu ?    2 searches
    small_sum    3 + 4 ?                       0            known by heart
    large_sum    47 + 85 ?                     1 python
    search_sum   debt of bakilu + 85 ?         2            search, then python

Whether a fact is known by heart follows from its relation, as popularity does in real questions, so
knowing *when* to call can generalise to facts that were never practised with tools. "Held out"
means: never in a tool trace and never in RL. The memorised facts themselves are all taught.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from otcrl.errors import ConfigError, nearest
from otcrl.protocols import Demo, Dialect, Segment, Tool
from otcrl.tasks.records import shuffled_epochs
from otcrl.tasks.traces import drill
from otcrl.types import Problem

KNOWN = ("color", "pet", "city", "spouse")
HIDDEN = ("food", "song", "drink", "game")
LINKS = ("mentor", "rival")  # entity-valued, and only ever a first hop: asked both ways they confuse
NUMBERS = ("debt", "height")
OPTIMUM = {"known": 0, "hidden": 1, "two_hop": 2, "small_sum": 0, "large_sum": 1, "search_sum": 2}
SYLLABLES = ("ba", "do", "ki", "lu", "me", "ra", "so", "ti", "vo", "ze")
LARGEST = 99  # sums stay below 199, so that a number is one token, as tokenizers that group digits have it


@dataclass(frozen=True, kw_only=True)
class Atlas:
    seed: int
    entities: int
    values_per_relation: int
    large_sums: int  # how many of these questions exist
    held_out_share: float
    held_out_per_kind: int  # at most, in evaluation
    demo_direct: float  # share of demonstrations without a call, where none is needed
    demo_extra: Sequence[float]  # shares of demonstrations with 0, 1, 2 ... redundant calls
    demo_mix: Mapping[str, float]  # how often each kind is demonstrated, relative
    drill_share: float  # share of SFT examples that teach a memorised fact, in the answer's own place
    copy_share: float  # share of SFT examples that are `words = the same words`: they form copying heads
    copy_words: int
    tools: Mapping[str, Tool] = field(repr=False, default_factory=dict)  # wired by build, for the prompt

    wired = frozenset({"tools"})

    def __post_init__(self) -> None:
        for name, most in (("entities", len(SYLLABLES) ** 3), ("large_sums", (LARGEST - 9) ** 2)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be 1 to {most}, got {getattr(self, name)}")
        for name in ("values_per_relation", "held_out_per_kind", "copy_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("held_out_share", "demo_direct", "drill_share", "copy_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share between 0 and 1, got {getattr(self, name)}")
        if self.drill_share + self.copy_share > 1:
            raise ValueError(f"drill_share and copy_share add up to {self.drill_share + self.copy_share}, more than 1")
        for kind in self.demo_mix.keys() - OPTIMUM.keys():
            raise ValueError(f"demo_mix: there is no kind {kind!r}.{nearest(kind, OPTIMUM)}")
        for name, shares in (("demo_mix", list(self.demo_mix.values())), ("demo_extra", list(self.demo_extra))):
            if not (sum(shares) > 0 and min(shares) >= 0):
                raise ValueError(f"{name} must hold shares of 0 or more, not all of them 0, got {shares}")

    # -- the world ---------------------------------------------------------------------------------

    @cached_property
    def names(self) -> list[str]:
        rng, names = random.Random(f"{self.seed}/names"), set()
        while len(names) < self.entities:
            names.add("".join(rng.choice(SYLLABLES) for _ in range(3)))
        return rng.sample(sorted(names), self.entities)

    @cached_property
    def values(self) -> dict[str, list[str]]:
        """The words that can be a relation's value; entities where the value is an entity."""
        own = {r: [f"{r}_{i}" for i in range(self.values_per_relation)] for r in (*KNOWN, *HIDDEN)}
        numbers = [str(n) for n in range(10, LARGEST + 1)]
        return own | dict.fromkeys(("spouse", *LINKS), self.names) | dict.fromkeys(NUMBERS, numbers)

    @cached_property
    def facts(self) -> dict[tuple[str, str], str]:
        """(entity, relation) -> value."""
        rng = random.Random(f"{self.seed}/facts")
        return {(e, r): rng.choice(self.values[r]) for e in self.names for r in (*KNOWN, *HIDDEN, *LINKS, *NUMBERS)}

    def own_corpus(self) -> list[tuple[str, str, str]]:
        """(id, title, text) of the corpus: every fact of the world, the memorised ones included."""
        return [(f"{e}/{r}", f"{r} of {e}", f"{r} of {e} is {v}") for (e, r), v in self.facts.items()]

    def words(self) -> list[str]:
        """Every word that a prompt, a call, an observation or an answer can hold."""
        grammar = ["of", "is", "?", "+", "=", "<search>", "</search>", "<python>", "</python>"]
        grammar += ["<observation>", "</observation>", "<answer>", "</answer>", "Error:"]
        numbers = [str(n) for n in range(2 * LARGEST + 1)]
        relations = [*KNOWN, *HIDDEN, *LINKS, *NUMBERS]
        own = [v for r in (*KNOWN, *HIDDEN) if r != "spouse" for v in self.values[r]]
        return [*grammar, *numbers, *relations, *self.names, *own]

    # -- questions ---------------------------------------------------------------------------------

    @cached_property
    def problems(self) -> list[Problem]:
        rng = random.Random(f"{self.seed}/questions")
        asked: dict[str, tuple[str, str]] = {}  # question -> (kind, answer)
        for e in self.names:
            for r in (*KNOWN, *HIDDEN):
                asked[f"{r} of {e} ?"] = ("known" if r in KNOWN else "hidden", self.facts[e, r])
            for link in LINKS:
                for r in HIDDEN:
                    asked[f"{r} of {link} of {e} ?"] = ("two_hop", self.facts[self.facts[e, link], r])
            for r in NUMBERS:
                for k in rng.sample(range(10, LARGEST + 1), 4):
                    asked[f"{r} of {e} + {k} ?"] = ("search_sum", str(int(self.facts[e, r]) + k))
        asked |= {f"{a} + {b} ?": ("small_sum", str(a + b)) for a in range(10) for b in range(10)}
        while sum(kind == "large_sum" for kind, _ in asked.values()) < self.large_sums:
            a, b = rng.randint(10, LARGEST), rng.randint(10, LARGEST)
            asked[f"{a} + {b} ?"] = ("large_sum", str(a + b))
        return [
            Problem(
                id=f"atlas-{self.seed}/{'held_out' if self._is_held_out(q) else 'train'}/{q[:-2]}",
                question=q,
                answers=(answer,),
                source=kind,
                optimal_calls=OPTIMUM[kind],
            )
            for q, (kind, answer) in asked.items()
        ]

    def _is_held_out(self, question: str) -> bool:
        return zlib.crc32(f"{self.seed}/{question}".encode()) % 1000 < 1000 * self.held_out_share

    @cached_property
    def train(self) -> dict[str, list[Problem]]:
        """kind -> problems that may be practised."""
        found = {k: [p for p in self.problems if p.source == k and not self._is_held_out(p.question)] for k in OPTIMUM}
        for kind in (kind for kind, problems in found.items() if not problems):
            raise ConfigError(
                f"no {kind} question is left to practise: lower task.held_out_share={self.held_out_share}"
            )
        return found

    def sample(self, step: int, count: int) -> list[Problem]:
        """Every kind equally often; each kind walks its own shuffled epochs."""
        pools = list(self.train.values())
        turns = (divmod(i, len(pools)) for i in range(step * count, (step + 1) * count))
        return [
            pools[kind][shuffled_epochs(len(pools[kind]), place, 1, f"{self.seed}/{kind}")[0]] for place, kind in turns
        ]

    def held_out(self) -> list[Problem]:
        rng = random.Random(f"{self.seed}/held_out")
        pools = [[p for p in self.problems if p.source == k and self._is_held_out(p.question)] for k in OPTIMUM]
        return [p for pool in pools for p in rng.sample(pool, min(self.held_out_per_kind, len(pool)))]

    def correct(self, answer: str, problem: Problem) -> float:
        return float(answer.split() == list(problem.answers))

    # -- demonstrations ----------------------------------------------------------------------------

    def demonstrations(self, step: int, count: int, dialect: Dialect) -> list[Demo]:
        rng = random.Random(f"{self.seed}/demonstrations/{step}")
        drills, copies = round(count * self.drill_share), round(count * self.copy_share)
        by_heart = [p for p in self.problems if p.optimal_calls == 0]
        kinds = rng.choices(list(self.demo_mix), list(self.demo_mix.values()), k=count - drills - copies)
        return [
            *(self._demonstrate(rng.choice(self.train[kind]), dialect, rng) for kind in kinds),
            *(drill(problem, dialect, self.tools) for problem in rng.choices(by_heart, k=drills)),
            *(self._copy(rng) for _ in range(copies)),
        ]

    def _demonstrate(self, problem: Problem, dialect: Dialect, rng: random.Random) -> Demo:
        """One trace that over-calls on purpose. Facts that only the corpus knows get fresh random values,
        so SFT teaches looking up and copying, and never the hidden facts themselves."""
        calls, answer = self._solve(problem, rng)
        if problem.optimal_calls == 0 and rng.random() < self.demo_direct:
            calls = []
        else:
            # the last call again: repeating a first hop would teach to confuse the entity asked with the one found
            calls += calls[-1:] * rng.choices(range(len(self.demo_extra)), self.demo_extra)[0]
        segments = [Segment(dialect.prompt(problem, self.tools), False)]
        for tool, arguments, result in calls:
            segments += [
                Segment(dialect.write_call(tool, arguments), True),
                Segment(dialect.observation(result), False),
            ]
        return [*segments, Segment(dialect.write_answer(answer), True)]

    def _solve(self, problem: Problem, rng: random.Random) -> tuple[list[tuple[str, str, str]], str]:
        """The shortest tool trace, as (tool, arguments, result), and the answer it leads to."""
        words = problem.question.split()[:-1]
        if problem.source in ("small_sum", "large_sum"):
            code = " ".join(words)
            return [("python", code, problem.answers[0])], problem.answers[0]
        *path, entity = [w for w in words if w not in ("of", "+") and not w.isdigit()]
        calls, value = [], entity
        for relation in reversed(path):
            query = f"{relation} of {value}"
            value = self._value(value, relation, rng)
            calls.append(("search", query, f"{query} is {value}"))
        if problem.source == "search_sum":
            total = str(int(value) + int(words[-1]))
            return [*calls, ("python", f"{value} + {words[-1]}", total)], total
        return calls, value

    def _value(self, entity: str, relation: str, rng: random.Random) -> str:
        if relation in KNOWN:
            return self.facts[entity, relation]
        if relation in HIDDEN:  # any content word at all: nothing to guess from the relation, only to copy
            return rng.choice(self._content)
        return rng.choice(self.values[relation])

    @cached_property
    def _content(self) -> list[str]:
        return [*self.names, *(v for r in (*KNOWN, *HIDDEN) if r != "spouse" for v in self.values[r])]

    def _copy(self, rng: random.Random) -> Demo:
        draw: list[Callable[[], str]] = [lambda: rng.choice(self._content), lambda: str(rng.randint(0, 2 * LARGEST))]
        words = " ".join(rng.choice(draw)() for _ in range(self.copy_words))
        return [Segment(f"{words} =", False), Segment(words, True)]
