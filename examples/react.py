"""A dialect: ReAct's lines (arXiv:2210.03629), `Action: search[query]`, `Observation: ...`, `Finish[answer]`.

otcrl train conf=smollm2_search dialect=react
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from otcrl.errors import ConfigError
from otcrl.protocols import Action, Answer, Call, Malformed, Nothing, Tokenizer, Tool
from otcrl.types import Problem

LINE = re.compile(r"(?:Action: (?P<tool>\w+)|Finish)\[(?P<text>.*?)\][^\S\n]*(?:\n|\Z)", re.DOTALL)
OPENED = re.compile(r"Action: \w+\[|Finish\[")


@dataclass(frozen=True, kw_only=True)
class ReAct:
    instructions: str  # holds {question}; may hold {tools}, one line for each tool

    def __post_init__(self) -> None:
        if "{question}" not in self.instructions:
            raise ValueError(f"instructions must hold {{question}}, got {self.instructions!r}")

    ends_with_stop_token = False  # an answer is over with its line, which is a stop string

    def check(self, tokenizer: Tokenizer, tools: Mapping[str, Tool]) -> None:
        for name in tools:
            if not re.fullmatch(r"\w+", name):
                raise ConfigError(f"this dialect calls a tool by one word, and {name!r} is none")

    def stop(self, tools: Mapping[str, Tool]) -> Sequence[str]:
        return ["]\n"]

    def prompt(self, problem: Problem, tools: Mapping[str, Tool]) -> str:
        listed = "\n".join(f"Action: {name}[...]: {tool.description}" for name, tool in tools.items())
        return self.instructions.replace("{tools}", listed).replace("{question}", problem.question)

    def parse(self, text: str, tools: Mapping[str, Tool]) -> Action:
        """The first whole line decides. `text` is what was sampled, any text at all."""
        line = LINE.search(text)
        if line is None:
            return Malformed("A line was opened with [ and not closed with ].") if OPENED.search(text) else Nothing()
        tool, written = line["tool"], line["text"].strip()
        if tool is None:
            return Answer(written)
        if tool not in tools:
            return Malformed(f"There is no tool named {tool!r}. The tools are: {', '.join(tools) or 'none'}.")
        return Call(tool, written)

    def observation(self, *results: str) -> str:
        return "".join(f"Observation: {result}\n" for result in results)

    def violations(self, sampled_turns: Sequence[str], tools: Mapping[str, Tool]) -> tuple[str, ...]:
        text = "".join(sampled_turns)
        found = ["the policy wrote an observation itself"] if "Observation:" in text else []
        answers = text.count("Finish[")
        return (*found, *([f"{answers} answers"] if answers > 1 else []))

    def write_call(self, tool: str, arguments: str) -> str:
        return f"{self.open_call(tool)}{arguments}]\n"

    def write_answer(self, text: str) -> str:
        return f"{self.open_answer()}{text}]\n"

    def open_call(self, tool: str) -> str:
        return f"Action: {tool}["

    def open_answer(self) -> str:
        return "Finish["
