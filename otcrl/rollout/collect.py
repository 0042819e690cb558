"""Many trajectories at once: no barrier between them, a bounded number in flight, one seed for each."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from otcrl.errors import OtcrlError
from otcrl.rollout.loop import Player
from otcrl.types import Problem, Trajectory

Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True, kw_only=True)
class Collector:
    player: Player
    group_size: int
    temperature: float
    concurrency: int  # trajectories in flight
    seed: int

    def __post_init__(self) -> None:
        for name in ("group_size", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")

    async def group(
        self, problem: Problem, names: Sequence[str], slots: asyncio.Semaphore, count: Callable[[], None]
    ) -> list[Trajectory]:
        """[G] trajectories of one problem, sampled for training; each takes one of the `slots`, and is counted."""
        return await self._all([problem] * len(names), names, self.temperature, "", slots, count)

    async def play(
        self,
        problems: Sequence[Problem],
        names: Sequence[str],
        temperature: float,
        opening: str = "",
        progress: Progress | None = None,
    ) -> list[Trajectory]:
        """One trajectory for each problem, in their order. A name fixes its trajectory's random draws."""
        done = itertools.count(1)

        def count() -> None:
            if progress:
                progress(next(done), len(problems))

        return await self._all(problems, names, temperature, opening, asyncio.Semaphore(self.concurrency), count)

    async def _all(
        self,
        problems: Sequence[Problem],
        names: Sequence[str],
        temperature: float,
        opening: str,
        slots: asyncio.Semaphore,
        count: Callable[[], None],
    ) -> list[Trajectory]:
        async def one(problem: Problem, name: str) -> Trajectory:
            async with slots:
                trajectory = await self.player.play(
                    problem, temperature=temperature, seed=stable_seed(self.seed, name), session=name, opening=opening
                )
            count()
            return trajectory

        try:
            async with asyncio.TaskGroup() as group:  # the first failure cancels the rest
                tasks = [group.create_task(one(p, n)) for p, n in zip(problems, names, strict=True)]
        except* OtcrlError as failures:
            raise first(failures) from failures
        return [task.result() for task in tasks]


def first(failures: BaseExceptionGroup[OtcrlError]) -> OtcrlError:
    """One error that says it all: hundreds of trajectories fail alike when an engine does."""
    error = failures.exceptions[0]
    return first(error) if isinstance(error, BaseExceptionGroup) else error


def stable_seed(seed: int, name: str) -> int:
    """A 63-bit seed from the run's seed and a trajectory's name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "big") >> 1
