"""RLOO: REINFORCE with the other trajectories as baseline (Ahmadian et al. 2024, arXiv:2402.14740 Sec. 2.2).

    1/G sum_i A_i grad log pi(o_i),   A_i = R_i - 1/(G - 1) sum_{j != i} R_j,   R = r - beta log(pi_old(o) / pi_ref(o))

A whole trajectory is one action, so what is clipped is its ratio w_i = pi(o_i) / pi_old(o_i), a product over its
tokens: min(w_i A_i, clip(w_i, 1 - low, 1 + high) A_i), as in TRL. On-policy w_i = 1 and the gradient is that above.
"""

from __future__ import annotations

from dataclasses import dataclass

from otcrl.algos import functional as F
from otcrl.algos.parts import check_at_least_zero, critic_free
from otcrl.types import Batch, Forward, Scores, Targets, TokenLoss


@dataclass(frozen=True, kw_only=True)
class RLOO:
    clip_low: float
    clip_high: float
    kl_reward_coef: float  # beta

    def __post_init__(self) -> None:
        check_at_least_zero(self, "clip_low", "clip_high", "kl_reward_coef")

    needs_critic = False
    needs_groups = True
    trains_entropy = False
    only_advantages_matter = True
    weighting = "sequence"
    whole_ratio = True

    @property
    def needs_reference(self) -> bool:
        return self.kl_reward_coef > 0

    def targets(self, batch: Batch, scores: Scores) -> Targets:
        kl_BT = F.row_sum(F.kl_k1(scores.old_logprobs, scores.ref_logprobs), batch.action_mask)
        rewards_B = batch.rewards - self.kl_reward_coef * kl_BT[:, 0]
        return critic_free(F.leave_one_out(rewards_B, batch.group_ids), batch.action_mask)

    def token_loss(self, new: Forward, batch: Batch, scores: Scores, targets: Targets) -> TokenLoss:
        new_BT, old_BT = (F.row_sum(x, batch.action_mask) for x in (new.logprobs, scores.old_logprobs))
        span = (new_BT, old_BT, targets.advantages, self.clip_low, self.clip_high)
        policy = F.clipped_surrogate(*span)
        stats = {"policy_loss": policy, "entropy": new.entropy, "clip_fraction": F.clip_fraction(*span)}
        return TokenLoss(policy, stats)
