"""The critic of PPO: a copy of the policy's body with one number for a head."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Critic(nn.Module):
    """values [B, T] float32: V(tokens < t) at column t, so column 0 is 0. Untrained it says 0 everywhere."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.body = copy.deepcopy(policy.base_model)
        self.head = nn.Linear(policy.config.get_text_config().hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.head.to(policy.device)

    def forward(self, token_ids_BT: Tensor) -> Tensor:
        hidden_BTD = self.body(input_ids=token_ids_BT, use_cache=False).last_hidden_state
        values_BT = self.head(hidden_BTD.float()).squeeze(-1)
        return nn.functional.pad(values_BT[:, :-1], (1, 0))
