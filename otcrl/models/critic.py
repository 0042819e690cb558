"""The critic of PPO: one number for each hidden state, of a body of its own or of the policy's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from otcrl.models.twin import twin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from otcrl.models.packed_attention import Packed


class Critic(nn.Module):
    """With a copy of the policy's body. Untrained it says 0 everywhere.

    values [B, T], float32 or wider: V(tokens < t) at column t, so column 0 is 0.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.body: PreTrainedModel = twin(policy.base_model)  # pyright: ignore[reportArgumentType]
        self.head = value_head(policy)

    def forward(self, token_ids_BT: Tensor, packed: Packed | None = None) -> Tensor:
        """`packed` holds the rows as far as actions depend on them; values past that mean nothing."""
        inputs = {"input_ids": token_ids_BT, "use_cache": False} if packed is None else packed.inputs()
        hidden = self.body(**inputs).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):  # the body's affair, if it is on
            values_BT = self.head(hidden).squeeze(-1)
        if packed is not None:
            values_BT = values_BT[0].take(packed.where_BT)
        T = token_ids_BT.shape[1]
        return nn.functional.pad(values_BT[:, : T - 1], (1, max(0, T - 1 - values_BT.shape[1])))


class SharedCritic(nn.Module):
    """A head on the policy's hidden states, of the pass that gives its log-probs. Untrained it says 0 everywhere."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.head = value_head(policy)

    def forward(self, hidden_ND: Tensor, action_mask_BT: Tensor) -> Tensor:
        """values [B, T], float32 or wider, 0 off the N actions, which these hidden states chose (`token_states`)."""
        values_N = self.head(hidden_ND).squeeze(-1)
        empty_BT = torch.zeros(action_mask_BT.shape, device=values_N.device, dtype=values_N.dtype)
        return empty_BT.index_put(action_mask_BT.nonzero(as_tuple=True), values_N)


class ValueHead(nn.Linear):
    """One number for each hidden state, 0 as yet; float32 or wider, though DeepSpeed keep its weights in 16 bits."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__(width, 1, dtype=dtype)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return nn.functional.linear(input.to(wide), self.weight.to(wide), self.bias.to(wide))


def value_head(policy: PreTrainedModel) -> ValueHead:
    with torch.device(policy.device):
        return ValueHead(policy.config.get_text_config().hidden_size, torch.promote_types(policy.dtype, torch.float32))
