"""A tokenizer's chat template: how it opens a trajectory, and what it writes between two turns of the policy.

The template is never applied to what the policy said: that would be tokens it did not sample. What stands between two
turns is rendered once, with marks where contents go, and cut there. So contents are always plain text, and a tool's
result that spells out an end-of-turn token ends no turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from otcrl.errors import DataError
from otcrl.protocols import Chat, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION = Message("user", "otcrl:question")
SAID = "otcrl:said"
THOUGHT = "otcrl:thought"
TAGS = ("<think>", "</think>")
MARK = "otcrl:{}:\"<&>'é"  # with what a template might escape

Runs = list[str | int]  # plain texts, and ids of control tokens between them


@dataclass(frozen=True)
class ChatTemplate:
    hf: PreTrainedTokenizerBase
    _frames: dict[tuple[str, ...], list[Runs]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"the chat template of {self.hf.name_or_path or 'the tokenizer'}"

    def open(self, chat: Chat) -> str:
        """The rendered messages, up to where the policy speaks. Raises DataError when they cannot be rendered."""
        return self._render(chat.messages, chat.functions, asks=True)

    def between(self, messages: Sequence[Message]) -> Runs:
        """From behind the end of the policy's turn up to its next one.

        Raises DataError when the template has no such place for them.
        """
        roles = tuple(message.role for message in messages)
        if roles not in self._frames:
            self._frames[roles] = self._cut(roles)
        first, *others = self._frames[roles]
        runs = list(first)
        for message, frame in zip(messages, others, strict=True):
            runs += [message.content, *frame]
        return joined(runs)

    def rewrites(self, messages: Sequence[Message]) -> str:
        """What the template changes in the past once `messages` follow a turn; "" if it only appends."""
        opened = self._render([QUESTION], asks=True)
        begun = opened.rstrip()  # some templates open the thought for the policy, or an empty one
        thought = "" if begun.endswith("</think>") else f"\n{THOUGHT}\n</think>\n\n"
        turn = Message("assistant", f"{'' if begun.endswith(TAGS) else '<think>'}{thought}{SAID}")
        once = self._render([QUESTION, turn, *messages], asks=True)
        if thought and THOUGHT not in once:
            return f"{self.name} drops the <think> part of a turn once there is a reply to it"
        if not once.startswith(opened):
            same = next(i for i in range(len(opened), -1, -1) if once.startswith(opened[:i]))
            return f"{self.name} begins a turn with {opened[same:]!r}, and leaves that out once there is a reply to it"
        if not self._render([QUESTION, turn, *messages, turn, *messages], asks=True).startswith(once):
            return f"{self.name} writes earlier turns otherwise once there are more of them"
        return ""

    @cached_property
    def end_id(self) -> int | None:
        """The token that ends the policy's turn; None where the template has none."""
        try:
            after = self._render([QUESTION, Message("assistant", SAID)], asks=False).partition(SAID)[2]
        except DataError:  # a template for prompts alone
            return None
        return next((run for run in self._split(after)[:1] if isinstance(run, int)), None)

    def _cut(self, roles: tuple[str, ...]) -> list[Runs]:
        """What the template writes before, between and after messages of these roles that follow a turn."""
        replies = [Message(role, MARK.format(number)) for number, role in enumerate(roles)]
        rendered = self._render([QUESTION, Message("assistant", SAID), *replies], asks=True)
        rest = rendered.partition(SAID)[2]
        frames: list[Runs] = []
        for reply in replies:
            if rest.count(reply.content) != 1:
                raise DataError(f"{self.name} does not write a {reply.role} message word for word after a turn")
            frame, _, rest = rest.partition(reply.content)
            frames.append(self._split(frame))
        if self.end_id is None or frames[0][:1] != [self.end_id]:
            raise DataError(f"{self.name} ends a turn with no control token, so nobody can tell where one is over")
        return [frames[0][1:], *frames[1:], self._split(rest)]

    def _render(self, messages: Sequence[Message], functions: Sequence[str] = (), *, asks: bool) -> str:
        from jinja2 import TemplateError

        listed = [{"role": message.role, "content": message.content} for message in messages]
        tools = [json.loads(function) for function in functions] or None
        try:
            rendered = self.hf.apply_chat_template(listed, tools=tools, add_generation_prompt=asks, tokenize=False)
        except (TemplateError, TypeError) as error:  # what templates raise for roles or an order that they do not know
            roles = ", ".join(message.role for message in messages)
            raise DataError(f"{self.name} cannot write messages of {roles}: {error}") from error
        assert isinstance(rendered, str), "tokenize=False gives text"
        return rendered

    def _split(self, text: str) -> Runs:
        """The text with its control tokens as ids."""
        parts = self._pattern.split(text) if self._controls else [text]
        return [self._controls.get(part, part) for part in parts if part]

    @cached_property
    def _controls(self) -> dict[str, int]:
        return {token.content: id for id, token in self.hf.added_tokens_decoder.items() if token.special}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._controls, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def joined(runs: Sequence[str | int]) -> Runs:
    """The same with neighbouring texts as one, which are encoded as one."""
    whole: Runs = []
    for run in runs:
        last = whole[-1] if whole else None
        if isinstance(run, str) and isinstance(last, str):
            whole[-1] = last + run
        else:
            whole.append(run)
    return whole
