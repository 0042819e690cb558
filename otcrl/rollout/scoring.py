"""Played groups become scored ones: who counts, what it earned, and what the others were lost to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from otcrl.errors import TrainingError
from otcrl.protocols import RewardFn
from otcrl.rollout.schedule import Group
from otcrl.types import Outcome, Stop, Trajectory


def score(reward: RewardFn, groups: Sequence[Group]) -> None:
    """Gives every trajectory that counts its reward. Groups are scored together: they may be compared."""
    counted_PG = [[t for t in group.trajectories if t.stop is not Stop.VOID and any(t.action_mask)] for group in groups]
    rewards = iter(reward([counted for counted in counted_PG if counted]))
    for group, counted in zip(groups, counted_PG, strict=True):
        group.scored = list(zip(counted, next(rewards), strict=True)) if counted else []


def has_signal(reward: RewardFn, group: Group) -> bool:
    """Whether its rewards differ. A group that infrastructure has emptied is not played again: its step is smaller."""
    score(reward, [group])
    return not group.scored or len({r.value for _, r in group.scored}) > 1


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
    return f"generating turn {len(late.tool_calls) + 1}"
