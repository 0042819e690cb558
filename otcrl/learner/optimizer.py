"""AdamW and its schedule, for the policy, the critic and the cold start alike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from otcrl.errors import ConfigError, nearest

DECAYS = ("linear", "cosine")
AUTOCAST = ("bfloat16",)  # not float16: gradients below 6e-8 would be 0, as the loss is not scaled


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW with a linear warm-up, and over the run a decay to `final_lr_share` of lr."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    warmup_steps: int
    decay: str  # linear | cosine
    final_lr_share: float  # 1: constant

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup_steps", "final_lr_share"):
            if not getattr(self, name) >= 0:  # nor NaN
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {list(self.betas)}")
        if self.decay not in DECAYS:
            raise ValueError(f"decay must be {' or '.join(DECAYS)}, got {self.decay!r}.{nearest(self.decay, DECAYS)}")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)

    def set_rate(self, optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step, steps)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step` of `steps`, counted from 0."""
        progress = step / max(steps, 1)
        rise = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        if self.decay == "linear":
            return self.lr * rise * (1 - (1 - self.final_lr_share) * progress)
        return self.lr * rise * max(self.final_lr_share, 0.5 * (1 + math.cos(math.pi * progress)))


def check_precision(max_grad_norm: float, autocast: str | None) -> None:
    """Raises ValueError for what clipping or autocast cannot work with."""
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be above 0, got {max_grad_norm}")
    if autocast not in (None, *AUTOCAST):
        raise ValueError(
            f"autocast must be {', '.join(AUTOCAST)} or null, got {autocast!r}.{nearest(autocast, AUTOCAST)}"
        )


def check_trained(dtype: object) -> None:
    """Raises ConfigError for a type of weights, or its name, that is too coarse to be trained."""
    if str(dtype).removeprefix("torch.") == "float16":
        raise ConfigError(
            "model.dtype is 'float16', which can be evaluated and not trained: small gradients are 0 in it, and the "
            "loss is not scaled against that. Use bfloat16 or float32"
        )
