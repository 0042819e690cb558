"""A reward: every call costs the same, and a right answer is always worth something.

otcrl train conf=quickstart reward=linear
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from otcrl.types import Problem, Reward, Trajectory, count_calls


def linear(m: int, price: float, least: float) -> float:
    """max(1 - price * m, least) for a right answer with m calls."""
    return max(1 - price * m, least)


@dataclass(frozen=True, kw_only=True)
class LinearReward:
    correct: Callable[[str, Problem], float]  # the task's; otcrl wires it in
    price: float  # of a call, in reward
    least: float  # what a right answer earns at least

    wired = frozenset({"correct"})  # parameters that no yaml may set
    needs_groups = False  # it looks at one trajectory at a time

    def __post_init__(self) -> None:
        for name in ("price", "least"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]:
        return [[self.score(t) for t in group] for group in trajectories_PG]

    def score(self, t: Trajectory) -> Reward:
        m = count_calls(t, "well_formed")
        right = 0.0 if t.answer is None or t.violations else self.correct(t.answer, t.problem)
        tool = linear(m, self.price, self.least)
        return Reward(right * tool, {"correct": right, "tool": tool, "cost": float(m)})  # the parts are only logged

    def state_dict(self) -> dict[str, float]:
        return {}  # nothing that a checkpoint must keep

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        assert not state, f"this reward has no state, got {len(state)} entries"
