"""GSPO: the ratio and the clip are those of a whole trajectory (Zheng et al. 2025, arXiv:2507.18071 Eq. 5 to 7).

    1/G sum_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i),   s_i = (pi(o_i) / pi_old(o_i)) ^ (1 / |o_i|)

A reward is given to a trajectory, so tokens of one trajectory are not weighted apart: no single token's ratio, such as
that of an expert that flipped in a mixture of experts, moves the update. s_i hardly leaves 1, hence the narrow clip.
"""

from __future__ import annotations

from dataclasses import dataclass

from otcrl.algos import functional as F
from otcrl.algos.parts import check_at_least_zero, critic_free
from otcrl.types import Batch, Forward, Scores, Targets, TokenLoss


@dataclass(frozen=True, kw_only=True)
class GSPO:
    std_floor: float
    keep_sign: bool
    clip_low: float
    clip_high: float

    def __post_init__(self) -> None:
        check_at_least_zero(self, "std_floor", "clip_low", "clip_high")

    needs_critic = False
    needs_groups = True
    needs_reference = False
    trains_entropy = False
    only_advantages_matter = True
    weighting = "sequence"
    whole_ratio = True

    def targets(self, batch: Batch, scores: Scores) -> Targets:
        advantages_B = F.group_advantages(batch.rewards, batch.group_ids, normalize=True, std_floor=self.std_floor)
        if self.keep_sign:
            advantages_B = F.sign_kept(advantages_B, batch.rewards)
        return critic_free(advantages_B, batch.action_mask)

    def token_loss(self, new: Forward, batch: Batch, scores: Scores, targets: Targets) -> TokenLoss:
        new_BT, old_BT = (F.row_mean(x, batch.action_mask) for x in (new.logprobs, scores.old_logprobs))
        span = (new_BT, old_BT, targets.advantages, self.clip_low, self.clip_high)
        policy = F.clipped_surrogate(*span)
        stats = {"policy_loss": policy, "entropy": new.entropy, "clip_fraction": F.clip_fraction(*span)}
        return TokenLoss(policy, stats)
