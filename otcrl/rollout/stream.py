"""The training problems as one endless, numbered sequence: what is dropped or lost comes back, nothing comes twice."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from otcrl.checkpoint import Frontier
from otcrl.types import Problem


class Stream:
    """Hands out the numbers 0, 1, 2 ... of the problems; one that was put back goes first."""

    def __init__(
        self, sample: Callable[[int, int], list[Problem]], per_step: int, rank: int = 0, ranks: int = 1
    ) -> None:
        """`sample` is a task's; in the plainest schedule, step s plays the problems s * per_step and following.

        Of several ranks, each hands out every `ranks`-th number, so that together they play the same problems as one.
        """
        self._rank, self._ranks = rank, ranks
        self._sample = sample
        self._per_step = per_step
        self._block = lru_cache(maxsize=4)(self._read)
        self._cursor = rank
        self._back: list[int] = []  # a heap

    def next(self) -> int:
        if self._back:
            return heapq.heappop(self._back)
        self._cursor += self._ranks
        return self._cursor - self._ranks

    def put_back(self, number: int) -> None:
        heapq.heappush(self._back, number)

    def problem(self, number: int) -> Problem:
        step, place = divmod(number, self._per_step)
        return self._block(step)[place][0]

    def names(self, number: int, group_size: int) -> list[str]:
        """[G] names of its trajectories, which fix their random draws: the same whenever it begins."""
        step, place = divmod(number, self._per_step)
        problem, earlier = self._block(step)[place]
        return [f"step {step}/{problem.id}/{earlier * group_size + i}" for i in range(group_size)]

    def _read(self, step: int) -> list[tuple[Problem, int]]:
        """The step's problems, each with how often it came before in the step."""
        seen, block = Counter[str](), []
        for problem in self._sample(step, self._per_step):
            block.append((problem, seen[problem.id]))
            seen[problem.id] += 1
        return block

    def frontier(self, begun: Iterable[int]) -> Frontier:
        """What a checkpoint keeps; `begun` are the numbers handed out, and neither consumed nor put back."""
        return Frontier(cursor=self._cursor, pending=tuple(sorted([*begun, *self._back])))

    def restore(self, frontier: Frontier) -> None:
        """`frontier` is that of all ranks."""
        self._cursor = frontier.cursor + (self._rank - frontier.cursor) % self._ranks
        self._back = sorted(number for number in frontier.pending if number % self._ranks == self._rank)


def joined(frontiers: Sequence[Frontier]) -> Frontier:
    """That of all ranks, of each rank's own, by rank: numbers that a rank which is behind has not begun are pending."""
    ranks = len(frontiers)
    cursor = max(frontier.cursor for frontier in frontiers)
    behind = (number for frontier in frontiers for number in range(frontier.cursor, cursor, ranks))
    begun = (number for frontier in frontiers for number in frontier.pending)
    since = (pair for frontier in frontiers for pair in frontier.since)
    return Frontier(cursor=cursor, pending=tuple(sorted([*begun, *behind])), since=tuple(sorted(since)))
