"""Jobs to plan, with only what a test cares about spelled out."""

from __future__ import annotations

from typing import Any

from otcrl.plan.gpus import GPUS
from otcrl.plan.job import Ceilings, Job, Sampling, Training, Work
from otcrl.plan.shapes import KNOWN

LARGE: tuple[dict[str, Any], ...] = (
    {"model": "Qwen2.5-7B", "gpus": 8, "checkpointing": False, "micro_tokens": 65_536},
    {"model": "Qwen2.5-7B", "gpus": 8, "gpu": "rtx4090-24gb"},
    {"model": "Qwen2.5-14B", "gpus": 8, "zero": 0},
    {"model": "Llama-3.1-70B", "nodes": 8, "gpus": 8},
    {"model": "Qwen2.5-32B", "sleep_level": 0},
    {"model": "Qwen2.5-72B"},
    {"model": "Qwen2.5-3B", "engine": "embedded", "precision": "float32", "critic": "own"},
)


def job(
    *,
    model: str = "Qwen2.5-7B",
    gpu: str = "h100-80gb",
    nodes: int = 1,
    gpus: int = 1,
    zero: int = 2,
    precision: str = "bfloat16",
    checkpointing: bool = True,
    reference: bool = False,
    critic: str | None = None,
    lora: int = 0,
    micro_tokens: int = 8192,
    offload: str = "none",
    offload_params: str = "none",
    engine: str = "vllm",
    tp: int = 1,
    gpu_memory: float = 0.5,
    sleep_level: int = 2,
    prompt: int = 300,
    max_tokens: int = 2048,
    group: int = 8,
    concurrency: int = 256,
    calls: float = 2,
    tool_s: float = 0.5,
) -> Job:
    """A 7B model on one H100 with DeepSpeed, vLLM, and 32 groups of trajectories that use half their limits."""
    return Job(
        shape=KNOWN[model],
        gpu=GPUS[gpu],
        nodes=nodes,
        gpus=gpus,
        training=Training(
            backend="deepspeed",
            precision=precision,
            zero=zero,
            offload=offload,
            offload_params=offload_params,
            lora=lora,
            checkpointing=checkpointing,
            micro_tokens=micro_tokens,
            logit_tile=(2048, 32_768),
            reference=reference,
            critic=critic,
            recompute=True,
            epochs=1,
            minibatches=1,
            shared_prefix=True,
            bucket=2e8,
        ),
        sampling=Sampling(
            kind=engine,
            servers=4,
            tp=tp,
            weight_bytes=2,
            context=4096,
            max_sequences=256,
            batch_tokens=8192,
            gpu_memory=gpu_memory,
            sleep_level=sleep_level,
            transport="ipc",
        ),
        work=Work(
            problems=32,
            group=group,
            concurrency=concurrency,
            prompt=prompt,
            sampled=max_tokens / 4,
            observed=max_tokens / 4,
            calls=calls,
            tool_s=tool_s,
            max_tokens=max_tokens,
            max_calls=4,
            ahead=False,
        ),
        ceilings=Ceilings(),
    )
