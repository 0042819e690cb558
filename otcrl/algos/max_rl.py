"""MaxRL: towards the log of the chance to be right (Tajwar et al. 2026, arXiv:2602.02710).

    A_i = (r_i - mean(r)) / mean(r)

The gradient of log p is that of p, times 1 / p: problems that are seldom solved weigh more, as in maximum likelihood.
Dividing by the group's mean reward does that. The loss around it is PPO's clip, averaged over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from otcrl.algos import functional as F
from otcrl.algos.parts import check_at_least_zero, critic_free
from otcrl.errors import TrainingError
from otcrl.types import Batch, Forward, Scores, Targets, TokenLoss


@dataclass(frozen=True, kw_only=True)
class MaxRL:
    clip_low: float
    clip_high: float
    weighting: Literal["token", "sequence"]

    def __post_init__(self) -> None:
        check_at_least_zero(self, "clip_low", "clip_high")

    needs_critic = False
    needs_groups = True
    needs_reference = False
    trains_entropy = False
    only_advantages_matter = True
    refuses_negative = True  # rewards

    def targets(self, batch: Batch, scores: Scores) -> Targets:
        """Raises TrainingError for a reward below 0: a mean of 0, or below it, is nothing to divide by."""
        least = batch.rewards.min().item()
        if least < 0:
            raise TrainingError(
                f"MaxRL divides by a group's mean reward, so rewards must be 0 or more, got {least:.3g}: "
                "choose a reward without penalties (outcome, otc_grpo), or another algo"
            )
        return critic_free(F.mean_normalized(batch.rewards, batch.group_ids), batch.action_mask)

    def token_loss(self, new: Forward, batch: Batch, scores: Scores, targets: Targets) -> TokenLoss:
        span = (new.logprobs, scores.old_logprobs, targets.advantages, self.clip_low, self.clip_high)
        policy = F.clipped_surrogate(*span)
        stats = {"policy_loss": policy, "entropy": new.entropy, "clip_fraction": F.clip_fraction(*span)}
        return TokenLoss(policy, stats)
