"""The sampler is not quite the learner: how far apart they are, and weights that make up for it.

Three distributions meet in a step: the sampler's mu (the engine, possibly with older weights), the learner's
pi_old (the same tokens scored before the update) and the learner's pi while it is updated. The algorithms see
pi / pi_old. The weights here are pi_old / mu, constants of the update. Docs and numbers: docs/mismatch.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from otcrl.algos import functional as F
from otcrl.errors import TrainingError
from otcrl.types import Batch, Metrics, Scores, Targets

Level = Literal["none", "token", "sequence", "geometric"]
Bound = Literal["truncate", "mask"]


def log_ratios(logprobs: Tensor, sampler_logprobs: Tensor, mask_BT: Tensor) -> Tensor:
    """log(pi / mu) of every token, float64 [B, T]; 0 off actions."""
    return torch.where(mask_BT, logprobs.detach().double() - sampler_logprobs.double(), 0.0)


def ratios(logprobs: Tensor, sampler_logprobs: Tensor, mask_BT: Tensor, level: Level) -> Tensor:
    """Importance weights pi / mu before any bound, float64 [B, T]; 1 off actions.

        token:     w_t = pi(t) / mu(t)
        sequence:  w = product of w_t over the row's action tokens, at each of them: exact, and of high variance
        geometric: w = (product of w_t) ^ (1 / number of action tokens), the ratio of GSPO, arXiv:2507.18071 Eq. 7
        none:      1

    Products are sums of logs; one that is too large for a float is inf, and is bounded like any other. Constants
    of the update: no gradient flows through them.
    """
    log_BT = log_ratios(logprobs, sampler_logprobs, mask_BT)
    log_B1 = log_BT.sum(1, keepdim=True)
    if level == "sequence":
        log_BT = log_B1.expand_as(log_BT)
    elif level == "geometric":
        log_BT = (log_B1 / mask_BT.sum(1, keepdim=True).clamp(min=1)).expand_as(log_BT)
    elif level == "none":
        log_BT = torch.zeros_like(log_BT)
    return torch.where(mask_BT, log_BT.exp(), 1.0)


def bounded(ratios: Tensor, bound: Bound, low: float, high: float) -> Tensor:
    """Weights within [low, high], by one of two rules.

    truncate: the nearest bound. Truncated importance sampling, Ionides 2008 (doi:10.1198/106186008X320456); for
              language models Yao et al. 2025 (fengyao.notion.site/off-policy-rl), who take min(w, C).
    mask:     0, so the token or the trajectory is left out. IcePop, arXiv:2510.18855 (ringtech.notion.site/icepop).
    """
    if bound == "truncate":
        return ratios.clamp(low, high)
    return torch.where((ratios >= low) & (ratios <= high), ratios, 0.0)


def effective_share(log_weights: Tensor) -> float:
    """Effective sample size as a share of the samples,  (sum w)^2 / (n sum w^2),  Kish 1965, from log w [n].

    1 when all weights are equal, 1/n when one of them is everything. A common factor of the weights cancels.
    """
    weights = (log_weights.double() - log_weights.max()).exp()
    return (weights.sum() ** 2 / (len(weights) * (weights**2).sum())).item()


def mismatch(logprobs: Tensor, sampler_logprobs: Tensor, mask_BT: Tensor) -> Metrics:
    """How far the learner is from the sampler on the sampled tokens, nats; {} when there are none.

    The mean and the largest |log pi - log mu|; KL(mu || pi) by two estimates (joschu.net/blog/kl-approx.html);
    the effective sample size of the unbounded weights pi / mu, over tokens and over trajectories.
    """
    if not mask_BT.any():
        return {}
    pi_N, mu_N = logprobs.detach()[mask_BT].double(), sampler_logprobs[mask_BT].double()
    sequences_B = log_ratios(logprobs, sampler_logprobs, mask_BT).sum(1)[mask_BT.any(1)]
    return {
        "logprob_gap_mean": (pi_N - mu_N).abs().mean().item(),
        "logprob_gap_max": (pi_N - mu_N).abs().max().item(),
        "mismatch_kl": F.kl_k1(mu_N, pi_N).mean().item(),
        "mismatch_kl_k3": F.kl_k3(mu_N, pi_N).mean().item(),
        "ess_token": effective_share(pi_N - mu_N),
        "ess_sequence": effective_share(sequences_B),
    }


def check_agreement(step: int, metrics: Metrics, max_gap: float | None) -> None:
    """Raises TrainingError when the sampler cannot have been the policy that learns, before anything is published."""
    gap = metrics.get("rollout/logprob_gap_mean", 0.0)  # none when no token of the step had an advantage
    if max_gap is not None and not gap <= max_gap:  # NaN is no agreement
        raise TrainingError(
            f"step {step}: sampler and learner disagree by {gap:.3g} nats per token on average (at most "
            f"{metrics['rollout/logprob_gap_max']:.3g}), more than loop.max_logprob_gap={max_gap}. Likely causes: the "
            "engine samples at another temperature, or with top_p or top_k; it was given wrong weights, or none; its "
            "dtype is too coarse (fp8). rollout/mismatch_kl of the earlier steps shows whether it came at once or grew"
        )


@dataclass(frozen=True, kw_only=True)
class Correction:
    """How the advantages of tokens are weighted that another distribution sampled."""

    level: Level
    bound: Bound
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= 1 <= self.high < math.inf:
            raise ValueError(
                f"low and high must be around 1, the weight of no mismatch, got {self.low} and {self.high}"
            )


def corrected(targets: Targets, batch: Batch, scores: Scores, correction: Correction) -> tuple[Targets, Metrics]:
    """Targets with importance weights pi_old / mu on the advantages, and how much that changed.

    A policy loss is linear in the advantage for weights of 0 or more, so no algorithm needs to know. Returns stay
    as they are: the critic learns from what happened.
    """
    free_BT = ratios(scores.old_logprobs, batch.sampler_logprobs, batch.action_mask, correction.level)
    weights_BT = bounded(free_BT, correction.bound, correction.low, correction.high)
    weights_N = weights_BT[batch.action_mask]
    metrics = {
        "rollout/is_weight_mean": weights_N.mean().item(),
        "rollout/is_truncated_share": (weights_N != free_BT[batch.action_mask]).double().mean().item(),
    }
    return replace(targets, advantages=(targets.advantages * weights_BT).to(targets.advantages.dtype)), metrics
