"""Solutions with programs: read as ReTool publishes them, and demonstrated as any dialect writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from otcrl.construct import construct
from otcrl.errors import ConfigError, DataError
from otcrl.presets import conf_dir, shipped
from otcrl.protocols import Answer, Call, Dialect
from otcrl.tasks.question_answering import QuestionAnswering
from otcrl.tasks.traces import Step, Trace, demonstrate, read_traces, trace
from otcrl.tools.python import PythonTool
from tests.test_records import write

ASKED = "You may run code.\n\n*user question:*\nWhat is 6 * 7?\n\nRemember to place the final answer in the last part."
SAID = (
    "A product.\n<code>\n```python\nprint(6 * 7)\n```\n</code>\n<interpreter>\n42\n</interpreter>\n\n"
    "Once more.\n<code>\nprint(7 * 6)\n</code>\n<interpreter>42</interpreter>\nBoth agree.\n"
    "<answer>\n\\boxed{42}\n</answer>"
)
FOUND = Trace("What is 6 * 7?", (Step("A product.", "print(6 * 7)", "42"), Step("Once more.", "print(7 * 6)", "42")),
              "Both agree.", "42")  # fmt: skip


def row(asked: str = ASKED, said: str = SAID) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def dialect(name: str) -> Dialect:
    return construct(yaml.safe_load((conf_dir() / f"dialect/{name}.yaml").read_text()), "dialect")


def test_a_row_is_a_question_and_what_was_thought_run_and_shown():
    assert trace(row()) == FOUND
    assert trace(row("What is 6 * 7?")).question == "What is 6 * 7?"
    assert trace(row(said="<answer>42</answer>")) == Trace(FOUND.question, (), "", "42")


@pytest.mark.parametrize(
    "said",
    [
        "So 42.",
        SAID.replace("<answer>", ""),
        "<code>print(1)</code> <answer>1</answer>",
        f"<code>print(1)</code> Nothing was shown. {SAID}",
    ],
)
def test_a_solution_without_an_answer_or_a_result_is_named_or_left_out(said: str, tmp_path: Path):
    path = write(tmp_path / "traces.jsonl", [row(), row(said=said)])
    with pytest.raises(DataError, match=r"row 2: messages\[1\] must be a solution whose programs have results"):
        read_traces(str(path))
    assert read_traces(str(path), skip_bad_rows=True) == [FOUND]


@pytest.mark.parametrize("name", ["retool", "torl", "otc", "tir"])
def test_a_trace_is_demonstrated_in_the_dialects_own_writing(name: str):
    spoken, tools = dialect(name), {"python": PythonTool(workers=1, preload=[], isolation="none")}
    prompt, *turns = demonstrate(FOUND, "python", spoken, tools)
    assert "What is 6 * 7?" in str(prompt.said)
    assert [turn.is_action for turn in turns] == [True, False, True, False, True]
    calls = [spoken.parse(turn.text, tools) for turn in turns[::2]]
    assert [(call.tool, call.arguments.strip()) for call in calls if isinstance(call, Call)] == [
        ("python", "print(6 * 7)"),
        ("python", "print(7 * 6)"),
    ]
    assert calls[-1] == Answer("42")
    assert "A product." in turns[0].text
    assert "42" in turns[1].text


def test_the_traces_that_otcrl_ships_have_the_answers_of_its_problems():
    task = QuestionAnswering(train=[str(shipped("tiny_math/train.jsonl"))], match="math")
    answers = {problem.question: problem for problem in task.sample(0, 20)}
    found = read_traces(str(shipped("tiny_math/traces.jsonl")))
    assert len(found) == len(answers) == 20
    assert all(task.correct(each.answer, answers[each.question]) for each in found)
    assert all(step.result == each.answer for each in found for step in each.steps[-1:])


def test_demonstrations_of_traces_need_the_tool_that_they_call():
    task = QuestionAnswering(traces=[str(shipped("tiny_math/traces.jsonl"))])
    with pytest.raises(ConfigError, match="demonstrations call 'python', which is not in tools: none"):
        task.demonstrations(0, 2, dialect("retool"))


def test_demonstrations_that_never_search_need_neither_search_nor_gold_passages(tmp_path: Path):
    data = write(tmp_path / "train.jsonl", [{"id": "a", "question": "Who?", "answers": ["Curie"]}])
    (demo,) = QuestionAnswering(train=[str(data)], demo_direct=1.0).demonstrations(0, 1, dialect("otc"))
    assert [segment.is_action for segment in demo] == [False, True]
    assert demo[-1].text == "<answer> Curie </answer>"
