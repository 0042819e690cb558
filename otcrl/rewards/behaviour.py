"""Four ways to be right: more or less reasoning, more or less acting, after the article on OTC (arXiv:2504.14870).

    r_correct * acting(tool calls) * reasoning(sampled tokens)

Less acting and any reasoning is OTC-PPO; the others show what becomes of a policy that is paid to think for long, or to
look everything up. Every factor is above 0, so a right answer beats a wrong one whatever it took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import pi, sin
from typing import Literal

from otcrl.errors import nearest
from otcrl.rewards.otc import check_above_zero, r_tool_ppo
from otcrl.rewards.outcome import Correct, Phi, pass_over
from otcrl.types import COUNTERS, Reward, Trajectory, count_calls

Wish = Literal["less", "any", "more"]


def factor(amount: float, scale: float, wish: Wish) -> float:
    """less: cos(angle), from 1 towards 0 (Eq. 5) | more: (1 + sin(angle)) / 2, from 1/2 towards 1 | any: 1.

    angle = amount pi / (2 amount + scale), from 0 to pi / 2.
    """
    if wish == "less":
        return r_tool_ppo(amount, scale)
    if wish == "more":
        return (1 + sin(amount * pi / (2 * amount + scale))) / 2
    return 1.0


@dataclass(frozen=True, kw_only=True)
class BehaviourReward:
    correct: Correct
    acting: Wish
    reasoning: Wish
    calls_scale: float  # calls, the c of Eq. 5
    tokens_scale: float  # sampled tokens
    counter: str
    require_well_formed: bool

    wired = frozenset({"correct"})
    needs_groups = False

    def __post_init__(self) -> None:
        check_above_zero(self, "calls_scale", "tokens_scale")
        if self.counter not in COUNTERS:
            raise ValueError(f"there is no counter {self.counter!r}.{nearest(self.counter, COUNTERS)}")

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]:
        return [[self._score(t) for t in group] for group in trajectories_PG]

    def _score(self, t: Trajectory) -> Reward:
        phi = Phi(self.correct, 0.0, self.require_well_formed)
        judged = phi.judged(t)
        acting = factor(count_calls(t, self.counter), self.calls_scale, self.acting)
        reasoning = factor(sum(t.action_mask), self.tokens_scale, self.reasoning)
        return Reward(
            phi.gated(t, judged) * acting * reasoning, {"correct": judged, "acting": acting, "reasoning": reasoning}
        )

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        pass_over(state)
