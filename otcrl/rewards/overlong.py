"""DAPO's soft overlong punishment (arXiv:2503.14476 Eq. 13), added to any other reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from otcrl.protocols import RewardFn
from otcrl.types import Reward, Trajectory


def overlong(length: int, most: int, cache: int) -> float:
    """Eq. 13:  0 up to most - cache tokens;  (most - cache - length) / cache up to most;  -1 beyond."""
    return max(-1.0, min(0.0, (most - cache - length) / cache))


@dataclass(frozen=True, kw_only=True)
class Overlong:
    """The reward within, less what a trajectory loses that comes near the limit on its tokens.

    Length is what `rollout.limits.max_tokens` limits: sampled and observation tokens. An answer that is cut off by
    the limit is wrong without being told why; a slope before it says so.
    """

    reward: RewardFn
    max_tokens: int
    cache_tokens: int  # the slope, before max_tokens

    can_be_negative = True

    def __post_init__(self) -> None:
        if not 0 < self.cache_tokens <= self.max_tokens:
            raise ValueError(
                f"cache_tokens must be at least 1 and at most max_tokens={self.max_tokens}, got {self.cache_tokens}"
            )

    @property
    def needs_groups(self) -> bool:
        return self.reward.needs_groups

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]:
        return [
            [self._shaped(t, r) for t, r in zip(group, rewards, strict=True)]
            for group, rewards in zip(trajectories_PG, self.reward(trajectories_PG), strict=True)
        ]

    def _shaped(self, t: Trajectory, r: Reward) -> Reward:
        first = t.action_mask.index(True) if True in t.action_mask else len(t.action_mask)
        penalty = overlong(len(t.token_ids) - first, self.max_tokens, self.cache_tokens)
        return Reward(r.value + penalty, {**r.parts, "overlong": penalty}, unshaped=r.value)

    def state_dict(self) -> dict[str, float]:
        return self.reward.state_dict()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.reward.load_state_dict(state)
