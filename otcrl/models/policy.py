"""What a causal language model says about tokens it is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def token_logprobs(
    model: PreTrainedModel,
    token_ids_BT: Tensor,
    action_mask_BT: Tensor,
    temperature: float = 1.0,
    entropy: Literal["skip", "measure", "train"] = "skip",
) -> tuple[Tensor, Tensor]:
    """(log pi(token t | tokens < t), entropy of that choice), both [B, T] float32 nats, 0 off actions.

    Rows are right-padded, so a causal model never sees padding before an action and needs no attention
    mask. Only the hidden states that choose an action reach the output layer: a vocabulary is wide, and
    most tokens of a tool trajectory are observations. Entropy is 0 when skipped, and has no gradient
    unless it is trained.
    """
    row_N, column_N = action_mask_BT.nonzero(as_tuple=True)

    def actions_only(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0][row_N, column_N - 1].unsqueeze(0),)

    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has an output layer"
    hook = head.register_forward_pre_hook(actions_only)
    try:
        logits_NV = model(input_ids=token_ids_BT, use_cache=False).logits.squeeze(0)
    finally:
        hook.remove()
    logprobs_NV = (logits_NV.float() / temperature).log_softmax(-1)
    chosen_N = logprobs_NV.gather(-1, token_ids_BT[row_N, column_N].unsqueeze(-1)).squeeze(-1)
    entropy_N = torch.zeros_like(chosen_N)
    if entropy != "skip":
        with torch.set_grad_enabled(entropy == "train" and torch.is_grad_enabled()):
            entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    empty_BT = torch.zeros(token_ids_BT.shape, device=token_ids_BT.device)
    return empty_BT.index_put((row_N, column_N), chosen_N), empty_BT.index_put((row_N, column_N), entropy_N)


def autocast(dtype: str | None, device: torch.device) -> torch.autocast:
    """Matrix products in `dtype` (bfloat16, float16); None: in the model's own."""
    return torch.autocast(device.type, dtype=getattr(torch, dtype or "bfloat16"), enabled=dtype is not None)
