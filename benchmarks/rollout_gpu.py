"""What only a GPU can show: rollouts against plain vLLM, weights by CUDA IPC, memory asleep and awake, bfloat16.

Plain vLLM is `LLM.generate`, in a process of its own, given the same prompts and lengths at once: as it comes, and with
what training needs of every request, its own seed and the log-probs of its tokens.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from common import Row
from rollout_parts import part, row
from rollout_work import Endless, EndlessModel, Finishes, Questions, SlowSearch, make_player
from transformers import PreTrainedModel

from otcrl.algos.mismatch import mismatch
from otcrl.models.policy import token_logprobs
from otcrl.protocols import Engine
from otcrl.rollout.collect import Collector
from otcrl.types import Reward, Trajectory, pack

BATCH_TOKENS = 8192
ON_CPU = {"enforce_eager": True}  # to try this file without a GPU


@dataclass(frozen=True, kw_only=True)
class Gpu:
    model: str
    trajectories: int = 512
    tokens: int = 512  # sampled by each
    question_words: int = 150
    context: int = 2048
    memory: float = 0.5  # share of the GPU, of both sides
    dtype: str = "bfloat16"
    device: str = "cuda"


def plain(work: Gpu, prompts: Sequence[list[int]], as_in_training: bool) -> float:
    """Sampled tokens per second of `LLM.generate`. Runs in a process of its own."""
    from vllm import LLM, SamplingParams

    device: dict[str, Any] = {"gpu_memory_utilization": work.memory} if work.device == "cuda" else ON_CPU
    size: dict[str, Any] = {"max_model_len": work.context, "max_num_seqs": work.trajectories}
    size["max_num_batched_tokens"] = BATCH_TOKENS
    kind: dict[str, Any] = {"dtype": work.dtype, "logprobs_mode": "processed_logprobs", "generation_config": "vllm"}
    llm = LLM(work.model, **kind, **size, **device)
    training: list[dict[str, Any]] = [{"seed": i, "logprobs": 0, "flat_logprobs": True} for i in range(len(prompts))]
    own = training if as_in_training else [{}] * len(prompts)
    fixed: dict[str, Any] = {"temperature": 1.0, "max_tokens": work.tokens, "ignore_eos": True, "detokenize": False}
    settings = [SamplingParams(**fixed, **more) for more in own]
    inputs: Any = [{"prompt_token_ids": ids} for ids in prompts]
    llm.generate(inputs, SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True), use_tqdm=False)  # warm
    llm.reset_prefix_cache()
    begun = time.perf_counter()
    out = llm.generate(inputs, settings, use_tqdm=False)
    spent = time.perf_counter() - begun
    return sum(len(answer.outputs[0].token_ids) for answer in out) / spent


def in_process(work: Gpu, prompts: Sequence[list[int]], as_in_training: bool) -> float:
    """Not in a multiprocessing.Pool: its workers may have no children, and vLLM needs some."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(plain, work, prompts, as_in_training).result()


def make(work: Gpu) -> tuple[Finishes, PreTrainedModel, Endless]:
    model, tokenizer = EndlessModel(path=work.model).load()
    torch.nn.Module.to(model, device=work.device, dtype=getattr(torch, work.dtype))
    size = {"context": work.context, "max_sequences": work.trajectories, "gpu_memory": work.memory}
    size["batch_tokens"] = BATCH_TOKENS
    options = {} if work.device == "cuda" else ON_CPU
    wired = {"model": model, "tokenizer": tokenizer}
    return Finishes(engine=part("engine/vllm", wired, **size, options=options)), model, tokenizer


async def rollouts(work: Gpu, engine: Engine, tokenizer: Endless) -> tuple[list[Trajectory], float]:
    """Trajectories of one turn, and the seconds they took."""
    tool = SlowSearch(median_s=0.0, result="")
    player = make_player(engine, tokenizer, tool, 0, work.tokens)
    names = [f"trajectory {i}" for i in range(work.trajectories)]
    collector = Collector(player=player, group_size=1, temperature=1.0, concurrency=len(names), seed=0)
    problems = Questions(length=work.question_words).sample(0, work.trajectories)
    begun = time.perf_counter()
    found = await collector.play(problems, names, 1.0)
    return found, time.perf_counter() - begun


def used_gib() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


@torch.no_grad()
def gaps(work: Gpu, model: PreTrainedModel, trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """How far the learner is from the sampler, both in `dtype`."""
    batch = pack([[(t, Reward(0.0)) for t in trajectories]], 0)
    found = []
    for rows in torch.arange(len(trajectories)).split(8):
        ids, mask = (tensor[rows].to(work.device) for tensor in (batch.token_ids, batch.action_mask))
        found.append(token_logprobs(model, ids, mask)[0].cpu())
    return mismatch(torch.cat(found), batch.sampler_logprobs, batch.action_mask)


async def measure(work: Gpu, rounds: int) -> tuple[list[Row], dict[str, float]]:
    _, tokenizer = EndlessModel(path=work.model).load()
    problems = Questions(length=work.question_words).sample(0, work.trajectories)
    prompts = [tokenizer.prompt_ids(problem.question) for problem in problems]
    speeds = {
        "plain vLLM": in_process(work, prompts, False),
        "plain vLLM, with seeds and log-probs": in_process(work, prompts, True),
    }
    engine, model, tokenizer = make(work)
    rows: list[Row] = []
    try:
        await rollouts(work, engine, tokenizer)  # starts it, and warms it up
        published = []
        for _ in range(rounds):
            begun = time.perf_counter()
            await engine.load_weights(model.named_parameters(), engine.version + 1)
            published.append(time.perf_counter() - begun)
        found, spent = await rollouts(work, engine, tokenizer)
        speeds["otcrl's rollouts"] = work.trajectories * work.tokens / spent
        if work.device == "cuda":
            awake = used_gib()
            await engine.sleep()
            rows += [row("gpu", "GPU memory, engine awake", awake, "GiB"), row("gpu", "asleep", used_gib(), "GiB")]
            await engine.load_weights(model.named_parameters(), engine.version + 1)
            rows += [row("gpu", "GPU memory, awake again", used_gib(), "GiB")]
        rows += [row("gpu", f"{work.dtype}: {name}", value, "") for name, value in gaps(work, model, found).items()]
    finally:
        await engine.close()
    rows += [row("gpu", name, speed, "sampled tokens/s") for name, speed in speeds.items()]
    size = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    rows += [
        row("gpu", "publication", median(published), "s"),
        row("gpu", "publication", size / median(published), "GB/s"),
    ]
    return rows, {
        "rollouts_vs_plain_vllm": speeds["otcrl's rollouts"] / speeds["plain vLLM"],
        "rollouts_vs_plain_vllm_with_seeds": speeds["otcrl's rollouts"]
        / speeds["plain vLLM, with seeds and log-probs"],
        "gpu_publication_s": median(published),
    }


def run(work: Gpu, rounds: int) -> tuple[list[Row], dict[str, float]]:
    return asyncio.run(measure(work, rounds))
