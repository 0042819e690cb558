"""What an update costs against the tokens of a batch, the length of its trajectories and the vocabulary.

A Llama of 8 layers and 14 M parameters beside its vocabulary, random rows without common prefixes, in float32. Seconds
are the least of two updates, bytes the peak of what torch's CPU allocator has handed out beyond weights and
optimizer, from the profiler's memory events in a third. A line is fitted through the points of each series; the ratio
is how far a point is from it at most. Part `cost` of learner.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from common import Row
from learner_work import Ours, group_targets, line
from plan import highest
from transformers import LlamaConfig, LlamaForCausalLM

from otcrl.types import Batch, rows

REPEATS = 2
LAYERS, WIDTH, FF_WIDTH, HEADS, KV_HEADS = 8, 384, 1024, 6, 2


@dataclass(frozen=True, kw_only=True)
class Point:
    tokens: int = 4096
    length: int = 256  # of a trajectory; its second half is sampled
    vocabulary: int = 16_384
    micro_tokens: int = 1024

    @property
    def rows(self) -> int:
        return self.tokens // self.length


SERIES: dict[str, list[Point]] = {
    "tokens": [Point(tokens=tokens) for tokens in (2048, 4096, 8192)],
    "length": [Point(length=length) for length in (128, 256, 512, 1024)],
    "vocabulary": [Point(vocabulary=words) for words in (8192, 16_384, 32_768, 65_536)],
}


def measure() -> tuple[list[Row], dict[str, float]]:
    table: list[Row] = []
    ratios: dict[str, float] = {}
    for name, points in SERIES.items():
        costs = [run(point) for point in points]
        sizes = [getattr(point, name) for point in points]
        for size, point, cost in zip(sizes, points, costs, strict=True):
            table.append(line("cost", f"{name}: {size:,}", **cost, tokens_per_s=point.tokens / cost["wall_s"]))
        ratios[f"cost_off_a_line_{name}"] = off_a_line(sizes, [cost["wall_s"] for cost in costs])
    return table, ratios


def off_a_line(x: Sequence[float], y: Sequence[float]) -> float:
    """How far a point is at most from the least squares line, relative to it."""
    line = np.polyval(np.polyfit(x, y, 1), x)
    return float(np.abs(np.array(y) / line - 1).max())


def random_batch(point: Point) -> Batch:
    torch.manual_seed(0)
    actions_BT = (torch.arange(point.length) >= point.length // 2).expand(point.rows, -1)
    return Batch(
        token_ids=torch.randint(0, point.vocabulary, (point.rows, point.length)),
        attention_mask=torch.ones(point.rows, point.length, dtype=torch.bool),
        action_mask=actions_BT,
        sampler_logprobs=-9.0 * actions_BT,
        rewards=torch.arange(point.rows) % 2.0,
        group_ids=torch.arange(point.rows) // 2,
    )


def run(point: Point) -> dict[str, float]:
    config = LlamaConfig(
        vocab_size=point.vocabulary, hidden_size=WIDTH, intermediate_size=FF_WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    side = Ours(LlamaForCausalLM(config), "packed", point.micro_tokens, None)
    batch = random_batch(point)
    targets = group_targets(batch)
    few = slice(0, 2)
    side.update(rows(batch, few), rows(targets, few))  # makes the optimizer's state
    wall, cpu = [], []
    for _ in range(REPEATS):
        begun, cpu_begun = time.perf_counter(), time.process_time()
        side.update(batch, targets)
        wall.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - cpu_begun)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        side.update(batch, targets)
    return {"wall_s": min(wall), "cpu_s": min(cpu), "peak_gb": highest(profile) / 1e9}
