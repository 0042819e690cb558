"""PPO with a learned critic (arXiv:1707.06347); the KL penalty is in the reward, in the loss, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from otcrl.algos import functional as F
from otcrl.algos.parts import check_at_least_zero
from otcrl.types import Batch, Forward, Scores, Targets, TokenLoss


@dataclass(frozen=True, kw_only=True)
class PPO:
    gamma: float
    lam: float
    clip_low: float
    clip_high: float
    value_clip: float
    value_coef: float
    kl_reward_coef: float
    kl_coef: float
    entropy_coef: float
    weighting: Literal["token", "sequence"]

    def __post_init__(self) -> None:
        check_at_least_zero(self, "clip_low", "clip_high", "value_clip", "value_coef")
        check_at_least_zero(self, "kl_reward_coef", "kl_coef", "entropy_coef")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    needs_critic = True
    needs_groups = False
    only_advantages_matter = False  # the value loss speaks about every row

    @property
    def needs_reference(self) -> bool:
        return self.kl_reward_coef > 0 or self.kl_coef > 0

    @property
    def trains_entropy(self) -> bool:
        return self.entropy_coef != 0

    def targets(self, batch: Batch, scores: Scores) -> Targets:
        mask_BT = batch.action_mask
        kl_BT = torch.where(mask_BT, F.kl_k1(scores.old_logprobs, scores.ref_logprobs), 0.0)
        rewards_BT = F.last_action(mask_BT) * batch.rewards[:, None] - self.kl_reward_coef * kl_BT
        advantages_BT = F.gae(rewards_BT, scores.values, mask_BT, self.gamma, self.lam)
        returns_BT = torch.where(mask_BT, advantages_BT + scores.values, 0.0)
        return Targets(advantages=F.whiten(advantages_BT, mask_BT), returns=returns_BT)

    def token_loss(self, new: Forward, batch: Batch, scores: Scores, targets: Targets) -> TokenLoss:
        span = (new.logprobs, scores.old_logprobs, targets.advantages, self.clip_low, self.clip_high)
        policy = F.clipped_surrogate(*span)
        value = F.clipped_value_loss(new.values, scores.values, targets.returns, self.value_clip)
        kl = F.kl_k3(new.logprobs, scores.ref_logprobs)
        loss = policy + self.value_coef * value + F.kl_penalty(self.kl_coef, kl) - self.entropy_coef * new.entropy
        stats = {"policy_loss": policy, "value_loss": value, "entropy": new.entropy}
        stats |= {"kl": kl} if self.needs_reference else {}
        return TokenLoss(loss, stats | {"clip_fraction": F.clip_fraction(*span)})
