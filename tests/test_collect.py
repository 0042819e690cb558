"""Which groups a step learns from, when they begin, and what becomes of those that are late: on a virtual clock."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otcrl.checkpoint import Frontier
from otcrl.dialects.search_r1 import SearchR1
from otcrl.errors import EngineError
from otcrl.models.tiny import word_tokenizer
from otcrl.protocols import Completion
from otcrl.rollout.collect import Collector
from otcrl.rollout.loop import Limits, Player
from otcrl.rollout.schedule import Group, Harvest, Rollouts, Schedule
from otcrl.rollout.stream import Stream, joined
from otcrl.types import Problem
from tests.virtual import run

TOKENIZER = word_tokenizer(["who", "?", "b", "<answer>", "</answer>"])
ANSWER = TOKENIZER.encode("<answer> b </answer>")
LIMITS = Limits(max_calls=2, max_turns=5, max_tokens=60, max_turn_tokens=10, max_observation_tokens=3, tool_timeout_s=1)
PLAIN = Schedule(ahead=0, oversample=1.0, stragglers="wait", max_age=4, only_signal=False, max_draws=3)
PER_STEP, GROUP = 4, 2


def scheduled(
    *,
    ahead: int = 0,
    oversample: float = 1.0,
    stragglers: Literal["wait", "drop", "keep"] = "wait",
    max_age: int = 4,
    only_signal: bool = False,
    max_draws: float = 3,
) -> Schedule:
    return Schedule(
        ahead=ahead,
        oversample=oversample,
        stragglers=stragglers,
        max_age=max_age,
        only_signal=only_signal,
        max_draws=max_draws,
    )


def problem(number: int) -> Problem:
    return Problem(id=f"toy/train/{number}", question="who ?", answers=("b",), source="toy")


def sample(step: int, count: int) -> list[Problem]:
    return [problem(number) for number in range(step * count, (step + 1) * count)]


@dataclass
class Slow:
    """An engine that takes `seconds(problem, attempt)` for an answer, one token of it in each third of the time."""

    seconds: Callable[[int, int], float]
    fails: str = ""  # session that does
    version: int = 0
    context: int = 64
    begun: Counter[str] = field(default_factory=Counter)  # by session
    cancelled: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    running: int = 0
    most: int = 0  # at once

    async def generate(self, token_ids: Sequence[int], *, session: str, **settings: object) -> Completion:
        number = int(session.split("/")[-2])
        seconds = self.seconds(number, self.begun[session])
        self.begun[session] += 1
        self.running += 1
        self.most = max(self.most, self.running)
        versions = []
        try:
            for _ in ANSWER:
                await asyncio.sleep(seconds / len(ANSWER))
                versions.append(self.version)
            if session == self.fails:
                raise EngineError("out of memory")
        except asyncio.CancelledError:
            self.cancelled.append(session)
            raise
        finally:
            self.running -= 1
        return Completion(ANSWER, [-0.5] * len(ANSWER), versions, True)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        raise EngineError("it only answers")

    def release(self, session: str) -> None:
        self.released.append(session)

    async def sleep(self) -> None: ...

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.version = version

    async def close(self) -> None: ...


def rollouts(engine: Slow, schedule: Schedule, *, steps: int = 100, concurrency: int = 1000) -> Rollouts:
    dialect = SearchR1(instructions="{question}", observation_template="{result}", require_think=False)
    player = Player(engine=engine, tokenizer=TOKENIZER, dialect=dialect, tools={}, limits=LIMITS)
    collector = Collector(player=player, group_size=GROUP, temperature=1.0, concurrency=concurrency, seed=0)
    stream = Stream(sample, PER_STEP)
    return Rollouts(collector=collector, stream=stream, schedule=schedule, per_step=PER_STEP, steps=steps)


def quiet(done: int, total: int) -> None: ...


async def always(group: Group) -> bool:
    return True


@dataclass
class Played:
    harvests: list[Harvest]
    ends: list[float]  # virtual seconds at which each step's rollout ended
    frontier: Frontier

    @property
    def numbers(self) -> list[list[int]]:
        return [[group.number for group in harvest.groups] for harvest in self.harvests]


def play(
    engine: Slow,
    schedule: Schedule,
    *,
    steps: int = 3,
    of: int = 100,
    update_s: float = 0.0,
    fills: Callable[[Group], bool] = lambda group: True,
    since: Frontier | None = None,
    first: int = 0,
    concurrency: int = 1000,
) -> Played:
    """Steps `first` to `first + steps` of a run of `of` steps; each ends with an update that takes `update_s`."""

    async def asked(group: Group) -> bool:
        await asyncio.sleep(0)
        return fills(group)

    async def main() -> Played:
        groups = rollouts(engine, schedule, steps=of, concurrency=concurrency)
        if since is not None:
            groups.restore(since)
        harvests, ends = [], []
        try:
            for step in range(first, first + steps):
                harvests.append(await groups.collect(step, asked, quiet))
                ends.append(asyncio.get_running_loop().time())
                await asyncio.sleep(update_s)
                engine.version = step + 1
            return Played(harvests, ends, groups.frontier())
        finally:
            await groups.close()

    return run(main())


def even(number: int, attempt: int) -> float:
    return 3.0


def slow(**seconds: float) -> Callable[[int, int], float]:
    """Problems p1=..., p7=... take so long, the others 3 s."""
    return lambda number, attempt: seconds.get(f"p{number}", 3.0)


# -- the plainest schedule -------------------------------------------------------------------------


def test_a_step_plays_its_own_problems_and_waits_for_all_of_them():
    played = play(Slow(slow(p1=30, p4=9)), PLAIN)
    assert played.numbers == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert played.ends == pytest.approx([30, 39, 42])
    assert played.frontier == Frontier(cursor=12)


def test_a_problem_that_one_rank_was_behind_with_has_not_begun_and_comes_first_after_a_restart():
    since = joined([Frontier(cursor=4), Frontier(cursor=5)])
    assert since == Frontier(cursor=5, pending=(4,))
    assert play(Slow(even), PLAIN, steps=0, since=since).frontier == since
    played = play(Slow(even), PLAIN, first=1, steps=1, since=since)
    assert played.numbers == [[4, 5, 6, 7]]
    assert played.frontier == Frontier(cursor=8)


def test_a_group_holds_the_trajectories_of_one_problem_under_names_that_are_its_own():
    engine = Slow(even)
    played = play(engine, PLAIN, steps=2)
    for groups in played.harvests:
        assert [[t.problem.id for t in g.trajectories] for g in groups.groups] == [
            [g.problem.id] * GROUP for g in groups.groups
        ]
    expected = [f"step {n // PER_STEP}/toy/train/{n}/{i}" for n in range(8) for i in range(GROUP)]
    assert list(engine.begun) == expected
    assert set(engine.begun.values()) == {1}


def test_a_problem_that_comes_twice_in_a_step_has_trajectories_of_its_own_each_time():
    stream = Stream(lambda step, count: [problem(0), problem(1), problem(0)], per_step=3)
    assert stream.names(3, 2) == ["step 1/toy/train/0/0", "step 1/toy/train/0/1"]
    assert stream.names(5, 2) == ["step 1/toy/train/0/2", "step 1/toy/train/0/3"]


def test_the_plainest_schedule_has_nothing_to_report():
    metrics = play(Slow(even), PLAIN).harvests[2].metrics()
    assert metrics == {
        "rollout/groups_played": 4,
        "rollout/groups_dropped_no_signal": 0,
        "rollout/groups_late": 0,
        "rollout/age_mean": 0,
        "rollout/cancelled": 0,
        "rollout/off_policy_steps_mean": 0,
        "rollout/off_policy_steps_max": 0,
    }


def test_progress_is_told_for_every_trajectory_and_is_full_once():
    told: list[tuple[int, int]] = []
    groups = rollouts(Slow(even), PLAIN)
    run(groups.collect(0, always, lambda done, total: told.append((done, total))))
    assert told == [(n, 8) for n in range(1, 9)]


def test_no_more_trajectories_are_under_way_than_allowed_whatever_step_they_are_of():
    engine = Slow(slow(p0=9))
    play(engine, scheduled(ahead=1, oversample=1.5, stragglers="keep"), concurrency=5, update_s=4)
    assert engine.most == 5


# -- over-sampling ------------------------------------------------------------------------------------


def test_an_oversampled_step_ends_when_enough_groups_are_complete():
    played = play(Slow(slow(p1=30)), scheduled(oversample=1.25, stragglers="drop"), steps=1)
    assert played.numbers == [[0, 2, 3, 4]]
    assert played.ends == pytest.approx([3])


def test_what_is_dropped_is_cancelled_released_and_first_in_the_next_step_under_the_same_names():
    engine = Slow(lambda number, attempt: 30.0 if (number, attempt) == (1, 0) else 3.0)
    played = play(engine, scheduled(oversample=1.25, stragglers="drop"), steps=2)
    names = ["step 0/toy/train/1/0", "step 0/toy/train/1/1"]
    assert sorted(engine.cancelled)[:2] == names
    assert set(names) <= set(engine.released)
    assert [engine.begun[name] for name in names] == [2, 2]
    assert 1 in played.numbers[1]
    assert played.harvests[0].metrics()["rollout/cancelled"] == 1
    assert played.harvests[1].metrics()["rollout/groups_late"] == 0  # played again, by the new weights


def test_a_problem_that_is_always_slow_is_waited_for_in_the_end():
    played = play(Slow(slow(p1=30)), scheduled(oversample=1.25, stragglers="drop", max_age=2), steps=4)
    assert [1 in numbers for numbers in played.numbers] == [False, False, True, False]
    assert played.ends == pytest.approx([3, 6, 36, 39])


def test_what_is_kept_stays_alive_and_is_learned_from_in_a_later_step():
    engine = Slow(slow(p1=7))
    played = play(engine, scheduled(oversample=1.25, stragglers="keep"), steps=3)
    assert played.numbers == [[0, 2, 3, 4], [5, 6, 7, 8], [1, 9, 10, 11]]
    assert played.ends == pytest.approx([3, 6, 9])
    assert engine.begun["step 0/toy/train/1/0"] == 1  # never cancelled


def test_every_token_of_a_kept_trajectory_says_which_weights_sampled_it():
    played = play(Slow(slow(p1=7)), scheduled(oversample=1.25, stragglers="keep"), steps=3)
    late = played.harvests[2].groups[0].trajectories[0]
    assert [v for v in late.versions if v >= 0] == [0, 1, 2]  # a token after 7/3, 14/3 and 7 s
    metrics = played.harvests[2].metrics()
    assert metrics["rollout/groups_late"] == 1
    assert metrics["rollout/age_mean"] == pytest.approx((2 + 0 + 0 + 0) / 4)
    assert metrics["rollout/off_policy_steps_max"] == 2
    assert metrics["rollout/off_policy_steps_mean"] == pytest.approx((2 + 1 + 0) / 12)


def test_a_group_that_was_kept_too_long_begins_again_and_the_second_time_it_is_waited_for():
    engine = Slow(slow(p1=100))
    played = play(engine, scheduled(oversample=1.25, stragglers="keep", max_age=2), steps=7)
    assert engine.begun["step 0/toy/train/1/0"] == 2
    assert [harvest.cancelled for harvest in played.harvests] == [0, 0, 0, 1, 0, 0, 0]
    assert [1 in numbers for numbers in played.numbers] == [False] * 5 + [True, False]
    assert max(harvest.step - g.began for harvest in played.harvests for g in harvest.groups) == 2


def test_groups_that_finish_while_the_learner_works_are_there_when_the_next_step_begins():
    played = play(Slow(slow(p1=7)), scheduled(oversample=1.25, stragglers="keep"), steps=2, update_s=10)
    assert 1 in played.numbers[1]
    assert played.ends == pytest.approx([3, 16])


def test_the_last_step_leaves_nothing_under_way():
    engine = Slow(slow(p1=1000))
    played = play(engine, scheduled(oversample=1.25, stragglers="keep"), steps=2, of=2)
    assert [harvest.cancelled for harvest in played.harvests] == [0, 1]
    assert played.frontier.pending == (1,)  # a longer run would play it


# -- one step ahead ---------------------------------------------------------------------------------


def test_with_ahead_the_next_rollout_and_the_update_share_their_time():
    behind = play(Slow(even), PLAIN, update_s=3, steps=4)
    ahead = play(Slow(even), scheduled(ahead=1), update_s=3, steps=4)
    assert behind.numbers == ahead.numbers
    assert behind.ends == pytest.approx([3, 9, 15, 21])
    assert ahead.ends == pytest.approx([3, 6, 9, 12])


def test_with_ahead_a_step_is_one_update_old_and_what_is_sampled_later_is_fresh():
    played = play(Slow(even), scheduled(ahead=1), update_s=1.5)
    metrics = played.harvests[1].metrics()
    assert metrics["rollout/age_mean"] == 1
    assert metrics["rollout/groups_late"] == 0  # it is as planned
    assert metrics["rollout/off_policy_steps_mean"] == pytest.approx(1 / 3)  # the token after 1 s; not those after 2, 3
    assert metrics["rollout/off_policy_steps_max"] == 1


def test_with_ahead_nothing_begins_for_a_step_after_the_last():
    engine = Slow(even)
    play(engine, scheduled(ahead=1), steps=2, of=2)
    assert len(engine.begun) == 2 * PER_STEP * GROUP


# -- only groups with signal ------------------------------------------------------------------------


def odd(group: Group) -> bool:
    return group.number % 2 == 1


def test_groups_without_signal_are_replaced_by_the_problems_that_follow():
    played = play(Slow(even), scheduled(only_signal=True), fills=odd, steps=2)
    assert [[g.number for g in h.groups if g.fills] for h in played.harvests] == [[1, 3, 5, 7], [9, 11, 13, 15]]
    metrics = played.harvests[0].metrics()
    assert metrics["rollout/groups_dropped_no_signal"] == 3 + 1  # 0, 2, 4 and 6
    assert metrics["rollout/groups_played"] == 8
    assert played.frontier == Frontier(cursor=16)


def test_a_step_goes_on_with_what_there_is_after_so_many_draws():
    played = play(Slow(even), scheduled(only_signal=True, max_draws=2), fills=lambda group: group.number == 5, steps=1)
    assert played.numbers == [list(range(8))]
    assert [g.number for g in played.harvests[0].groups if g.fills] == [5]
    assert played.frontier == Frontier(cursor=8)  # and no group more has begun


def test_every_group_is_asked_for_its_signal_once():
    asked: list[int] = []

    def fills(group: Group) -> bool:
        asked.append(group.number)
        return group.number % 3 == 0

    play(Slow(even), scheduled(only_signal=True, oversample=1.5, stragglers="keep"), fills=fills, steps=5)
    assert len(asked) == len(set(asked))


def test_a_replacement_begins_as_soon_as_a_group_turns_out_to_lack_signal():
    played = play(Slow(slow(p1=6)), scheduled(only_signal=True), fills=lambda group: group.number != 0, steps=1)
    assert played.numbers == [[0, 1, 2, 3, 4]]
    assert played.ends == pytest.approx([6])  # 4 was played while 1 was


# -- nothing is skipped, nothing comes twice ------------------------------------------------------------

SCHEDULES = st.builds(
    scheduled,
    ahead=st.sampled_from([0, 1]),
    oversample=st.sampled_from([1.1, 1.25, 1.5, 2.0]),
    stragglers=st.sampled_from(["drop", "keep"]),
    max_age=st.integers(2, 4),
    only_signal=st.booleans(),
) | st.builds(scheduled, ahead=st.sampled_from([0, 1]), only_signal=st.booleans())
SECONDS = st.lists(st.floats(0.1, 40), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(SCHEDULES, SECONDS, st.floats(0, 20))
def test_every_problem_is_consumed_once_in_a_bounded_time_at_a_bounded_age(schedule, seconds, update_s):
    def takes(number: int, attempt: int) -> float:
        return seconds[(7 * number + attempt) % len(seconds)]

    played = play(Slow(takes), schedule, steps=9, update_s=update_s, fills=odd)
    consumed = [number for numbers in played.numbers for number in numbers]
    assert len(consumed) == len(set(consumed))
    assert sorted([*consumed, *played.frontier.pending]) == list(range(played.frontier.cursor))
    for harvest in played.harvests:
        assert sum(group.fills for group in harvest.groups) == PER_STEP
        for group in harvest.groups:
            assert harvest.step - group.began <= max(
                schedule.max_age if schedule.stragglers == "keep" else 0, schedule.ahead
            )
            assert harvest.step - group.first <= min(schedule.patience, 100)


@settings(max_examples=30, deadline=None)
@given(SCHEDULES, SECONDS, st.integers(1, 5))
def test_a_restart_neither_skips_a_problem_nor_repeats_one(schedule, seconds, stopped):
    def takes(number: int, attempt: int) -> float:
        return seconds[number % len(seconds)]

    before = play(Slow(takes), schedule, steps=stopped, fills=odd)
    saved = json.loads(json.dumps(asdict(before.frontier)))
    first = tuple((number, step) for number, step in saved["since"])
    since = Frontier(cursor=saved["cursor"], pending=tuple(saved["pending"]), since=first)
    after = play(Slow(takes), schedule, steps=6 - stopped, first=stopped, since=since, fills=odd)
    consumed = [number for numbers in [*before.numbers, *after.numbers] for number in numbers]
    assert sorted([*consumed, *after.frontier.pending]) == list(range(after.frontier.cursor))
    if schedule.stragglers == "wait":
        assert before.numbers + after.numbers == play(Slow(takes), schedule, steps=6, fills=odd).numbers


# -- what goes wrong ----------------------------------------------------------------------------------


def test_the_first_failure_ends_the_step_and_everything_else_is_cancelled_and_awaited():
    engine = Slow(slow(p3=1), fails="step 0/toy/train/3/0")
    with pytest.raises(EngineError, match="out of memory"):
        play(engine, PLAIN)
    assert len(engine.released) == PER_STEP * GROUP  # `run` would fail for a task that is still pending


def test_a_failure_while_the_learner_works_ends_the_next_step():
    engine = Slow(slow(p5=1), fails="step 1/toy/train/5/1")
    with pytest.raises(EngineError, match="out of memory"):
        play(engine, scheduled(ahead=1), update_s=50)


def test_a_rollout_that_somebody_else_cancels_is_an_error_and_not_a_wait_for_ever():
    class Cancelling(Slow):
        async def generate(self, token_ids: Sequence[int], *, session: str, **settings: object) -> Completion:
            raise asyncio.CancelledError

    with pytest.raises(EngineError, match="rollout of problem 'toy/train/0' was cancelled"):
        play(Cancelling(even), PLAIN)


def test_an_interrupt_leaves_no_task_behind():
    engine = Slow(even)

    async def main() -> None:
        groups = rollouts(engine, scheduled(ahead=1, oversample=1.5, stragglers="keep"))
        try:
            for step in range(100):
                await groups.collect(step, always, quiet)
        finally:
            await groups.close()

    async def interrupted() -> None:
        task = asyncio.create_task(main())
        await asyncio.sleep(10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(interrupted())
    assert engine.running == 0
    assert sorted(engine.released) == sorted(engine.begun.elements())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"ahead": 2}, "ahead must be 0 or 1"),
        ({"oversample": 0.5}, "oversample must be at least 1"),
        ({"oversample": 1.5}, "stragglers=wait waits for every group"),
        ({"stragglers": "keep"}, "with oversample=1 there are none"),
        ({"oversample": 1.5, "stragglers": "keep", "max_age": 0}, "max_age must be at least 1"),
        ({"oversample": 1.5, "stragglers": "drop", "ahead": 1, "max_age": 1}, "max_age must be at least 2"),
        ({"max_draws": 0.5}, "max_draws must be at least oversample=1.0"),
    ],
)
def test_switches_that_contradict_each_other_are_refused(change, why):
    with pytest.raises(ValueError, match=why):
        scheduled(**change)
