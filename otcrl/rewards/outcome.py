"""Correctness: the reward of Search-R1 and ToRL, and the r_phi that OTC multiplies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from otcrl.types import Problem, Reward, Trajectory

Correct = Callable[[str, Problem], float]


@dataclass(frozen=True, slots=True)
class Phi:
    """The two readings of r_phi in arXiv:2504.14870 App. D.3: r_correct, or r_correct + weight * r_format."""

    correct: Correct
    format_weight: float
    require_well_formed: bool

    def r_correct(self, t: Trajectory) -> float:
        """0 for a trajectory without an answer, and (switchable) for a right answer in a malformed one."""
        if t.answer is None or (self.require_well_formed and t.violations):
            return 0.0
        return self.correct(t.answer, t.problem)

    def r_format(self, t: Trajectory) -> float:
        return self.format_weight * float(not t.violations and t.answer is not None)


@dataclass(frozen=True, kw_only=True)
class OutcomeReward:
    """Right or wrong, whatever the calls cost."""

    correct: Correct
    format_weight: float
    require_well_formed: bool

    wired = frozenset({"correct"})
    needs_groups = False

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]:
        return [[self._score(t) for t in group] for group in trajectories_PG]

    def _score(self, t: Trajectory) -> Reward:
        phi = Phi(self.correct, self.format_weight, self.require_well_formed)
        right = phi.r_correct(t)
        return Reward(right + phi.r_format(t), {"correct": right, "well_formed": float(not t.violations)})

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        assert not state, f"an outcome reward has no state, got {len(state)} entries"
