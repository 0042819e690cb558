"""Search-R1's tags: `<search> q </search>`, `<python> code </python>`, `<answer> a </answer>`.

The tag of a tool is its name. With `<information>` and its own instructions this is Search-R1's
dialect; with `<observation>` and OTC's instructions it is the one of arXiv:2504.14870, App. C.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from otcrl.dialects.tool_calls import described
from otcrl.errors import ConfigError
from otcrl.protocols import Action, Answer, Call, Malformed, Nothing, Tokenizer, Tool
from otcrl.types import Problem

TAG = re.compile(r"<(/?)([A-Za-z_][\w-]*)>")


@dataclass(frozen=True, kw_only=True)
class SearchR1:
    instructions: str  # holds {question}; may hold {tools}, one line for each tool
    observation_template: str  # holds {result} between a pair of tags
    require_think: bool  # True: every turn opens with <think>...</think>, or it is a violation

    def __post_init__(self) -> None:
        for name, text in (("instructions", "{question}"), ("observation_template", "{result}")):
            if text not in getattr(self, name):
                raise ValueError(f"{name} must hold {text}, got {getattr(self, name)!r}")

    @property
    def ends_with_stop_token(self) -> bool:
        return False  # </answer> is a stop string

    def check(self, tokenizer: Tokenizer, tools: Mapping[str, Tool]) -> None:
        """Raises ConfigError for a tool whose name can be no tag."""
        for name in tools:
            if not TAG.fullmatch(f"<{name}>"):
                raise ConfigError(f"this dialect calls a tool by a tag, and <{name}> can be none: use dialect=hermes")

    def stop(self, tools: Mapping[str, Tool]) -> Sequence[str]:
        return [f"</{name}>" for name in (*tools, "answer")]

    def prompt(self, problem: Problem, tools: Mapping[str, Tool]) -> str:
        listed = "\n".join(f"<{name}> ... </{name}>: {described(tool)}" for name, tool in tools.items())
        return self.instructions.replace("{tools}", listed).replace("{question}", problem.question)

    def parse(self, text: str, tools: Mapping[str, Tool]) -> Action:
        """The first complete call or answer decides, whatever other tags there are; what follows it is ignored."""
        names = "|".join(map(re.escape, ("answer", *tools)))
        if found := re.search(rf"<({names})>(.*?)</\1>", text, re.DOTALL):
            name, body = found[1], found[2].strip()
            return Answer(body) if name == "answer" else Call(name, body)
        return amiss(text, tools)

    def observation(self, *results: str) -> str:
        return "".join(self.observation_template.replace("{result}", result) for result in results)

    def violations(self, sampled_turns: Sequence[str], tools: Mapping[str, Tool]) -> tuple[str, ...]:
        found: list[str] = []
        text = "".join(sampled_turns)
        observation_tags = {tag[2] for tag in TAG.finditer(self.observation_template)}
        for name in sorted(observation_tags & {tag[2] for tag in TAG.finditer(text)}):
            found.append(f"the policy wrote <{name}> itself")
        answers = len(re.findall(r"<answer>", text))
        if answers > 1:
            found.append(f"{answers} answers")
        for turn in sampled_turns:
            for name in ("think", "answer", *tools):
                opened, closed = turn.count(f"<{name}>"), turn.count(f"</{name}>")
                if opened != closed:
                    found.append(f"<{name}> opened {opened} times and closed {closed} times")
            if isinstance(action := self.parse(turn, tools), Malformed):
                found.append(action.why)
            if self.require_think and not turn.lstrip().startswith("<think>"):
                found.append("a turn does not open with <think>")
        return tuple(dict.fromkeys(found))

    def write_call(self, tool: str, arguments: str) -> str:
        return f"{self.open_call(tool)} {arguments} </{tool}>"

    def write_answer(self, text: str) -> str:
        return f"{self.open_answer()} {text} </answer>"

    def open_call(self, tool: str) -> str:
        return f"<{tool}>"

    def open_answer(self) -> str:
        return "<answer>"


def amiss(text: str, tools: Mapping[str, Tool]) -> Malformed | Nothing:
    """What is wrong with the first tag of a turn without a complete call or answer, if it has one."""
    open_tag = ""
    for tag in TAG.finditer(text):
        closes, name = bool(tag[1]), tag[2]
        if name == "think" or (open_tag and name != open_tag):
            continue
        if not closes:
            open_tag = name
        elif not open_tag:
            return Malformed(f"</{name}> closes a tag that was never opened.")
        else:
            return Malformed(f"There is no tool named {name!r}. The tools are: {', '.join(tools) or 'none'}.")
    return Malformed(f"<{open_tag}> was opened and never closed with </{open_tag}>.") if open_tag else Nothing()
