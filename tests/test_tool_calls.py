"""Calls to imitate: when a turn makes the calls that were wanted, and what the policy is shown."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcrl.dialects.hermes import Hermes
from otcrl.dialects.search_r1 import SearchR1
from otcrl.dialects.toolrl import ToolRL
from otcrl.errors import ConfigError, DataError
from otcrl.preflight import check_dialect
from otcrl.protocols import Answer
from otcrl.rewards.call_matching import accepted_calls, calls_of, same_calls
from otcrl.tasks.question_answering import QuestionAnswering
from otcrl.tasks.tool_calls import ToolCalls
from otcrl.types import Problem
from tests.published import ROWS, TURN
from tests.templates import DEAF, SILENT, chat_tokenizer
from tests.test_records import write

TOOLRL = ToolRL(system="Use\n{tools}", calls="imitate")
HERMES = Hermes(system=None, instructions="{question}", answer="tag", calls="imitate", allow_rewriting=False)
FUNCTIONS = [
    {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"}, "days": {"type": "integer"}, "share": {"type": "number"},
                "all": {"type": "boolean"}, "tags": {"type": "array"}, "who": {"type": "object"},
            },
            "required": ["city"],
        },
    }
]  # fmt: skip


def turn(*calls: tuple[str, dict[str, Any]], thought: str = "t") -> str:
    lines = "\n".join(json.dumps({"name": name, "parameters": arguments}) for name, arguments in calls)
    return f"<think> {thought} </think>\n<tool_call>\n{lines}\n</tool_call>"


def hermes(*calls: tuple[str, dict[str, Any]]) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {json.dumps(a)}}}\n</tool_call>' for n, a in calls)


# -- the calls of one turn are those of another -------------------------------------------------------------

A, B = ("f", {"city": "Kochi"}), ("g", {"n": 1, "tags": ["a"]})


@pytest.mark.parametrize(
    ("said", "gold", "same"),
    [
        (turn(A, B), turn(B, A), 1.0),
        (hermes(A, B), turn(A, B), 1.0),  # however they are written
        (turn(A), turn(A, A), 0.0),
        (turn(A, A), turn(A, B), 0.0),
        (turn(("f", {"city": "Oslo"})), turn(A), 0.0),
        (turn(("f", {})), turn(A), 0.0),
        (turn(("g", {"n": 1.0, "tags": ["a"]})), turn(B), 1.0),
        (turn(("g", {"n": True, "tags": ["a"]})), turn(B), 0.0),
        (turn(A).replace("}}", "}"), turn(A), 0.0),
        (turn(A, thought=hermes(B)), turn(A), 1.0),  # a thought calls nothing
        (f"<think> maybe {hermes(A)} or not", turn(A), 0.0),  # nor one that never ends
        ("<think> t </think>\n<response> r </response>", "<think> t </think>\n<response> another </response>", 1.0),
        (turn(A), "<think> t </think>\n<response> r </response>", 0.0),
    ],
)
def test_all_calls_and_no_others_in_any_order(said: str, gold: str, same: float):
    assert same_calls(said, gold) == same


calls = st.lists(
    st.tuples(
        st.sampled_from("fg"), st.dictionaries(st.sampled_from("ab"), st.integers(0, 1) | st.booleans(), max_size=2)
    ),
    max_size=4,
)


@given(calls, st.randoms())
def test_a_turn_is_the_same_as_any_order_of_itself_and_as_no_part_of_it(made: list, random):
    mixed = random.sample(made, len(made))
    assert same_calls(turn(*made), turn(*mixed)) == (1.0 if made else 0.0)  # empty tags hold no call
    if made:
        assert same_calls(turn(*made[1:]), turn(*made)) == 0.0


# -- the values that are accepted ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "values", "right"),
    [
        ({"city": "Kochi"}, {"city": ["Kochi", "Kochi, Japan"]}, True),
        ({"city": "kochi,japan"}, {"city": ["Kochi", "Kochi, Japan"]}, True),
        ({"city": "Oslo"}, {"city": ["Kochi"]}, False),
        ({}, {"city": ["Kochi", ""]}, False),  # the function needs it
        ({"city": "a"}, {"city": ["a"], "days": [1, ""]}, True),
        ({"city": "a"}, {"city": ["a"], "days": [1]}, False),
        ({"city": "a", "days": 1}, {"city": ["a"], "days": [1]}, True),
        ({"city": "a", "days": 1.0}, {"city": ["a"], "days": [1]}, False),
        ({"city": "a", "days": "1"}, {"city": ["a"], "days": [1]}, False),
        ({"city": "a", "share": 1}, {"city": ["a"], "share": [1.0]}, True),
        ({"city": "a", "all": 1}, {"city": ["a"], "all": [True]}, False),
        ({"city": "a", "all": True}, {"city": ["a"], "all": ["", True]}, True),
        ({"city": "a", "tags": ["X.", "y"]}, {"city": ["a"], "tags": [["x", "y"]]}, True),
        ({"city": "a", "tags": ["y", "x"]}, {"city": ["a"], "tags": [["x", "y"]]}, False),
        ({"city": "a", "who": {"n": 1}}, {"city": ["a"], "who": [{"n": [1, 2], "m": [3, ""]}]}, True),
        ({"city": "a", "who": {"n": 1}}, {"city": ["a"], "who": [{"n": [1, 2], "m": [3]}]}, False),
        ({"city": "a", "who": {"n": 1, "z": 1}}, {"city": ["a"], "who": [{"n": [1, 2]}]}, False),
        ({"city": "a", "none": 1}, {"city": ["a"]}, False),
        ({"city": "a", "days": 1}, {"city": ["a"]}, False),  # not asked for
    ],
)
def test_an_argument_may_have_any_value_that_is_accepted(arguments: dict, values: dict, right: bool):
    assert accepted_calls(turn(("f", arguments)), [{"f": values}], FUNCTIONS) == float(right)


def test_each_wanted_call_is_made_once_however_they_are_paired():
    """The first call fits both that are wanted, the second only one of them."""
    wanted = [{"f": {"city": ["a", "b"]}}, {"f": {"city": ["a"]}}]
    assert accepted_calls(turn(("f", {"city": "a"}), ("f", {"city": "b"})), wanted, FUNCTIONS) == 1.0
    assert accepted_calls(turn(("f", {"city": "b"}), ("f", {"city": "b"})), wanted, FUNCTIONS) == 0.0


def test_where_no_call_fits_none_is_right_and_where_one_does_any_is():
    silent = "<think> nothing fits </think>\n<response> I cannot. </response>"
    assert [accepted_calls(text, [], FUNCTIONS) for text in (silent, turn(A))] == [1.0, 0.0]
    assert [accepted_calls(text, "some", FUNCTIONS) for text in (silent, turn(A))] == [0.0, 1.0]
    assert accepted_calls("<tool_call>oops</tool_call>", [], FUNCTIONS) == 0.0


def test_many_calls_that_all_fit_are_paired_at_once():
    many = [("f", {"city": "a"})] * 40
    assert accepted_calls(turn(*many), [{"f": {"city": ["a"]}}] * 40, FUNCTIONS) == 1.0
    assert accepted_calls(turn(*many), [{"f": {"city": ["a"]}}] * 39 + [{"g": {}}], FUNCTIONS) == 0.0


# -- the task -----------------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path) -> ToolCalls:
    rows = [ROWS["toolrl"][0] | {"extra_info": {"index": i}} for i in range(4)]
    train = write(tmp_path / "train.jsonl", rows)
    return ToolCalls(train=[str(train)], test=[str(write(tmp_path / "bfcl.jsonl", [ROWS["bfcl"][0]]))])


def test_gold_turns_are_right_and_others_are_not(task: ToolCalls):
    for problem in task.sample(0, 4):
        assert task.correct(TURN, problem) == 1.0
        assert task.correct(turn(("forecast", {"city": "Oslo"})), problem) == 0.0
    (problem,) = task.held_out()
    assert task.correct(hermes(("weather.forecast", {"city": "Kochi"})), problem) == 1.0
    assert task.correct(hermes(("weather.forecast", {"city": "Kochi", "days": 2})), problem) == 0.0


def test_a_demonstration_is_the_published_turn(task: ToolCalls):
    (demo,) = task.demonstrations(0, 1, TOOLRL)
    assert demo[1].text == TURN
    assert TOOLRL.parse(demo[1].text, {}) == Answer(TURN)
    assert TOOLRL.violations([demo[1].text], {}) == ()
    only_values = replace(task, train=task.test, test=())
    with pytest.raises(ConfigError, match="has no published turn to demonstrate, only accepted values"):
        only_values.demonstrations(0, 1, TOOLRL)


def test_both_dialects_show_the_functions_of_a_problem(task: ToolCalls):
    (problem,) = task.held_out()
    tokenizer = chat_tokenizer()
    for dialect in (HERMES, TOOLRL):
        shown = tokenizer.decode(tokenizer.prompt_ids(dialect.prompt(problem, {})))
        assert "weather.forecast" in shown
        assert problem.question in shown
    with pytest.raises(DataError, match="it is ToolRL's"):
        HERMES.prompt(task.sample(0, 1)[0], {})


def test_questions_with_answers_are_no_calls_to_imitate(tmp_path: Path):
    path = write(tmp_path / "train.jsonl", [ROWS["plain"][0]])
    with pytest.raises(ConfigError, match="holds no calls to imitate: its rows are for task=qa"):
        ToolCalls(train=[str(path)])


def test_the_task_and_the_dialect_must_agree_that_nothing_runs():
    tokenizer = chat_tokenizer()
    check_dialect(TOOLRL, ToolCalls(), tokenizer, {})
    check_dialect(HERMES, ToolCalls(), tokenizer, {})
    runs = [
        replace(HERMES, calls="run"),
        SearchR1(instructions="{question}", observation_template="{result}", require_think=False),
    ]
    for dialect in runs:
        with pytest.raises(ConfigError, match="the task compares a whole turn: use dialect=toolrl, or dialect=hermes"):
            check_dialect(dialect, ToolCalls(), tokenizer, {})
    with pytest.raises(ConfigError, match=r"the task is not about calls to imitate: use dialect\.calls=run"):
        check_dialect(TOOLRL, QuestionAnswering(), tokenizer, {})


def test_a_chat_template_that_loses_a_message_is_refused(tmp_path: Path):
    """The policy would never hear of its tools and their format, or never be asked."""
    run, tags = replace(TOOLRL, calls="run"), SearchR1(
        instructions="Q: {question}", observation_template="{result}", require_think=False
    )  # fmt: skip
    path = write(tmp_path / "rows.jsonl", ROWS["toolrl"][:1])
    for dialect, task, template, role in (
        (run, QuestionAnswering(), SILENT, "system"),
        (TOOLRL, ToolCalls(test=[str(path)]), SILENT, "system"),  # with a published prompt
        (run, QuestionAnswering(), DEAF, "user"),
        (tags, QuestionAnswering(), DEAF, "user"),
    ):
        check_dialect(dialect, task, chat_tokenizer(), {})
        lost = f"the chat template of .* does not write the {role} message of {type(dialect).__name__}: '.+' is not in"
        with pytest.raises(DataError, match=lost):
            check_dialect(dialect, task, chat_tokenizer(template), {})
    check_dialect(tags, QuestionAnswering(), chat_tokenizer(SILENT), {})  # it has no system message


# -- real data ------------------------------------------------------------------------------------------------


def first_values(accepted: list[dict[str, dict[str, list[Any]]]]) -> list[tuple[str, dict[str, Any]]]:
    """The wanted calls with the first accepted value of each argument that has to be there."""

    def whole(one: Any) -> Any:
        if isinstance(one, list):
            return [whole(each) for each in one]
        return {k: value(v) for k, v in one.items() if "" not in v} if isinstance(one, dict) else one

    def value(listed: list[Any]) -> Any:
        return whole(next((each for each in listed if each != ""), []))

    return [
        (name, {key: value(listed) for key, listed in values.items() if "" not in listed})
        for call in accepted
        for name, values in call.items()
    ]


def spoiled(made: list[tuple[str, dict[str, Any]]]) -> list[list[tuple[str, dict[str, Any]]]]:
    """Versions of the calls with one thing wrong in each."""
    versions: list[Callable[[list], object]] = [
        lambda c: c.append(c[0]),
        lambda c: c.pop(),
        lambda c: c.__setitem__(0, (c[0][0] + "x", c[0][1])),
        lambda c: c[0][1].__setitem__("no such argument", 1),
    ]
    found = []
    for change in versions:
        other = copy.deepcopy(made)
        change(other)
        found.append(other)
    return found


@pytest.mark.parametrize("name", ["simple_python", "multiple", "parallel", "parallel_multiple", "live_simple"])
def test_published_values_are_right_and_anything_else_is_wrong(shared: Path, name: str):
    task = ToolCalls(test=[str(shared / "data" / "bfcl" / f"{name}.jsonl.gz")])
    right = 0
    for problem in task.held_out():
        accepted = problem.meta["accepted"]
        assert isinstance(accepted, list)
        made = first_values(accepted)
        right += task.correct(hermes(*made), problem) == 1.0
        for other in spoiled(made):
            assert task.correct(hermes(*other), problem) == 0.0
    assert right >= len(task.held_out()) - 1  # one row of live_simple accepts no value for an argument it requires


def test_published_turns_of_toolrl_are_right_in_their_own_form(shared: Path):
    path = str(shared / "data" / "toolrl" / "sft.jsonl.gz")
    task = ToolCalls(train=[path])
    well_formed = 0
    for problem in task.sample(0, 400):
        assert task.correct(problem.answers[0], problem) == 1.0
        assert calls_of(problem.answers[0]) is not None
        well_formed += TOOLRL.violations([problem.answers[0]], {}) == ()
        assert isinstance(problem, Problem)
    assert well_formed == 400
