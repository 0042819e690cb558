"""Search-R1's format reward (arXiv:2505.15117; qa_em_format.py): six cases, from right to nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from otcrl.rewards.outcome import Correct
from otcrl.types import Reward, Trajectory


def format_score(
    right: bool, answered: bool, valid: bool, retrieved: bool, structure: float, final: float, retrieval: float
) -> float:
    """right, valid: 1 | right, invalid: 1 - structure | not right, valid: structure (+ retrieval) |
    wrong, invalid: final | no answer, invalid: 0."""
    if right:
        return 1.0 if valid else 1.0 - structure
    if valid:
        return structure + (retrieval if retrieved else 0.0)
    return final if answered else 0.0


@dataclass(frozen=True, kw_only=True)
class FormatReward:
    correct: Correct
    structure: float  # lambda_s
    final: float  # lambda_f
    retrieval: float  # lambda_r: a gold answer stands in an observation

    wired = frozenset({"correct"})

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]:
        return [[self._score(t) for t in group] for group in trajectories_PG]

    def _score(self, t: Trajectory) -> Reward:
        right = 0.0 if t.answer is None else self.correct(t.answer, t.problem)
        seen = " ".join(call.result for call in t.tool_calls).lower()
        retrieved = any(answer.lower() in seen for answer in t.problem.answers)
        valid = not t.violations and t.answer is not None
        value = format_score(
            right >= 1, t.answer is not None, valid, retrieved, self.structure, self.final, self.retrieval
        )
        return Reward(value, {"correct": right, "well_formed": float(not t.violations), "retrieved": float(retrieved)})

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        assert not state, f"a format reward has no state, got {len(state)} entries"
