"""Drawing tokens so that a draw depends on (seed, position) alone, never on what else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds_B: Sequence[int], positions_B: Sequence[int]) -> np.ndarray:
    """[B] float64 in [0, 1): number `position` of the splitmix64 stream that starts at the scrambled seed.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    start_B = splitmix(np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds_B], dtype=np.uint64))
    bits_B = splitmix(start_B + np.array(positions_B, dtype=np.uint64) * GOLDEN)
    return (bits_B >> np.uint64(11)) * 2.0**-53


def splitmix(x: np.ndarray) -> np.ndarray:
    """The output function of splitmix64, elementwise; uint64 arithmetic wraps."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample(logits_BV: Tensor, temperatures_B: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [B] and their log-probs [B] float32, nats, under the distribution they were drawn from.

    The draw inverts the cumulative distribution, so a token of probability 0 is never drawn. Temperature 0 takes the
    likeliest token and reports its log-prob at temperature 1. A log-prob is NaN where the logits are.
    """
    greedy_B = temperatures_B == 0
    logprobs_BV = (logits_BV.float() / temperatures_B.masked_fill(greedy_B, 1.0)[:, None]).log_softmax(-1)
    cumulative_BV = logprobs_BV.exp().cumsum(-1)
    last_B = cumulative_BV[:, -1]
    # below the last value, or the search could run past the last token that has any probability
    target_B = (uniforms_B * last_B).float().minimum(last_B.nextafter(torch.zeros_like(last_B)))
    ids_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0].clamp_max(logits_BV.shape[-1] - 1)
    if greedy_B.any():
        ids_B = torch.where(greedy_B, logprobs_BV.argmax(-1), ids_B)
    return ids_B, logprobs_BV.gather(-1, ids_B[:, None])[:, 0]
