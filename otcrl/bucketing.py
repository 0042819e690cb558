"""Which rows share a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Places of like lengths together, shortest first, at most `max_tokens` padded tokens; a longer one is alone."""
    bucket: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if bucket and lengths[place] * (len(bucket) + 1) > max_tokens:
            yield bucket
            bucket = []
        bucket.append(place)
    if bucket:
        yield bucket
