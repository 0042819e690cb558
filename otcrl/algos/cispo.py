"""CISPO: the weight is clipped, never the token (MiniMax-M1 2025, arXiv:2506.13585 Eq. 4 and 5).

    1/sum_i |o_i| sum_i sum_t sg(clip(w_it, 1 - low, 1 + high)) A_i log pi(o_it),   A_i = (r_i - mean(r)) / std(r)

PPO's clip takes the gradient from tokens whose ratio has moved far; these are rare, and often where reasoning turns.
Here every token keeps one, with a bounded weight. The paper sets no lower bound and does not say its upper one.
"""

from __future__ import annotations

from dataclasses import dataclass

from otcrl.algos import functional as F
from otcrl.algos.parts import check_at_least_zero, critic_free
from otcrl.types import Batch, Forward, Scores, Targets, TokenLoss


@dataclass(frozen=True, kw_only=True)
class CISPO:
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
        policy = F.clipped_weight(*span)
        clipped = F.bound_fraction(new.logprobs, scores.old_logprobs, self.clip_low, self.clip_high)
        stats = {"policy_loss": policy, "entropy": new.entropy, "clip_fraction": clipped}
        return TokenLoss(policy, stats)
