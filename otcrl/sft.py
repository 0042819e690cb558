"""Supervised cold start: next-token loss on the action tokens of demonstrations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

from otcrl import dist
from otcrl.errors import DataError, TrainingError
from otcrl.learner.backend import Backend
from otcrl.learner.optimizer import Optimizer, check_precision
from otcrl.learner.passes import idle_mask, passes
from otcrl.models.reader import Reader
from otcrl.protocols import Chat, Demo, Dialect, Task, Tokenizer
from otcrl.types import Metrics

Example = tuple[list[int], list[bool]]  # token ids [L], action mask [L]


@dataclass(frozen=True, kw_only=True)
class Sft:
    steps: int  # 0: no cold start
    batch_size: int  # demonstrations per step
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
    policy: Backend,
    reader: Reader,
    tokenizer: Tokenizer,
    task: Task,
    dialect: Dialect,
    config: Sft,
    on_step: Callable[[int, Metrics], None],
) -> None:
    """Train `policy` in place; `reader` reads its model. Raises TrainingError when the loss is not finite."""
    policy.begin(config.optimizer, config.max_grad_norm)
    device = reader.model.device
    reader.model.train()
    for step in range(config.steps):
        examples = batch(step, tokenizer, task, dialect, config)
        num_actions = sum(sum(mask) for _, mask in examples)
        loss = torch.zeros((), dtype=torch.float64)
        ids_BT, mask_BT = padded(examples, tokenizer.pad_id)
        own = list(passes(reader, policy, ids_BT, mask_BT, config.micro_tokens))
        for number, (micro, counts) in enumerate(own, start=1):
            ids, mask = (x_BT[micro.rows, : micro.width] for x_BT in (ids_BT, mask_BT))
            mask = mask if counts else idle_mask()
            logprobs_BT, *_ = policy(ids.to(device), mask.to(device), micro.packed, 1.0, "skip", config.autocast)
            share = -counts / num_actions  # one normaliser for the whole batch
            policy.backward([logprobs_BT], [torch.full_like(logprobs_BT, share)], last=number == len(own))
            loss += (logprobs_BT.detach().sum() * share).cpu()
        dist.add([loss], f"SFT step {step}")
        norm = policy.step(config.optimizer.rate(step, config.steps), f"SFT step {step}")
        for name, value in (("loss", loss.item()), ("gradient norm", norm)):
            if not math.isfinite(value):
                lr = config.optimizer.lr
                raise TrainingError(f"SFT {name} is {value} at step {step}: lower sft.optimizer.lr (now {lr}).")
        tokens = sum(len(ids) for ids, _ in examples)
        on_step(step, {"sft/loss": loss.item(), "sft/grad_norm": norm, "sft/tokens": tokens})
    reader.model.eval()


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
