"""Correctness: the reward of Search-R1 and ToRL, and the r_phi that OTC multiplies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from otcrl.tell import tell
from otcrl.types import Problem, Reward, Trajectory

Correct = Callable[[str, Problem], float]


@dataclass(frozen=True, slots=True)
class Phi:
    """The two readings of r_phi in arXiv:2504.14870 App. D.3: r_correct, or r_correct + weight * r_format."""

    correct: Correct
    format_weight: float
    require_well_formed: bool

    def judged(self, t: Trajectory) -> float:
        """What the task says of the answer, however the trajectory was written; 0 without one."""
        return 0.0 if t.answer is None else self.correct(t.answer, t.problem)

    def gated(self, t: Trajectory, judged: float) -> float:
        """r_correct: what counts of it, 0 (switchable) for a right answer in a malformed trajectory."""
        return 0.0 if self.require_well_formed and t.violations else judged

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
        judged = phi.judged(t)
        value = phi.gated(t, judged) + phi.r_format(t)
        return Reward(value, {"correct": judged, "well_formed": float(not t.violations)})

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        pass_over(state)


def pass_over(state: Mapping[str, float]) -> None:
    """Says that a checkpoint's reward kept what this one has no use for: another reward goes on with the run."""
    if state:
        tell(f"the checkpoint's reward knew the least calls of {len(state)} problems, which this one does not use")
