"""What a causal language model says about tokens it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from otcrl.models.packed_attention import Packed, gathered
from otcrl.models.token_logprobs import Entropy, linear_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def token_logprobs(
    model: PreTrainedModel,
    token_ids_BT: Tensor,
    action_mask_BT: Tensor,
    temperature: float = 1.0,
    entropy: Entropy = "skip",
    *,
    packed: Packed | None = None,
    head: nn.Linear | None = None,
) -> tuple[Tensor, Tensor]:
    """The first two of `token_states`."""
    return token_states(model, token_ids_BT, action_mask_BT, temperature, entropy, packed=packed, head=head)[:2]


def token_states(
    model: PreTrainedModel,
    token_ids_BT: Tensor,
    action_mask_BT: Tensor,
    temperature: float = 1.0,
    entropy: Entropy = "skip",
    *,
    packed: Packed | None = None,
    head: nn.Linear | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log pi(token t | tokens < t), entropy of that choice), both [B, T] nats in float32 or wider, 0 off actions.

    And [N, D], the last hidden states that chose the N actions, in the order of `action_mask_BT.nonzero()`.

    Only the hidden states that choose an action reach the output layer: a vocabulary is wide, and most tokens of a tool
    trajectory are observations. Entropy is 0 when skipped, and has no gradient unless it is trained.

    `packed` holds the rows as far as actions depend on them; without it they go through the model as they are,
    right-padded, so that a causal model never sees padding before an action and needs no attention mask.
    `head`: the output layer, where it alone makes the model's logits of its hidden states (otcrl.models.reader finds
    out); they are then never held all at once.
    """
    row_N, column_N = action_mask_BT.nonzero(as_tuple=True)
    chosen_N = token_ids_BT[row_N, column_N]
    inputs = {"input_ids": token_ids_BT, "use_cache": False} if packed is None else packed.inputs()
    chose: list[Tensor] = []

    def acting(hidden: Tensor) -> Tensor:
        if packed is None:
            chose.append(hidden[row_N, column_N - 1])
        else:
            chose.append(gathered(hidden[0], packed.where_BT[row_N, column_N - 1]))
        return chose[-1]

    if head is None:
        with changing_input(output_layer(model), lambda hidden: acting(hidden).unsqueeze(0)):
            logits_NV = model(**inputs).logits.squeeze(0)
        logprobs_N, entropy_N = softmax_logprobs(logits_NV, chosen_N, temperature, entropy)
    else:
        fused = partial(
            linear_logprobs,
            weight_VD=head.weight,
            bias_V=head.bias,
            chosen_N=chosen_N,
            temperature=temperature,
            entropy=entropy,
        )
        with computing(head, fused):
            logprobs_N, entropy_N = head(acting(model.base_model(**inputs).last_hidden_state))
    empty_BT = torch.zeros(token_ids_BT.shape, device=token_ids_BT.device, dtype=logprobs_N.dtype)
    logprobs_BT, entropy_BT = (empty_BT.index_put((row_N, column_N), said_N) for said_N in (logprobs_N, entropy_N))
    return logprobs_BT, entropy_BT, chose[-1]


def softmax_logprobs(
    logits_NV: Tensor, chosen_N: Tensor, temperature: float, entropy: Entropy
) -> tuple[Tensor, Tensor]:
    """What `linear_logprobs` says, from logits that are all there."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    logprobs_NV = (logits_NV.to(wide) / temperature).log_softmax(-1)
    chosen_logprobs_N = logprobs_NV.gather(-1, chosen_N.unsqueeze(-1)).squeeze(-1)
    entropy_N = torch.zeros_like(chosen_logprobs_N)
    if entropy != "skip":
        with torch.set_grad_enabled(entropy == "train" and torch.is_grad_enabled()):
            entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return chosen_logprobs_N, entropy_N


def output_layer(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has an output layer"
    return head


@contextmanager
def changing_input(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    hook = layer.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]),))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def computing(layer: nn.Module, function: Callable[[Tensor], Any]) -> Iterator[None]:
    """The layer computes `function`, and is still called as a layer: hooks may have to gather its weight first."""
    layer.forward = function
    try:
        yield
    finally:
        del layer.forward


@contextmanager
def recomputing(*models: nn.Module) -> Iterator[None]:
    """Layers whose gradient checkpointing is enabled do it, which transformers leaves to training mode.

    All else stays in evaluation mode: with dropout, the first update's policy would not be the one that was scored.
    """
    modules = (module for model in models for module in model.modules())
    layers = [m for m in modules if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    was = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, training in zip(layers, was, strict=True):
            layer.training = training


def autocast(dtype: str | None, device: torch.device) -> torch.autocast:
    """Matrix products in `dtype` (bfloat16, float16); None: in the model's own."""
    return torch.autocast(device.type, dtype=getattr(torch, dtype or "bfloat16"), enabled=dtype is not None)
