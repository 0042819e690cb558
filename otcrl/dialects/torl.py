r"""ToRL's notebook style (arXiv:2503.23383): ```python blocks, ```output blocks, \boxed{answer}.

The policy writes a code block and then opens an output block itself; that opening is the stop string,
so it is a sampled token, and the injected text is the output and the closing fence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from otcrl.errors import ConfigError
from otcrl.protocols import Action, Answer, Call, Malformed, Nothing, Tokenizer, Tool
from otcrl.types import Problem

BLOCK = re.compile(r"```(\w+)[^\S\n]*\n(.*?)\n?```", re.DOTALL)
OUTPUT = "```output"
BOXED = "\\boxed{"


@dataclass(frozen=True, kw_only=True)
class ToRL:
    instructions: str  # holds {question}
    free_last_turn: bool  # True: after the last call nothing runs, and what is written is final, made-up outputs too

    @property
    def ends_with_stop_token(self) -> bool:
        return True

    def check(self, tokenizer: Tokenizer, tools: Mapping[str, Tool]) -> None:
        """Raises ConfigError for a tool whose name cannot be the language of a code block."""
        for name in tools:
            if not re.fullmatch(r"\w+", name):
                raise ConfigError(f"this dialect calls a tool by a code block, whose language cannot be {name!r}")

    def stop(self, tools: Mapping[str, Tool]) -> Sequence[str]:
        return [OUTPUT] if tools else []

    def prompt(self, problem: Problem, tools: Mapping[str, Tool]) -> str:
        return self.instructions.replace("{question}", problem.question)

    def parse(self, text: str, tools: Mapping[str, Tool]) -> Action:
        """A turn that opens an output block runs its last code block; any other, or one without tools, is final."""
        at = text.find(OUTPUT) if tools else -1
        if at >= 0:
            blocks = BLOCK.findall(text[:at])
            if not blocks:
                return Malformed("No complete code block stands before the output block.")
            language, code = blocks[-1]
            if language not in tools:
                return Malformed(f"{language!r} cannot be run. Write one of: {', '.join(tools) or 'none'}.")
            return Call(language, code)
        answers = boxed(text)
        return Answer(answers[-1]) if answers else Nothing()

    @property
    def conclusion(self) -> str | None:
        return "" if self.free_last_turn else None

    def answered(self, sampled_turns: Sequence[str]) -> str | None:
        """ToRL judges the last box of the whole response (math_verifier.py): one before the last program counts."""
        return next((found[-1] for turn in reversed(sampled_turns) if (found := boxed(turn))), None)

    def observation(self, *results: str) -> str:
        return "".join(f"\n{result}\n```\n" for result in results)

    def violations(self, sampled_turns: Sequence[str], tools: Mapping[str, Tool]) -> tuple[str, ...]:
        found: list[str] = []
        answers = [answer for turn in sampled_turns for answer in boxed(turn) if answer]  # prompts write an empty box
        if len(set(answers)) > 1:
            found.append(f"{len(answers)} different answers")
        tried = sampled_turns[:-1] if self.free_last_turn else sampled_turns
        found += [action.why for turn in tried if isinstance(action := self.parse(turn, tools), Malformed)]
        if sampled_turns and sampled_turns[-1].count("```") % 2 and OUTPUT not in sampled_turns[-1]:
            found.append("a code block was opened and never closed")
        return tuple(found)

    def write_call(self, tool: str, arguments: str) -> str:
        return f"{self.open_call(tool)}{arguments}\n```\n{OUTPUT}"

    def write_answer(self, text: str) -> str:
        return f"{self.open_answer()}{text}}}"

    def open_call(self, tool: str) -> str:
        return f"```{tool}\n"

    def open_answer(self) -> str:
        return BOXED


def boxed(text: str) -> list[str]:
    r"""The contents of every complete `\boxed{...}` in order; braces inside must balance."""
    found, at = [], text.find(BOXED)
    while at >= 0:
        start, depth, i = at + len(BOXED), 1, at + len(BOXED)
        while i < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            i += 1
        if depth == 0:
            found.append(text[start : i - 1].strip())
        at = text.find(BOXED, i)
    return found
