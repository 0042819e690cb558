"""Supervised cold start: next-token loss on the action tokens of demonstrations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from otcrl.errors import DataError, TrainingError
from otcrl.learner.learner import Optimizer, check_precision
from otcrl.models.policy import autocast, token_logprobs
from otcrl.protocols import Demo, Dialect, Task, Tokenizer
from otcrl.types import Metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Example = tuple[list[int], list[bool]]  # token ids [L], action mask [L]


@dataclass(frozen=True, kw_only=True)
class Sft:
    steps: int  # 0: no cold start
    batch_size: int  # demonstrations per step
    micro_tokens: int  # padded tokens per forward pass; changes memory and speed, never the gradient
    max_tokens: int  # a longer demonstration is an error
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    warmup_steps: int
    final_lr_share: float  # cosine decay to this share of lr
    max_grad_norm: float
    autocast: str | None  # bfloat16, or null for the model's own dtype

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch_size", 1), ("micro_tokens", 1), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        Optimizer(  # refuses what AdamW cannot work with
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            final_lr_share=self.final_lr_share,
        )
        check_precision(self.max_grad_norm, self.autocast)


def train_sft(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    task: Task,
    dialect: Dialect,
    config: Sft,
    on_step: Callable[[int, Metrics], None],
) -> None:
    """Train `model` in place. Raises TrainingError when the loss is not finite."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    model.train()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * cosine(step, config.steps, config.warmup_steps, config.final_lr_share)
        examples = batch(step, tokenizer, task, dialect, config)
        num_actions = sum(sum(mask) for _, mask in examples)
        loss = 0.0
        for micro in by_length(examples, config.micro_tokens):
            ids_BT, mask_BT = padded(micro, tokenizer.pad_id, model.device)
            with autocast(config.autocast, model.device):
                logprobs_BT, _ = token_logprobs(model, ids_BT, mask_BT)
            part = -logprobs_BT.sum() / num_actions  # one normaliser for the whole batch
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm).item()
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise TrainingError(f"SFT {name} is {value} at step {step}: lower sft.lr (now {config.lr}).")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(ids) for ids, _ in examples)
        on_step(step, {"sft/loss": loss, "sft/grad_norm": norm, "sft/tokens": tokens})
    model.eval()


def batch(step: int, tokenizer: Tokenizer, task: Task, dialect: Dialect, config: Sft) -> list[Example]:
    """The examples of one step. Raises ConfigError when the task has none, DataError when they do not fit."""
    demos = task.demonstrations(step, config.batch_size, dialect)
    examples = [encode(demo, tokenizer, ends=dialect.ends_with_stop_token) for demo in demos]
    check(examples, config.max_tokens, step)
    return examples


def encode(demo: Demo, tokenizer: Tokenizer, *, ends: bool) -> Example:
    """Each segment encoded by itself, as in a rollout, where injected and sampled text never share a token."""
    ids = tokenizer.prompt_ids(demo[0].text)
    mask = [False] * len(ids)
    for segment in demo[1:]:
        more = tokenizer.encode(segment.text)
        ids, mask = ids + more, mask + [segment.is_action] * len(more)
    if ends:
        ids, mask = [*ids, min(tokenizer.stop_ids)], [*mask, True]
    return ids, mask


def check(examples: Sequence[Example], max_tokens: int, step: int) -> None:
    """Raises DataError when a step's demonstrations are too long, or none of them has anything to learn."""
    longest = max((len(ids) for ids, _ in examples), default=0)
    if longest > max_tokens:
        raise DataError(
            f"a demonstration of SFT step {step} has {longest} tokens, more than sft.max_tokens={max_tokens}: "
            "raise it, or show fewer words of each passage"
        )
    if not any(any(mask) for _, mask in examples):
        raise DataError(f"the {len(examples)} demonstrations of SFT step {step} hold no action to learn")


def by_length(examples: Sequence[Example], micro_tokens: int) -> Iterator[list[Example]]:
    """Like lengths together, at most `micro_tokens` padded tokens at a time."""
    micro: list[Example] = []
    for example in sorted(examples, key=lambda e: len(e[0])):
        if micro and len(example[0]) * (len(micro) + 1) > micro_tokens:
            yield micro
            micro = []
        micro.append(example)
    yield micro


def padded(examples: Sequence[Example], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids, _ in examples)
    ids_BT = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids, _ in examples], device=device)
    mask_BT = torch.tensor([mask + [False] * (longest - len(mask)) for _, mask in examples], device=device)
    return ids_BT, mask_BT


def cosine(step: int, steps: int, warmup: int, final: float) -> float:
    """Linear warm-up, then half a cosine from 1 to `final`."""
    rise = min(1.0, (step + 1) / max(warmup, 1))
    return rise * max(final, 0.5 * (1 + math.cos(math.pi * step / steps)))
