"""Every row has its place in one bucket, and no bucket is larger than it may be."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from otcrl.bucketing import by_length


def test_like_lengths_share_a_bucket():
    assert list(by_length([3, 9, 4, 8], max_tokens=18)) == [[0, 2], [3, 1]]


@given(st.lists(st.integers(1, 40)), st.integers(1, 100))
def test_buckets_hold_every_row_once_and_fit(lengths, max_tokens):
    buckets = list(by_length(lengths, max_tokens))
    assert sorted(place for bucket in buckets for place in bucket) == list(range(len(lengths)))
    assert all(len(b) * max(lengths[i] for i in b) <= max_tokens or len(b) == 1 for b in buckets)
    for short, long in pairwise(buckets):
        assert max(lengths[i] for i in short) <= min(lengths[i] for i in long)
        assert (len(short) + 1) * lengths[long[0]] > max_tokens  # the next one would not have fitted
