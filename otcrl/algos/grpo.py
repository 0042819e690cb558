"""GRPO: the group is the baseline, so there is no critic (DeepSeekMath, arXiv:2402.03300 Eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from otcrl.algos import functional as F
from otcrl.algos.parts import check_at_least_zero, critic_free
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
        check_at_least_zero(self, "std_floor", "clip_low", "clip_high", "kl_coef", "entropy_coef")

    needs_critic = False
    needs_groups = True

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
        if self.keep_sign:
            advantages_B = F.sign_kept(advantages_B, batch.rewards)
        return critic_free(advantages_B, batch.action_mask)

    def token_loss(self, new: Forward, batch: Batch, scores: Scores, targets: Targets) -> TokenLoss:
        span = (new.logprobs, scores.old_logprobs, targets.advantages, self.clip_low, self.clip_high)
        policy = F.clipped_surrogate(*span)
        kl = F.kl_k3(new.logprobs, scores.ref_logprobs)
        loss = policy + F.kl_penalty(self.kl_coef, kl) - self.entropy_coef * new.entropy
        stats = {"policy_loss": policy, "entropy": new.entropy, "clip_fraction": F.clip_fraction(*span)}
        stats |= {"kl": kl} if self.needs_reference else {}
        return TokenLoss(loss, stats)
