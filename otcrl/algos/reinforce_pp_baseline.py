"""REINFORCE++ with baseline: the group's mean, but the batch's spread (Hu et al. 2025, arXiv:2501.03262).

    A_i = r_i - mean of its group,   then  (A - mean(A)) / std(A)

over all tokens of the batch, with PPO's clip and, in the loss, beta times the k2 estimate of the KL. A group whose
rewards hardly differ is not blown up, as it is where its own spread divides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from otcrl.algos import functional as F
from otcrl.algos.parts import check_at_least_zero
from otcrl.types import Batch, Forward, Scores, Targets, TokenLoss


@dataclass(frozen=True, kw_only=True)
class ReinforcePPBaseline:
    clip_low: float
    clip_high: float
    kl_coef: float  # beta
    weighting: Literal["token", "sequence"]

    def __post_init__(self) -> None:
        check_at_least_zero(self, "clip_low", "clip_high", "kl_coef")

    needs_critic = False
    needs_groups = True
    trains_entropy = False

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def only_advantages_matter(self) -> bool:
        return self.kl_coef == 0

    def targets(self, batch: Batch, scores: Scores) -> Targets:
        advantages_B = F.group_advantages(batch.rewards, batch.group_ids, normalize=False)
        advantages_BT = F.whiten(advantages_B[:, None] * batch.action_mask, batch.action_mask)
        return Targets(advantages=advantages_BT, returns=torch.zeros_like(advantages_BT))

    def token_loss(self, new: Forward, batch: Batch, scores: Scores, targets: Targets) -> TokenLoss:
        span = (new.logprobs, scores.old_logprobs, targets.advantages, self.clip_low, self.clip_high)
        policy = F.clipped_surrogate(*span)
        kl = F.kl_k2(new.logprobs, scores.ref_logprobs)
        stats = {"policy_loss": policy, "entropy": new.entropy, "clip_fraction": F.clip_fraction(*span)}
        stats |= {"kl": kl} if self.needs_reference else {}
        return TokenLoss(policy + F.kl_penalty(self.kl_coef, kl), stats)
