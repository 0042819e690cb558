"""An algorithm: REINFORCE with the batch's mean as baseline (Williams 1992).

    A_i = r_i - mean(r),   loss = -A_i log pi(token)

otcrl train conf=quickstart algo=reinforce
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from otcrl.types import Batch, Forward, Scores, Targets, TokenLoss


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    entropy_coef: float  # nats
    weighting: Literal["token", "sequence"]  # how the learner averages the tokens' losses

    needs_critic = False
    needs_groups = False  # a problem with one trajectory teaches too: the baseline is the batch's
    needs_reference = False

    @property
    def only_advantages_matter(self) -> bool:
        return self.entropy_coef == 0

    @property
    def trains_entropy(self) -> bool:
        return self.entropy_coef != 0

    def targets(self, batch: Batch, scores: Scores) -> Targets:
        """Every sampled token has its trajectory's advantage; prompts and observations have none."""
        advantages_B = batch.rewards - batch.rewards.mean()
        advantages_BT = advantages_B[:, None] * batch.action_mask
        return Targets(advantages=advantages_BT, returns=torch.zeros_like(advantages_BT))

    def token_loss(self, new: Forward, batch: Batch, scores: Scores, targets: Targets) -> TokenLoss:
        policy_BT = -targets.advantages * new.logprobs
        return TokenLoss(
            policy_BT - self.entropy_coef * new.entropy, {"policy_loss": policy_BT, "entropy": new.entropy}
        )
