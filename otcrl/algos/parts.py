"""What several algorithms share and no paper claims: refusing settings, one advantage for all tokens of a row, and
leaving out the tokens that do not count."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from otcrl.protocols import Algorithm
from otcrl.types import Batch, Forward, Scores, Targets, TokenLoss

Tokens = TypeVar("Tokens", Forward, Scores, Targets)


def check_at_least_zero(algo: object, *names: str) -> None:
    """Raises ValueError for the first of these settings that is below 0, infinite or NaN."""
    for name in names:
        if not 0 <= getattr(algo, name) < math.inf:
            raise ValueError(f"{name} must be 0 or more, got {getattr(algo, name)}")


def critic_free(advantages_B: Tensor, action_mask_BT: Tensor) -> Targets:
    """Every action token of a trajectory has the trajectory's advantage; there is no critic to teach."""
    advantages_BT = advantages_B[:, None] * action_mask_BT
    return Targets(advantages=advantages_BT, returns=torch.zeros_like(advantages_BT))


def loss_of_weighted(
    algo: Algorithm, new: Forward, batch: Batch, scores: Scores, targets: Targets, weights_BT: Tensor
) -> TokenLoss:
    """The algorithm's, and exactly 0 without any gradient where a token's weight is 0, whatever stands there.

    Multiplying by 0 would not do: a ratio may be inf where nothing was sampled, and inf * 0 is NaN. Nor would leaving
    out the loss alone, whose gradient is 0 times that of exp at the same place: what goes in is 0 there as well.
    """
    counts_BT = weights_BT != 0
    given = (only(new, counts_BT), batch, only(scores, counts_BT), only(targets, counts_BT))
    out = algo.token_loss(*given)
    stats = {name: torch.where(counts_BT, value_BT, 0.0) for name, value_BT in out.stats.items()}
    return TokenLoss(torch.where(counts_BT, out.loss, 0.0), stats)


def only(data: Tokens, chosen_BT: Tensor) -> Tokens:
    """The same, but 0 at all other tokens."""
    return type(data)(*(torch.where(chosen_BT, getattr(data, f.name), 0.0) for f in fields(data)))
