"""A Llama small enough to learn Atlas on two CPU cores, with one token for each word of its world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from otcrl.models.tokenizer import HFTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class TinyLlama:
    width: int
    layers: int
    heads: int
    ff_width: int
    context: int

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "ff_width", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % (2 * self.heads):  # rotary embeddings turn pairs
            raise ValueError(f"width must be a multiple of 2 * heads = {2 * self.heads}, got {self.width}")

    def load(self, words: Sequence[str], seed: int) -> tuple[PreTrainedModel, HFTokenizer]:
        """A freshly initialised float32 model and its tokenizer."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = self.load_tokenizer(words)
        config = LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=self.width,
            intermediate_size=self.ff_width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.prompt_ids("")[0],
            eos_token_id=tokenizer.end_id,
            pad_token_id=tokenizer.pad_id,
        )
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                torch.nn.init.normal_(weight, std=(0.5 if into_stream else 1.0) * weight.shape[1] ** -0.5)
        torch.nn.init.constant_(model.model.norm.weight, 4 * self.width**-0.5)  # logits of order 1 from tied embeddings
        return model, tokenizer

    def load_tokenizer(self, words: Sequence[str]) -> HFTokenizer:
        """The tokenizer alone, for an engine that needs no weights here."""
        return word_tokenizer(words)


def word_tokenizer(words: Sequence[str]) -> HFTokenizer:
    """One token for each word between white space; decoding joins words with single spaces."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(("<pad>", "<bos>", "<eos>", "<unk>", *words)))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    return HFTokenizer(hf=hf, chat=False)
