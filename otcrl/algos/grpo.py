"""GRPO: the group is the baseline, so there is no critic (DeepSeekMath, arXiv:2402.03300 Eq. 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from otcrl.algos import functional as F
from otcrl.types import Batch, Forward, Scores, Targets, TokenLoss


@dataclass(frozen=True, kw_only=True)
class GRPO:
    normalize: bool
    std_floor: float
    keep_sign: bool
    clip_low: float
    clip_high: float
    kl_coef: float
    entropy_coef: float
    weighting: Literal["token", "sequence"]

    def __post_init__(self) -> None:
        for name in ("std_floor", "clip_low", "clip_high", "kl_coef", "entropy_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")

    needs_critic = False

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def trains_entropy(self) -> bool:
        return self.entropy_coef != 0

    @property
    def only_advantages_matter(self) -> bool:
        return self.kl_coef == 0 and self.entropy_coef == 0

    def targets(self, batch: Batch, scores: Scores) -> Targets:
        advantages_B = F.group_advantages(
            batch.rewards, batch.group_ids, normalize=self.normalize, std_floor=self.std_floor
        )
        if self.keep_sign:  # a right answer is never pushed down, however many calls it took
            advantages_B = torch.where(batch.rewards > 0, advantages_B.clamp(min=0), advantages_B)
        advantages_BT = advantages_B[:, None] * batch.action_mask
        return Targets(advantages=advantages_BT, returns=torch.zeros_like(advantages_BT))

    def token_loss(self, new: Forward, batch: Batch, scores: Scores, targets: Targets) -> TokenLoss:
        span = (new.logprobs, scores.old_logprobs, targets.advantages, self.clip_low, self.clip_high)
        policy = F.clipped_surrogate(*span)
        kl = F.kl_k3(new.logprobs, scores.ref_logprobs)
        loss = policy + self.kl_coef * kl - self.entropy_coef * new.entropy
        stats = {"policy_loss": policy, "kl": kl, "entropy": new.entropy, "clip_fraction": F.clip_fraction(*span)}
        return TokenLoss(loss, stats)
