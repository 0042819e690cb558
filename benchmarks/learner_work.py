"""One GRPO update on fixed work, in a process of its own: the batch, two ways to learn from it, what it costs.

    python learner_work.py SPEC.json RESULT.json

learner_trl.py is the third way. All three read the batch from one file, so that they learn from the same tokens.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import Row
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from otcrl import dist
from otcrl.algos import functional as F
from otcrl.algos.grpo import GRPO
from otcrl.learner.deepspeed_backend import DeepSpeed
from otcrl.learner.learner import Learner
from otcrl.learner.optimizer import Optimizer
from otcrl.learner.torch_backend import TorchBackend
from otcrl.models.lora import Lora
from otcrl.models.policy import autocast
from otcrl.models.reader import Packing, Reader
from otcrl.types import Batch, Targets

ALGO = GRPO(
    normalize=True, std_floor=0.0, keep_sign=False, clip_low=0.2, clip_high=0.2, kl_coef=0.0, entropy_coef=0.0,
    weighting="sequence",
)  # fmt: skip
ADAMW = Optimizer(lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, warmup_steps=0, decay="linear", final_lr_share=1.0)
MAX_NORM = 1.0
NOISE = 0.1  # nats, between the sampler's log-probs and the policy's: a few tokens are clipped
ENTRIES = 512  # of each parameter's gradient that are compared


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Groups that share a prompt, and completions whose lengths are log-normal."""

    groups: int = 8
    group: int = 8  # trajectories
    prompt: int = 300  # tokens
    median: int = 200  # tokens of a completion
    sigma: float = 0.6  # of the logarithm of its length
    longest: int = 1024  # tokens of a completion

    @property
    def trajectories(self) -> int:
        return self.groups * self.group

    def batch(self, vocabulary: int) -> Batch:
        """Random tokens: what they mean costs nothing. Rewards differ within each group."""
        rng = random.Random(0)
        rows: list[tuple[list[int], int]] = []
        for _ in range(self.groups):
            prompt = [rng.randrange(vocabulary) for _ in range(self.prompt)]
            for _ in range(self.group):
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
            sampler_logprobs=torch.zeros(attention.shape),
            rewards=torch.arange(len(rows)) % self.group / self.group,
            group_ids=torch.arange(len(rows)) // self.group,
        )

    def warm_up(self) -> Lengths:
        """As many trajectories, of hardly a token."""
        return replace(self, prompt=8, median=8, sigma=0.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to make an update."""

    way: str  # trl, plain: a loop over padded rows, or one of otcrl's packings
    rows: int = 0  # padded rows in a pass of trl and plain
    micro_tokens: int = 0  # in a pass of otcrl
    checkpointing: bool = False
    ranks: int = 1
    threads: int  # of each rank

    @property
    def name(self) -> str:
        size = f"{self.rows} rows" if self.way in ("trl", "plain") else f"{self.micro_tokens} tokens"
        again = ", checkpointing" if self.checkpointing else ""
        ranks = f"{self.ranks} ranks of " if self.ranks > 1 else ""
        return f"{self.way}, {size}{again}, {ranks}{self.threads} thread{'s' if self.threads > 1 else ''}"


def load(path: str, *, checkpointing: bool = False) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable()
    if torch.cuda.is_available():
        model.to("cuda")  # pyright: ignore[reportArgumentType]  # its `self` is a protocol no model meets
    return model


def write_batch(path: Path, lengths: Lengths, model: PreTrainedModel, precision: str | None) -> None:
    """The batch, with log-probs of a sampler that differs a little from the model: ratios are not all 1."""
    batch = lengths.batch(model.config.get_text_config().vocab_size)
    reader = Reader.of(model, "shared")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for micro in reader.micros(batch.token_ids, batch.action_mask, 4096):
            few, width = torch.tensor(micro.rows), micro.width
            ids, mask = (x[few, :width].to(model.device) for x in (batch.token_ids, batch.action_mask))
            batch.sampler_logprobs[few, :width] = reader.logprobs(ids, mask, micro.packed, half=precision)[0].cpu()
    noise = NOISE * torch.randn(batch.sampler_logprobs.shape, generator=generator)
    batch.sampler_logprobs.add_(noise * batch.action_mask)
    torch.save(asdict(batch), path)


COLUMNS = ("trajectories", "wall_s", "cpu_s", "tokens_per_s", "peak_gb", "loss", "grad_norm", "gradient_gap", "mfu")


def line(part: str, what: str, **found: float | None) -> Row:
    """A row of the table: seconds, CPU seconds of all threads, decimal gigabytes."""
    rounded = {name: round(value, 5) for name, value in found.items() if value is not None}
    return {"part": part, "what": what, **{name: rounded.get(name) for name in COLUMNS}}


# -- what an update costs --------------------------------------------------------------------------------


class Meter:
    """Seconds and bytes between `start` and `stop`.

    `peak_gb`: of the resident set, beyond what it was when the meter was made, before the model; weights, optimizer and
    what malloc cannot give back count. On a GPU all that torch has allocated there.
    """

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.before = status("VmRSS")

    def start(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, float]:
        if self.on_gpu:
            torch.cuda.synchronize()
        found = {"wall_s": time.perf_counter() - self.wall, "cpu_s": time.process_time() - self.cpu}
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else status("VmHWM") - self.before
        return found | {"peak_gb": peak / 1e9}


def status(name: str) -> int:
    """Bytes of this process, by their name in /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def watch_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Some entries of every gradient go to the end of this list whenever the optimizer steps."""
    seen: list[Tensor] = []

    def see(*_: object) -> None:
        picked = []
        for parameter in dict(sorted(model.named_parameters())).values():
            assert parameter.grad is not None
            entries = parameter.grad.flatten()
            picked.append(entries[:: max(1, len(entries) // ENTRIES)].float().cpu())
        seen.append(torch.cat(picked))

    optimizer.register_step_pre_hook(see)  # pyright: ignore[reportArgumentType]
    return seen


# -- the ways ------------------------------------------------------------------------------------------------


class PlainLoop:
    """What a short script would do: rows in the order in which they come, as a trainer that shuffles has them."""

    def __init__(self, model: PreTrainedModel, rows: int, precision: str | None) -> None:
        self.model, self.rows, self.precision = model.train(), rows, precision
        self.optimizer = ADAMW.build(model.parameters())

    def update(self, batch: Batch, targets: Targets) -> dict[str, float]:
        total, device = 0.0, self.model.device
        weights_BT = F.token_weights(batch.action_mask, ALGO.weighting)
        for index in torch.arange(len(batch.rewards)).split(self.rows):
            width = int(batch.attention_mask[index].sum(1).max())
            start = int(batch.action_mask[index].any(0).nonzero()[0])
            ids, attention = (x[index, :width].to(device) for x in (batch.token_ids, batch.attention_mask))
            with autocast(self.precision, device):
                logits = self.model(ids, attention_mask=attention, logits_to_keep=width - start + 1).logits[:, :-1]
            logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, start:, None]).squeeze(-1)
            old, advantages, weights = (
                x[index, start:width].to(device) for x in (batch.sampler_logprobs, targets.advantages, weights_BT)
            )
            surrogate = F.clipped_surrogate(logprobs, old, advantages, ALGO.clip_low, ALGO.clip_high)
            loss = (surrogate * weights).sum()
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": total, "grad_norm": norm}


class Ours:
    def __init__(self, model: PreTrainedModel, packing: Packing, micro_tokens: int, precision: str | None) -> None:
        self.learner = Learner(
            policy=model, reference=None, critic=None, steps=1, seed=0, temperature=1.0, policy_optimizer=ADAMW,
            critic_optimizer=ADAMW, epochs=1, minibatch_size=0, packing=packing, micro_tokens=micro_tokens,
            max_grad_norm=MAX_NORM, max_skipped=0, old_logprobs="sampler", autocast=precision, backend="torch",
            deepspeed=DeepSpeed(
                zero_stage=2, offload="none", offload_params="none", nvme_path=None, bucket=1e8, overlap=True
            ),
            lora=Lora(rank=0, alpha=32, targets="all-linear"), critic_trunk="own",
        )  # fmt: skip
        backend = self.learner.backends["policy"]
        assert isinstance(backend, TorchBackend)
        self.optimizer = backend.optimizer

    def update(self, batch: Batch, targets: Targets) -> dict[str, float]:
        found = self.learner.update(0, batch, self.learner.score(batch), targets, ALGO)
        return {"loss": found["update/loss"], "grad_norm": found["update/policy_grad_norm"]}


def group_targets(batch: Batch) -> Targets:
    advantages_B = F.group_advantages(batch.rewards, batch.group_ids, normalize=True)
    advantages_BT = advantages_B[:, None] * batch.action_mask
    return Targets(advantages=advantages_BT, returns=torch.zeros_like(advantages_BT))


def read_batches(spec: dict[str, Any]) -> tuple[Batch, Batch]:
    """A small one that has as many rows, and the one that counts."""
    return Lengths(**spec["lengths"]).warm_up().batch(1000), Batch(**torch.load(spec["batch"]))


def run(spec: dict[str, Any]) -> tuple[dict[str, float], Tensor]:
    """What it cost, and some of the gradient."""
    meter, case = Meter(), Case(**spec["case"])
    model = load(spec["model"], checkpointing=case.checkpointing)
    if case.way == "plain":
        side = PlainLoop(model, case.rows, spec["precision"])
    else:
        side = Ours(model, case.way, case.micro_tokens, spec["precision"])  # pyright: ignore[reportArgumentType]
    gradients = watch_gradients(model, side.optimizer)
    small, batch = read_batches(spec)
    side.update(small, group_targets(small))  # makes the optimizer's state
    dist.barrier("the update that is measured")
    meter.start()
    found = side.update(batch, group_targets(batch))
    return found | meter.stop(), gradients[-1]


def main(run: Callable[[dict[str, Any]], tuple[dict[str, float], Tensor]]) -> None:
    source, target = map(Path, sys.argv[1:])
    spec = json.loads(source.read_text())
    torch.set_num_threads(spec["case"]["threads"])
    dist.start(dist.Ranks(timeout_s=1800))
    found, gradient = run(spec)
    if dist.is_first():
        torch.save(gradient, target.with_suffix(".gradient"))
        target.write_text(json.dumps(found))
    dist.stop()


if __name__ == "__main__":
    main(run)
