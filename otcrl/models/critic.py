"""The critic of PPO: a copy of the policy's body with one number for a head."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from otcrl.models.packed_attention import Packed


class Critic(nn.Module):
    """values [B, T], float32 or wider: V(tokens < t) at column t, so column 0 is 0. Untrained it says 0 everywhere."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.body: PreTrainedModel = copy.deepcopy(policy.base_model)  # pyright: ignore[reportAttributeAccessIssue]
        wide = torch.promote_types(policy.dtype, torch.float32)
        self.head = nn.Linear(policy.config.get_text_config().hidden_size, 1, dtype=wide)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.head.to(policy.device)

    def forward(self, token_ids_BT: Tensor, packed: Packed | None = None) -> Tensor:
        """`packed` holds the rows as far as actions depend on them; values past that mean nothing."""
        inputs = {"input_ids": token_ids_BT, "use_cache": False} if packed is None else packed.inputs()
        hidden = self.body(**inputs).last_hidden_state
        values_BT = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        if packed is not None:
            values_BT = values_BT[0].take(packed.where_BT)
        T = token_ids_BT.shape[1]
        return nn.functional.pad(values_BT[:, : T - 1], (1, max(0, T - 1 - values_BT.shape[1])))
