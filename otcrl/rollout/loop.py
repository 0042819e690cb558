"""Multi-turn rollout: generate, run the tool the policy asked for, append its result, repeat.

Tokens in, tokens out: the token list only ever grows at its end. Text is decoded to find tool calls,
never re-encoded, so the trainer sees exactly the tokens the policy sampled.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from otcrl.errors import DataError, ToolUnavailable, TrainingError
from otcrl.protocols import (
    Answer,
    Call,
    Calls,
    Completion,
    Concludes,
    Dialect,
    Engine,
    Malformed,
    Prepares,
    Remembers,
    Tokenizer,
    Tool,
    ToolResult,
)
from otcrl.rollout.pace import paced
from otcrl.types import Metrics, Outcome, Problem, Stop, ToolCall, Trajectory

First = Literal["nearly_done", "least_done"]
NOTHING = "(no result)"  # what the policy is shown where a tool says nothing
MOST_MALFORMED = 4  # calls of one turn, each of which is answered
ORDERS: Mapping[str, int] = {"nearly_done": -1, "least_done": 1}  # a lower priority goes first


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one trajectory may spend. Tokens exclude the prompt."""

    max_calls: int  # well-formed tool calls
    max_turns: int  # completions, malformed ones included
    max_tokens: int  # sampled and observation tokens together
    max_turn_tokens: int  # sampled tokens in one completion
    max_observation_tokens: int  # of each result; a longer one is cut after the last line that is whole
    tool_timeout_s: float
    timeout_s: float | None = None  # of the whole trajectory; None: as long as it takes

    def __post_init__(self) -> None:
        if self.max_calls < 0:
            raise ValueError(f"max_calls must be at least 0, got {self.max_calls}")
        for name in ("max_turns", "max_tokens", "max_turn_tokens", "max_observation_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.tool_timeout_s > 0:
            raise ValueError(f"tool_timeout_s must be above 0, got {self.tool_timeout_s}")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be null or above 0, got {self.timeout_s}")


@dataclass(slots=True)
class Draft:
    """A trajectory in the making: four lists that grow together."""

    token_ids: list[int] = field(default_factory=list)
    action_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)  # sampled text, one entry for each completion
    calls: list[ToolCall] = field(default_factory=list)
    answer: str | None = None
    generate_s: float = 0.0
    prompt_length: int = 0
    begun: float = field(default_factory=time.monotonic)
    waits_for: ToolCall | None = None  # the call that runs, as it is recorded should it never come back
    deadline_s: float | None = None  # the one that it has passed

    def open(self, prompt: list[int], opening: list[int]) -> None:
        """Begins, or begins again, with a prompt and what is written for the policy after it."""
        self.token_ids, self.action_mask, self.logprobs, self.versions = [*prompt, *opening], [], [], []
        self.prompt_length = len(prompt)
        self.pad()

    def inject(self, ids: list[int]) -> None:
        self.token_ids += ids
        self.pad()

    def sample(self, completion: Completion, text: str) -> None:
        self.token_ids += completion.token_ids
        self.action_mask += [True] * len(completion.token_ids)
        self.logprobs += completion.logprobs
        self.versions += completion.versions
        self.turns.append(text)

    def pad(self) -> None:
        """Whatever is not sampled is not an action."""
        missing = len(self.token_ids) - len(self.action_mask)
        self.action_mask += [False] * missing
        self.logprobs += [0.0] * missing
        self.versions += [-1] * missing

    def timings(self) -> Metrics:
        tool_s = sum(call.seconds for call in self.calls)
        spent = {"total_s": time.monotonic() - self.begun, "generate_s": self.generate_s, "tool_s": tool_s}
        return spent if self.deadline_s is None else spent | {"deadline_s": self.deadline_s}


@dataclass(frozen=True, kw_only=True)
class Player:
    """Plays one problem at a time; any number of its coroutines run side by side."""

    engine: Engine
    tokenizer: Tokenizer
    dialect: Dialect
    tools: Mapping[str, Tool]
    limits: Limits
    first: First = "nearly_done"  # of the trajectories that wait for the engine

    def __post_init__(self) -> None:
        if self.first not in ORDERS:
            raise ValueError(f"first must be {' or '.join(ORDERS)}, got {self.first!r}")

    def open(self, problem: Problem) -> list[int]:
        """The ids that open a trajectory. Raises DataError when there are none."""
        ids = self.tokenizer.prompt_ids(self.dialect.prompt(problem, self.tools))
        if not problem.question.strip() or not ids:
            raise DataError(f"problem {problem.id!r} has an empty prompt")
        return ids

    def check(self, problem: Problem) -> None:
        """Before a run: raises DataError for a prompt that is empty, or leaves no room to answer."""
        ids = self.open(problem)
        if len(ids) >= self.engine.context:
            raise DataError(
                f"problem {problem.id!r} has a prompt of {len(ids)} tokens, and the context is "
                f"{self.engine.context}: raise engine.context or drop the problem"
            )

    async def _release(self, session: str) -> None:
        for tool in self.tools.values():
            await tool.release(session)

    async def play(
        self, problem: Problem, *, temperature: float, seed: int, session: str, opening: str = ""
    ) -> Trajectory:
        """One trajectory. `opening` is injected after the prompt (evaluation: to force a call or an answer).

        One that does not fit into the context, or that takes too long, is over: it never stops the others.
        """
        if not opening and isinstance(self.dialect, Prepares):
            opening = self.dialect.opening
        draft = Draft()
        draft.open(self.open(problem), self.tokenizer.encode(opening))
        try:
            stop = await self._turns(problem, draft, opening, temperature=temperature, seed=seed, session=session)
        finally:
            self.engine.release(session)
            await to_its_end(self._release(session))
        if draft.answer is None and isinstance(self.dialect, Remembers):
            draft.answer = self.dialect.answered(draft.turns)
            stop = Stop.ANSWERED if draft.answer is not None and stop is Stop.INVALID else stop
        return Trajectory(
            problem=problem,
            token_ids=draft.token_ids,
            action_mask=draft.action_mask,
            logprobs=draft.logprobs,
            versions=draft.versions,
            tool_calls=tuple(draft.calls),
            answer=draft.answer,
            violations=self.dialect.violations(draft.turns, self.tools),
            stop=stop,
            response=self.tokenizer.decode(draft.token_ids[draft.prompt_length :]),
            turns=tuple(draft.turns),
            timings=draft.timings(),
        )

    async def _turns(
        self, problem: Problem, draft: Draft, opening: str, *, temperature: float, seed: int, session: str
    ) -> Stop:
        """Turn after turn until one is the last, or the deadline passes."""
        deadline = asyncio.timeout(self.limits.timeout_s)
        try:
            async with deadline:
                stop = await self._look_up(problem, draft, opening, session)
                while stop is None:
                    stop = await self._turn(draft, opening, temperature=temperature, seed=seed, session=session)
                    opening = ""
                return stop
        except TimeoutError:
            if not deadline.expired():
                raise
            draft.deadline_s = self.limits.timeout_s
            draft.calls += [draft.waits_for] if draft.waits_for else []
            return Stop.VOID

    async def _look_up(self, problem: Problem, draft: Draft, opening: str, session: str) -> Stop | None:
        """What the dialect's prompt shows is looked up, and the prompt made with it."""
        if not isinstance(self.dialect, Prepares) or (call := self.dialect.look_up(problem)) is None:
            return None
        done = await self._call(draft, call, "", session)
        draft.calls.append(done)
        if done.outcome is Outcome.OVER_BUDGET:
            return Stop.MAX_CALLS
        if done.outcome is Outcome.INFRA_ERROR:
            return Stop.VOID
        draft.calls[-1] = done = replace(done, result=self._cut(done.result))
        prompt = self.dialect.prompt_with(problem, done.result)
        draft.open(self.tokenizer.prompt_ids(prompt), self.tokenizer.encode(opening))
        return None

    async def _turn(self, draft: Draft, opening: str, *, temperature: float, seed: int, session: str) -> Stop | None:
        """One completion and what it asks for. Returns why the trajectory is over, or None."""
        tools = self.tools
        if (closing := self._conclusion(draft)) is not None:
            tools = {}
            if closing and not opening:
                opening = closing
                draft.inject(self.tokenizer.encode(opening))
        if (room := self._room(draft)) <= 0:
            return Stop.MAX_TOKENS
        if len(draft.turns) == self.limits.max_turns:
            return Stop.MAX_TURNS
        begun = time.monotonic()
        completion = await self.engine.generate(
            draft.token_ids,
            stop=self.dialect.stop(tools),
            max_tokens=min(room, self.limits.max_turn_tokens),
            temperature=temperature,
            seed=seed,
            session=session,
            priority=ORDERS[self.first] * len(draft.turns),
        )
        draft.generate_s += time.monotonic() - begun
        text = opening + self.tokenizer.decode(without_end(completion.token_ids, self.tokenizer.stop_ids))
        draft.sample(completion, text)
        if not completion.finished:
            return Stop.MAX_TOKENS
        return await self._act(draft, text, tools, session)

    def _conclusion(self, draft: Draft) -> str | None:
        """What is written for the policy before a turn that is for the answer alone; None before any other."""
        turns_left = self.limits.max_turns - len(draft.turns)
        if not isinstance(self.dialect, Concludes) or turns_left == 0:
            return None
        return self.dialect.conclusion if turns_left == 1 or self._is_spent(draft) else None

    def _is_spent(self, draft: Draft) -> bool:
        """Whether the budget of calls is."""
        ran = sum(call.outcome in (Outcome.OK, Outcome.MODEL_ERROR) for call in draft.calls)
        return ran == self.limits.max_calls

    async def _act(self, draft: Draft, text: str, tools: Mapping[str, Tool], session: str) -> Stop | None:
        match self.dialect.parse(text, tools):
            case Answer(answer):
                draft.answer = answer
                return Stop.ANSWERED
            case Calls(asked):
                asked = tuple(fewer(asked))
            case Call() | Malformed() as one:
                asked = (one,)
            case _:
                return Stop.INVALID
        before, written = len(draft.calls), text
        for each in asked:
            call = await self._call(draft, each, written, session)
            draft.calls.append(call)
            written = "" if isinstance(each, Malformed) else written  # a turn with many is not kept with each
            if call.outcome is Outcome.OVER_BUDGET:
                return Stop.MAX_CALLS
            if call.outcome is Outcome.INFRA_ERROR:
                return Stop.VOID
        made = draft.calls[before:]
        ids, shown = self._observation([call.result for call in made])
        fits = len(ids) <= self._room(draft)
        shown = shown if fits else [""] * len(made)  # what was not shown earns nothing
        draft.calls[before:] = [replace(call, result=text) for call, text in zip(made, shown, strict=True)]
        if not fits:
            return Stop.MAX_TOKENS
        draft.inject(ids)
        return None

    def _room(self, draft: Draft) -> int:
        """Tokens that it may still grow by."""
        spent = len(draft.token_ids) - draft.prompt_length
        return min(self.limits.max_tokens - spent, self.engine.context - len(draft.token_ids))

    async def _call(self, draft: Draft, asked: Call | Malformed, text: str, session: str) -> ToolCall:
        """`text` is the turn that a malformed call is recorded with."""
        if isinstance(asked, Malformed):
            return ToolCall("", text, f"Error: {asked.why}", Outcome.INVALID)
        if self._is_spent(draft):
            return ToolCall(asked.tool, asked.arguments, "", Outcome.OVER_BUDGET)
        draft.waits_for = ToolCall(asked.tool, asked.arguments, "not back before the deadline", Outcome.INFRA_ERROR)
        tool = self.tools[asked.tool]
        async with paced(self.engine, tool):
            call = await run_call(tool, asked.arguments, session, self.limits.tool_timeout_s)
        draft.waits_for = None
        return call

    def _observation(self, results: list[str]) -> tuple[list[int], list[str]]:
        """Ids that carry results, and what they show of each: a reward must not pay for what was cut off."""
        whole = self.tokenizer.encode(self.dialect.observation(*results))
        if len(whole) <= self.limits.max_observation_tokens:  # tokenizing is most of what a rollout costs here
            return whole, results
        shown = [self._cut(result) for result in results]
        return whole if shown == results else self.tokenizer.encode(self.dialect.observation(*shown)), shown

    def _cut(self, result: str) -> str:
        """As much of a result as the policy is shown."""
        ids = self.tokenizer.encode(result)
        if len(ids) <= self.limits.max_observation_tokens:
            return result
        return whole_lines(self.tokenizer.decode(ids[: self.limits.max_observation_tokens]), result)


def fewer(asked: Sequence[Call | Malformed]) -> Iterator[Call | Malformed]:
    """Without most of those that are malformed: a policy that repeats itself opens hundreds in one turn."""
    more = sum(isinstance(each, Malformed) for each in asked) - MOST_MALFORMED
    broken = 0
    for each in asked:
        broken += isinstance(each, Malformed)
        if more > 0 and isinstance(each, Malformed) and broken == MOST_MALFORMED:
            yield Malformed(f"{each.why} So are {more} more calls of this turn wrong.")
            return
        yield each


def without_end(ids: Sequence[int], stop_ids: frozenset[int]) -> Sequence[int]:
    """What was said before the token that ended it: the text of that token is no part of an answer or a call."""
    return ids[:-1] if ids and ids[-1] in stop_ids else ids


def whole_lines(cut: str, text: str) -> str:
    """The beginning `cut` of `text` without its last line if that is not whole; as it is where there is no other.

    A passage is a line, so what the policy reads ends with one.
    """
    whole, _, _ = cut.rpartition("\n")
    return cut if text[len(cut) :].startswith("\n") or not whole.strip() else whole


async def run_call(tool: Tool, arguments: str, session: str, timeout_s: float) -> ToolCall:
    """The call and what became of it. A tool that is down, or does not answer in time, is an infrastructure error."""
    begun = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            result = await answer_of(tool, arguments, session)
    except ToolUnavailable as error:
        result = ToolResult(str(error), Outcome.INFRA_ERROR)
    except TimeoutError:
        result = ToolResult(f"{tool.name} did not answer within {timeout_s} s", Outcome.INFRA_ERROR)
    text = (result.text or NOTHING).encode(errors="replace").decode()  # half a surrogate pair is no text with tokens
    return ToolCall(tool.name, arguments, text, result.outcome, time.monotonic() - begun, result.price, result.cached)


async def answer_of(tool: Tool, arguments: str, session: str) -> ToolResult:
    """Raises TrainingError for what is none: a tool may be anybody's code."""
    running: object = tool.run(arguments, session)
    if not inspect.isawaitable(running):
        raise TrainingError(f"tools: {type(tool).__name__}.run must be `async def`, and it returned {running!r}")
    result = await running
    if not isinstance(result, ToolResult):
        raise TrainingError(f"tools: {type(tool).__name__}.run must return a ToolResult, and it returned {result!r}")
    return result


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Awaits it; a cancellation takes effect when it is done, not in its middle."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not report it as overlooked
        raise
