"""What the policy may write, and what is made of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.normalizers import Replace
from transformers import PreTrainedTokenizerFast

from otcrl.dialects.hermes import Hermes
from otcrl.dialects.retool import ReTool
from otcrl.dialects.search_r1 import SearchR1
from otcrl.dialects.tool_calls import dumped, read
from otcrl.dialects.toolrl import ToolRL
from otcrl.dialects.torl import ToRL, boxed
from otcrl.errors import ConfigError, DataError
from otcrl.preflight import check_dialect
from otcrl.protocols import Answer, Call, Calls, Chat, Dialect, Malformed, Message, Nothing, ToolResult
from otcrl.tasks.question_answering import QuestionAnswering
from otcrl.types import Problem
from tests.tiny import tiny_tokenizer


class Echo:
    def __init__(self, name: str) -> None:
        self.name, self.description = name, "says it again"

    async def run(self, arguments: str, session: str) -> ToolResult:
        return ToolResult(arguments)

    async def release(self, session: str) -> None: ...

    async def close(self) -> None: ...


class Weather(Echo):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}  # noqa: RUF012


TOOLS = {name: Echo(name) for name in ("search", "python")}
TAGS = SearchR1(
    instructions="Use {tools}\nQ: {question}",
    observation_template="\n\n<information>{result}</information>\n\n",
    require_think=False,
)
FENCES = ToRL(instructions="Solve: {question}", free_last_turn=False)
TASK = QuestionAnswering()
CODE = ReTool(instructions="Solve: {question}", tool="python")
HERMES = Hermes(
    system=None, instructions="{question}", answer="tag", calls="run", allow_rewriting=False, tools=TOOLS
)  # fmt: skip
WHOLE_CALL = '{"name": "search", "parameters": {"input": "q"}}'
TOOLRL = ToolRL(system="Use\n{tools}", calls="run", tools=TOOLS)
ALL: dict[str, Dialect] = {"search_r1": TAGS, "torl": FENCES, "retool": CODE, "hermes": HERMES, "toolrl": TOOLRL}
PROBLEM = Problem(id="a/b/0", question="Who?", answers=("x",), source="a")
plain = st.text(st.characters(blacklist_characters="<>`{}\\", blacklist_categories=("Cs",)), max_size=20)
TAG_NAMES = "think search python code answer response tool_call obs".split()
PIECES = [
    *(f"<{slash}{name}>" for name in TAG_NAMES for slash in ("", "/")),
    *("```python\n", "```output", "```", "\n", "\\boxed{", "{", "}", '"', "[", "\\ud800", "1e999", "NaN", "é", " x "),
    *('{"name": "search", "arguments": {"input": "q"}}', '{"name": "python", "parameters": {"input": "1"}}'),
]  # fmt: skip
MARK = "MARK"  # in place of what a call says
garbage = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)


@pytest.fixture(params=ALL)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    return ALL[request.param]


# -- what holds for all of them ---------------------------------------------------------------------------


@given(garbage)
def test_whatever_is_written_can_be_read(text: str):
    for dialect in ALL.values():
        for tools in (TOOLS, {}):
            action = dialect.parse(text, tools)
            assert isinstance(action, Call | Calls | Answer | Malformed | Nothing)
            for call in action.calls if isinstance(action, Calls) else [action]:
                if isinstance(call, Call):
                    assert call.tool in tools
                    call.arguments.encode()  # so that any tool can be sent it
            assert dialect.violations([text, text], tools) == dialect.violations([text, text], tools)


@given(st.sampled_from(["search", "python"]), plain)
def test_what_is_written_as_a_call_is_read_as_that_call(tool: str, arguments: str):
    for name, dialect in ALL.items():
        if name == "retool" and tool != "python":
            continue
        wanted = arguments.strip() if name == "search_r1" else arguments
        assert dialect.parse(dialect.write_call(tool, arguments), TOOLS) == Call(tool, wanted), name
        assert dialect.write_call(tool, arguments).startswith(dialect.open_call(tool))
        assert dialect.violations([dialect.write_call(tool, arguments)], TOOLS) in ((), TOOLRL_NEEDS_THOUGHT)


@given(plain)
def test_what_is_written_as_an_answer_is_read_as_that_answer(text: str):
    for name, dialect in ALL.items():
        read_as = dialect.parse(dialect.write_answer(text), TOOLS)
        assert read_as == Answer(text.strip()) or (name == "hermes" and not text.strip() and read_as == Nothing()), name
        assert dialect.write_answer(text).startswith(dialect.open_answer())


TOOLRL_NEEDS_THOUGHT = ("a turn is not <think>, then <tool_call>, <response> or both",)


def test_a_call_that_is_never_closed_or_never_opened_is_named(dialect: Dialect):
    whole = dialect.write_call("python", "1")
    closing = "</" + whole.rpartition("</")[2] if dialect is not FENCES else "```output"
    for broken in (whole.removesuffix(closing), closing):
        if dialect is FENCES and broken != closing:
            continue  # a block that nobody ran is how ToRL shows code
        action = dialect.parse(broken, TOOLS)
        assert isinstance(action, Malformed), broken
        assert "never" in action.why or "stands before" in action.why


calls = st.tuples(st.sampled_from(["search", "python"]), plain.map(str.strip))


@given(calls, calls, st.sampled_from(["", "\n", " so "]))
def test_a_call_inside_a_call_is_text_of_it_or_breaks_it(outer: tuple[str, str], inner: tuple[str, str], gap: str):
    for name, dialect in ALL.items():
        begin, end = dialect.write_call(outer[0], MARK).split(MARK)
        inside = f"{gap}{dialect.write_call(*inner)}{gap}"
        found = dialect.parse(begin + inside + end, TOOLS)
        if name in ("hermes", "toolrl"):  # JSON can hold no tag as it is
            assert isinstance(found, Calls), name
            assert isinstance(found.calls[0], Malformed), name
        elif name == "search_r1" and inner[0] != outer[0]:
            assert found == Call(outer[0], inside.strip())
        else:  # the inner closing tag, or Markdown's inner fence, closes the outer one
            assert isinstance(found, Call | Malformed), name


@given(st.lists(calls, min_size=2, max_size=4), st.data())
def test_of_several_calls_in_a_turn_all_are_read_or_the_first(several: list[tuple[str, str]], data: st.DataObject):
    """All of them, in their order, a broken one in its place; or, where a call ends the turn, the first alone."""
    broken = data.draw(st.sampled_from([None, *range(len(several))]))
    for name, dialect in ALL.items():
        turn = [("python", said) for _, said in several] if name == "retool" else several
        written = [dialect.write_call(*call) for call in turn]
        if name not in ("hermes", "toolrl"):
            assert dialect.parse("\n".join(written), TOOLS) == Call(*turn[0]), name
            continue
        expected: list[Call | type[Malformed]] = [Call(*call) for call in turn]
        if broken is not None:
            written[broken] = "<tool_call>\n{]\n</tool_call>"
            expected[broken] = Malformed
        found = dialect.parse("\n".join(written), TOOLS)
        assert isinstance(found, Calls), name
        assert [Malformed if isinstance(call, Malformed) else call for call in found.calls] == expected, name


@given(calls, st.data())
def test_a_call_that_breaks_off_is_never_run(call: tuple[str, str], data: st.DataObject):
    for name, dialect in ALL.items():
        whole = dialect.write_call("python", call[1])
        cut = data.draw(st.integers(0, len(whole) - 1))
        found = dialect.parse(whole[:cut], TOOLS)
        assert not isinstance(found, Call | Calls | Answer), (name, whole[:cut])


def test_every_result_of_a_turn_is_shown_in_its_order(dialect: Dialect):
    shown = str(dialect.observation("first", "second"))
    assert 0 <= shown.index("first") < shown.index("second")


def test_a_tokenizer_that_cannot_write_the_dialect_is_refused(dialect: Dialect):
    tools = {"python": TOOLS["python"]}
    if dialect is not HERMES:
        check_dialect(dialect, TASK, tiny_tokenizer(), tools)
    letters = tiny_tokenizer()
    assert isinstance(letters.hf, PreTrainedTokenizerFast)
    letters.hf.backend_tokenizer.normalizer = Replace(Regex("[<`\\\\]"), "")
    with pytest.raises(DataError, match="the tokenizer has no tokens for '"):
        check_dialect(dialect, TASK, letters, tools)


# -- Search-R1 --------------------------------------------------------------------------------------------


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
        ("<reasoning> hm </reasoning> <search> who </search>", Call("search", "who")),
        ("<b>Note</b> <answer> Paris </answer>", Answer("Paris")),
        ("the type List<int> matters <search> q </search>", Call("search", "q")),
        ("</information> <search> q </search>", Call("search", "q")),
        ("<answer> I am not sure <search> q </search>", Call("search", "q")),
    ],
    ids=[
        *["call", "overshoot", "less-than", "answer", "nested", "nothing"],
        *["other-tags", "html", "angle-brackets", "own-observation", "unfinished-answer"],
    ],
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


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        (["<search> q </search>", "<answer> a </answer>"], ()),
        (["<answer> a </answer><answer> b </answer>"], ("2 answers",)),
        (["<information> made up </information><answer> a </answer>"], ("the policy wrote <information> itself",)),
        (["<think> hm <answer> a </answer>"], ("<think> opened 1 times and closed 0 times",)),
        (
            ["<google> q </google>", "<answer> a </answer>"],
            ("There is no tool named 'google'. The tools are: search, python.",),
        ),
        (["A <b>bold</b> <search> q </search>", "<answer> a </answer>"], ()),
    ],
    ids=["well-formed", "two-answers", "own-observation", "unbalanced", "no-such-tool", "other-tags"],
)
def test_violations_are_named(turns, found):
    assert TAGS.violations(turns, TOOLS) == found


def test_thinking_first_is_demanded_only_when_asked_for():
    strict = SearchR1(instructions="{question}", observation_template="{result}", require_think=True)
    assert strict.violations(["<answer> a </answer>"], TOOLS) == ("a turn does not open with <think>",)
    assert strict.violations(["<think> x </think> <answer> a </answer>"], TOOLS) == ()


def test_a_tool_whose_name_can_be_no_tag_is_refused():
    with pytest.raises(ConfigError, match=r"dialect: .* <my\.tool> can be none: use dialect=hermes"):
        check_dialect(TAGS, TASK, tiny_tokenizer(), {"my.tool": Echo("my.tool")})


# -- ToRL -------------------------------------------------------------------------------------------------


def test_torl_takes_the_last_box_of_all_turns():
    assert FENCES.answered([r"\boxed{1} or \boxed{42}, so check:", "The code agrees."]) == "42"
    assert FENCES.answered(["I do not know."]) is None


def test_torl_runs_the_last_complete_block_of_the_turn():
    text = "First\n```python\nx = 1\n```\nthen\n```python\nprint(2)\n```\n```output"
    assert FENCES.parse(text, TOOLS) == Call("python", "print(2)")


def test_torl_without_a_block_before_the_output_is_malformed():
    assert isinstance(FENCES.parse("so\n```output", TOOLS), Malformed)
    assert isinstance(FENCES.parse("```ruby\nputs 1\n```\n```output", TOOLS), Malformed)


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        (["I must put it in \\boxed{}. So \\boxed{7}"], ()),
        (["\\boxed{6} or \\boxed{7}"], ("2 different answers",)),
        (["```output", "\\boxed{7}"], ("No complete code block stands before the output block.",)),
        (
            ["```javascript\n1\n```\n```output", "\\boxed{7}"],
            ("'javascript' cannot be run. Write one of: search, python.",),
        ),
    ],
)
def test_torl_names_what_breaks_its_form(turns, found):
    assert FENCES.violations(turns, TOOLS) == found


def test_torl_answers_only_in_its_last_turn_and_takes_the_last_box():
    assert FENCES.parse(r"so \boxed{1}, no, \boxed{\frac{1}{2}}.", TOOLS) == Answer(r"\frac{1}{2}")
    assert FENCES.violations([r"so \boxed{1}, no, \boxed{2}."], TOOLS) == ("2 different answers",)
    assert FENCES.violations([r"so \boxed{1}, yes, \boxed{1}."], TOOLS) == ()


def test_torl_stops_for_tools_only_when_there_are_some():
    assert FENCES.stop(TOOLS) == ["```output"]
    assert FENCES.stop({}) == []


def test_torl_without_tools_takes_whatever_is_written_as_final():
    made_up = "```python\nprint(2)\n```\n```output\n2\n```\nso \\boxed{2}"
    assert FENCES.parse(made_up, {}) == Answer("2")
    assert FENCES.conclusion is None
    assert replace(FENCES, free_last_turn=True).conclusion == ""


def test_a_written_torl_call_and_its_observation_make_whole_fences():
    whole = FENCES.write_call("python", "print(2)") + FENCES.observation("2")
    assert whole == "```python\nprint(2)\n```\n```output\n2\n```\n"


@given(st.text(alphabet="ab{}\\boxed", max_size=40))
def test_boxed_never_fails_and_its_braces_balance(text):
    for inner in boxed(text):
        assert inner.count("{") == inner.count("}")


# -- ReTool -----------------------------------------------------------------------------------------------

SNIPPET = "<code>\n```python\nprint(2)\n```\n</code>"


@pytest.mark.parametrize(
    ("text", "action"),
    [
        (f"First I compute.\n{SNIPPET}", Call("python", "print(2)")),
        ("<code>print(2)</code>", Call("python", "print(2)")),
        ("<code>\n```py\nif x:\n    print('```')\n```\n</code>", Call("python", "if x:\n    print('```')")),
        (f"I write <code> now: {SNIPPET}", Call("python", "print(2)")),
        ("<answer>\n\\boxed{\\frac{1}{2}}\n</answer>", Answer("\\frac{1}{2}")),
        ("<answer> 7 </answer>", Answer("7")),
        ("so it is \\boxed{7}", Nothing()),
        ("<answer>\\boxed{1}</answer><code>print(2)</code>", Call("python", "print(2)")),
    ],
    ids=["fenced", "bare", "fence-in-code", "mentioned", "boxed", "unboxed", "no-tags", "answer-then-code"],
)
def test_retool_is_read(text: str, action: object):
    assert CODE.parse(text, TOOLS) == action


def test_retool_shows_a_result_as_its_interpreter_and_names_what_breaks_its_form():
    assert CODE.observation("2") == "\n<interpreter>\n2\n</interpreter>\n\n"
    assert CODE.violations([SNIPPET, "<answer>\\boxed{2}</answer>"], TOOLS) == ()
    assert CODE.violations(["<interpreter>3</interpreter>"], TOOLS) == ("the policy wrote <interpreter> itself",)
    assert CODE.violations(["<answer>1</answer><answer>2</answer>"], TOOLS) == ("2 answers",)
    assert CODE.violations(["<code>x"], TOOLS) == ("<code> opened 1 times and closed 0 times",)


@pytest.mark.parametrize(
    ("tools", "why"),
    [
        ({"pyhton": Echo("pyhton")}, "<code> runs 'python', which is no tool. Did you mean 'pyhton'?"),
        (TOOLS, "this dialect can call 'python' only, and the tools have search too"),
    ],
)
def test_retool_has_one_tool(tools: dict, why: str):
    with pytest.raises(ConfigError) as caught:
        check_dialect(CODE, TASK, tiny_tokenizer(), tools)
    assert why in str(caught.value)


# -- calls as JSON ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("", "There is nothing between <tool_call> and </tool_call>"),
        ("search(q)", "A call must be JSON"),
        ('["search"]', "A call must be a JSON object with a name"),
        ('{"arguments": {}}', "A call must be a JSON object with a name"),
        ('{"name": "search", "arguments": "q"}', "The arguments of 'search' must be one JSON object"),
        ('{"name": "search", "arguments": {}, "parameters": {}}', "The arguments of 'search' must be one JSON object"),
        ('{"name": "search", "arguments": {"input": NaN}}', "NaN is no JSON"),
        ('{"name": "search", "arguments": {"input": "\\ud800"}}', "holds half of a surrogate pair"),
        ("[" * 100_000, "A call must be JSON"),
        ('{"name": "google", "arguments": {}}', "There is no tool named 'google'. The tools are: search, python."),
        ('{"name": "search", "arguments": {"query": "q"}}', 'search takes one text, {"input": "..."}, got {"query"'),
        ('{"name": "search", "arguments": {"input": ["q"]}}', 'search takes one text, {"input": "..."}, got {"input"'),
    ],
)  # fmt: skip
def test_a_call_that_is_wrong_says_how(body: str, why: str):
    for dialect in (HERMES, TOOLRL):
        action = dialect.parse(f"<tool_call>\n{body}\n</tool_call>", TOOLS)
        assert isinstance(action, Malformed)
        assert why in action.why


def test_several_calls_are_read_in_order_with_what_is_wrong_in_its_place():
    one, other = ('{"name": "search", "arguments": {"input": "q"}}', '{"name": "python", "parameters": {"input": "1"}}')
    both = Calls((Call("search", "q"), Call("python", "1")))
    assert HERMES.parse(f"<tool_call>{one}</tool_call>\n<tool_call>{other}</tool_call>", TOOLS) == both
    assert TOOLRL.parse(f"<think> t </think>\n<tool_call>\n{one}\n{other}\n</tool_call>", TOOLS) == both
    broken = HERMES.parse(f"<tool_call>{one}<tool_call>{other}</tool_call></tool_call>", TOOLS)
    assert isinstance(broken, Calls)
    assert [type(call) for call in broken.calls] == [Malformed, Call, Malformed]


def test_a_tool_with_parameters_gets_them_as_json():
    tools = {"weather": Weather("weather")}
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Kōchi", "days": 2}}</tool_call>'
    assert HERMES.parse(text, tools) == Call("weather", '{"city": "Kōchi", "days": 2}')
    assert replace(HERMES, tools=tools).write_call("weather", '{"days": 2}') == (
        '<tool_call>\n{"name": "weather", "arguments": {"days": 2}}\n</tool_call>'
    )


@given(
    st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<", '"']) | st.text(max_size=3), max_size=6).map("".join)
)
def test_no_text_in_a_call_that_otcrl_writes_can_be_taken_for_a_tag(text: str):
    text = text.encode(errors="replace").decode()  # no halves of surrogate pairs
    body = dumped({"name": "search", "arguments": {"input": text}})
    (call,) = read(f"<tool_call>{body}</tool_call>")
    assert not isinstance(call, Malformed)
    assert call.arguments == {"input": text}


# -- Hermes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text", "action"),
    [
        ("tag", "<think>\nhm <answer>no</answer>\n</think>\n\n<answer> b </answer>", Answer("b")),
        ("tag", "hm\n</think>\n\n<answer>b</answer>", Answer("b")),  # the template opened the thought
        ("tag", "It is b.", Nothing()),
        ("boxed", r"It is \boxed{\frac{1}{2}}.", Answer(r"\frac{1}{2}")),
        ("text", "<think>hm</think> It is b. ", Answer("It is b.")),
        ("text", "<think>hm</think>", Nothing()),
        ("tag", "<think>I could <tool_call>, no</think><answer>b</answer>", Answer("b")),
        ("tag", "<think>hm <answer>b</answer>", Malformed("<think> was opened and never closed with </think>.")),
    ],
)
def test_hermes_answers_in_a_turn_without_calls_and_never_in_a_thought(answer, text: str, action: object):
    assert replace(HERMES, answer=answer).parse(text, TOOLS) == action


def test_hermes_shows_the_tools_as_functions_and_its_system_message_first():
    chat = replace(HERMES, system="Be brief.").prompt(
        PROBLEM, {"search": TOOLS["search"], "weather": Weather("weather")}
    )
    assert chat.messages == (Message("system", "Be brief."), Message("user", "Who?"))
    search, weather = (json.loads(each)["function"] for each in chat.functions)
    assert search["parameters"]["properties"] == {"input": {"type": "string"}}
    assert weather == {"name": "weather", "description": "says it again", "parameters": Weather.parameters}


def test_hermes_shows_a_problems_own_messages_and_functions():
    meta = {"messages": [{"role": "user", "content": "Hi"}], "functions": [{"name": "f"}]}
    chat = HERMES.prompt(replace(PROBLEM, meta=meta), TOOLS)
    assert chat == Chat((Message("user", "Hi"),), ('{"type": "function", "function": {"name": "f"}}',))
    with pytest.raises(DataError, match="'a/b/0' has a prompt of its own without functions: it is ToolRL's"):
        HERMES.prompt(replace(PROBLEM, meta={"messages": meta["messages"]}), TOOLS)


def test_where_calls_are_imitated_a_whole_turn_is_the_answer():
    turn = '<think> t </think>\n<tool_call>\n{"name": "search"}\n</tool_call>'
    for dialect in (replace(HERMES, calls="imitate"), replace(TOOLRL, calls="imitate")):
        assert dialect.parse(f"{turn}\n", TOOLS) == Answer(turn)
        assert dialect.parse(" ", TOOLS) == Nothing()
        assert dialect.stop(TOOLS) == []


@pytest.mark.parametrize(
    ("turn", "found"),
    [
        ("<tool_response>3</tool_response>", ("the policy wrote <tool_response> itself",)),
        ("<answer>1</answer><answer>2</answer>", ("2 answers",)),
        ("<think>hm", ("<think> was never closed",)),
        ("<tool_call>", ("<tool_call> was opened and never closed with </tool_call>.",)),
        (
            '<tool_call>{"name": "nope", "arguments": {}}</tool_call>',
            ("There is no tool named 'nope'. The tools are: search, python.",),
        ),
        (
            '<tool_call>{"name": "search", "arguments": {"x": 1}}</tool_call>',
            ('search takes one text, {"input": "..."}, got {"x": 1}.',),
        ),
    ],
)
def test_hermes_names_what_breaks_its_form(turn: str, found: tuple[str, ...]):
    assert HERMES.violations([turn], TOOLS) == found


# -- ToolRL -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turn", "found"),
    [
        ("<think> t </think>\n<response> r </response>", ()),
        (f"<think> t </think>\n<tool_call>\n{WHOLE_CALL}\n</tool_call>", ()),
        (f"<think> t </think>\n<tool_call>\n{WHOLE_CALL}\n</tool_call>\n<response> r </response>", ()),
        (
            '<think> t </think>\n<tool_call>\n{"name": "f"}\n</tool_call>',
            ("There is no tool named 'f'. The tools are: search, python.",),
        ),
        ("<response> r </response>", TOOLRL_NEEDS_THOUGHT),
        ("<think> t </think>", TOOLRL_NEEDS_THOUGHT),
        ("<think> t </think> so <response> r </response>", TOOLRL_NEEDS_THOUGHT),
        ("<obs> o </obs>", ("the policy wrote <obs> itself", *TOOLRL_NEEDS_THOUGHT)),
        ("<think> a </think><think> b </think><response> r </response>", ("2 times <think>",)),
    ],
)  # fmt: skip
def test_toolrl_names_what_breaks_its_form(turn: str, found: tuple[str, ...]):
    assert TOOLRL.violations([turn], TOOLS) == found


def test_toolrl_lists_the_tools_in_its_system_message_and_takes_a_published_prompt_as_it_is():
    chat = TOOLRL.prompt(PROBLEM, {"search": TOOLS["search"]})
    assert chat.messages == (
        Message(
            "system",
            'Use\n1. Name: search\nDescription: says it again\nParameters: {"input": {"type": "string"}}',
        ),
        Message("user", "**Dialogue Records History**\n<user> Who? </user>"),
    )
    own = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert TOOLRL.prompt(replace(PROBLEM, meta={"messages": own}), TOOLS) == Chat(
        (Message("system", "S"), Message("user", "U"))
    )


def test_toolrl_writes_a_dialogue_of_other_data_as_its_history():
    said = [("user", "a?"), ("assistant", "b"), ("user", "c?")]
    meta = {"messages": [{"role": r, "content": c} for r, c in said], "functions": [{"name": "f"}]}
    (_, user) = TOOLRL.prompt(replace(PROBLEM, meta=meta), {}).messages
    assert user.content.endswith("<user> a? </user>\n\n<response> b </response>\n\n<user> c? </user>")
