"""What a causal language model says about tokens it is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def token_logprobs(
    model: PreTrainedModel,
    token_ids_BT: Tensor,
    action_mask_BT: Tensor,
    temperature: float = 1.0,
    *,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """(log pi(token t | tokens < t), entropy of that choice), both [B, T] float32 nats, 0 off actions.

    Rows are right-padded, so a causal model never sees padding before an action and needs no
    attention mask. Logits are made only for the columns in which some row acts.
    """
    columns_C = action_mask_BT.any(0).nonzero().squeeze(-1)
    output = model(input_ids=token_ids_BT, logits_to_keep=columns_C - 1, use_cache=False)
    logprobs_BCV = (output.logits.float() / temperature).log_softmax(-1)
    chosen_BC = logprobs_BCV.gather(-1, token_ids_BT[:, columns_C, None]).squeeze(-1)
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy_BC = -(logprobs_BCV.exp() * logprobs_BCV).sum(-1)
    empty_BT = torch.zeros(token_ids_BT.shape, device=token_ids_BT.device)
    mask_BT = action_mask_BT.to(empty_BT.dtype)
    return (
        empty_BT.index_copy(1, columns_C, chosen_BC) * mask_BT,
        empty_BT.index_copy(1, columns_C, entropy_BC) * mask_BT,
    )


def autocast(dtype: str | None, device: torch.device) -> torch.autocast:
    """Matrix products in `dtype` (bfloat16, float16); None: in the model's own."""
    return torch.autocast(device.type, dtype=getattr(torch, dtype or "bfloat16"), enabled=dtype is not None)
