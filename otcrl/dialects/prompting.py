"""How systems that were not trained with tools are prompted: directly, with a chain of thought, RAG and IRCoT.

The answer stands in Search-R1's tags. An `opening` is written for the policy, and whatever follows is the answer, so
that a model need not know of tags. Where the instructions hold {passages}, a tool is asked the question before the
policy writes anything, and the prompt shows what it found: retrieval-augmented generation, one call. With
`each_sentence` every line that the policy writes is a query too (IRCoT, arXiv:2212.10509): a line, its passages, the
next line. There the passages of all queries are gathered above the reasoning, and the prompt is made anew for each
sentence; here they stand after the sentence that found them, so that tokens are only ever appended. There a reader
reads the answer off once no query is left; here the answer's tag is written for the policy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from otcrl.dialects.search_r1 import TAG, SearchR1
from otcrl.errors import ConfigError, nearest
from otcrl.protocols import Action, Answer, Call, Malformed, Tokenizer, Tool
from otcrl.types import Problem

PASSAGES, LINE = "{passages}", "\n"
ANSWER, CLOSING = "answer>", "</answer>"
PLACE = re.compile(r"\{question\}|\{passages\}")


@dataclass(frozen=True, kw_only=True)
class Prompting:
    instructions: str  # holds {question}; may hold {passages}
    opening: str  # written for the policy after the prompt: "<answer>" makes all that follows the answer; "": nothing
    observation_template: str  # holds {result}: the passages of a sentence, or what was wrong with it
    tool: str  # finds passages
    each_sentence: bool  # True: for each line that the policy writes; False: for the question alone

    def __post_init__(self) -> None:
        if self.opening not in ("", self._tags.open_answer()):
            raise ValueError(f"opening must be empty or {self._tags.open_answer()!r}, got {self.opening!r}")
        if self.each_sentence and PASSAGES not in self.instructions:
            raise ValueError(f"instructions must hold {PASSAGES} with each_sentence, got {self.instructions!r}")

    @property
    def _tags(self) -> SearchR1:
        return SearchR1(
            instructions=self.instructions, observation_template=self.observation_template, require_think=False
        )

    @property
    def ends_with_stop_token(self) -> bool:
        return False  # </answer> is a stop string

    def check(self, tokenizer: Tokenizer, tools: Mapping[str, Tool]) -> None:
        """Raises ConfigError when there is no tool to find the passages."""
        if PASSAGES in self.instructions and self.tool not in tools:
            raise ConfigError(f"dialect.tool is {self.tool!r}, which is not in tools.{nearest(self.tool, tools)}")

    def stop(self, tools: Mapping[str, Tool]) -> Sequence[str]:
        return [*self._tags.stop({}), *([LINE] if self.each_sentence and tools else [])]

    @property
    def conclusion(self) -> str | None:
        return self.open_answer() if self.each_sentence else None

    def look_up(self, problem: Problem) -> Call | None:
        return Call(self.tool, problem.question) if PASSAGES in self.instructions else None

    def prompt(self, problem: Problem, tools: Mapping[str, Tool]) -> str:
        return self.prompt_with(problem, "")

    def prompt_with(self, problem: Problem, found: str) -> str:
        values = {"{question}": problem.question, PASSAGES: found}
        return PLACE.sub(lambda place: values[place[0]], self.instructions)

    def parse(self, text: str, tools: Mapping[str, Tool]) -> Action:
        """The answer, or with `each_sentence` the line as a query. The policy has no tools of its own."""
        opening = self.opening if tools or not self.each_sentence else self.open_answer()
        text = opened_once(text, opening)
        action = self._tags.parse(text, {})
        if opening and text.startswith(opening) and not isinstance(action, Answer):
            return Answer(text.removeprefix(opening).strip())
        if isinstance(action, Answer) or not self.each_sentence or (isinstance(action, Malformed) and ANSWER in text):
            return action
        return Call(self.tool, text.strip()) if text.strip() else Malformed("The line is empty. Write a sentence.")

    def observation(self, *results: str) -> str:
        return self._tags.observation(*results)

    def violations(self, sampled_turns: Sequence[str], tools: Mapping[str, Tool]) -> tuple[str, ...]:
        last = opened_once(sampled_turns[-1], self.open_answer()) if sampled_turns else ""
        if self.opening and last.startswith(self.opening) and CLOSING not in last:
            last += CLOSING  # it ended at the end of the text, which ends an answer too
        turns = [*sampled_turns[:-1], last] if sampled_turns else []
        if self.each_sentence:  # a sentence may hold any tag but the answer's
            turns = [TAG.sub(lambda tag: tag[0] if tag[2] == "answer" else "", turn) for turn in turns]
        return self._tags.violations(turns, {})

    def write_call(self, tool: str, arguments: str) -> str:
        if not self.each_sentence:
            raise ConfigError("in this dialect the policy makes no calls: choose another one to demonstrate them in")
        return f"{' '.join(arguments.split())}{LINE}"

    def write_answer(self, text: str) -> str:
        return self._tags.write_answer(text)

    def open_call(self, tool: str) -> str:
        return ""  # a line is one, whatever it begins with

    def open_answer(self) -> str:
        return self._tags.open_answer()


def opened_once(text: str, opening: str) -> str:
    """Without the opening that a policy writes again, though it was written for it."""
    rest = text.removeprefix(opening).lstrip()
    return rest if opening and text.startswith(opening) and rest.startswith(opening) else text
