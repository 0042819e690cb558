"""ToRL's reward (arXiv:2503.23383 Sec. 2.3.3): +1 for a right answer, -1 for any other, less where a program failed.

It is a reward of its own, not an r_phi for OTC: see `OTCReward` for why a product wants 0 where this has -1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from otcrl.rewards.outcome import Correct, pass_over
from otcrl.types import Outcome, Reward, Trajectory


@dataclass(frozen=True, kw_only=True)
class ToRLReward:
    correct: Correct
    error_penalty: float

    wired = frozenset({"correct"})
    needs_groups = False
    can_be_negative = True

    def __post_init__(self) -> None:
        if not 0 <= self.error_penalty < math.inf:
            raise ValueError(f"error_penalty must be 0 or more, got {self.error_penalty}")

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]:
        return [[self._score(t) for t in group] for group in trajectories_PG]

    def _score(self, t: Trajectory) -> Reward:
        right = 0.0 if t.answer is None else self.correct(t.answer, t.problem)
        failed = any(call.outcome is Outcome.MODEL_ERROR for call in t.tool_calls)
        return Reward(2 * right - 1 - self.error_penalty * failed, {"correct": right, "failed": float(failed)})

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        pass_over(state)
