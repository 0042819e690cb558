"""What the policy may write, and what is made of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcrl.dialects.search_r1 import SearchR1
from otcrl.dialects.torl import ToRL, boxed
from otcrl.protocols import Answer, Call, Malformed, Nothing, ToolResult
from otcrl.types import Problem


class Echo:
    def __init__(self, name: str) -> None:
        self.name, self.description = name, "says it again"

    async def run(self, arguments: str, session: str) -> ToolResult:
        return ToolResult(arguments)

    async def release(self, session: str) -> None: ...

    async def close(self) -> None: ...


TOOLS = {name: Echo(name) for name in ("search", "python")}
TAGS = SearchR1(
    instructions="Use {tools}\nQ: {question}",
    observation_template="\n\n<information>{result}</information>\n\n",
    require_think=False,
)
FENCES = ToRL(instructions="Solve: {question}")
PROBLEM = Problem(id="a/b/0", question="Who?", answers=("x",), source="a")
plain = st.text(st.characters(blacklist_characters="<>`{}\\", blacklist_categories=("Cs",)), max_size=20)


def test_the_prompt_holds_the_question_and_every_tool():
    text = TAGS.prompt(PROBLEM, TOOLS)
    assert text == "Use <search> ... </search>: says it again\n<python> ... </python>: says it again\nQ: Who?"


def test_instructions_without_a_place_for_the_question_are_refused():
    with pytest.raises(ValueError, match=r"instructions must hold \{question\}"):
        SearchR1(instructions="hello", observation_template="{result}", require_think=False)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("<think> hm </think><search> q </search>", Call("search", "q")),
        ("<search> q </search>.", Call("search", "q")),  # the tag ended inside the token `>.`
        ("<python> print(1 < 2) </python>", Call("python", "print(1 < 2)")),
        ("<answer> Paris </answer>", Answer("Paris")),
        ("<search> a <answer> b </search>", Call("search", "a <answer> b")),
        ("I do not know", Nothing()),
    ],
    ids=["call", "overshoot", "less-than", "answer", "nested", "nothing"],
)
def test_tags_are_read(text, action):
    assert TAGS.parse(text, TOOLS) == action


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<search> q", "never closed"),
        ("q </search>", "never opened"),
        ("<google> q </google>", "no tool named 'google'. The tools are: search, python"),
    ],
)
def test_a_broken_call_is_answered_with_what_is_wrong(text, why):
    action = TAGS.parse(text, TOOLS)
    assert isinstance(action, Malformed)
    assert why in action.why


@given(st.sampled_from(["search", "python"]), plain)
def test_what_is_written_as_a_call_is_read_as_that_call(tool, arguments):
    assert TAGS.parse(TAGS.write_call(tool, arguments), TOOLS) == Call(tool, arguments.strip())
    assert TAGS.write_call(tool, arguments).startswith(TAGS.open_call(tool))


@given(plain)
def test_what_is_written_as_an_answer_is_read_as_that_answer(text):
    assert TAGS.parse(TAGS.write_answer(text), TOOLS) == Answer(text.strip())
    assert FENCES.parse(FENCES.write_answer(text), TOOLS) == Answer(text.strip())


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        (["<search> q </search>", "<answer> a </answer>"], ()),
        (["<answer> a </answer><answer> b </answer>"], ("2 answers",)),
        (["<information> made up </information><answer> a </answer>"], ("the policy wrote <information> itself",)),
        (["<think> hm <answer> a </answer>"], ("<think> opened 1 times and closed 0 times",)),
    ],
    ids=["well-formed", "two-answers", "own-observation", "unbalanced"],
)
def test_violations_are_named(turns, found):
    assert TAGS.violations(turns, TOOLS) == found


def test_thinking_first_is_demanded_only_when_asked_for():
    strict = SearchR1(instructions="{question}", observation_template="{result}", require_think=True)
    assert strict.violations(["<answer> a </answer>"], TOOLS) == ("a turn does not open with <think>",)
    assert strict.violations(["<think> x </think> <answer> a </answer>"], TOOLS) == ()


def test_torl_runs_the_last_complete_block_of_the_turn():
    text = "First\n```python\nx = 1\n```\nthen\n```python\nprint(2)\n```\n```output"
    assert FENCES.parse(text, TOOLS) == Call("python", "print(2)")


def test_torl_without_a_block_before_the_output_is_malformed():
    assert isinstance(FENCES.parse("so\n```output", TOOLS), Malformed)
    assert isinstance(FENCES.parse("```ruby\nputs 1\n```\n```output", TOOLS), Malformed)


def test_torl_answers_only_in_its_last_turn_and_takes_the_last_box():
    assert FENCES.parse(r"so \boxed{1}, no, \boxed{\frac{1}{2}}.", TOOLS) == Answer(r"\frac{1}{2}")
    assert FENCES.violations([r"so \boxed{1}, no, \boxed{2}."], TOOLS) == ("2 different answers",)
    assert FENCES.violations([r"so \boxed{1}, yes, \boxed{1}."], TOOLS) == ()


def test_torl_stops_for_tools_only_when_there_are_some():
    assert FENCES.stop(TOOLS) == ["```output"]
    assert FENCES.stop({}) == []


def test_a_written_torl_call_and_its_observation_make_whole_fences():
    whole = FENCES.write_call("python", "print(2)") + FENCES.observation("2")
    assert whole == "```python\nprint(2)\n```\n```output\n2\n```\n"


@given(st.text(alphabet="ab{}\\boxed", max_size=40))
def test_boxed_never_fails_and_its_braces_balance(text):
    for inner in boxed(text):
        assert inner.count("{") == inner.count("}")
