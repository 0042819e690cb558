r"""ReTool's tags (arXiv:2504.11536, Sec. 2.3): `<code>` runs, `<interpreter>` shows what it printed.

A turn ends at `</code>`, and the result is put behind it. The answer is a `\boxed{}` in `<answer>`, and the turn that
gives it is over at the end of the text. There is one tool, so a call does not name it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from otcrl.dialects.torl import BOXED, boxed
from otcrl.errors import ConfigError, nearest
from otcrl.protocols import Action, Answer, Call, Malformed, Nothing, Tokenizer, Tool
from otcrl.types import Problem

CODE, END = "<code>", "</code>"
FENCED = re.compile(r"\s*```\w*[^\S\n]*\n(.*?)\n?[^\S\n]*```\s*", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class ReTool:
    instructions: str  # holds {question}
    tool: str  # that <code> runs

    def __post_init__(self) -> None:
        if "{question}" not in self.instructions:
            raise ValueError(f"instructions must hold {{question}}, got {self.instructions!r}")

    @property
    def ends_with_stop_token(self) -> bool:
        return True

    def check(self, tokenizer: Tokenizer, tools: Mapping[str, Tool]) -> None:
        """Raises ConfigError when what `<code>` runs is not there, or something is that it cannot call."""
        if tools and self.tool not in tools:
            raise ConfigError(f"dialect.tool: <code> runs {self.tool!r}, which is no tool.{nearest(self.tool, tools)}")
        if others := sorted(tools.keys() - {self.tool}):
            raise ConfigError(f"this dialect can call {self.tool!r} only, and the tools have {', '.join(others)} too")

    def stop(self, tools: Mapping[str, Tool]) -> Sequence[str]:
        return [END] if tools else []

    def prompt(self, problem: Problem, tools: Mapping[str, Tool]) -> str:
        return self.instructions.replace("{question}", problem.question)

    def parse(self, text: str, tools: Mapping[str, Tool]) -> Action:
        """A turn with a `</code>` runs what stands before it; any other turn is final."""
        at = text.find(END)
        if at >= 0:
            start = text.rfind(CODE, 0, at)
            if start < 0:
                return Malformed(f"{END} closes a tag that was never opened.")
            if self.tool not in tools:
                return Malformed("There is nothing here that runs code.")
            return Call(self.tool, unfenced(text[start + len(CODE) : at]))
        answers = ANSWER.findall(text)
        if answers:
            inside = boxed(answers[-1])
            return Answer(inside[-1] if inside else answers[-1].strip())
        return Malformed(f"{CODE} was opened and never closed with {END}.") if CODE in text else Nothing()

    def observation(self, *results: str) -> str:
        return "".join(f"\n<interpreter>\n{result}\n</interpreter>\n\n" for result in results)

    def violations(self, sampled_turns: Sequence[str], tools: Mapping[str, Tool]) -> tuple[str, ...]:
        found: list[str] = []
        text = "".join(sampled_turns)
        if "<interpreter>" in text or "</interpreter>" in text:
            found.append("the policy wrote <interpreter> itself")
        if (answers := text.count("<answer>")) > 1:
            found.append(f"{answers} answers")
        for turn in sampled_turns:
            for name in ("code", "answer"):
                opened, closed = turn.count(f"<{name}>"), turn.count(f"</{name}>")
                if opened != closed:
                    found.append(f"<{name}> opened {opened} times and closed {closed} times")
        return tuple(dict.fromkeys(found))

    def write_call(self, tool: str, arguments: str) -> str:
        return f"{self.open_call(tool)}{arguments}\n```\n{END}"

    def write_answer(self, text: str) -> str:
        return f"{self.open_answer()}{text}}}\n</answer>"

    def open_call(self, tool: str) -> str:
        return f"{CODE}\n```{tool}\n"

    def open_answer(self) -> str:
        return f"<answer>\n{BOXED}"


def unfenced(text: str) -> str:
    """The code inside a Markdown fence, or the text as it is without the line breaks around it."""
    fence = FENCED.fullmatch(text)
    return fence[1] if fence else text.strip("\n")
