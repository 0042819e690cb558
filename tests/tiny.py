"""A random Llama of two layers and a tokenizer of single characters, for tests that need real ones."""

from __future__ import annotations

import string
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import Unigram
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from otcrl.models.tokenizer import HFTokenizer


def tiny_tokenizer(*pieces: str) -> HFTokenizer:
    """One token for each printable ASCII character and for each of `pieces`, which win over their characters."""
    special, characters = ["<pad>", "<eos>"], sorted(string.printable)
    vocabulary = [*((token, 0.0) for token in special), *((c, -10.0) for c in characters), *((p, -1.0) for p in pieces)]
    backend = Tokenizer(Unigram(vocabulary, unk_id=0))
    backend.decoder = decoders.Fuse()
    return HFTokenizer(
        hf=PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"), chat=False
    )


def tiny_llama(
    vocab_size: int, *, seed: int = 0, heads: Sequence[int] = (4, 2), context: int = 512, tied: bool = False
) -> LlamaForCausalLM:
    """Two layers of width 32 in float32; `heads` are those of queries and of keys; `tied`: one matrix for both ends."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # far from uniform, so that greedy decoding has a clear favourite
    )
    return LlamaForCausalLM(config).eval()
