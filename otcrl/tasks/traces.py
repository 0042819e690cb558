"""Whole solutions, with the programs they run and what those print, as demonstrations in any dialect.

The form is that of ReTool's cold start (arXiv:2504.11536 Sec. 2.2; JoeYing/ReTool-SFT): a user's message, and an
assistant's with <code>, <interpreter> and at its end <answer>.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

from otcrl.dialects.retool import ANSWER, unfenced
from otcrl.dialects.torl import boxed
from otcrl.errors import DataError
from otcrl.protocols import Demo, Dialect, Segment, Tool
from otcrl.tasks.fields import Row, Wrong, message
from otcrl.tasks.records import read_rows
from otcrl.types import Problem

log = logging.getLogger(__name__)

STEP = re.compile(r"(.*?)<code>(.*?)</code>\s*<interpreter>(.*?)</interpreter>", re.DOTALL)
QUESTION = re.compile(r".*\*user question:\*(.*?)(?:Remember to place the final answer|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Step:
    thought: str
    program: str
    result: str


@dataclass(frozen=True, slots=True)
class Trace:
    question: str
    steps: tuple[Step, ...]
    thought: str  # before the answer
    answer: str


def read_traces(source: str, skip_bad_rows: bool = False) -> list[Trace]:
    """The traces of a file or hub data set. Raises DataError for a row that is none, unless such are to be left out."""
    found, bad, number = list[Trace](), list[str](), 0
    for number, row in enumerate(read_rows(source, ("messages",)), start=1):
        try:
            found.append(trace(row))
        except Wrong as error:
            bad.append(f"{source}, row {number}: {error}")
            if not skip_bad_rows:
                raise DataError(f"{bad[0]} ([task.]skip_bad_rows=true goes on without such rows)") from error
    if bad:
        log.warning("%s: %d of %d traces left out, the first: %s", source, len(bad), number, bad[0])
    if not found:
        raise DataError(f"{source} holds no trace.")
    return found


def trace(row: Row) -> Trace:
    """Raises Wrong for messages that are no question and its solution."""
    messages = row["messages"]
    if not isinstance(messages, list) or len(messages) != 2:
        raise Wrong("messages", "a user's and an assistant's", messages)
    asked, said = (message({"prompt": messages}, at) for at in (0, 1))
    question = QUESTION.match(asked)
    steps, end = list[Step](), 0
    for found in STEP.finditer(said):
        if "code>" in found[2]:  # over the end of a program without a result, to the next that has one
            break
        steps.append(Step(found[1].strip(), unfenced(found[2]), found[3].strip()))
        end = found.end()
    rest = said[end:]
    answer = ANSWER.search(rest)
    if answer is None or "<code>" in rest:
        raise Wrong("messages[1]", "a solution whose programs have results, and which ends with <answer>", said[-60:])
    inside = boxed(answer[1])
    return Trace(
        question=(question[1] if question else asked).strip(),
        steps=tuple(steps),
        thought=rest[: answer.start()].strip(),
        answer=inside[-1] if inside else answer[1].strip(),
    )


def demonstrate(found: Trace, tool: str, dialect: Dialect, tools: Mapping[str, Tool]) -> Demo:
    """The trace as a trajectory that calls `tool`, written and answered as the dialect has it."""
    problem = Problem(id="trace", question=found.question, answers=(found.answer,), source="trace")
    segments = [Segment(dialect.prompt(problem, tools), False)]
    for step in found.steps:
        segments.append(Segment(paragraph(step.thought) + dialect.write_call(tool, step.program), True))
        segments.append(Segment(dialect.observation(step.result), False))
    return [*segments, Segment(paragraph(found.thought) + dialect.write_answer(found.answer), True)]


def paragraph(text: str) -> str:
    return f"{text}\n" if text else ""


def drill(problem: Problem, dialect: Dialect, tools: Mapping[str, Tool]) -> Demo:
    """Puts the answer in the weights, and says nothing about whether to call: its opening is there already."""
    opening, whole = dialect.open_answer(), dialect.write_answer(problem.answers[0])
    prompt = dialect.prompt(problem, tools)
    return [Segment(prompt, False), Segment(opening, False), Segment(whole.removeprefix(opening), True)]
