"""Dr. GRPO: GRPO without its two biases (Liu et al. 2025, arXiv:2503.20783 Sec. 3).

    1/G sum_i 1/M sum_t min(w_it A_i, clip(w_it, 1 - low, 1 + high) A_i),   A_i = r_i - mean(r)

GRPO divides by a trajectory's length, so a long wrong one is pushed down less per token, and by the group's standard
deviation, so problems that are nearly always or nearly never solved weigh more. Here M is a constant.
"""

from __future__ import annotations

from dataclasses import dataclass

from otcrl.algos import functional as F
from otcrl.algos.parts import check_at_least_zero, critic_free
from otcrl.types import Batch, Forward, Scores, Targets, TokenLoss


@dataclass(frozen=True, kw_only=True)
class DrGRPO:
    max_tokens: int  # M, of a trajectory: the budget for sampled tokens, whatever was used of it
    clip_low: float
    clip_high: float

    def __post_init__(self) -> None:
        check_at_least_zero(self, "clip_low", "clip_high")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")

    needs_critic = False
    needs_groups = True
    needs_reference = False
    trains_entropy = False
    only_advantages_matter = True

    @property
    def weighting(self) -> int:
        return self.max_tokens

    def targets(self, batch: Batch, scores: Scores) -> Targets:
        return critic_free(F.group_advantages(batch.rewards, batch.group_ids, normalize=False), batch.action_mask)

    def token_loss(self, new: Forward, batch: Batch, scores: Scores, targets: Targets) -> TokenLoss:
        span = (new.logprobs, scores.old_logprobs, targets.advantages, self.clip_low, self.clip_high)
        policy = F.clipped_surrogate(*span)
        stats = {"policy_loss": policy, "entropy": new.entropy, "clip_fraction": F.clip_fraction(*span)}
        return TokenLoss(policy, stats)
