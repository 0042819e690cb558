"""One trajectory, turn by turn: what is an action, what is counted, and when it is over."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
from torch import Tensor

from otcrl.dialects.prompting import Prompting
from otcrl.dialects.search_r1 import SearchR1
from otcrl.errors import DataError, EngineError, ToolUnavailable, TrainingError
from otcrl.models.tiny import word_tokenizer
from otcrl.protocols import Action, Call, Calls, Completion, Malformed, Nothing, Tool, ToolResult
from otcrl.rewards.format import FormatReward
from otcrl.rollout.collect import Collector, Progress, stable_seed
from otcrl.rollout.loop import MOST_MALFORMED, Limits, Player, fewer, whole_lines
from otcrl.types import Outcome, Problem, Stop, Trajectory, count_calls

WORDS = [
    "b </answer>",
    *"who ? a b c <think> </think> <search> </search> <answer> </answer> <information> </information> Error:".split(),
]  # the first can be sampled, and is two tokens when its text is encoded
TOKENIZER = word_tokenizer(WORDS)
DIALECT = SearchR1(
    instructions="{question}", observation_template=" <information> {result} </information> ", require_think=False
)
PROBLEM = Problem(id="toy/train/0", question="who ?", answers=("b",), source="toy")
LIMITS = Limits(
    max_calls=2, max_turns=5, max_tokens=60, max_turn_tokens=10, max_observation_tokens=3, tool_timeout_s=0.2
)
CALL, ANSWER = "<search> a </search>", "<answer> b </answer>"


class Script:
    """An engine that says its lines in order, whatever it is asked."""

    version, context = 3, 64

    def __init__(self, *lines: str, finished: bool = True) -> None:
        self.lines, self.finished = list(lines), finished
        self.prompts: list[list[int]] = []
        self.seeds: list[int] = []
        self.priorities: list[int] = []
        self.released: list[str] = []

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
        self.prompts.append(list(token_ids))
        self.seeds.append(seed)
        self.priorities.append(priority)
        ids = TOKENIZER.encode(self.lines.pop(0))[:max_tokens]
        return Completion(ids, [-0.25] * len(ids), [self.version] * len(ids), self.finished)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        raise EngineError("it only says its lines")

    def release(self, session: str) -> None:
        self.released.append(session)

    async def sleep(self) -> None: ...

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None: ...

    async def close(self) -> None: ...


class Search:
    name, description = "search", "finds"

    def __init__(self, result: str = "b", outcome: Outcome = Outcome.OK, error: str = "", seconds: float = 0) -> None:
        self.result, self.outcome, self.error, self.seconds, self.asked = result, outcome, error, seconds, []
        self.sessions: list[str] = []
        self.released: list[str] = []

    async def run(self, arguments: str, session: str) -> ToolResult:
        self.asked.append(arguments)
        self.sessions.append(session)
        await asyncio.sleep(self.seconds)
        if self.error:
            raise ToolUnavailable(self.error)
        return ToolResult(self.result, self.outcome)

    async def release(self, session: str) -> None:
        self.released.append(session)

    async def close(self) -> None: ...


def test_half_a_surrogate_pair_in_a_result_ends_no_run():
    """Corpora hold texts that were cut in the middle of an emoji."""
    t = play(Script(CALL, ANSWER), Search(result="b \ud83d"))
    assert t.tool_calls[0].result == "b ?"
    assert t.stop is Stop.ANSWERED


def test_a_tool_that_says_nothing_is_shown_to_have_said_nothing():
    t = play(Script(CALL, ANSWER), Search(result=""))
    assert t.tool_calls[0].result == "(no result)"


class Plain(Search):
    def run(self, arguments: str, session: str) -> Any:
        return "b"


class Silent(Search):
    async def run(self, arguments: str, session: str) -> Any: ...


@pytest.mark.parametrize(
    ("tool", "why"),
    [
        (Plain(), "Plain.run must be `async def`, and it returned 'b'"),
        (Silent(), "Silent.run must return a ToolResult, and it returned None"),
    ],
)
def test_a_tool_that_returns_something_else_is_named(tool, why):
    with pytest.raises(TrainingError, match=f"tools: {why}"):
        play(Script(CALL, ANSWER), tool)


class LastBox(SearchR1):
    """As ToRL: what any turn answered counts, whatever the last one says."""

    def answered(self, sampled_turns: Sequence[str]) -> str | None:
        return next((turn.split()[0] for turn in reversed(sampled_turns) if turn.startswith("c")), None)


def player(engine: Script, tool: Search | None = None, limits: Limits = LIMITS) -> Player:
    return Player(
        engine=engine, tokenizer=TOKENIZER, dialect=DIALECT, tools={"search": tool or Search()}, limits=limits
    )


def play(
    engine: Script,
    tool: Search | None = None,
    problem: Problem = PROBLEM,
    opening: str = "",
    limits: Limits = LIMITS,
) -> Trajectory:
    return asyncio.run(
        player(engine, tool, limits).play(problem, temperature=1.0, seed=7, session="s", opening=opening)
    )


def test_where_the_last_answer_of_all_turns_counts_an_earlier_one_is_remembered():
    dialect = LastBox(**vars(DIALECT))
    for lines, stop, answer in (
        (["c <search> a </search>", "b"], Stop.ANSWERED, "c"),
        (["c <search> a </search>", ANSWER], Stop.ANSWERED, "b"),
        (["c <search> a </search>", CALL, CALL], Stop.MAX_CALLS, "c"),
        (["a <search> a </search>", "b"], Stop.INVALID, None),
    ):
        who = replace(player(Script(*lines)), dialect=dialect)
        t = asyncio.run(who.play(PROBLEM, temperature=1.0, seed=7, session="s"))
        assert (t.stop, t.answer) == (stop, answer), lines


def actions(t: Trajectory) -> list[str]:
    return [TOKENIZER.decode([i]) for i, is_action in zip(t.token_ids, t.action_mask, strict=True) if is_action]


def injected(t: Trajectory) -> list[str]:
    return [TOKENIZER.decode([i]) for i, is_action in zip(t.token_ids, t.action_mask, strict=True) if not is_action]


def test_sampled_tokens_are_actions_and_nothing_else_is():
    t = play(Script(CALL, ANSWER))
    assert actions(t) == f"{CALL} {ANSWER}".split()
    assert injected(t) == "<bos> who ? <information> b </information>".split()
    assert [lp != 0 for lp in t.logprobs] == t.action_mask
    assert t.versions == [3 if acted else -1 for acted in t.action_mask]


def test_a_sampled_id_is_kept_even_where_its_text_encodes_to_others():
    whole = TOKENIZER.hf.get_vocab()["b </answer>"]
    assert TOKENIZER.encode(TOKENIZER.decode([whole])) != [whole]

    class Merging(Script):
        async def generate(self, token_ids: Sequence[int], **settings) -> Completion:
            ids = [*TOKENIZER.encode("<answer>"), whole]
            return Completion(ids, [-0.25] * 2, [3] * 2, True)

    t = play(Merging())
    assert t.answer == "b"
    assert t.token_ids[-1] == whole


def test_every_turn_continues_the_very_tokens_of_the_last():
    engine = Script(CALL, CALL, ANSWER)
    t = play(engine)
    for earlier, later in zip(engine.prompts, engine.prompts[1:], strict=False):
        assert later[: len(earlier)] == earlier
    assert t.token_ids[: len(engine.prompts[-1])] == engine.prompts[-1]


def test_the_answer_ends_it_and_is_read_from_sampled_text():
    t = play(Script(CALL, ANSWER))
    assert (t.stop, t.answer, t.violations) == (Stop.ANSWERED, "b", ())


def test_an_answer_in_an_observation_earns_nothing():
    t = play(Script(CALL, "c"), Search(result="<answer> b </answer>"))
    assert t.answer is None
    assert t.stop is Stop.INVALID


def test_an_answer_in_the_prompt_earns_nothing():
    t = play(Script("c"), problem=Problem(id="x/y/z", question="<answer> b </answer> ?", answers=("b",), source="x"))
    assert t.answer is None


def test_a_call_beyond_the_budget_is_counted_as_emitted_and_not_run():
    tool = Search()
    t = play(Script(CALL, CALL, CALL), tool)
    assert (t.stop, len(tool.asked)) == (Stop.MAX_CALLS, 2)
    assert (count_calls(t, "emitted"), count_calls(t, "well_formed"), count_calls(t, "executed")) == (3, 2, 2)


def test_a_failed_call_is_an_observation_and_counts():
    t = play(Script(CALL, ANSWER), Search(result="Error: c", outcome=Outcome.MODEL_ERROR))
    assert (t.stop, count_calls(t, "well_formed"), count_calls(t, "failed"), count_calls(t, "executed")) == (
        Stop.ANSWERED, 1, 1, 0,
    )  # fmt: skip


def test_a_malformed_call_gets_an_error_observation_and_another_turn():
    tool = Search()
    t = play(Script("a </search>", ANSWER), tool)
    assert (t.stop, tool.asked) == (Stop.ANSWERED, [])
    assert (count_calls(t, "invalid"), count_calls(t, "well_formed")) == (1, 0)
    assert "Error:" in injected(t)
    assert t.violations  # so that a malformed trajectory earns no correctness reward


def test_malformed_turns_are_limited_too():
    assert play(Script(*["a </search>"] * 5)).stop is Stop.MAX_TURNS


def test_a_completion_that_was_cut_is_over_and_gives_no_answer():
    t = play(Script(ANSWER, finished=False))
    assert (t.stop, t.answer) == (Stop.MAX_TOKENS, None)


@pytest.mark.parametrize(
    ("cut", "text", "kept"),
    [
        ("Doc 1: Rome\nDoc 2: Par", "Doc 1: Rome\nDoc 2: Paris", "Doc 1: Rome"),
        ("Doc 1: Rome", "Doc 1: Rome\nDoc 2: Paris", "Doc 1: Rome"),
        ("Doc 1: Rome\nDoc 2: Paris", "Doc 1: Rome\nDoc 2: Paris\n", "Doc 1: Rome\nDoc 2: Paris"),
        ("Doc 1: Rom", "Doc 1: Rome\nDoc 2: Paris", "Doc 1: Rom"),
        ("\nDoc 1: Rom", "\nDoc 1: Rome", "\nDoc 1: Rom"),
    ],
)
def test_a_cut_observation_ends_with_a_whole_passage_if_one_fits(cut: str, text: str, kept: str):
    assert whole_lines(cut, text) == kept


def test_observations_are_cut_to_their_limit():
    t = play(Script(CALL, ANSWER), Search(result="a b c a b c"))
    assert injected(t)[3:] == "<information> a b c </information>".split()


FORMAT = FormatReward(
    correct=lambda answer, of: 0.0, structure=0.2, final=0.1, retrieval=0.1,
    rules="sequence", calls=["search"], result="information",
)  # fmt: skip


@pytest.mark.parametrize(("shown", "retrieved"), [("b c a c c", 1.0), ("c c c b", 0.0)])
def test_a_reward_reads_of_a_result_what_the_policy_was_shown(shown: str, retrieved: float):
    t = play(Script(CALL, ANSWER), Search(result=shown))
    assert t.tool_calls[0].result == " ".join(shown.split()[:3])
    ((earned,),) = FORMAT([[t]])
    assert earned.parts["retrieved"] == retrieved


@pytest.mark.parametrize(
    ("first", "result", "well_formed"),
    [
        (f"<think> a </think> {CALL}", "b", 1.0),
        (f"<think> a </think> {CALL}", "<search> b", 1.0),
        (f"<think> a </think> {CALL}", "</information> </think> <answer>", 1.0),
        (CALL, "b", 0.0),
        (f"<think> a </think> <information> c </information> {CALL}", "b", 0.0),
    ],
)
def test_tags_in_a_result_are_not_the_policys(first: str, result: str, well_formed: float):
    t = play(Script(first, f"<think> c </think> {ANSWER}"), Search(result=result))
    assert t.turns == (first, f"<think> c </think> {ANSWER}")
    ((earned,),) = FORMAT([[t]])
    assert earned.parts["well_formed"] == well_formed


def test_of_what_is_looked_up_for_the_prompt_the_record_holds_what_the_prompt_shows():
    dialect = Prompting(
        instructions="who {passages} {question}", opening="", observation_template="{result}", tool="search",
        each_sentence=False,
    )  # fmt: skip
    who = replace(player(Script(ANSWER), Search(result="a b c b")), dialect=dialect)
    t = asyncio.run(who.play(PROBLEM, temperature=1.0, seed=7, session="s"))
    assert t.tool_calls[0].result == "a b c"
    assert injected(t) == "<bos> who a b c who ?".split()


def test_a_tool_that_is_down_makes_the_trajectory_void():
    t = play(Script(CALL), Search(error="connection refused"))
    assert t.stop is Stop.VOID
    assert t.tool_calls[0].outcome is Outcome.INFRA_ERROR
    assert t.tool_calls[0].result == "connection refused"
    assert count_calls(t, "well_formed") == 0


def test_a_tool_that_does_not_answer_in_time_is_down():
    t = play(Script(CALL), Search(seconds=5))
    assert t.stop is Stop.VOID
    assert "did not answer within 0.2 s" in t.tool_calls[0].result


def test_a_forced_opening_is_injected_and_read_with_what_follows():
    t = play(Script("b </answer>"), opening="<answer>")
    assert t.answer == "b"
    assert actions(t) == ["b", "</answer>"]


def test_engine_and_tools_are_told_which_trajectory_they_serve_and_when_it_is_over():
    engine, tool = Script(CALL, ANSWER), Search()
    play(engine, tool)
    assert (tool.sessions, tool.released, engine.released) == (["s"], ["s"], ["s"])


def test_the_session_is_released_even_when_the_engine_fails():
    engine, tool = Script(), Search()
    with pytest.raises(IndexError):
        play(engine, tool)
    assert (tool.released, engine.released) == (["s"], ["s"])


def test_every_tool_is_released_though_the_trajectory_is_cancelled_while_it_waits_for_one():
    """A group that is given up begins again under the same names: nothing of the first time may be left."""

    class Busy(Search):
        async def release(self, session: str) -> None:
            await asyncio.sleep(0.05)
            await super().release(session)

    busy, other = Busy(), Search()
    both = replace(player(Script(ANSWER)), tools={"search": busy, "other": other})

    async def given_up() -> bool:
        playing = asyncio.create_task(both.play(PROBLEM, temperature=1.0, seed=7, session="s"))
        await asyncio.sleep(0.02)
        playing.cancel()
        await asyncio.wait([playing])
        return playing.cancelled()

    assert asyncio.run(given_up())
    assert (busy.released, other.released) == (["s"], ["s"])


def test_a_problem_without_a_question_is_refused_by_name():
    with pytest.raises(DataError, match="'toy/train/9' has an empty prompt"):
        play(Script(ANSWER), problem=Problem(id="toy/train/9", question="  ", answers=("b",), source="toy"))


LONG = Problem(id="toy/train/1", question="a " * 100, answers=("b",), source="toy")


def test_a_prompt_longer_than_the_context_is_refused_before_a_run_with_both_numbers():
    with pytest.raises(DataError, match="prompt of 101 tokens, and the context is 64"):
        player(Script()).check(LONG)


@pytest.mark.parametrize(
    ("problem", "opening"),
    [(LONG, ""), (PROBLEM, "<answer> b " * 40)],
    ids=["the prompt", "the prompt and a forced opening"],
)
def test_what_does_not_fit_into_the_context_ends_its_trajectory_and_nothing_else(problem, opening):
    t = play(Script(), problem=problem, opening=opening)
    assert (t.stop, t.answer, actions(t)) == (Stop.MAX_TOKENS, None, [])


def test_an_observation_that_fills_the_context_ends_the_trajectory():
    tool = Search(result="a " * 60)
    t = play(Script(CALL), tool, limits=replace(LIMITS, max_tokens=1000, max_observation_tokens=100))
    assert (t.stop, len(actions(t)), t.answer) == (Stop.MAX_TOKENS, 3, None)
    assert len(t.token_ids) <= Script.context
    assert t.tool_calls[0].result == "", "nothing of it was shown, so it earns nothing"


def test_of_many_broken_calls_in_a_turn_a_few_are_answered_and_the_turn_is_kept_once():
    """A policy that repeats itself opens hundreds: each would be answered, and recorded with the whole turn."""

    class Flood(SearchR1):
        def parse(self, text: str, tools: Mapping[str, Tool]) -> Action:
            return Calls((Call("search", "b"), *[Malformed("It is broken.")] * 100)) if "search" in text else Nothing()

    dialect = Flood(**vars_of(DIALECT))
    t = asyncio.run(
        replace(player(Script(CALL, "b")), dialect=dialect, limits=replace(LIMITS, max_tokens=1000)).play(
            PROBLEM, temperature=1.0, seed=7, session="s"
        )
    )
    outcomes = [call.outcome for call in t.tool_calls]
    assert outcomes == [Outcome.OK, *[Outcome.INVALID] * MOST_MALFORMED]
    assert [bool(call.arguments) for call in t.tool_calls] == [True, True, False, False, False]
    said = [each.why for each in fewer([Malformed("It is broken.")] * 100) if isinstance(each, Malformed)]
    assert said == [*["It is broken."] * 3, "It is broken. So are 96 more calls of this turn wrong."]


def vars_of(dialect: SearchR1) -> dict[str, Any]:
    return {f.name: getattr(dialect, f.name) for f in fields(dialect)}


# -- one trajectory among many --------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "priorities"), [("nearly_done", [0, -1, -2]), ("least_done", [0, 1, 2])])
def test_who_has_made_more_turns_goes_first_or_last(first, priorities):
    engine = Script(CALL, CALL, ANSWER)
    asyncio.run(replace(player(engine), first=first).play(PROBLEM, temperature=1.0, seed=7, session="s"))
    assert engine.priorities == priorities


def test_an_order_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="first must be nearly_done or least_done, got 'newest'"):
        replace(player(Script()), first="newest")


SHORT = replace(LIMITS, timeout_s=0.05)


class Stuck(Script):
    """An engine that has said its lines and then never answers."""

    was_cancelled = False

    async def generate(self, token_ids: Sequence[int], **settings) -> Completion:
        if self.lines:
            return await super().generate(token_ids, **settings)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        raise AssertionError("nobody waits that long")


def test_a_trajectory_past_its_deadline_is_void_and_its_request_is_cancelled():
    engine, tool = Stuck(CALL), Search()
    t = play(engine, tool, limits=SHORT)
    assert (t.stop, t.timings["deadline_s"]) == (Stop.VOID, 0.05)
    assert engine.was_cancelled
    assert (tool.released, engine.released) == (["s"], ["s"])
    assert actions(t) == CALL.split()


def test_a_trajectory_whose_tool_is_past_the_deadline_says_which():
    t = play(Script(CALL, CALL), Search(seconds=60), limits=replace(SHORT, tool_timeout_s=30))
    assert (t.stop, t.timings["deadline_s"]) == (Stop.VOID, 0.05)
    assert [(call.tool, call.outcome) for call in t.tool_calls] == [("search", Outcome.INFRA_ERROR)]


def test_a_tools_own_timeout_is_not_the_trajectorys():
    t = play(Script(CALL), Search(seconds=60), limits=replace(LIMITS, tool_timeout_s=0.02, timeout_s=30))
    assert t.stop is Stop.VOID
    assert "deadline_s" not in t.timings


def test_a_trajectory_in_time_knows_of_no_deadline():
    assert "deadline_s" not in play(Script(ANSWER), limits=SHORT).timings


def test_an_engine_that_runs_into_a_timeout_of_its_own_is_not_taken_for_a_late_trajectory():
    class Failing(Script):
        async def generate(self, token_ids: Sequence[int], **settings) -> Completion:
            raise TimeoutError("the engine's")

    with pytest.raises(TimeoutError, match="the engine's"):
        play(Failing(), limits=SHORT)


# -- many trajectories ------------------------------------------------------------------------------------


def evaluated(engine: Script, names: Sequence[str], seed: int = 0, progress: Progress | None = None) -> Script:
    collector = Collector(player=player(engine), group_size=3, temperature=1.0, concurrency=2, seed=seed)
    asyncio.run(collector.play([PROBLEM] * len(names), names, 0.0, "", progress))
    return engine


def test_every_trajectory_has_a_seed_of_its_own_fixed_by_the_run_and_its_name():
    def seeds(names: str, seed: int = 0) -> list[int]:
        return evaluated(Script(*[ANSWER] * 3), list(names), seed).seeds

    assert len(set(seeds("abc"))) == 3
    assert seeds("abc") == seeds("abc")
    assert not set(seeds("abc")) & set(seeds("def"))
    assert not set(seeds("abc")) & set(seeds("abc", seed=1))
    assert 0 <= stable_seed(0, "x") < 2**63


def test_progress_is_told_for_every_trajectory():
    told: list[tuple[int, int]] = []
    evaluated(Script(*[ANSWER] * 3), ["a", "b", "c"], progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
