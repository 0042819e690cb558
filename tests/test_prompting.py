"""Systems without RL: what they are shown, what they may write, and what counts as a call of theirs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from otcrl import cli
from otcrl.compose import compose
from otcrl.construct import construct
from otcrl.dialects.prompting import Prompting
from otcrl.errors import ConfigError, EngineError
from otcrl.evaluate.attempts import read_attempts
from otcrl.presets import find_preset
from otcrl.protocols import Answer, Call, Completion, Dialect, Malformed, Nothing, ToolResult
from otcrl.rollout.loop import Limits, Player
from otcrl.types import Outcome, Problem, Stop, Trajectory, count_calls
from tests.test_rollout import Search
from tests.tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer(".\n", "</answer>")
PROBLEM = Problem(id="toy/test/0", question="Who wrote {passages}?", answers=("b",), source="toy")
LIMITS = Limits(
    max_calls=3, max_turns=5, max_tokens=400, max_turn_tokens=100, max_observation_tokens=30, tool_timeout_s=0.2
)


def dialect(name: str) -> Dialect:
    config = compose([f"dialect={name}"], preset=find_preset("quickstart"))
    return construct(config["dialect"], "dialect")


class Script:
    """An engine that says its lines in order; what ends in no stop string has ended by itself."""

    version, context = 3, 1000

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)
        self.prompts: list[list[int]] = []
        self.stops: list[Sequence[str]] = []

    async def generate(self, token_ids: Sequence[int], *, stop: Sequence[str], **settings: object) -> Completion:
        self.prompts.append(list(token_ids))
        self.stops.append(stop)
        ids = TOKENIZER.encode(self.lines.pop(0))
        return Completion(ids, [-0.25] * len(ids), [self.version] * len(ids), True)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        raise EngineError("it only says its lines")

    def release(self, session: str) -> None: ...

    async def sleep(self) -> None: ...

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None: ...

    async def close(self) -> None: ...


def play(name: str, engine: Script, tool: Search | None, limits: Limits = LIMITS, opening: str = "") -> Trajectory:
    tools = {} if tool is None else {"search": tool}
    player = Player(engine=engine, tokenizer=TOKENIZER, dialect=dialect(name), tools=tools, limits=limits)
    return asyncio.run(player.play(PROBLEM, temperature=0.0, seed=0, session="s", opening=opening))


def sampled(t: Trajectory) -> str:
    return TOKENIZER.decode([i for i, acted in zip(t.token_ids, t.action_mask, strict=True) if acted])


ANSWER = "<answer> b </answer>"


# -- direct, chain of thought ---------------------------------------------------------------------------


def test_a_chain_of_thought_is_one_turn_without_tools_that_ends_with_the_answer() -> None:
    tool = Search()
    t = play("cot", engine := Script(f"So: {ANSWER}"), tool)
    assert (t.stop, t.answer, t.tool_calls, tool.asked) == (Stop.ANSWERED, "b", (), [])
    assert TOKENIZER.decode(engine.prompts[0]).endswith("Question: Who wrote {passages}?")
    assert engine.stops == [["</answer>"]]


@pytest.mark.parametrize("said", ["b </answer>", "b", " b\n", "b</answer>."])
def test_all_that_a_direct_answer_says_is_the_answer_since_its_tag_was_written_for_it(said: str) -> None:
    t = play("direct", engine := Script(said), None)
    assert (t.stop, t.answer, t.tool_calls) == (Stop.ANSWERED, "b", ())
    assert TOKENIZER.decode(engine.prompts[0]).endswith("Who wrote {passages}?<answer>")
    assert sampled(t) == said


def test_the_token_that_ends_a_text_is_no_part_of_the_answer() -> None:
    class Ending(Script):
        async def generate(self, token_ids: Sequence[int], *, stop: Sequence[str], **settings: object) -> Completion:
            ids = [*TOKENIZER.encode("b"), TOKENIZER.end_id]
            return Completion(ids, [-0.25] * len(ids), [self.version] * len(ids), True)

    t = play("direct", Ending(), None)
    assert (t.answer, t.token_ids[-1], t.action_mask[-1]) == ("b", TOKENIZER.end_id, True)  # and still an action
    assert play("cot", Ending(), None).stop is Stop.INVALID  # `<eos>` is no tag that was never closed


def test_the_policy_has_no_tool_even_where_there_is_one() -> None:
    tool = Search()
    t = play("cot", Script("<search> q </search>", ANSWER), tool)
    assert t.tool_calls[-1].outcome is Outcome.INVALID
    assert play("cot", Script(f"<search> q </search> {ANSWER}"), tool).answer == "b"  # whatever else is in tags
    assert tool.asked == []


def test_an_answer_that_never_comes_is_none() -> None:
    t = play("cot", Script("b"), None)
    assert (t.stop, t.answer) == (Stop.INVALID, None)


# -- RAG ------------------------------------------------------------------------------------------------


CLOSE = " b </answer>"  # what is left to say after the opening


def test_rag_puts_the_passages_of_the_question_into_the_prompt_and_counts_one_call() -> None:
    tool = Search(result="Doc 1: {question}")
    t = play("rag", engine := Script(CLOSE), tool)
    assert tool.asked == [PROBLEM.question]
    prompt = TOKENIZER.decode(engine.prompts[0])
    assert "\nDoc 1: {question}\n" in prompt  # what a passage or a question spells out is no place to fill
    assert prompt.endswith("Question: Who wrote {passages}?<answer>")
    assert (count_calls(t, "well_formed"), t.answer, t.response) == (1, "b", ANSWER)


def test_passages_are_no_actions_and_every_token_is_as_the_engine_saw_it() -> None:
    t = play("rag", engine := Script(CLOSE), Search(result="<answer> c </answer>"))
    assert sampled(t) == CLOSE
    assert t.token_ids[: len(engine.prompts[0])] == engine.prompts[0]
    assert not any(t.action_mask[: len(engine.prompts[0])])
    assert t.answer == "b"  # one that stands in a passage earns nothing


def test_passages_are_cut_to_the_limit_of_observations() -> None:
    t = play("rag", engine := Script(CLOSE), Search(result="first\n" + "x" * 100))
    assert "help.\n\nfirst\n\nQuestion" in TOKENIZER.decode(engine.prompts[0])
    assert t.stop is Stop.ANSWERED


def test_an_opening_that_evaluation_forces_takes_the_place_of_the_dialects() -> None:
    t = play("rag", engine := Script("b </answer>"), Search(), opening="So <answer>")
    assert TOKENIZER.decode(engine.prompts[0]).endswith("?So <answer>")
    assert (t.answer, sampled(t)) == ("b", "b </answer>")


def test_a_look_up_that_fails_makes_the_trajectory_void_and_one_that_is_refused_is_shown() -> None:
    down = play("rag", Script(), Search(error="connection refused"))
    assert (down.stop, down.tool_calls[0].outcome, sampled(down)) == (Stop.VOID, Outcome.INFRA_ERROR, "")
    late = play("rag", Script(), Search(seconds=60), replace(LIMITS, tool_timeout_s=30, timeout_s=0.05))
    assert (late.stop, late.tool_calls[0].outcome) == (Stop.VOID, Outcome.INFRA_ERROR)
    assert late.timings["deadline_s"] == 0.05
    refused = play("rag", engine := Script(CLOSE), Search(result="too long", outcome=Outcome.MODEL_ERROR))
    assert "too long" in TOKENIZER.decode(engine.prompts[0])
    assert count_calls(refused, "failed") == 1


def test_rag_without_a_tool_to_ask_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dialect\.tool is 'search', which is not in tools"):
        dialect("rag").check(TOKENIZER, {})
    dialect("rag").check(TOKENIZER, {"search": Search()})
    dialect("direct").check(TOKENIZER, {})


def test_a_look_up_beyond_the_budget_of_calls_ends_the_trajectory() -> None:
    t = play("rag", Script(), tool := Search(), replace(LIMITS, max_calls=0))
    assert (t.stop, tool.asked, count_calls(t, "emitted")) == (Stop.MAX_CALLS, [], 1)


# -- ToRL's last turn -------------------------------------------------------------------------------------

CODE = "```search\nq\n```\n```output"


def test_in_torls_last_turn_nothing_runs_and_nothing_stops_so_it_may_still_answer() -> None:
    made_up = CODE + "\n7\n```\nso \\boxed{b}"
    for limits in ({"max_calls": 1}, {"max_turns": 2}):
        t = play("torl", engine := Script(CODE, made_up), tool := Search(), replace(LIMITS, **limits))
        assert (t.stop, t.answer, len(tool.asked), count_calls(t, "emitted")) == (Stop.ANSWERED, "b", 1, 1)
        assert engine.stops == [["```output"], []]
    t = play("torl_brief", engine := Script(CODE, CODE), tool := Search(), replace(LIMITS, max_calls=1))
    assert (t.stop, t.answer, engine.stops[1]) == (Stop.MAX_CALLS, None, ["```output"])


# -- IRCoT ----------------------------------------------------------------------------------------------


def test_ircot_searches_with_the_question_and_then_with_every_sentence() -> None:
    tool = Search(result="found")
    engine = Script("One leads to two.\n", "Two is b.\n", ANSWER)
    t = play("ircot", engine, tool, replace(LIMITS, max_calls=4))
    assert tool.asked == [PROBLEM.question, "One leads to two.", "Two is b."]
    assert (t.stop, t.answer, count_calls(t, "well_formed"), t.violations) == (Stop.ANSWERED, "b", 3, ())
    assert t.response == "One leads to two.\n\nPassages:\nfound\n\nTwo is b.\n\nPassages:\nfound\n\n" + ANSWER
    assert sampled(t) == "One leads to two.\nTwo is b.\n" + ANSWER
    for earlier, later in zip(engine.prompts, engine.prompts[1:], strict=False):
        assert later[: len(earlier)] == earlier  # tokens are only ever appended


CLOSED_BOOK = {"the answer": CLOSE, "not closed": "b", "on a line of its own": "\nb\n</answer>"}


@pytest.mark.parametrize("said", CLOSED_BOOK.values(), ids=CLOSED_BOOK.keys())
def test_ircot_answers_at_its_budget_of_calls_as_a_reader_reads_the_answer_off_there(said: str) -> None:
    ten = replace(LIMITS, max_calls=10, max_turns=11, max_tokens=900)
    t = play("ircot", engine := Script(*["More.\n"] * 9, said), tool := Search(), ten)
    assert (len(tool.asked), count_calls(t, "well_formed"), count_calls(t, "emitted")) == (10, 10, 10)
    assert (t.stop, t.answer) == (Stop.ANSWERED, "b")
    assert t.response.endswith("\n\n<answer>" + said)
    assert sampled(t) == "More.\n" * 9 + said  # the tag was written for it
    assert t.token_ids[: len(engine.prompts[-1])] == engine.prompts[-1]
    assert (engine.stops[-2], engine.stops[-1]) == (["</answer>", "\n"], ["</answer>"])


@pytest.mark.parametrize(
    ("lines", "limits"),
    [([CLOSE], {"max_calls": 1}), (["\n", "\n", CLOSE], {"max_turns": 3})],
    ids=["the question alone", "turns"],
)
def test_ircot_answers_in_its_last_turn_whatever_makes_it_the_last(lines: list[str], limits: dict[str, int]) -> None:
    t = play("ircot", Script(*lines), Search(), replace(LIMITS, **limits))
    assert (t.stop, t.answer, count_calls(t, "well_formed")) == (Stop.ANSWERED, "b", 1)


def test_a_budget_of_tokens_is_kept_to_by_what_is_written_for_the_policy_too() -> None:
    t = play("ircot", engine := Script("a", "b"), Search(result="f"), replace(LIMITS, max_tokens=23, max_calls=2))
    assert (t.stop, len(engine.lines), t.answer) == (Stop.MAX_TOKENS, 1, None)


def test_a_sentence_that_ends_the_text_is_a_query_as_well() -> None:
    t = play("ircot", Script("One leads to two.", ANSWER), tool := Search())
    assert (t.answer, tool.asked[1:]) == ("b", ["One leads to two."])


def test_an_empty_line_is_no_query() -> None:
    t = play("ircot", Script("\n", ANSWER), tool := Search())
    assert (t.answer, len(tool.asked), count_calls(t, "invalid")) == ("b", 1, 1)


IRCOT = Prompting(
    instructions="{passages} {question}",
    opening="",
    observation_template="[{result}]",
    tool="search",
    each_sentence=True,
)
plain = st.text(st.characters(blacklist_characters="<>", blacklist_categories=("Cs", "Cc", "Z")), min_size=1)


@given(plain)
def test_what_is_written_as_a_sentence_is_read_as_a_query(text: str) -> None:
    assert IRCOT.parse(IRCOT.write_call("search", text), {}) == Call("search", text)
    assert IRCOT.parse(IRCOT.write_answer(text), {}) == Answer(text)
    assert IRCOT.write_answer(text).startswith(IRCOT.open_answer())
    assert replace(IRCOT, each_sentence=False).parse(text, {}) == Nothing()


@pytest.mark.parametrize("name", ["direct", "rag"])
@pytest.mark.parametrize(
    "said", ["<answer>b", "<answer> <answer> b </answer>", "<answer>b </answer>", "<answer>\n<answer>b"]
)
def test_an_answer_whose_tag_was_written_for_it_may_open_it_again_and_end_with_the_text(name: str, said: str) -> None:
    assert dialect(name).parse(said, {}) == Answer("b")
    assert dialect(name).violations([said], {}) == ()


def test_a_sentence_may_hold_tags_that_are_no_answers() -> None:
    tools = {"search": Search()}
    assert IRCOT.parse("The <i>Titanic</i> sank.\n", tools) == Call("search", "The <i>Titanic</i> sank.")
    assert IRCOT.violations(["The <i>Titanic</i> sank.\n", "<answer> b </answer>"], tools) == ()
    assert IRCOT.violations(["</answer> b\n"], tools) != ()


def test_an_answer_that_is_not_closed_is_malformed() -> None:
    assert isinstance(IRCOT.parse("<answer> b\n", {"search": Search()}), Malformed)


# -- with real parts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of an evaluation of a random model on two questions, with a search tool over one passage."""
    folder = tmp_path_factory.mktemp("prompting")
    tiny_llama(TOKENIZER.vocab_size).save_pretrained(folder / "model")
    TOKENIZER.hf.save_pretrained(folder / "model")
    rows = [{"id": str(i), "question": f"Who is {i}?", "answers": ["x"]} for i in range(2)]
    (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "corpus.jsonl").write_text('{"id": "1", "title": "Paris", "text": "The capital of France."}\n')
    return [
        *("conf=quickstart", f"model={folder / 'model'}", f"data=toy={folder / 'toy.jsonl'}", "engine.context=512"),
        *(f"tools.search.corpus=[{folder / 'corpus.jsonl'}]", "rollout.limits.max_tokens=60", "evaluate.sampled=false"),
        *("rollout.limits.max_observation_tokens=60", f"run_dir={folder / 'run'}"),
    ]


@pytest.mark.parametrize(("name", "calls"), [("direct", 0), ("cot", 0), ("rag", 1), ("ircot", 1), ("tir", 0)])
def test_otcrl_eval_runs_every_one_of_them(name: str, calls: int, settings: list[str]) -> None:
    assert cli.main(["eval", *settings, f"dialect={name}", f"as={name}"]) == 0
    folder = Path(settings[-1].removeprefix("run_dir=")) / "eval" / name / "greedy"
    found = read_attempts(folder)
    assert [a.source for a in found] == ["toy", "toy"]
    assert all(a.calls("well_formed") >= calls and not a.is_void for a in found)
    assert (folder / "config.yaml").is_file()


def test_offloading_is_refused_where_calls_are_not_the_policys(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", *settings, "dialect=rag", "evaluate.offloading=true"]) == 2
    assert "evaluate.offloading takes tools away and forces calls" in capsys.readouterr().err


# -- what cannot be --------------------------------------------------------------------------------------


def test_each_sentence_needs_a_place_for_the_passages_and_every_prompt_one_for_the_question() -> None:
    with pytest.raises(ValueError, match=r"instructions must hold \{passages\} with each_sentence"):
        replace(IRCOT, instructions="{question}")
    with pytest.raises(ValueError, match=r"instructions must hold \{question\}"):
        replace(IRCOT, instructions="{passages}")
    with pytest.raises(ValueError, match="opening must be empty or '<answer>', got '<answr>'"):
        replace(IRCOT, opening="<answr>")
    with pytest.raises(ValueError, match=r"observation_template must hold \{result\}"):
        replace(IRCOT, observation_template="")


def test_no_call_can_be_demonstrated_where_there_are_none() -> None:
    with pytest.raises(ConfigError, match="the policy makes no calls"):
        replace(IRCOT, each_sentence=False).write_call("search", "q")


def test_prompted_tool_use_names_every_tool_and_reads_calls_as_search_r1_does() -> None:
    class Python(Search):
        name, description = "python", "computes"

        async def run(self, arguments: str, session: str) -> ToolResult:
            return ToolResult("4")

    tools = {"search": Search(), "python": Python()}
    text = dialect("tir").prompt(PROBLEM, tools)
    assert isinstance(text, str)
    assert "<search> ... </search>: finds\n<python> ... </python>: computes\n" in text
    assert dialect("tir").parse("<python> 2 + 2 </python>", tools) == Call("python", "2 + 2")


def test_mathematics_without_a_tool_answers_in_a_box() -> None:
    alone = dialect("cot_math")
    assert list(alone.stop({})) == []
    assert alone.parse(r"so \boxed{4}", {}) == Answer("4")
