"""Log-probs and entropies of an output layer over a wide vocabulary, without ever holding all of its logits.

The logits of N tokens over V words are the largest tensor of an update: 8,192 x 152,000 in float32 are 5 GB, and a
plain log_softmax holds several of them. Here a few tokens' logits exist at a time, in the forward pass and, computed
again, in the backward one: one more matrix product (four instead of three) buys all that memory.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Entropy = Literal["skip", "measure", "train"]
CHUNK = {"cpu": 128, "cuda": 1024}  # tokens; fewer would read the weight more often than they compute with it


def linear_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    chosen_N: Tensor,
    temperature: float = 1.0,
    entropy: Entropy = "skip",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(log softmax((W h + b) / temperature)[chosen], entropy of that softmax), [N], nats, float32 or wider.

    The products are in autocast's dtype where that is on, and the softmax in float32 at least. Entropy is 0 when
    skipped, and has no gradient unless it is trained.
    """
    chunk = chunk or CHUNK.get(hidden_ND.device.type, CHUNK["cuda"])
    return _LinearLogprobs.apply(hidden_ND, weight_VD, bias_V, chosen_N, temperature, entropy, chunk)  # pyright: ignore


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        chosen_N: Tensor,
        temperature: float,
        entropy: Entropy,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.dtype = product_dtype(hidden_ND)
        ctx.temperature, ctx.entropy, ctx.chunk = temperature, entropy, chunk
        wide = torch.promote_types(ctx.dtype, torch.float32)
        logprobs_N, log_total_N, entropy_N = hidden_ND.new_zeros(3, len(hidden_ND), dtype=wide)
        weight, bias = cast(ctx.dtype, weight_VD, bias_V)
        for n in spans(len(hidden_ND), chunk):
            logprobs = scaled_logits(hidden_ND[n], weight, bias, temperature, wide)
            log_total_N[n] = logprobs.logsumexp(-1)
            logprobs -= log_total_N[n, None]
            logprobs_N[n] = logprobs.gather(-1, chosen_N[n, None]).squeeze(-1)
            if entropy != "skip":
                entropy_N[n] = -(logprobs.exp().mul_(logprobs)).sum(-1)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, chosen_N, log_total_N, entropy_N)
        if entropy != "train":
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_N, grad_entropy_N = grads
        hidden_ND, weight_VD, bias_V, chosen_N, log_total_N, entropy_N = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        wide = log_total_N.dtype
        weight, bias = cast(ctx.dtype, weight_VD, bias_V)
        d_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        d_weight = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        d_bias = torch.zeros_like(bias_V, dtype=wide) if needs_bias and bias_V is not None else None
        for n in spans(len(hidden_ND), ctx.chunk):
            logprobs = scaled_logits(hidden_ND[n], weight, bias, ctx.temperature, wide).sub_(log_total_N[n, None])
            if ctx.entropy == "train":  # dH/dz = -p (log p + H)
                factor = -grad_entropy_N[n, None] * (logprobs + entropy_N[n, None]) - grad_N[n, None]
            else:
                factor = -grad_N[n, None]
            d_scores = logprobs.exp_().mul_(factor)
            d_scores.scatter_add_(-1, chosen_N[n, None], grad_N[n, None])
            d_logits = d_scores.div_(ctx.temperature).to(ctx.dtype)
            if d_hidden is not None:
                d_hidden[n] = d_logits @ weight
            if d_weight is not None:
                accumulate(d_weight, d_logits.T, hidden_ND[n].to(ctx.dtype))
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        d_weight = d_weight if d_weight is None else d_weight.to(weight_VD.dtype)
        d_bias = d_bias if d_bias is None else d_bias.to(weight_VD.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None


def product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def cast(dtype: torch.dtype, weight_VD: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)


def spans(count: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, count, chunk)]


def scaled_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, wide: torch.dtype) -> Tensor:
    """A fresh tensor, which callers write in."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)
    return logits.to(wide).div_(temperature)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a temporary where the dtypes agree."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
