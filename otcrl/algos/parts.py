"""What several algorithms share and no paper claims: refusing settings, one advantage for all tokens of a row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from otcrl.types import Targets


def check_at_least_zero(algo: object, *names: str) -> None:
    """Raises ValueError for the first of these settings that is below 0, infinite or NaN."""
    for name in names:
        if not 0 <= getattr(algo, name) < math.inf:
            raise ValueError(f"{name} must be 0 or more, got {getattr(algo, name)}")


def critic_free(advantages_B: Tensor, action_mask_BT: Tensor) -> Targets:
    """Every action token of a trajectory has the trajectory's advantage; there is no critic to teach."""
    advantages_BT = advantages_B[:, None] * action_mask_BT
    return Targets(advantages=advantages_BT, returns=torch.zeros_like(advantages_BT))
