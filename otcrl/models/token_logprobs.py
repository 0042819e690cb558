"""Log-probs and entropies of an output layer over a wide vocabulary, without ever holding all of its logits.

The logits of N tokens over V words are the largest tensor of an update: 8,192 x 152,000 in float32 are 5 GB, and a
plain log_softmax holds several of them. Here one tile of them exists at a time, some tokens by some words, in the
forward pass and, computed again, in the backward one: one more matrix product (four instead of three) buys all that
memory. A softmax over tiles keeps each token's largest logit so far, and sums relative to it (Milakov and Gimelshein
2018, arXiv:1805.02867).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Entropy = Literal["skip", "measure", "train"]
Tile = tuple[int, int]  # tokens, words
# CPU: fits its cache. CUDA: large enough to keep it busy, a quarter of a gigabyte in float32.
TILE: dict[str, Tile] = {"cpu": (1024, 4096), "cuda": (2048, 32_768)}


def linear_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    chosen_N: Tensor,
    temperature: float = 1.0,
    entropy: Entropy = "skip",
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """(log softmax((W h + b) / temperature)[chosen], entropy of that softmax), [N], nats, float32 or wider.

    The products are in autocast's dtype where that is on, and the softmax in float32 at least. Entropy is 0 when
    skipped, and has no gradient unless it is trained.
    """
    tile = tile or TILE.get(hidden_ND.device.type, TILE["cuda"])
    return _LinearLogprobs.apply(hidden_ND, weight_VD, bias_V, chosen_N, temperature, entropy, tile)  # pyright: ignore


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
        tile: Tile,
    ) -> tuple[Tensor, Tensor]:
        logits = Logits(hidden_ND, weight_VD, bias_V, temperature, tile)
        # of the words so far: the largest logit, the sum of exp(logit - largest), and of (logit - largest) times that
        largest_N = hidden_ND.new_full((len(hidden_ND),), torch.finfo(logits.wide).min, dtype=logits.wide)
        total_N, weighted_N, picked_N = largest_N.new_zeros(3, len(hidden_ND))
        for n, v, scores in logits.tiles():
            word_N1, is_here_N1 = within(v, chosen_N[n])
            picked_N[n] += torch.where(is_here_N1, scores.gather(-1, word_N1), 0.0).squeeze(-1)
            largest = torch.maximum(largest_N[n], scores.amax(-1))
            back = largest_N[n] - largest
            total, weighted = sums(scores.sub_(largest[:, None]), entropy)
            weighted_N[n] = back.exp() * (weighted_N[n] + back * total_N[n]) + weighted
            total_N[n] = back.exp() * total_N[n] + total
            largest_N[n] = largest
        log_total_N, logprobs_N = largest_N + total_N.log(), picked_N - largest_N - total_N.log()
        entropy_N = torch.zeros_like(total_N) if entropy == "skip" else total_N.log() - weighted_N / total_N
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, chosen_N, log_total_N, entropy_N)
        ctx.temperature, ctx.entropy, ctx.tile, ctx.dtype = temperature, entropy, tile, logits.dtype
        if entropy != "train":
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_N, grad_entropy_N = grads
        hidden_ND, weight_VD, bias_V, chosen_N, log_total_N, entropy_N = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        logits = Logits(hidden_ND, weight_VD, bias_V, ctx.temperature, ctx.tile, ctx.dtype)
        d_hidden = torch.zeros_like(hidden_ND, dtype=logits.wide) if needs_hidden else None
        d_weight = torch.zeros_like(weight_VD, dtype=logits.wide) if needs_weight else None
        d_bias = torch.zeros_like(bias_V, dtype=logits.wide) if needs_bias and bias_V is not None else None
        for n, v, scores in logits.tiles():
            word_N1, is_here_N1 = within(v, chosen_N[n])
            logprobs = scores.sub_(log_total_N[n, None])
            if ctx.entropy == "train":  # dH/dz = -p (log p + H)
                factor = -grad_entropy_N[n, None] * (logprobs + entropy_N[n, None]) - grad_N[n, None]
            else:
                factor = -grad_N[n, None]
            d_scores = logprobs.exp_().mul_(factor)
            d_scores.scatter_add_(-1, word_N1, grad_N[n, None] * is_here_N1)
            d_logits = divided(d_scores, ctx.temperature).to(ctx.dtype)
            if d_hidden is not None:
                accumulate(d_hidden[n], d_logits, logits.weight[v])
            if d_weight is not None:
                accumulate(d_weight[v], d_logits.T, logits.hidden[n])
            if d_bias is not None:
                d_bias[v] += d_logits.sum(0)
        d_hidden = d_hidden if d_hidden is None else d_hidden.to(hidden_ND.dtype)
        d_weight = d_weight if d_weight is None else d_weight.to(weight_VD.dtype)
        d_bias = None if d_bias is None or bias_V is None else d_bias.to(bias_V.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None


class Logits:
    """(W h + b) / temperature, tile by tile."""

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        temperature: float,
        tile: Tile,
        dtype: torch.dtype | None = None,  # of the products; autocast's, or else the hidden states'
    ) -> None:
        self.dtype = dtype or product_dtype(hidden_ND)
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.hidden, self.weight = hidden_ND.to(self.dtype), weight_VD.to(self.dtype)
        self.bias = None if bias_V is None else bias_V.to(self.dtype)
        self.temperature, self.tile = temperature, tile

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Tokens, words, and their logits, in float32 at least: a fresh tensor, which callers write in."""
        tokens, words = self.tile
        for n in spans(len(self.hidden), tokens):
            for v in spans(len(self.weight), words):
                with torch.autocast(self.hidden.device.type, enabled=False):
                    bias = None if self.bias is None else self.bias[v]
                    scores = torch.nn.functional.linear(self.hidden[n], self.weight[v], bias)
                yield n, v, divided(scores.to(self.wide), self.temperature)


def product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def spans(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def within(words: slice, chosen_N: Tensor) -> tuple[Tensor, Tensor]:
    """([N, 1] numbers of the chosen words among these, any number for those that are not, [N, 1] whether they are)."""
    number_N1 = chosen_N[:, None] - words.start
    last = words.stop - words.start - 1
    return number_N1.clamp(0, last), (number_N1 >= 0) & (number_N1 <= last)


def sums(scores: Tensor, entropy: Entropy) -> tuple[Tensor, Tensor]:
    """[N] of exp(score), and of score * exp(score), 0 if entropy is skipped. `scores` are gone."""
    if entropy == "skip":
        total_N = scores.exp_().sum(-1)
        return total_N, torch.zeros_like(total_N)
    odds = scores.exp()
    return odds.sum(-1), scores.mul_(odds).sum(-1)


def divided(x: Tensor, by: float) -> Tensor:
    """In place, and for nothing where it changes nothing."""
    return x if by == 1 else x.div_(by)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a temporary where the dtypes agree."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
