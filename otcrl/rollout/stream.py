"""The training problems as one endless, numbered sequence: what is dropped or lost comes back, nothing comes twice."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache

from otcrl.checkpoint import Frontier
from otcrl.types import Problem


class Stream:
    """Hands out the numbers 0, 1, 2 ... of the problems; one that was put back goes first."""

    def __init__(self, sample: Callable[[int, int], list[Problem]], per_step: int) -> None:
        """`sample` is a task's; in the plainest schedule, step s plays the problems s * per_step and following."""
        self._sample = sample
        self._per_step = per_step
        self._block = lru_cache(maxsize=4)(self._read)
        self._cursor = 0
        self._back: list[int] = []  # a heap

    def next(self) -> int:
        if self._back:
            return heapq.heappop(self._back)
        self._cursor += 1
        return self._cursor - 1

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
        self._cursor, self._back = frontier.cursor, sorted(frontier.pending)
