"""Attention over packed rows (otcrl.packing): each run's tokens attend to their whole row, prefix included.

The rest of a model works token by token, so the tokens of many rows go through it as one row [1, U] with their own
positions; attention alone must know whose they are. It is registered with transformers: no model code changes.

    CUDA, half precision   flash attention with variable lengths, one call
    otherwise              scaled_dot_product_attention for each bucket of runs of like shape; runs are padded to one
                           shape inside attention only, and only where that costs less than one more call
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from otcrl.packing import Layout

CALL = 2048  # query-key pairs that cost what one more call of attention does

Attend = Callable[[Tensor, Tensor, Tensor, "Packed", float | None, int | None], Tensor]


@dataclass(frozen=True)
class Bucket:
    """N runs of like shape: Q queries and S keys each; past the end of a run or a row stands U's first token."""

    runs: Sequence[int]
    query_NQ: Tensor  # int64, places in U
    key_NS: Tensor  # int64, places in U
    position_NQ: Tensor  # int64, of a query in its row, so the number of keys before it
    are_whole: bool  # every run is its whole row: plain causal attention


class Packed:
    """A layout on its device, with what attention must know of it; all layers and models share one."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.where_BT = layout.where_BT.to(device)
        self.windows: set[int] = set()  # that layers have asked for
        self._masks: dict[tuple[int, int | None, torch.dtype], Tensor] = {}

    def inputs(self) -> dict[str, object]:
        """Arguments of a transformers model's forward, which then has one row of U tokens."""
        return {
            "input_ids": self.layout.token_ids_U[None].to(self.device),
            "position_ids": self.layout.position_U[None].to(self.device),
            "attention_mask": torch.zeros(1, 1, 1, 1, device=self.device),  # of four dimensions: no other is made
            "packed": self,
            "use_cache": False,
        }

    # -- for flash attention

    @cached_property
    def query_ends(self) -> Tensor:
        """[R + 1] int32, where each run's queries end."""
        return torch.tensor([0, *accumulate(self.layout.queries)], dtype=torch.int32, device=self.device)

    @cached_property
    def key_ends(self) -> Tensor:
        return torch.tensor([0, *accumulate(self.layout.keys)], dtype=torch.int32, device=self.device)

    @cached_property
    def key_K(self) -> Tensor:
        return self.layout.key_K.to(self.device)

    # -- for scaled_dot_product_attention

    @cached_property
    def buckets(self) -> list[Bucket]:
        queries, keys = self.layout.queries, self.layout.keys
        place_U = torch.arange(len(self.layout.token_ids_U))
        query_places, key_places = place_U.split(queries), self.layout.key_K.split(keys)
        positions = self.layout.position_U.split(queries)

        def padded(parts: Sequence[Tensor], runs: Sequence[int]) -> Tensor:
            return pad_sequence([parts[run] for run in runs], batch_first=True).to(self.device)

        return [
            Bucket(
                runs=runs,
                query_NQ=padded(query_places, runs),
                key_NS=padded(key_places, runs),
                position_NQ=padded(positions, runs),
                are_whole=all(queries[run] == keys[run] for run in runs),
            )
            for runs in alike(queries, keys)
        ]

    @cached_property
    def query_places(self) -> Tensor:
        """int64, places in U of the queries of all buckets, one after another."""
        return torch.cat([bucket.query_NQ.flatten() for bucket in self.buckets])

    @cached_property
    def key_places(self) -> Tensor:
        return torch.cat([bucket.key_NS.flatten() for bucket in self.buckets])

    @cached_property
    def result_U(self) -> Tensor:
        """Where a token's result is among those of the buckets, one after another."""
        starts = [0, *accumulate(self.layout.queries)]
        found_U = torch.empty(starts[-1], dtype=torch.int64)
        before = 0
        for bucket in self.buckets:
            width = bucket.query_NQ.shape[1]
            for run in bucket.runs:
                count = self.layout.queries[run]
                found_U[starts[run] : starts[run] + count] = torch.arange(before, before + count)
                before += width
        return found_U.to(self.device)

    def mask(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """[N or 1, 1, Q, S] of bucket `number`: 0 where a query attends, -inf elsewhere. Made once for all layers."""
        key = (number, window, dtype)
        if key not in self._masks:
            bucket = self.buckets[number]
            position_NQ = bucket.position_NQ
            if bool((position_NQ == position_NQ[:1]).all()):
                position_NQ = position_NQ[:1]
            back_NQS = position_NQ[:, :, None] - torch.arange(bucket.key_NS.shape[1], device=self.device)
            hidden_NQS = (back_NQS < 0) if window is None else (back_NQS < 0) | (back_NQS >= window)
            mask = torch.zeros(hidden_NQS.shape, dtype=dtype, device=self.device)
            self._masks[key] = mask.masked_fill_(hidden_NQS, -torch.inf)[:, None]
        return self._masks[key]


def alike(queries: Sequence[int], keys: Sequence[int]) -> Iterator[list[int]]:
    """Runs that go into one call: padding them to one shape costs fewer pairs than one more call."""
    bucket: list[int] = []
    most_queries = most_keys = 0
    for run in sorted(range(len(keys)), key=lambda run: (queries[run] == keys[run], keys[run], queries[run])):
        wider, longer = max(most_queries, queries[run]), max(most_keys, keys[run])
        pairs = (len(bucket) + 1) * wider * longer - len(bucket) * most_queries * most_keys
        is_other_kind = bucket and (queries[run] == keys[run]) != (queries[bucket[0]] == keys[bucket[0]])
        if bucket and (is_other_kind or pairs - queries[run] * keys[run] > CALL):
            yield bucket
            bucket, wider, longer = [], queries[run], keys[run]
        bucket.append(run)
        most_queries, most_keys = wider, longer
    if bucket:
        yield bucket


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed: Packed | None = None,
    **other: object,
) -> tuple[Tensor, None]:
    """[1, heads, U, head_dim] -> [1, U, heads, head_dim] by `packed`; without it, transformers' own for padded rows."""
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **other)  # pyright: ignore[reportArgumentType]
    if sliding_window is not None:
        packed.windows.add(sliding_window)
    window = sliding_window if sliding_window is not None and sliding_window < max(packed.layout.keys) else None
    if torch.is_autocast_enabled(query.device.type):  # which knows scaled_dot_product_attention alone
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    query_UHD, key_UHD, value_UHD = (x[0].transpose(0, 1) for x in (query, key, value))
    attend = (varlen() if takes_flash(query, value) else None) or by_buckets
    return attend(query_UHD, key_UHD, value_UHD, packed, scaling, window)[None], None


def takes_flash(query: Tensor, value: Tensor) -> bool:
    """What flash-attn has kernels for: 16 bits, from Ampere on, heads of up to 256 numbers, keys and values alike."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    size = query.shape[-1]
    is_recent = torch.cuda.get_device_capability(query.device) >= (8, 0)
    return is_recent and size <= 256 and size % 8 == 0 and value.shape[-1] == size


def by_buckets(
    query_UHD: Tensor, key_UHD: Tensor, value_UHD: Tensor, packed: Packed, scaling: float | None, window: int | None
) -> Tensor:
    # gathered at once for all buckets: the gradient of each gather is as large as what it gathers from
    every_query = gathered(query_UHD, packed.query_places).split([b.query_NQ.numel() for b in packed.buckets])
    every_key, every_value = (
        gathered(x, packed.key_places).split([b.key_NS.numel() for b in packed.buckets]) for x in (key_UHD, value_UHD)
    )
    results = []
    for number, (bucket, *parts) in enumerate(zip(packed.buckets, every_query, every_key, every_value, strict=True)):
        queries, keys, values = (part.unflatten(0, (len(bucket.runs), -1)).transpose(1, 2) for part in parts)
        if keys.is_cuda:  # where grouped heads and a mask together have no kernel but the slowest
            groups = queries.shape[1] // keys.shape[1]
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        is_causal = bucket.are_whole and window is None
        mask = None if is_causal else packed.mask(number, window, queries.dtype)
        result = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=not keys.is_cuda
        )
        results.append(result.transpose(1, 2).flatten(0, 1))
    return torch.cat(results).index_select(0, packed.result_U)


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """x[index] whose gradient is summed in float32 at least: many rows may share one token."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).index_select(0, index).to(x.dtype)


@cache
def varlen() -> Attend | None:
    """Flash attention in which a run's last query sees its last key: of the package flash-attn, else torch's own."""
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError:
        return torch_varlen()

    def attend(
        query: Tensor, key: Tensor, value: Tensor, packed: Packed, scaling: float | None, window: int | None
    ) -> Tensor:
        return flash_attn_varlen_func(
            query,
            *of_rows(key, value, packed),
            *(packed.query_ends, packed.key_ends, max(packed.layout.queries), max(packed.layout.keys)),
            softmax_scale=scaling,
            causal=True,
            window_size=(-1 if window is None else window - 1, 0 if window is not None else -1),
        )

    return attend


def torch_varlen() -> Attend | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:
        return None

    def attend(
        query: Tensor, key: Tensor, value: Tensor, packed: Packed, scaling: float | None, window: int | None
    ) -> Tensor:
        out = varlen_attn(
            query,
            *of_rows(key, value, packed),
            *(packed.query_ends, packed.key_ends, max(packed.layout.queries), max(packed.layout.keys)),
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=True,
        )
        assert isinstance(out, Tensor)
        return out

    return attend


def of_rows(key_UHD: Tensor, value_UHD: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """Keys and values of the runs' rows, one after another: a copy where rows share."""
    if not packed.layout.shares:
        return key_UHD.contiguous(), value_UHD.contiguous()
    return gathered(key_UHD, packed.key_K), gathered(value_UHD, packed.key_K)


PACKED_ATTENTION = "otcrl_packed"
AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)  # for padded rows
