"""A layout holds each distinct prefix of its rows once, and knows where every token of every row is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcrl.packing import common_prefix, lay_out, micro_batches

ROWS = st.lists(st.lists(st.integers(0, 2), max_size=7).map(np.array).map(lambda row: row.astype(np.int64)), max_size=8)


def distinct_prefixes(rows: list[np.ndarray]) -> set[tuple[int, ...]]:
    return {tuple(row[: end + 1].tolist()) for row in rows for end in range(len(row))}


def ordered(rows: list[np.ndarray]) -> list[np.ndarray]:
    return sorted(rows, key=lambda row: row.tolist())


def test_the_example_of_the_module():
    a, b, c, d, e, f, g = range(7)
    layout = lay_out([np.array(row) for row in ([a, b, c, d], [a, b, c, e, f], [a, g])], share=True)
    assert layout.token_ids_U.tolist() == [a, b, c, d, e, f, g]
    assert layout.position_U.tolist() == [0, 1, 2, 3, 3, 4, 1]
    assert layout.where_BT.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 4, 5], [0, 6, 0, 0, 0]]
    assert (layout.queries, layout.keys) == ((4, 2, 1), (4, 5, 2))
    assert layout.key_K.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5, 0, 6]


@given(ROWS, st.booleans())
def test_every_token_is_found_again_with_its_position(rows, share):
    layout = lay_out(rows, share=share)
    for row, where_T in zip(rows, layout.where_BT, strict=True):
        where_L = where_T[: len(row)]
        assert layout.token_ids_U[where_L].tolist() == row.tolist()
        assert layout.position_U[where_L].tolist() == list(range(len(row)))


@given(ROWS)
def test_sorted_rows_take_as_many_tokens_as_they_have_distinct_prefixes(rows):
    assert len(lay_out(ordered(rows), share=True).token_ids_U) == len(distinct_prefixes(rows))


@given(ROWS)
def test_in_any_order_prefixes_are_only_shared_between_neighbours_and_never_confused(rows):
    layout = lay_out(rows, share=True)
    assert len(distinct_prefixes(rows)) <= len(layout.token_ids_U) <= sum(map(len, rows))


@given(ROWS)
def test_without_sharing_every_row_is_a_run_of_its_own(rows):
    layout = lay_out(rows, share=False)
    assert layout.queries == layout.keys == tuple(len(row) for row in rows if len(row))
    assert not layout.shares


@given(ROWS)
def test_a_run_is_the_end_of_its_row_and_its_keys_are_the_whole_row(rows):
    layout = lay_out(ordered(rows), share=True)
    ends = np.cumsum((0, *layout.queries))
    for run, keys in enumerate(layout.key_K.split(layout.keys)):
        assert keys[-layout.queries[run] :].tolist() == list(range(ends[run], ends[run + 1]))
        assert layout.position_U[keys].tolist() == list(range(layout.keys[run]))


@given(ROWS, st.integers(1, 20), st.booleans())
def test_micro_batches_hold_every_row_once_within_the_budget(rows, max_tokens, share):
    micros = list(micro_batches(rows, max_tokens, share=share))
    assert sorted(row for micro in micros for row in micro) == list(range(len(rows)))
    for micro in micros:
        size = len(lay_out([rows[i] for i in micro], share=share).token_ids_U)
        filled = [i for i in micro if len(rows[i])]
        assert size <= max_tokens or len(filled) == 1
        if share:
            assert size == len(distinct_prefixes([rows[i] for i in micro]))


def test_a_group_stays_together_and_its_prompt_counts_once():
    prompts = [np.full(10, prompt) for prompt in (5, 6)]
    rows = [np.append(prompts[i % 2], [i, i]) for i in range(8)]  # groups alternate
    micros = list(micro_batches(rows, 18, share=True))  # 10 + 4 * 2
    assert micros == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert len(list(micro_batches(rows, 18, share=False))) == 8


@pytest.mark.parametrize(
    ("a", "b", "common"), [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([3], [1], 0)]
)
def test_a_common_prefix_ends_where_rows_differ_or_one_ends(a, b, common):
    assert common_prefix(np.array(a), np.array(b)) == common
