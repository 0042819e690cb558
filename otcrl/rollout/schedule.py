"""When groups begin, how long a step waits for them, and what becomes of those that are late (docs/async.md).

One rule begins groups: while a step has `n` places to fill, `oversample * n` groups are under way or finished.
One rule ends a step: its places are filled, by groups in the order of their completion.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from otcrl.checkpoint import Frontier
from otcrl.errors import EngineError
from otcrl.rollout.collect import Collector, Progress
from otcrl.rollout.stream import Stream
from otcrl.types import Metrics, Problem, Reward, Trajectory


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The switches. `max_age` bounds how old what is learned from may be, and how often a problem is put off."""

    ahead: int  # 1: the rollout of the next step runs while the learner updates
    oversample: float  # groups begun for each group that a step needs
    stragglers: Literal["wait", "drop", "keep"]  # groups that the step did not need in the end
    max_age: int  # steps
    only_signal: bool  # groups whose rewards are all equal do not count, and others are played for them
    max_draws: float  # groups played in a step for each group it needs, at most

    def __post_init__(self) -> None:
        if self.ahead not in (0, 1):
            raise ValueError(f"ahead must be 0 or 1, got {self.ahead}")
        if not 1 <= self.oversample < math.inf:
            raise ValueError(f"oversample must be at least 1, got {self.oversample}")
        if not self.oversample <= self.max_draws < math.inf:
            raise ValueError(f"max_draws must be at least oversample={self.oversample}, got {self.max_draws}")
        if self.stragglers == "wait" and self.oversample > 1:
            raise ValueError(
                f"oversample is {self.oversample}, and stragglers=wait waits for every group that was begun: "
                "choose stragglers=drop or keep, or oversample=1"
            )
        if self.stragglers != "wait" and self.oversample == 1:
            raise ValueError(f"stragglers is {self.stragglers}, and with oversample=1 there are none: raise oversample")
        least = math.ceil(self.oversample) - 1 + self.ahead
        if self.max_age < least:
            raise ValueError(
                f"max_age must be at least {least} with oversample={self.oversample} and ahead={self.ahead}, "
                f"got {self.max_age}"
            )

    @property
    def patience(self) -> float:
        """Steps after which a problem that was begun is waited for, so that none is put off for ever."""
        return {"wait": math.inf, "drop": self.max_age, "keep": 2 * self.max_age + 1}[self.stragglers]


@dataclass(slots=True, kw_only=True, eq=False)
class Group:
    """The trajectories of one problem."""

    number: int  # of the problem in the stream
    problem: Problem
    first: int  # step in which its problem first began
    began: int  # step in which this attempt began
    finished: int = 0  # trajectories
    trajectories: list[Trajectory] = field(default_factory=list)  # [G] when all are finished
    scored: list[tuple[Trajectory, Reward]] | None = None  # those that count
    fills: bool = True  # a place of the step; False: it carries no signal
    given_up: bool = False
    task: asyncio.Task[None] | None = None

    @property
    def plain(self) -> Group:
        """Without its task; scored anew by who gets it."""
        return replace(self, task=None, scored=None)


@dataclass(frozen=True, kw_only=True)
class Harvest:
    """What one step consumes."""

    step: int
    version: int  # of the learner's weights
    ahead: int
    groups: list[Group]  # by number
    cancelled: int  # groups; their problems come again

    @property
    def plain(self) -> Harvest:
        """Without what belongs to this process alone, so that other ranks can have it."""
        return replace(self, groups=[group.plain for group in self.groups])

    def metrics(self) -> Metrics:
        ages = [self.step - group.began for group in self.groups]
        tokens = Counter[int]()  # by the version that sampled them
        for group in self.groups:
            for t in group.trajectories:
                tokens.update(t.versions)
        del tokens[-1]
        behind = sum((self.version - version) * count for version, count in tokens.items())
        return {
            "rollout/groups_played": len(self.groups),
            "rollout/groups_dropped_no_signal": sum(not group.fills for group in self.groups),
            "rollout/groups_late": sum(age > self.ahead for age in ages),
            "rollout/age_mean": sum(ages) / len(ages),
            "rollout/cancelled": self.cancelled,
            "rollout/off_policy_steps_mean": behind / max(tokens.total(), 1),
            "rollout/off_policy_steps_max": self.version - min(tokens, default=self.version),
        }


def together(harvests: Sequence[Harvest]) -> Harvest:
    """What all ranks have harvested in a step, as one would have alone."""
    groups = sorted((group for harvest in harvests for group in harvest.groups), key=lambda group: group.number)
    return replace(harvests[0], groups=groups, cancelled=sum(harvest.cancelled for harvest in harvests))


class Rollouts:
    """The groups that are under way, also between two steps. Whoever made it awaits `close` in the end."""

    def __init__(self, *, collector: Collector, stream: Stream, schedule: Schedule, per_step: int, steps: int) -> None:
        self._collector, self._stream, self._schedule = collector, stream, schedule
        self._per_step, self._steps = per_step, steps
        self._slots = asyncio.Semaphore(collector.concurrency)
        self._flying: dict[int, Group] = {}
        self._landed: list[tuple[int, int, Group]] = []  # a heap: (first, number, group), complete and not consumed
        self._first: dict[int, int] = {}  # problem -> step in which it first began, until it is consumed
        self._owed: set[int] = set()  # of those that fly, the step's: it does not end without them
        self._wake = asyncio.Event()
        self._failure: BaseException | None = None
        self._tally: Tally | None = None

    # -- what the training loop uses -----------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing is under way, so the engine may sleep."""
        return not self._flying

    async def collect(self, step: int, fills: Callable[[Group], Awaitable[bool]], progress: Progress) -> Harvest:
        """The groups that `step` consumes; with `ahead`, the next step's have begun.

        With `only_signal`, `fills` is asked once about every group as it is complete. Raises what the first
        trajectory that failed has raised.
        """
        cancelled = await self._age_out(step)
        self._tally = Tally(progress, self._per_step * self._collector.group_size)
        self._tally.add(sum(group.finished for group in self._outstanding()))
        played = await self._fill(step, fills, self._tally)
        self._tally = None
        is_last = step + 1 >= self._steps
        if is_last or self._schedule.stragglers == "drop":
            cancelled += await self._give_up(self._outstanding())
        if self._schedule.ahead and not is_last:
            cancelled += await self._age_out(step + 1)
            self._begin(step, self._per_step)
        return Harvest(
            step=step,
            version=self._collector.player.engine.version,
            ahead=self._schedule.ahead,
            groups=sorted(played, key=lambda group: group.number),
            cancelled=cancelled,
        )

    def frontier(self) -> Frontier:
        """For a checkpoint: what is under way, or complete and not consumed, is played again after a restart."""
        frontier = self._stream.frontier(group.number for group in self._outstanding())
        begun = (number for number in frontier.pending if number in self._first)  # not what another rank was ahead of
        return replace(frontier, since=tuple((number, self._first[number]) for number in begun))

    def restore(self, frontier: Frontier) -> None:
        self._stream.restore(frontier)
        self._first = dict(frontier.since)

    async def close(self) -> None:
        """Cancel whatever is under way, and await its end."""
        await self._give_up(list(self._flying.values()))

    # -- groups begin -----------------------------------------------------------------------------------

    def _begin(self, step: int, places: int, draws: int | None = None) -> None:
        """The groups that `places` still ask for, where no more than `draws` may be played."""
        wanted = math.ceil(self._schedule.oversample * places)
        if draws is not None:
            wanted = min(wanted, draws)
        for _ in range(wanted - len(self._flying) - len(self._landed)):
            number = self._stream.next()
            first = self._first.setdefault(number, step)
            group = Group(number=number, problem=self._stream.problem(number), first=first, began=step)
            group.task = asyncio.create_task(self._play(group), name=f"problem {number}")
            group.task.add_done_callback(partial(self._land, group))
            self._flying[number] = group

    async def _play(self, group: Group) -> None:
        names = self._stream.names(group.number, self._collector.group_size)
        group.trajectories = await self._collector.group(group.problem, names, self._slots, partial(self._count, group))

    async def _fill(self, step: int, fills: Callable[[Group], Awaitable[bool]], tally: Tally) -> list[Group]:
        """Groups for all places of the step, with those that turned out not to fill one."""
        places, draws = self._per_step, math.ceil(self._schedule.max_draws * self._per_step)
        self._begin(step, places, draws)
        self._owed = {n for n, group in self._flying.items() if step - group.first >= self._schedule.patience}
        played: list[Group] = []
        while places and len(played) < draws:
            for group in await self._next(min(places, draws - len(played))):
                played.append(group)
                del self._first[group.number]
                group.fills = not self._schedule.only_signal or await fills(group)
                places -= group.fills
                tally.total += 0 if group.fills else self._collector.group_size
            self._begin(step, places, draws - len(played))
        tally.fill()
        return played

    # -- groups are complete, or given up -----------------------------------------------------------------

    def _land(self, group: Group, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if task.cancelled() and not group.given_up:
            error = EngineError(f"the rollout of problem {group.problem.id!r} was cancelled, and not by its schedule")
        self._failure = self._failure or error
        if not group.given_up:
            del self._flying[group.number]
            self._owed.discard(group.number)
            heapq.heappush(self._landed, (group.first, group.number, group))
        self._wake.set()

    async def _next(self, most: int) -> list[Group]:
        """Up to `most` complete groups, who began first first; room is left for those that are owed."""
        while True:
            if self._failure is not None:
                raise self._failure
            count = min(most - len(self._owed), len(self._landed))
            if count > 0:
                return [heapq.heappop(self._landed)[-1] for _ in range(count)]
            self._wake.clear()
            await self._wake.wait()

    async def _age_out(self, step: int) -> int:
        """Give up what would be too old in `step`; the number of groups."""
        if self._schedule.stragglers != "keep":
            return 0
        return await self._give_up([g for g in self._outstanding() if step - g.began > self._schedule.max_age])

    async def _give_up(self, groups: list[Group]) -> int:
        """Cancel them, so that their problems come again; their number."""
        for group in groups:
            group.given_up = True
            assert group.task is not None, "whoever is under way has a task"
            group.task.cancel()  # nothing happens to one that is complete
            self._flying.pop(group.number, None)
            self._stream.put_back(group.number)
        if groups:
            self._landed = [entry for entry in self._landed if not entry[-1].given_up]
            heapq.heapify(self._landed)
            await asyncio.wait([group.task for group in groups if group.task is not None])
        return len(groups)

    def _outstanding(self) -> list[Group]:
        return [*self._flying.values(), *(group for *_, group in self._landed)]

    # -- progress -----------------------------------------------------------------------------------------

    def _count(self, group: Group) -> None:
        group.finished += 1
        if self._tally is not None:
            self._tally.add(1)


@dataclass(slots=True)
class Tally:
    """Tells a bar about a step's trajectories; it is full when the step is, however many were under way."""

    tell: Progress
    total: int
    done: int = 0
    told: int = 0

    def add(self, more: int) -> None:
        self.done += more
        self._tell(min(self.done, self.total - 1))

    def fill(self) -> None:
        self._tell(self.total)

    def _tell(self, done: int) -> None:
        if done != self.told:
            self.tell(done, self.total)
            self.told = done
