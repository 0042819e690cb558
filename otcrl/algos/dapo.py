"""DAPO: GRPO that keeps exploring (Yu et al. 2025, arXiv:2503.14476 Eq. 8).

    1/sum_i |o_i| sum_i sum_t min(w_it A_i, clip(w_it, 1 - low, 1 + high) A_i),   A_i = (r_i - mean(r)) / std(r)

Four changes. Clip-higher: high > low, so an unlikely token may rise. Token mean: long trajectories are not diluted.
Both are here, without KL or entropy term. Dynamic sampling is a schedule, `rollout.schedule.only_signal`; overlong
shaping is a reward, `otcrl/rewards/overlong.py`. The paper's sum is over one group; here, as in its code, over all.
"""

from __future__ import annotations

from dataclasses import dataclass

from otcrl.algos import functional as F
from otcrl.algos.parts import check_at_least_zero, critic_free
from otcrl.types import Batch, Forward, Scores, Targets, TokenLoss


@dataclass(frozen=True, kw_only=True)
class DAPO:
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
    weighting = "token"

    def targets(self, batch: Batch, scores: Scores) -> Targets:
        advantages_B = F.group_advantages(batch.rewards, batch.group_ids, normalize=True, std_floor=self.std_floor)
        if self.keep_sign:
            advantages_B = F.sign_kept(advantages_B, batch.rewards)
        return critic_free(advantages_B, batch.action_mask)

    def token_loss(self, new: Forward, batch: Batch, scores: Scores, targets: Targets) -> TokenLoss:
        span = (new.logprobs, scores.old_logprobs, targets.advantages, self.clip_low, self.clip_high)
        policy = F.clipped_surrogate(*span)
        stats = {"policy_loss": policy, "entropy": new.entropy, "clip_fraction": F.clip_fraction(*span)}
        return TokenLoss(policy, stats)
