"""Played groups become scored ones: who counts, what it earned, and what the others were lost to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from otcrl import dist
from otcrl.errors import TrainingError
from otcrl.protocols import RewardFn
from otcrl.rollout.schedule import Group
from otcrl.types import Outcome, Reward, Stop, Trajectory


def score_alike(reward: RewardFn, groups: Sequence[Group]) -> None:
    """The same, and on every rank the same rewards: the first judges, as judges may be slow, and of two minds.

    Were they not the same, ranks would take other rows for those that act, and learn some twice and some never.
    """

    def judged() -> tuple[list[list[Reward]], dict[str, float]]:
        score(reward, groups)
        return [[earned for _, earned in group.scored or []] for group in groups], reward.state_dict()

    if dist.size() == 1:
        return score(reward, groups)
    rewards_PG, state = dist.decided_by_first(judged, "rewards")
    if not dist.is_first():
        for group, rewards in zip(groups, rewards_PG, strict=True):
            group.scored = list(zip(counted(group), rewards, strict=True))
        reward.load_state_dict(state)


def score(reward: RewardFn, groups: Sequence[Group]) -> None:
    """Gives every trajectory that counts its reward. Groups are scored together: they may be compared."""
    counted_PG = [counted(group) for group in groups]
    asked = [own for own in counted_PG if own]
    given = reward(asked)
    check_rewards(given, asked, type(reward).__name__)
    rewards = iter(given)
    for group, own in zip(groups, counted_PG, strict=True):
        group.scored = list(zip(own, next(rewards), strict=True)) if own else []


def check_rewards(given: object, asked: Sequence[Sequence[Trajectory]], name: str) -> None:
    """Raises TrainingError for what is no number for each trajectory: a reward may be anybody's code."""
    if not isinstance(given, Sequence) or len(given) != len(asked):
        raise TrainingError(f"reward: {name} must return a list for each of {len(asked)} groups, got {short(given)}")
    for rewards, group in zip(given, asked, strict=True):
        if not isinstance(rewards, Sequence) or len(rewards) != len(group):
            raise TrainingError(
                f"reward: {name} must return a Reward for each of {len(group)} trajectories, got {short(rewards)}"
            )
        for reward in rewards:
            if not isinstance(reward, Reward):
                raise TrainingError(f"reward: {name} must return Rewards, Reward(1.0), got {short(reward)}")
            if not is_number(reward.value):
                raise TrainingError(f"reward: {name} must give a number, got Reward({reward.value!r})")


def is_number(value: object) -> bool:
    """One that is not finite is passed on: the learner skips what comes of it, as often as it may."""
    try:
        math.isfinite(value)  # pyright: ignore[reportArgumentType]  numbers of numpy and torch too
    except TypeError:
        return False
    return True


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def counted(group: Group) -> list[Trajectory]:
    """Those of its trajectories that earn something."""
    return [t for t in group.trajectories if t.stop is not Stop.VOID and any(t.action_mask)]


def has_signal(reward: RewardFn, group: Group) -> bool:
    """Whether its rewards differ, in more than what length is paid: DAPO's condition is on who is right (Eq. 11).

    A group that infrastructure has emptied is not played again: its step is smaller.
    """
    score(reward, [group])
    values = {r.value if r.unshaped is None else r.unshaped for _, r in group.scored or ()}
    return not group.scored or len(values) > 1


def check_void(groups: Sequence[Group], max_void_share: float) -> None:
    """Raises TrainingError, saying what failed, when too many trajectories are void or none is left."""
    everything = [t for group in groups for t in group.trajectories]
    void = [t for t in everything if t.stop is Stop.VOID]
    if len(void) > max_void_share * len(everything):
        raise TrainingError(
            f"{len(void)} of {len(everything)} trajectories were lost to infrastructure, more than "
            f"loop.max_void_share={max_void_share}; {'; '.join(losses(void))}"
        )
    if not any(t.stop is not Stop.VOID and any(t.action_mask) for t in everything):
        raise TrainingError(f"none of the step's {len(everything)} trajectories is left to learn from")


def losses(void: Sequence[Trajectory]) -> list[str]:
    """What void trajectories were lost to."""
    late = [t for t in void if "deadline_s" in t.timings]
    broken = [
        c for t in void if "deadline_s" not in t.timings for c in t.tool_calls if c.outcome is Outcome.INFRA_ERROR
    ]
    said = []
    for (tool, error), times in Counter((c.tool, c.result) for c in broken).most_common(1):
        said.append(f"tool {tool!r} failed {times} times with: {error}")
    if late:
        where = Counter(waited_for(t) for t in late).most_common()
        said.append(
            f"{len(late)} trajectories passed the deadline of {late[0].timings['deadline_s']:g} s "
            f"(rollout.limits.timeout_s): {', '.join(f'{times} while {what}' for what, times in where)}"
        )
    return said


def waited_for(late: Trajectory) -> str:
    last = late.tool_calls[-1] if late.tool_calls else None
    if last is not None and last.outcome is Outcome.INFRA_ERROR:
        return f"waiting for tool {last.tool!r}"
    return f"generating turn {len(late.turns) + 1}"
