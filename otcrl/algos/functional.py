"""The formulas. One pure function per equation; every tensor is [B, T] unless it says otherwise."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation, arXiv:1506.02438 Eq. 16, over action tokens only.

        A_t = delta_t + gamma * lam * A_{t+1},   delta_t = r_t + gamma * V_{t+1} - V_t

    Tool and padding tokens are skipped: "t+1" means the next action token. 0 off actions.
    """
    advantages_BT = torch.zeros_like(values_BT)
    next_value_B = torch.zeros_like(values_BT[:, 0])
    next_advantage_B = torch.zeros_like(next_value_B)
    for t in reversed(range(values_BT.shape[1])):
        is_action_B = mask_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        advantages_BT[:, t] = torch.where(is_action_B, advantage_B, 0.0)
        next_advantage_B = torch.where(is_action_B, advantage_B, next_advantage_B)
        next_value_B = torch.where(is_action_B, values_BT[:, t], next_value_B)
    return advantages_BT


def group_advantages(
    rewards_B: Tensor, group_ids_B: Tensor, *, normalize: bool, std_floor: float = 0.0, eps: float = 1e-6
) -> Tensor:
    """GRPO, arXiv:2402.03300 Sec. 4.1.2:  A_i = (r_i - mean(r)) / (max(std(r), floor) + eps).  Returns [B].

    The std is the unbiased one, as in Search-R1. `normalize=False` drops the denominator (Dr. GRPO,
    arXiv:2503.20783). A lone trajectory has nothing to compare with: 0. Computed in float64, so that
    equal rewards give exactly 0 rather than rounding noise divided by eps.
    """
    r_B = rewards_B.double()
    advantages_B = torch.zeros_like(r_B)
    for group in group_ids_B.unique():
        members_B = group_ids_B == group
        r_G = r_B[members_B]
        if len(r_G) > 1 and not bool((r_G == r_G[0]).all()):
            scale = r_G.std().clamp(min=std_floor) + eps if normalize else 1.0
            advantages_B[members_B] = (r_G - r_G.mean()) / scale
    return advantages_B.to(rewards_B.dtype)


def leave_one_out(rewards_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """RLOO, arXiv:2402.14740 Sec. 2.2:  A_i = r_i - mean of the others = G / (G - 1) (r_i - mean(r)).  Returns [B].

    The baseline does not depend on r_i, so the gradient is that of the expected reward, and not (G - 1) / G of it.
    A lone trajectory: 0.
    """
    size_B = (group_ids_B[:, None] == group_ids_B).sum(1)
    return group_advantages(rewards_B, group_ids_B, normalize=False) * size_B / (size_B - 1).clamp(min=1)


def mean_normalized(rewards_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """MaxRL, arXiv:2602.02710:  A_i = (r_i - mean(r)) / mean(r), for rewards of 0 or more.  Returns [B].

    With rewards 0 and 1 the expected gradient is that of log p cut off after G - 1 terms of its series
    -sum_k (1 - p)^k / k, p being the chance to be right: rare success weighs more. A group without success: 0.
    """
    centred_B = group_advantages(rewards_B, group_ids_B, normalize=False)
    return torch.where(centred_B == 0, 0.0, centred_B / (rewards_B - centred_B))


def sign_kept(advantages_B: Tensor, rewards_B: Tensor) -> Tensor:
    """No trajectory with a reward above 0 is pushed down, however it compares with its group.  Returns [B]."""
    return torch.where(rewards_B > 0, advantages_B.clamp(min=0), advantages_B)


def whiten(values_BT: Tensor, mask_BT: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean 0 and standard deviation 1 over the action tokens; 0 off them.

    Equal values have no spread: exactly 0, as in `group_advantages`.
    """
    actions = values_BT[mask_BT].double()
    if actions.numel() == 0 or bool((actions == actions[0]).all()):
        return torch.zeros_like(values_BT)
    whitened_BT = (values_BT.double() - actions.mean()) / (actions.std() + eps)
    return torch.where(mask_BT, whitened_BT, 0.0).to(values_BT.dtype)


def row_sum(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """At every token the sum over its row's action tokens: of log-probs, that of the trajectory."""
    return torch.where(mask_BT, values_BT, 0.0).sum(1, keepdim=True).expand_as(values_BT)


def row_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """At every token the mean over its row's action tokens; 0 in a row without any.

    exp(row_mean(log pi) - row_mean(log pi_old)) is GSPO's ratio, arXiv:2507.18071 Eq. 7.
    """
    return row_sum(values_BT, mask_BT) / mask_BT.sum(1, keepdim=True).clamp(min=1)


def kl_penalty(coef: float, kl: Tensor) -> Tensor | float:
    """What the loss adds for a KL; 0 without a coefficient, though the KL be inf there (0 times inf is NaN)."""
    return coef * kl if coef else 0.0


def clipped_surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """PPO, arXiv:1707.06347 Eq. 7, negated:  -min(w A, clip(w, 1 - low, 1 + high) A),  w = pi / pi_old.

    0 where A is 0, though w be inf: a correction may have masked the token for just that. Where A > 0 a token far above
    the bound has no gradient either, and not the NaN of 0 times inf.
    """
    log_ratio = torch.where(advantages != 0, logprobs - old_logprobs, 0.0)
    ratio = torch.where(advantages > 0, log_ratio.clamp(max=math.log1p(high) + 1), log_ratio).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def clipped_weight(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """CISPO, arXiv:2506.13585 Eq. 4 and 5, negated:  -sg(clip(w, 1 - low, 1 + high)) A log pi,  w = pi / pi_old.

    sg stops the gradient, so a clipped token still has one, only with a bounded weight. The value means nothing.
    """
    weight = (logprobs - old_logprobs).exp().clamp(1 - low, 1 + high).detach()
    return -weight * advantages * logprobs


def clip_fraction(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """1 where the clip is what decides, so the token has no gradient: a statistic of Eq. 7."""
    ratio = (logprobs - old_logprobs).exp()
    return (((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))).float()


def bound_fraction(logprobs: Tensor, old_logprobs: Tensor, low: float, high: float) -> Tensor:
    """1 where the weight of `clipped_weight` is bounded, whatever the advantage: the token has a gradient still."""
    ratio = (logprobs - old_logprobs).exp()
    return ((ratio > 1 + high) | (ratio < 1 - low)).float()


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """0.5 * max((V - R)^2, (clip(V, V_old +- clip) - R)^2), as in the OpenAI baselines PPO2."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k1 estimate of KL(pi || ref), joschu.net/blog/kl-approx.html:  log(pi / ref); unbiased, any sign."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k2 estimate, joschu.net/blog/kl-approx.html:  0.5 log(pi / ref)^2; on-policy its gradient is the KL's."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k3 estimate of KL(pi || ref), GRPO Eq. 4:  ref/pi - log(ref/pi) - 1  >= 0."""
    gap = ref_logprobs - logprobs
    return gap.exp() - gap - 1


def token_weights(mask_BT: Tensor, weighting: str | int) -> Tensor:
    """Weights of the tokens, so that a loss is always `(weights_BT * loss_BT).sum()`.

    "token":    every action token counts the same; they sum to 1 (DAPO Eq. 8).
    "sequence": every trajectory with an action counts the same, whatever its length; they sum to 1 (GRPO Eq. 3).
    a number:   every action token counts 1 / (trajectories with an action * number), whatever the lengths: they sum
                to mean length / number (Dr. GRPO).
    """
    mask_BT = mask_BT.float()
    lengths_B1 = mask_BT.sum(1, keepdim=True)
    rows = (lengths_B1 > 0).sum().clamp(min=1)
    if weighting == "token":
        return mask_BT / lengths_B1.sum().clamp(min=1)
    if weighting == "sequence":
        return mask_BT / lengths_B1.clamp(min=1) / rows
    if isinstance(weighting, int):
        return mask_BT / rows / weighting
    raise ValueError(f"weighting must be 'token' or 'sequence', got {weighting!r}")


def last_action(mask_BT: Tensor) -> Tensor:
    """One-hot [B, T] at each row's last action token; a row without actions is all False."""
    return mask_BT & (mask_BT.long().flip(1).cumsum(1).flip(1) == 1)
