"""ToolRL's format (arXiv:2504.13958, Sec. 3.2): `<think>`, `<tool_call>` with a JSON line for each call, `<response>`.

ToolRL trains single steps: a whole turn is compared with a published one and nothing runs (`calls: imitate`). With
`calls: run` the calls of a block run in order, and their results follow it as `<obs>`, as its dialogues write them;
`<response>` is then the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from otcrl.dialects.tool_calls import CLOSE, OPEN, arguments_of, asked, dumped, faults, read, schema
from otcrl.protocols import Action, Answer, Chat, Malformed, Message, Nothing, Tokenizer, Tool
from otcrl.types import Problem

END = "</response>"
RESPONSE = re.compile(r"<response>(.*?)</response>", re.DOTALL)
WHOLE = re.compile(r"\s*<think>.*?</think>\s*(<tool_call>.*?</tool_call>)?\s*(<response>.*?</response>)?\s*", re.DOTALL)
HISTORY = "**Dialogue Records History**\n"


@dataclass(frozen=True, kw_only=True)
class ToolRL:
    system: str  # holds {tools}, the list of what can be called
    calls: Literal["run", "imitate"]  # imitate: nothing runs, a whole turn is the answer, for task=tool_calls
    tools: Mapping[str, Tool] = field(repr=False, default_factory=dict)  # wired by build, to write demonstrations

    wired = frozenset({"tools"})

    def __post_init__(self) -> None:
        if "{tools}" not in self.system:
            raise ValueError(f"system must hold {{tools}}, got {self.system!r}")

    @property
    def ends_with_stop_token(self) -> bool:
        return self.calls == "imitate"  # else </response> is a stop string

    def check(self, tokenizer: Tokenizer, tools: Mapping[str, Tool]) -> None:
        """Nothing: it needs no chat template, and JSON can name any tool."""

    def stop(self, tools: Mapping[str, Tool]) -> Sequence[str]:
        return [] if self.calls == "imitate" else [CLOSE, END]

    def prompt(self, problem: Problem, tools: Mapping[str, Tool]) -> Chat:
        """The question with the tools. A published prompt of ToolRL is taken as it is."""
        own, functions = problem.meta.get("messages"), problem.meta.get("functions")
        dialogue = [Message(m["role"], m["content"]) for m in own] if isinstance(own, Sequence) else []
        if dialogue and not isinstance(functions, Sequence):
            return Chat(tuple(dialogue))
        schemas = functions if isinstance(functions, Sequence) else [schema(tool) for tool in tools.values()]
        system = self.system.replace("{tools}", "\n".join(listed(schemas)))
        said = dialogue or [Message("user", problem.question)]
        return Chat((Message("system", system), Message("user", HISTORY + "\n\n".join(history(said)))))

    def parse(self, text: str, tools: Mapping[str, Tool]) -> Action:
        """The calls of a turn that has some, else its response."""
        if self.calls == "imitate":
            return Answer(text.strip()) if text.strip() else Nothing()
        said = text.rpartition("</think>")[2]
        if "<think>" in said:
            return Malformed("<think> was opened and never closed with </think>.")
        if calls := read(said):
            return asked(calls, tools)
        if responses := RESPONSE.findall(said):
            return Answer(responses[0].strip())
        return Malformed("<response> and </response> make no pair.") if "response>" in said else Nothing()

    def observation(self, *results: str) -> str:
        return "\n" + "".join(f"<obs> {result} </obs>\n" for result in results) + "\n"

    def violations(self, sampled_turns: Sequence[str], tools: Mapping[str, Tool]) -> tuple[str, ...]:
        found: list[str] = []
        for turn in sampled_turns:
            said = turn.rpartition("</think>")[2]
            if "<obs>" in turn:
                found.append("the policy wrote <obs> itself")
            found += [f"{n} times <think>"] if (n := turn.count("<think>")) > 1 else []
            found += [f"{n} times <{name}>" for name in ("tool_call", "response") if (n := said.count(f"<{name}>")) > 1]
            whole = WHOLE.fullmatch(turn)
            if whole is None or not any(whole.groups()):
                found.append("a turn is not <think>, then <tool_call>, <response> or both")
            found += faults(read(said), tools if self.calls == "run" else None)
        return tuple(dict.fromkeys(found))

    def write_call(self, tool: str, arguments: str) -> str:
        return f"{self.open_call(tool)}{dumped(arguments_of(self.tools.get(tool), arguments))}}}\n{CLOSE}"

    def write_answer(self, text: str) -> str:
        return f"{self.open_answer()} {text} {END}"

    def open_call(self, tool: str) -> str:
        return f'{OPEN}\n{{"name": {json.dumps(tool)}, "parameters": '

    def open_answer(self) -> str:
        return "<response>"


def listed(schemas: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """The tools as ToolRL's prompt lists them."""
    for number, each in enumerate(schemas, start=1):
        properties = each.get("parameters")
        properties = properties.get("properties", {}) if isinstance(properties, Mapping) else {}
        yield f"{number}. Name: {each['name']}\nDescription: {each.get('description', '')}"
        yield f"Parameters: {json.dumps(properties, ensure_ascii=False)}"


def history(messages: Sequence[Message]) -> Iterator[str]:
    tags = {"user": "user", "assistant": "response", "tool": "obs"}
    for message in messages:
        tag = tags.get(message.role)
        yield f"<{tag}> {message.content} </{tag}>" if tag else message.content
