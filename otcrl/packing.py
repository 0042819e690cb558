"""Rows of tokens laid out for one forward pass: without padding, and what they begin with in common only once.

A causal model says the same about a prefix wherever it stands, so a token is told by its prefix: equal prefixes,
one token. Rows that are sorted share the longest prefixes with their neighbours, so a row adds what it does not
share with the row before it, and that is all there is to a trie:

    row 0   a b c d                  a b c d             the tokens U of the pass, in this order; each row's
    row 1   a b c e f      ->                e f         new ones are a *run* that attends to the whole row
    row 2   a g                                  g
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Row = np.ndarray  # [L] int64 token ids


@dataclass(frozen=True)
class Layout:
    """One forward pass. U: its tokens. R: its runs, one for each row that adds tokens. K: the keys of all runs."""

    token_ids_U: Tensor  # int64
    position_U: Tensor  # int64, of a token in its row
    where_BT: Tensor  # int64, the place in U of a row's token; 0 past its end
    queries: tuple[int, ...]  # [R] tokens of each run: the last ones of its row
    keys: tuple[int, ...]  # [R] tokens of its row
    key_K: Tensor  # int64, places in U of the runs' rows, one after another

    @property
    def shares(self) -> bool:
        return self.queries != self.keys


def common_prefix(a: Row, b: Row) -> int:
    """How many tokens both begin with."""
    shorter = min(len(a), len(b))
    differs = a[:shorter] != b[:shorter]
    return int(differs.argmax()) if differs.any() else shorter


def lay_out(rows: Sequence[Row], *, share: bool) -> Layout:
    """The layout of `rows`, any of which may be empty. Sorted rows share most."""
    where_BT = np.zeros((len(rows), max(map(len, rows), default=0)), dtype=np.int64)
    tokens, positions, key_places = [], [], []
    queries, keys = [], []
    size = 0
    for i, row in enumerate(rows):
        old = common_prefix(row, rows[i - 1]) if share and i else 0
        new = len(row) - old
        where_BT[i, :old] = where_BT[i - 1, :old]
        where_BT[i, old : len(row)] = np.arange(size, size + new)
        if new:
            tokens.append(row[old:])
            positions.append(np.arange(old, len(row)))
            key_places.append(where_BT[i, : len(row)])
            queries.append(new)
            keys.append(len(row))
            size += new
    return Layout(
        token_ids_U=joined(tokens),
        position_U=joined(positions),
        where_BT=torch.from_numpy(where_BT),
        queries=tuple(queries),
        keys=tuple(keys),
        key_K=joined(key_places),
    )


def joined(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64))


def micro_batches(rows: Sequence[Row], max_tokens: int, *, share: bool) -> Iterator[list[int]]:
    """Numbers of rows that share a forward pass of at most `max_tokens` tokens; a longer row is alone.

    Sorted, so that rows with a common prefix meet; a prefix that two passes need is computed in both.
    """
    micro: list[int] = []
    total = 0
    for i in in_order(rows):
        new = len(rows[i]) - (common_prefix(rows[i], rows[micro[-1]]) if share and micro else 0)
        if micro and total + new > max_tokens:
            yield micro
            micro, total, new = [], 0, len(rows[i])
        micro.append(i)
        total += new
    if micro:
        yield micro


def shares(rows: Sequence[Row], ranks: int, *, share: bool) -> list[list[int]]:
    """Numbers of the rows that each rank reads: neighbours, so that prefixes stay together, of about equal cost.

    The cost of a row is its tokens, or those that it does not share with the row before it.
    """
    order = in_order(rows)
    costs = [
        len(rows[i]) - (common_prefix(rows[i], rows[order[at - 1]]) if share and at else 0)
        for at, i in enumerate(order)
    ]
    ends = np.cumsum([0, *costs])
    middles = (ends[:-1] + ends[1:]) / 2
    ranks_of = np.minimum((middles * ranks // max(ends[-1], 1)).astype(int), ranks - 1)
    return [[i for i, own in zip(order, ranks_of, strict=True) if own == rank] for rank in range(ranks)]


def in_order(rows: Sequence[Row]) -> list[int]:
    """Numbers of the rows, those that begin alike beside each other."""
    return sorted(range(len(rows)), key=lambda i: rows[i].astype(">i8").tobytes())
