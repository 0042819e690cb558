"""A Hugging Face tokenizer with the five verbs that a rollout needs, and no surprises in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerFast

from otcrl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REMEMBERED = 4096  # prompts


@dataclass(frozen=True, kw_only=True)
class HFTokenizer:
    hf: PreTrainedTokenizerBase
    chat: bool  # True: the prompt becomes a user message of the chat template
    _prompts: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        name = self.hf.name_or_path or "the tokenizer"
        if self.hf.eos_token_id is None:
            raise DataError(f"{name} has no end-of-text token: a completion could never end. Set its eos_token.")
        if self.chat and not self.hf.chat_template:
            raise DataError(f"model.chat is true, but {name} has no chat template: set model.chat=false.")
        if isinstance(self.hf, PreTrainedTokenizerFast):  # what a tokenizer.json may ask for, and nobody here does
            self.hf.backend_tokenizer.no_truncation()
            self.hf.backend_tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
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

    def prompt_ids(self, prompt: str) -> list[int]:
        if prompt not in self._prompts:  # a group begins with the same one, again and again
            if len(self._prompts) >= REMEMBERED:
                self._prompts.clear()
            self._prompts[prompt] = self._prompt_ids(prompt)
        return list(self._prompts[prompt])

    def _prompt_ids(self, prompt: str) -> list[int]:
        if self.chat:
            message = [{"role": "user", "content": prompt}]
            text = self.hf.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            return self.hf(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportArgumentType]
        start = self.hf.bos_token_id
        return [*([start] if isinstance(start, int) else []), *self.encode(prompt)]

    @property
    def pad_id(self) -> int:
        pad = self.hf.pad_token_id
        return pad if isinstance(pad, int) else self.end_id  # padding is masked everywhere, so any id will do

    @property
    def end_id(self) -> int:
        end = self.hf.eos_token_id
        assert isinstance(end, int), "checked when it was made"
        return end

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset({self.end_id})

    @property
    def vocab_size(self) -> int:
        return len(self.hf)
