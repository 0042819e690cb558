"""What a chat template writes around the policy's turns, and that nothing the policy said is ever rendered again."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcrl.dialects.hermes import Hermes
from otcrl.errors import ConfigError, DataError
from otcrl.models.tokenizer import HFTokenizer
from otcrl.protocols import Chat, Completion, Message, Segment
from otcrl.rollout.loop import Limits, Player
from otcrl.sft import encode
from otcrl.types import Outcome, Problem, Stop, Trajectory, count_calls
from tests import templates
from tests.test_rollout import Script, Search
from tests.tiny import tiny_tokenizer

TOKENIZER = templates.chat_tokenizer()
HERMES = Hermes(system=None, instructions="{question}", answer="tag", calls="run", allow_rewriting=False)
PROBLEM = Problem(id="toy/train/0", question="who ?", answers=("b",), source="toy")
LIMITS = Limits(
    max_calls=3, max_turns=5, max_tokens=4000, max_turn_tokens=400, max_observation_tokens=200, tool_timeout_s=0.2
)
END = TOKENIZER.end_id
printable = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)


def rendered(*messages: tuple[str, str], asks: bool = True) -> str:
    listed = [{"role": role, "content": content} for role, content in messages]
    text = TOKENIZER.hf.apply_chat_template(listed, add_generation_prompt=asks, tokenize=False)
    assert isinstance(text, str)
    return text


def replies(*results: str) -> Chat:
    return Chat(tuple(Message("tool", result) for result in results))


# -- between two turns ---------------------------------------------------------------------------------


@given(st.lists(printable, min_size=1, max_size=4), printable)
def test_what_follows_a_turn_is_what_the_template_would_write_after_it(results: list[str], said: str):
    before = rendered(("user", "q"), ("assistant", said), asks=False).removesuffix("\n")  # the end of the turn
    whole = rendered(("user", "q"), ("assistant", said), *(("tool", result) for result in results))
    assert whole.startswith(before)
    assert TOKENIZER.decode(TOKENIZER.encode(replies(*results))) == whole[len(before) :]
    wanted = TOKENIZER.hf(whole[len(before) :], add_special_tokens=False)["input_ids"]
    assert TOKENIZER.encode(replies(*results)) == wanted


@given(st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "assistant\n", " x"]), max_size=5).map("".join))
def test_a_result_that_spells_out_control_tokens_holds_none(result: str):
    controls = [TOKENIZER.hf.get_vocab()[token] for token in ("<|im_start|>", "<|im_end|>")]
    spelled, plain = (TOKENIZER.encode(replies(text)) for text in (result, "x"))
    assert [id for id in spelled if id in controls] == [id for id in plain if id in controls]
    assert TOKENIZER.decode(spelled) == TOKENIZER.decode(plain).replace("\nx\n", f"\n{result}\n")


def test_a_turn_ends_with_the_templates_token_and_a_text_with_the_tokenizers():
    assert TOKENIZER.decode([END]) == "<|im_end|>"
    assert {TOKENIZER.decode([id]) for id in TOKENIZER.stop_ids} == {"<|im_end|>", "<eos>"}
    plain = tiny_tokenizer()
    assert plain.stop_ids == {plain.end_id}
    assert plain.decode([plain.end_id]) == "<eos>"


def test_a_prompt_of_messages_is_rendered_with_its_functions():
    chat = Chat((Message("system", "Think."), Message("user", "q")), (json.dumps({"name": "a_tool"}),))
    text = TOKENIZER.decode(TOKENIZER.prompt_ids(chat))
    assert text.startswith("<|im_start|>system\nThink.\n\nYou may call these:\n")
    assert '{"name": "a_tool"}' in text
    assert text.endswith("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")
    assert TOKENIZER.prompt_ids("q") == TOKENIZER.prompt_ids(Chat((Message("user", "q"),)))


def test_without_a_template_messages_are_their_text_and_functions_and_replies_are_refused():
    plain = tiny_tokenizer()
    chat = Chat((Message("system", "Think."), Message("user", "q")))
    assert plain.prompt_ids(chat) == plain.prompt_ids("Think.\n\nq")
    with pytest.raises(DataError, match=r"shows functions by its chat template only: set model\.chat=true"):
        plain.prompt_ids(replace(chat, functions=("{}",)))
    with pytest.raises(DataError, match=r"by its chat template only: set model\.chat=true"):
        plain.encode(replies("x"))


# -- templates that do not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (templates.FORGETS, "drops the <think> part of a turn once there is a reply to it. otcrl trains on what was"),
        (templates.BEGINS, r"begins a turn with '<think>\n\n</think>\n\n', and leaves that out once there is a reply"),
        (templates.ESCAPES, "does not write a tool message word for word after a turn"),
        (templates.REFUSES, "cannot write messages of user, assistant, tool: no tools here"),
        (templates.HIDES, "the chat template does not show the tools: 'search' is not in the prompt"),
        (templates.OTHERWISE, "the chat template does not ask for calls in <tool_call>: the model writes them in "),
        (templates.UNENDED, "ends a turn with no control token, so nobody can tell where one is over"),
    ],
    ids=["forgets", "begins", "escapes", "refuses", "hides", "otherwise", "unended"],
)
def test_a_template_that_does_not_fit_says_so_before_the_run(template: str, why: str):
    with pytest.raises(ConfigError) as caught:
        HERMES.check(templates.chat_tokenizer(template), {"search": Search()})
    assert why in str(caught.value)


def test_a_template_that_fits_is_silent_and_one_that_rewrites_can_be_allowed():
    HERMES.check(TOKENIZER, {"search": Search()})
    replace(HERMES, calls="imitate").check(TOKENIZER, {})
    for template in (templates.FORGETS, templates.BEGINS):
        replace(HERMES, allow_rewriting=True).check(templates.chat_tokenizer(template), {"search": Search()})
    with pytest.raises(DataError, match="'an_example' is not in the prompt"):
        replace(HERMES, calls="imitate").check(templates.chat_tokenizer(templates.HIDES), {})


# -- a trajectory ------------------------------------------------------------------------------------------


class Chatting(Script):
    """Says its lines and ends each of them with the end of a turn."""

    context = 8000

    def __init__(self, *lines: str, tokenizer: HFTokenizer = TOKENIZER) -> None:
        super().__init__(*lines)
        self.tokenizer = tokenizer

    async def generate(self, token_ids, **settings) -> Completion:
        self.prompts.append(list(token_ids))
        ids = [*self.tokenizer.encode(self.lines.pop(0)), END]
        return Completion(ids, [-0.25] * len(ids), [self.version] * len(ids), True)


def call(query: str) -> str:
    return f'<tool_call>\n{{"name": "search", "arguments": {{"input": "{query}"}}}}\n</tool_call>'


def play(engine: Script, tool: Search | None = None, limits: Limits = LIMITS) -> Trajectory:
    player = Player(
        engine=engine, tokenizer=TOKENIZER, dialect=HERMES, tools={"search": tool or Search()}, limits=limits
    )
    return asyncio.run(player.play(PROBLEM, temperature=1.0, seed=7, session="s"))


def test_a_conversation_is_what_the_template_would_have_rendered():
    turns = [f"<think>\nhm\n</think>\n\n{call('a')}", f"{call('b')}\n{call('c')}", "<answer>b</answer>"]
    t = play(Chatting(*turns), Search(result="found"))
    assert (t.stop, t.answer, t.violations) == (Stop.ANSWERED, "b", ())
    system = TOKENIZER.decode(TOKENIZER.prompt_ids(HERMES.prompt(PROBLEM, {"search": Search()})))
    found = ("tool", "found")
    after = rendered(("user", "-"), ("assistant", turns[0]), found, ("assistant", turns[1]), found, found, asks=True)
    assert TOKENIZER.decode(t.token_ids) == f"{system}{after.split('assistant', 1)[1][1:]}{turns[2]}<|im_end|>"
    said = TOKENIZER.decode([i for i, acts in zip(t.token_ids, t.action_mask, strict=True) if acts])
    assert said == "".join(f"{turn}<|im_end|>" for turn in turns)


def test_calls_of_one_turn_run_in_their_order_and_share_one_observation():
    tool = Search(result="found")
    engine = Chatting(call("a") + call("b"), "<answer>b</answer>")
    t = play(engine, tool)
    assert tool.asked == ["a", "b"]
    assert count_calls(t, "well_formed") == 2
    assert len(engine.prompts) == 2
    assert TOKENIZER.decode(t.token_ids).count("<tool_response>\nfound\n</tool_response>") == 2


def test_a_broken_call_is_answered_in_its_place_and_the_ones_beside_it_run():
    tool = Search(result="found")
    t = play(Chatting(f"{call('a')}<tool_call>{{oops</tool_call>{call('b')}", "<answer>b</answer>"), tool)
    assert tool.asked == ["a", "b"]
    assert [c.outcome for c in t.tool_calls] == [Outcome.OK, Outcome.INVALID, Outcome.OK]
    shown = TOKENIZER.decode(t.token_ids).split("<tool_response>\n")[1:]
    assert [part.startswith("Error: A call must be JSON") for part in shown] == [False, True, False]
    assert t.violations


def test_a_turn_with_one_call_too_many_runs_those_that_it_may_and_ends():
    tool = Search()
    t = play(Chatting(call("a") * 4), tool)
    assert (t.stop, tool.asked) == (Stop.MAX_CALLS, ["a"] * 3)
    assert [c.outcome for c in t.tool_calls][-1] is Outcome.OVER_BUDGET


def test_a_tool_that_is_down_ends_a_turn_of_several_calls():
    t = play(Chatting(call("a") + call("b")), Search(error="connection refused"))
    assert (t.stop, [c.outcome for c in t.tool_calls]) == (Stop.VOID, [Outcome.INFRA_ERROR])


def test_each_result_of_a_turn_is_cut_by_itself():
    t = play(
        Chatting(call("a") * 2, "<answer>b</answer>"),
        Search(result="abc" * 20),
        replace(LIMITS, max_observation_tokens=9),
    )
    assert TOKENIZER.decode(t.token_ids).count("<tool_response>\nabcabcabc\n</tool_response>") == 2


def test_the_end_of_a_turn_is_no_part_of_an_answer():
    text = replace(HERMES, answer="text")
    player = Player(engine=Chatting(" b "), tokenizer=TOKENIZER, dialect=text, tools={}, limits=LIMITS)
    assert asyncio.run(player.play(PROBLEM, temperature=1.0, seed=7, session="s")).answer == "b"


def test_a_demonstration_is_token_for_token_what_a_rollout_of_it_would_be():
    tools = {"search": Search()}
    dialect = replace(HERMES, tools=tools)
    turns = [dialect.write_call("search", "a"), dialect.write_answer("b")]
    demo = [
        Segment(dialect.prompt(PROBLEM, tools), False),
        Segment(turns[0], True),
        Segment(dialect.observation("found"), False),
        Segment(turns[1], True),
    ]
    ids, mask = encode(demo, TOKENIZER, ends=dialect.ends_with_stop_token)
    t = play(Chatting(*turns), Search(result="found"))
    assert (ids, mask) == (t.token_ids, t.action_mask)
