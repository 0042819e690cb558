"""Work that is the same whoever does it: turns of a fixed length, each of the first few of them a tool call.

What a small model writes is noise, so nothing here reads it: a completion is as long as it may be (the tokenizer knows
no end of text), it always counts as a call (`EveryTurnCalls`), and a trajectory is over when it calls once more than it
may. These are parts like any other, so the real loop, scheduler, engines and learner run with them unchanged.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from otcrl.models.tokenizer import HFTokenizer
from otcrl.protocols import Call, Completion, Demo, Dialect, Engine, Tokenizer, Tool, ToolResult
from otcrl.rollout.loop import Limits, Player
from otcrl.types import Problem, Reward, Trajectory

SUBJECTS = "rivers mountains composers bridges novels elements painters islands treaties planets".split()
SENTENCE = "Which of the {} that are named in the passages below came first, and which of them was the longest? "
PASSAGE = "Doc {}(Title: {}) The {} were known long before anybody had counted them, and are named after each other. "


# -- the parts ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Endless(HFTokenizer):
    """A tokenizer whose texts never end."""

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset()


@dataclass(frozen=True, kw_only=True)
class EndlessModel:
    """A model section of the config, e.g. {_target_: rollout_work.EndlessModel, path: models/smollm2}."""

    path: str
    chat_template: str | None = None

    def load(self, words: Sequence[str] = (), seed: int = 0) -> tuple[PreTrainedModel, Endless]:
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        tokenizer.chat_template = self.chat_template or tokenizer.chat_template
        model = AutoModelForCausalLM.from_pretrained(self.path, dtype="float32")
        return model, Endless(hf=tokenizer, chat=self.chat_template is not None)


@dataclass(frozen=True, kw_only=True)
class EveryTurnCalls:
    """A dialect in which whatever is written calls the tool."""

    tool: str = "search"

    @property
    def ends_with_stop_token(self) -> bool:
        return False

    def check(self, tokenizer: Tokenizer, tools: Mapping[str, Tool]) -> None: ...

    def stop(self, tools: Mapping[str, Tool]) -> Sequence[str]:
        return ()

    def prompt(self, problem: Problem, tools: Mapping[str, Tool]) -> str:
        return problem.question

    def parse(self, text: str, tools: Mapping[str, Tool]) -> Call:
        return Call(self.tool, text)

    def observation(self, *results: str) -> str:
        return "".join(f"<tool_response>\n{result}\n</tool_response>\n" for result in results)

    def violations(self, sampled_turns: Sequence[str], tools: Mapping[str, Tool]) -> tuple[str, ...]:
        return ()

    def write_call(self, tool: str, arguments: str) -> str:
        return arguments

    def write_answer(self, text: str) -> str:
        return text

    def open_call(self, tool: str) -> str:
        return ""

    def open_answer(self) -> str:
        return ""


@dataclass(kw_only=True)
class Finishes:
    """An engine whose completions always count as finished, also when max_tokens ended them."""

    engine: Engine
    sampled: int = field(default=0, init=False)  # tokens

    @property
    def version(self) -> int:
        return self.engine.version

    @property
    def context(self) -> int:
        return self.engine.context

    async def generate(
        self,
        token_ids: Sequence[int],
        *,
        stop: Sequence[str],
        max_tokens: int,
        temperature: float,
        seed: int,
        session: str,
        priority: int = 0,
    ) -> Completion:
        done = await self.engine.generate(
            token_ids, stop=stop, max_tokens=max_tokens, temperature=temperature, seed=seed, session=session,
            priority=priority,
        )  # fmt: skip
        assert len(done.token_ids) == max_tokens, f"a turn of {max_tokens} tokens has {len(done.token_ids)}"
        self.sampled += max_tokens
        return replace(done, finished=True)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        return await self.engine.score(token_ids)

    def release(self, session: str) -> None:
        self.engine.release(session)

    async def sleep(self) -> None:
        await self.engine.sleep()

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        await self.engine.load_weights(weights, version)

    async def close(self) -> None:
        await self.engine.close()


@dataclass(kw_only=True)
class SlowSearch:
    """Returns `result` after a while; `sigma` above 0: log-normal around `median_s`, drawn by trajectory and call."""

    median_s: float
    result: str
    sigma: float = 0.0
    name: str = "search"
    description: str = "finds passages"
    calls: Counter[str] = field(default_factory=Counter, init=False)  # by session

    def latency(self, session: str, call: int) -> float:
        """Seconds of the `call`-th call, from 0."""
        return self.median_s * random.Random(f"{session}/{call}").lognormvariate(0.0, self.sigma)

    async def run(self, arguments: str, session: str) -> ToolResult:
        number = self.calls[session]
        self.calls[session] += 1
        await asyncio.sleep(self.latency(session, number))
        return ToolResult(self.result)

    async def release(self, session: str) -> None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Questions:
    """A task: the same questions as `question` writes, in order."""

    length: int  # words of each question, about

    def sample(self, step: int, count: int) -> list[Problem]:
        return [self._problem(step * count + i) for i in range(count)]

    def held_out(self) -> list[Problem]:
        return self.sample(0, 1)

    def correct(self, answer: str, problem: Problem) -> float:
        return 0.0

    def demonstrations(self, step: int, count: int, dialect: Dialect) -> list[Demo]:
        return []

    def _problem(self, number: int) -> Problem:
        return Problem(str(number), question(number, self.length), ("none",), "benchmark")


class PlaceInGroup:
    """A reward that no trajectory shares with another of its group and none is equal to the mean of a group of even
    size, so that every trajectory is learned from."""

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]:
        return [[Reward(float(place)) for place in range(len(group))] for group in trajectories_PG]

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None: ...


# -- texts ----------------------------------------------------------------------------------------------


def question(number: int, words: int) -> str:
    """Question `number`, of `words` words give or take a fifth: prompts differ in length, as they do in practice."""
    rng = random.Random(number)
    length = round(words * rng.uniform(0.8, 1.2))
    text = f"{number}. " + "".join(SENTENCE.format(rng.choice(SUBJECTS)) for _ in range(length // 10 + 1))
    return " ".join(text.split()[:length])


def passage(tokens: int, tokenizer: HFTokenizer) -> str:
    """A search result of exactly `tokens` tokens."""
    text = "".join(PASSAGE.format(i, subject, subject) for i, subject in enumerate(SUBJECTS * (tokens // 50 + 1)))
    return tokenizer.decode(tokenizer.encode(text)[:tokens]).strip()


def limits(calls: int, turn_tokens: int) -> Limits:
    """`calls` tool calls, and a completion more, of `turn_tokens` each."""
    return Limits(
        max_calls=calls, max_turns=calls + 1, max_tokens=1_000_000, max_turn_tokens=turn_tokens,
        max_observation_tokens=1_000_000, tool_timeout_s=600,
    )  # fmt: skip


def make_player(engine: Engine, tokenizer: HFTokenizer, tool: SlowSearch, calls: int, turn_tokens: int) -> Player:
    return Player(
        engine=engine,
        tokenizer=tokenizer,
        dialect=EveryTurnCalls(),
        tools={tool.name: tool},
        limits=limits(calls, turn_tokens),
    )
