"""The K/V cache of all trajectories, one pair of tensors per layer, and an attention that reads it in place.

A trajectory owns a row of the pool, so it can join or leave the decode batch without copying anybody's cache.
Transformers repeats K and V for each query head of a grouped-query model; with a mask, on CPU, that took 15 times as
long as the attention itself (64 rows of 300 tokens, 9 query heads on 3). `grouped_attention` repeats nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TOKEN_BLOCK = 64  # the pool grows along tokens in multiples of this


@dataclass(frozen=True, slots=True)
class Window:
    """What one forward reads, and where its N real (not padding) tokens are kept."""

    rows: slice | Tensor  # pool rows that are read, one per batch row: a slice reads in place, a tensor [B] copies
    width: int  # tokens of each row that are read
    batch: Tensor  # [N] int64, batch row of a real token
    column: Tensor  # [N] int64, batch column of it
    row: Tensor  # [N] int64, pool row its K/V go to
    position: Tensor  # [N] int64, its position in the trajectory


class KVPool(Cache):
    """Per layer two tensors [rows, kv_heads, tokens, head_dim]; passes as `past_key_values`.

    Set `window` before each forward. Memory that was never written is zero, not noise: a masked NaN is still NaN.
    """

    window: Window

    def __init__(self, *, max_rows: int, max_tokens: int) -> None:
        super().__init__(layers=[])
        self._max_rows, self._max_tokens = max_rows, max_tokens
        self._rows, self._tokens = 0, 0
        self._keys: dict[int, Tensor] = {}  # layer -> [rows, kv_heads, tokens, head_dim]
        self._values: dict[int, Tensor] = {}

    def reserve(self, rows: int, tokens: int) -> None:
        """Room for `rows` trajectories of `tokens` tokens; grows in steps, so that growth is rare."""
        if rows > self._rows:
            self._rows = min(self._max_rows, max(rows, 2 * self._rows))
        elif tokens <= self._tokens:
            return
        if tokens > self._tokens:
            blocks = -(-max(tokens, self._tokens * 3 // 2) // TOKEN_BLOCK)
            self._tokens = min(self._max_tokens, blocks * TOKEN_BLOCK)
        for store in (self._keys, self._values):
            for layer, old in store.items():
                store[layer] = old.new_zeros(self._rows, old.shape[1], self._tokens, old.shape[3])
                store[layer][: old.shape[0], :, : old.shape[2]] = old

    def copy(self, source: Sequence[int], target: Sequence[int], width: int) -> None:
        """The first `width` tokens of rows `source` [N] also in rows `target` [N]; swaps work."""
        source, target = list(source), list(target)  # a tuple would index along other dimensions
        for store in (self._keys, self._values):
            for pool in store.values():
                pool[target, :, :width] = pool[source, :, :width]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """K and V [B, kv_heads, width, head_dim] of the window's rows, the new ones included."""
        return self._keep(self._keys, layer_idx, key_states), self._keep(self._values, layer_idx, value_states)

    def _keep(self, store: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        at = self.window
        if layer not in store:
            store[layer] = new.new_zeros(self._rows, new.shape[1], self._tokens, new.shape[3])
        pool = store[layer]
        pool[at.row, :, at.position] = new[at.batch, :, at.column]
        return pool[at.rows, :, : at.width]


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """[B, T, heads, head_dim] attention; for T = 1 the query heads that share a K/V head are its queries."""
    batch, heads, queries, dim = query.shape
    if queries > 1 or position_bias is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias
        )
    grouped = query.reshape(batch, key.shape[1], -1, dim)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, -1), None


GROUPED_ATTENTION = "otcrl_grouped"
AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
AttentionMaskInterface.register(GROUPED_ATTENTION, sdpa_mask)  # without it, such a model ignores padding elsewhere
