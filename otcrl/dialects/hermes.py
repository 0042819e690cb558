r"""The model's own chat template and tool schema (Hermes, Qwen2.5, Qwen3): calls as JSON in `<tool_call>` tags.

The template shows the tools and writes their results: what comes between two turns is a `tool` message for each call.
A turn is over at the template's end-of-turn token. One with calls runs all of them in order; one without is final.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from otcrl.dialects.tool_calls import CLOSE, OPEN, arguments_of, asked, dumped, faults, read, schema
from otcrl.dialects.torl import BOXED, boxed
from otcrl.errors import DataError
from otcrl.protocols import Action, Answer, Chat, Malformed, Message, Nothing, Tokenizer, Tool
from otcrl.types import Problem

THINK, THOUGHT = "<think>", "</think>"
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
ANSWERS = {"tag": ("<answer>", "</answer>"), "boxed": (BOXED, "}"), "text": ("", "")}
FUNCTION = {"name": "an_example", "description": "shown or not?", "parameters": {"type": "object", "properties": {}}}
EXAMPLE = Problem(id="an/example/0", question="?", answers=("",), source="an")


@dataclass(frozen=True, kw_only=True)
class Hermes:
    system: str | None  # None: the template's own
    instructions: str  # the user's message; holds {question}
    answer: Literal["tag", "boxed", "text"]  # of a turn without calls: what is in <answer>, in \boxed{}, or all of it
    calls: Literal["run", "imitate"]  # imitate: nothing runs, a whole turn is the answer, for task=tool_calls
    allow_rewriting: bool  # True: also with a template that changes earlier turns, which otcrl never does
    tools: Mapping[str, Tool] = field(repr=False, default_factory=dict)  # wired by build, to write demonstrations

    wired = frozenset({"tools"})

    def __post_init__(self) -> None:
        if "{question}" not in self.instructions:
            raise ValueError(f"instructions must hold {{question}}, got {self.instructions!r}")

    @property
    def ends_with_stop_token(self) -> bool:
        return True

    def check(self, tokenizer: Tokenizer, tools: Mapping[str, Tool]) -> None:
        """Raises DataError when the chat template cannot show the tools or their results, or rewrites the past."""
        imitates = self.calls == "imitate"
        if not tools and not imitates:
            return
        example = replace(EXAMPLE, meta={"functions": [FUNCTION]}) if imitates else EXAMPLE
        shown = tokenizer.decode(tokenizer.prompt_ids(self.prompt(example, tools)))
        if missing := [name for name in ([FUNCTION["name"]] if imitates else tools) if f'"{name}"' not in shown]:
            raise DataError(f"the chat template does not show the tools: {missing[0]!r} is not in the prompt")
        if OPEN not in shown:
            raise DataError(f"the chat template does not ask for calls in {OPEN}: the model writes them in another way")
        if imitates:
            return
        reply = self.observation("a result")
        tokenizer.encode(reply)
        if (why := tokenizer.rewrites(reply)) and not self.allow_rewriting:
            raise DataError(
                f"{why}. otcrl trains on what was sampled, so a server that renders the conversation anew would show "
                "the model something else: use a template that only appends, or set dialect.allow_rewriting=true"
            )

    def stop(self, tools: Mapping[str, Tool]) -> Sequence[str]:
        return []

    def prompt(self, problem: Problem, tools: Mapping[str, Tool]) -> Chat:
        """The question with the tools; a problem with messages and functions of its own is shown those."""
        own, functions = problem.meta.get("messages"), problem.meta.get("functions")
        if isinstance(own, Sequence) and not isinstance(functions, Sequence):
            raise DataError(f"problem {problem.id!r} has a prompt of its own without functions: it is ToolRL's")
        schemas = functions if isinstance(functions, Sequence) else [schema(tool) for tool in tools.values()]
        said = Message("user", self.instructions.replace("{question}", problem.question))
        messages = [Message(m["role"], m["content"]) for m in own] if isinstance(own, Sequence) else [said]
        if self.system is not None and messages[0].role != "system":
            messages.insert(0, Message("system", self.system))
        listed = (json.dumps({"type": "function", "function": each}, ensure_ascii=False) for each in schemas)
        return Chat(tuple(messages), tuple(listed))

    def parse(self, text: str, tools: Mapping[str, Tool]) -> Action:
        """What stands behind the last thought: all its calls, or the answer. Thoughts may mention either."""
        if self.calls == "imitate":
            return Answer(text.strip()) if text.strip() else Nothing()
        said = text.rpartition(THOUGHT)[2]
        if THINK in said:
            return Malformed(f"{THINK} was opened and never closed with {THOUGHT}.")
        if calls := read(said):
            return asked(calls, tools)
        found = TAGGED.findall(said) if self.answer == "tag" else boxed(said) if self.answer == "boxed" else [said]
        return Answer(found[-1].strip()) if found and found[-1].strip() else Nothing()

    def observation(self, *results: str) -> Chat:
        return Chat(tuple(Message("tool", result) for result in results))

    def violations(self, sampled_turns: Sequence[str], tools: Mapping[str, Tool]) -> tuple[str, ...]:
        found: list[str] = []
        for turn in sampled_turns:
            said = turn.rpartition(THOUGHT)[2]
            if "<tool_response>" in turn:
                found.append("the policy wrote <tool_response> itself")
            if THINK in said:
                found.append(f"{THINK} was never closed")
            found += faults(read(said), tools if self.calls == "run" else None)
            if self.answer == "tag" and (answers := said.count("<answer>")) > 1:
                found.append(f"{answers} answers")
        return tuple(dict.fromkeys(found))

    def write_call(self, tool: str, arguments: str) -> str:
        written = arguments_of(self.tools.get(tool), arguments)
        return f"{self.open_call(tool)}{dumped(written)}}}\n{CLOSE}"

    def write_answer(self, text: str) -> str:
        opening, closing = ANSWERS[self.answer]
        return f"{opening}{text}{closing}"

    def open_call(self, tool: str) -> str:
        return f'{OPEN}\n{{"name": {json.dumps(tool)}, "arguments": '

    def open_answer(self) -> str:
        return ANSWERS[self.answer][0]
