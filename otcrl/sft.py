"""Supervised cold start: next-token loss on the action tokens of demonstrations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch

from otcrl.errors import DataError, TrainingError
from otcrl.learner.optimizer import Optimizer, check_precision
from otcrl.models.reader import Packing, Reader
from otcrl.protocols import Chat, Demo, Dialect, Task, Tokenizer
from otcrl.types import Metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Example = tuple[list[int], list[bool]]  # token ids [L], action mask [L]


@dataclass(frozen=True, kw_only=True)
class Sft:
    steps: int  # 0: no cold start
    batch_size: int  # demonstrations per step
    packing: Packing  # as in the learner
    micro_tokens: int  # per forward pass, as they are packed; changes memory and speed, never the gradient
    max_tokens: int  # a longer demonstration is an error
    optimizer: Optimizer
    max_grad_norm: float
    autocast: str | None  # bfloat16, or null for the model's own dtype

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch_size", 1), ("micro_tokens", 1), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
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
    optimizer = config.optimizer.build(trained)
    reader = Reader.of(model, config.packing, config.autocast)
    model.train()
    for step in range(config.steps):
        config.optimizer.set_rate(optimizer, step, config.steps)
        examples = batch(step, tokenizer, task, dialect, config)
        num_actions = sum(sum(mask) for _, mask in examples)
        loss = 0.0
        ids_BT, mask_BT = padded(examples, tokenizer.pad_id)
        for micro in reader.micros(ids_BT, mask_BT, config.micro_tokens):
            ids, mask = (x_BT[micro.rows, : micro.width].to(model.device) for x_BT in (ids_BT, mask_BT))
            logprobs_BT, _ = reader.logprobs(ids, mask, micro.packed)
            part = -logprobs_BT.sum() / num_actions  # one normaliser for the whole batch
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm).item()
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                lr = config.optimizer.lr
                raise TrainingError(f"SFT {name} is {value} at step {step}: lower sft.optimizer.lr (now {lr}).")
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
    """Each segment encoded by itself, as in a rollout, where injected and sampled text never share a token.

    A turn that is over only at the stop token shows it: before a chat template's messages, and (`ends`) at the end.
    """
    ids = tokenizer.prompt_ids(demo[0].said)
    mask = [False] * len(ids)
    for segment, following in zip_longest(demo[1:], demo[2:]):
        more = tokenizer.encode(segment.said)
        is_over = ends if following is None else isinstance(following.said, Chat)
        if segment.is_action and is_over:
            more = [*more, tokenizer.end_id]
        ids, mask = ids + more, mask + [segment.is_action] * len(more)
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


def padded(examples: Sequence[Example], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids, _ in examples)
    ids_BT = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids, _ in examples])
    mask_BT = torch.tensor([mask + [False] * (longest - len(mask)) for _, mask in examples])
    return ids_BT, mask_BT
