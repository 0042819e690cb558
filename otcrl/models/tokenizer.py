"""A Hugging Face tokenizer with the five verbs that a rollout needs, and no surprises in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerFast

from otcrl.errors import DataError
from otcrl.models.chat import ChatTemplate
from otcrl.protocols import Chat, Message, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REMEMBERED = 4096  # prompts


@dataclass(frozen=True, kw_only=True)
class HFTokenizer:
    hf: PreTrainedTokenizerBase
    chat: bool  # True: the prompt becomes a user message of the chat template
    _prompts: dict[Text, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.hf.eos_token_id is None:
            raise DataError(f"{self._name} has no end-of-text token: a completion could never end. Set its eos_token.")
        if self.chat and not self.hf.chat_template:
            raise DataError(f"model.chat is true, but {self._name} has no chat template: set model.chat=false.")
        if isinstance(self.hf, PreTrainedTokenizerFast):  # what a tokenizer.json may ask for, and nobody here does
            self.hf.backend_tokenizer.no_truncation()
            self.hf.backend_tokenizer.no_padding()

    def encode(self, text: Text) -> list[int]:
        if isinstance(text, Chat):
            return self._between(text)
        if isinstance(self.hf, PreTrainedTokenizerFast):  # its wrapper costs more than the work
            backend = self.hf.backend_tokenizer
            backend.encode_special_tokens = True  # which means: as plain text; the wrapper sets it before each call too
            return backend.encode(text, add_special_tokens=False).ids
        return self.hf.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        if isinstance(self.hf, PreTrainedTokenizerFast):
            return self.hf.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
        text = self.hf.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str), "one sequence is one text"
        return text

    def prompt_ids(self, prompt: Text) -> list[int]:
        if prompt not in self._prompts:  # a group begins with the same one, again and again
            if len(self._prompts) >= REMEMBERED:
                self._prompts.clear()
            self._prompts[prompt] = self._prompt_ids(prompt)
        return list(self._prompts[prompt])

    def _prompt_ids(self, prompt: Text) -> list[int]:
        if self.chat:
            chat = prompt if isinstance(prompt, Chat) else Chat((Message("user", prompt),))
            return self.hf(self.template.open(chat), add_special_tokens=False)["input_ids"]  # pyright: ignore[reportArgumentType]
        if isinstance(prompt, Chat) and prompt.functions:
            raise DataError(f"{self._name} shows functions by its chat template only: set model.chat=true")
        start = self.hf.bos_token_id
        return [*([start] if isinstance(start, int) else []), *self.encode(str(prompt))]

    def _between(self, chat: Chat) -> list[int]:
        if not self.chat:
            raise DataError(f"{self._name} writes messages by its chat template only: set model.chat=true")
        runs = self.template.between(chat.messages)
        return [id for run in runs for id in ([run] if isinstance(run, int) else self.encode(run))]

    def rewrites(self, reply: Chat) -> str:
        return self.template.rewrites(reply.messages) if self.chat else ""

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.hf)

    @property
    def _name(self) -> str:
        return self.hf.name_or_path or "the tokenizer"

    @property
    def pad_id(self) -> int:
        pad = self.hf.pad_token_id
        return pad if isinstance(pad, int) else self._eos_id  # padding is masked everywhere, so any id will do

    @property
    def end_id(self) -> int:
        end = self.template.end_id if self.chat else None
        return self._eos_id if end is None else end

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset({self._eos_id, self.end_id})

    @property
    def _eos_id(self) -> int:
        eos = self.hf.eos_token_id
        assert isinstance(eos, int), "checked when it was made"
        return eos

    @property
    def vocab_size(self) -> int:
        return len(self.hf)
