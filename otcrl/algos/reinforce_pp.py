"""REINFORCE++: no critic, no group; the whole batch is the baseline (Hu et al. 2025, arXiv:2501.03262).

    A_t = r - beta sum_{s >= t} log(pi_old(s) / pi_ref(s)),   then  (A_t - mean(A)) / std(A)

over all tokens of the batch, with PPO's clip. One trajectory for each problem is enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from otcrl.algos import functional as F
from otcrl.algos.parts import check_at_least_zero
from otcrl.types import Batch, Forward, Scores, Targets, TokenLoss


@dataclass(frozen=True, kw_only=True)
class ReinforcePP:
    clip_low: float
    clip_high: float
    kl_reward_coef: float  # beta
    weighting: Literal["token", "sequence"]

    def __post_init__(self) -> None:
        check_at_least_zero(self, "clip_low", "clip_high", "kl_reward_coef")

    needs_critic = False
    needs_groups = False
    trains_entropy = False
    only_advantages_matter = True

    @property
    def needs_reference(self) -> bool:
        return self.kl_reward_coef > 0

    def targets(self, batch: Batch, scores: Scores) -> Targets:
        mask_BT = batch.action_mask
        kl_BT = torch.where(mask_BT, F.kl_k1(scores.old_logprobs, scores.ref_logprobs), 0.0)
        rewards_BT = F.last_action(mask_BT) * batch.rewards[:, None] - self.kl_reward_coef * kl_BT
        to_go_BT = F.gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma=1.0, lam=1.0)
        return Targets(advantages=F.whiten(to_go_BT, mask_BT), returns=torch.zeros_like(to_go_BT))

    def token_loss(self, new: Forward, batch: Batch, scores: Scores, targets: Targets) -> TokenLoss:
        span = (new.logprobs, scores.old_logprobs, targets.advantages, self.clip_low, self.clip_high)
        policy = F.clipped_surrogate(*span)
        stats = {"policy_loss": policy, "entropy": new.entropy, "clip_fraction": F.clip_fraction(*span)}
        return TokenLoss(policy, stats)
