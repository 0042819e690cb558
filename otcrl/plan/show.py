"""A plan for people (tables) and for programs (JSON)."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from otcrl.errors import ConfigError
from otcrl.plan import memory
from otcrl.plan.changes import Proposal
from otcrl.plan.gpus import GIB
from otcrl.plan.job import PHASES, Ceilings, Job
from otcrl.plan.memory import Usage
from otcrl.plan.speed import Estimate

PARTS = (
    *("weights", "gradients", "optimizer", "reference", "critic", "buffers"),
    *("activations", "logits", "working"),
    *("engine weights", "engine workspace", "KV cache", "contexts", "allowance"),
)


def show(job: Job, usages: list[Usage], times: Estimate | None, price: float | None) -> None:
    """`times` null: it does not fit, so it has none."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(heading(job), style="bold", soft_wrap=True)
    table = Table("GiB per GPU", *PHASES)
    for column in table.columns[1:]:
        column.justify = "right"
    for part in PARTS:
        if any(part in usage.parts for usage in usages):
            table.add_row(part, *(gib(usage.parts.get(part, 0.0)) for usage in usages))
    table.add_section()
    table.add_row("together", *(f"{usage.total / GIB:.1f}" for usage in usages), style="bold")
    table.add_row(f"of {job.gpu.memory / GIB:.1f}", *(marked(usage) for usage in usages))
    if times is not None:
        table.add_section()
        table.add_row("seconds", *(f"{times.seconds[phase]:.1f}" for phase in PHASES))
    console.print(table)
    for line in (*capacity(job), *(speed(job, times, price) if times is not None else ()), *assumptions(job)):
        console.print(line, soft_wrap=True)


def gib(value: float) -> str:
    return "" if not value else f"{value / GIB:.1f}" if value > 0.05 * GIB else f"{value / GIB:.3f}"


def marked(usage: Usage) -> str:
    return f"{usage.total / usage.limit:.0%}" if usage.over <= 0 else f"[red]+{usage.over / GIB:.1f}[/red]"


def heading(job: Job) -> str:
    shape, training = job.shape, job.training
    parts = [
        f"{shape.name}, {count(shape.parameters)} parameters, {training.precision}",
        f"{job.nodes} x {job.gpus} {job.gpu.name}",
        f"{training.backend}{f' ZeRO-{training.zero}' if training.backend == 'deepspeed' else ''}",
        *([f"optimizer on {training.offload}"] if training.offload != "none" else []),
        *([f"weights on {training.offload_params}"] if training.offload_params != "none" else []),
        *([f"LoRA rank {training.lora}"] if training.lora else []),
        *(["checkpointing"] if training.checkpointing else []),
        f"engine {job.sampling.kind}{f', tp {job.sampling.tp}' if job.sampling.tp > 1 else ''}",
    ]
    return " · ".join(parts)


def count(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def capacity(job: Job) -> list[str]:
    sampling, work = job.sampling, job.work
    lines = [
        f"K/V cache: {memory.kv_bytes(job.shape, sampling.weight_bytes):,.0f} bytes per token; each of {job.copies} "
        f"copies of the model holds {memory.kv_trajectories(job, work.longest):.1f} trajectories of {work.longest:,} "
        f"tokens, and decodes {sampling.max_sequences} at a time"
    ]
    if host := memory.host_bytes(job):
        lines.append(f"main memory of each node for what is offloaded there: {host / GIB:.0f} GiB")
    return lines


def speed(job: Job, times: Estimate, price: float | None) -> list[str]:
    cost = "" if price is None else f", {times.cost(price):,.0f} at {price:g} per GPU-hour"
    return [
        f"a step: {times.step_s:.0f} s for {job.work.trajectories:,} trajectories of {job.work.tokens:,.0f} tokens, "
        f"{times.sampled / job.work.trajectories:,.0f} of them sampled; {times.decode_step_s * 1e3:.1f} ms per decode "
        f"step with {times.in_flight:.0f} in flight in each copy; rollout waits for {times.rollout_bound}",
        f"{times.tokens_per_day / 1e6:,.1f} M tokens a day, {times.tokens_per_gpu_s:,.0f} per second and GPU; "
        f"1000 steps: {times.gpu_hours():,.0f} GPU-hours on {times.gpus} GPUs{cost}",
    ]


def assumptions(job: Job) -> list[str]:
    c, work = job.ceilings, job.work
    return [
        f"assumed: prompts of {work.prompt:.0f} tokens, {work.calls:g} calls of {work.tool_s:g} s, {work.observed:.0f} "
        f"observed tokens; ceilings {c.training:.0%} of FLOP/s in training, {c.prefill:.0%} in prefill, {c.decode:.0%} "
        f"of memory bandwidth in decoding; nothing was measured (docs/plan.md)"
    ]


def numbers(
    job: Job, usages: list[Usage], times: Estimate, price: float | None, why: str | None, found: Proposal | None
) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds, tokens."""
    return {
        "model": asdict(job.shape) | {"parameters": job.shape.parameters},
        "gpu": asdict(job.gpu),
        "nodes": job.nodes,
        "gpus": job.gpus,
        "training": asdict(job.training),
        "sampling": asdict(job.sampling),
        "work": asdict(job.work),
        "ceilings": {field.name: getattr(job.ceilings, field.name) for field in fields(Ceilings)},
        "memory_bytes": {usage.phase: dict(usage.parts) | {"total": usage.total} for usage in usages},
        "fits": why is None,
        "obstacle": why,
        "proposal": None if found is None else found.settings,
        "kv_bytes_per_token": memory.kv_bytes(job.shape, job.sampling.weight_bytes),
        "kv_trajectories": memory.kv_trajectories(job, job.work.longest),
        "host_bytes_per_node": memory.host_bytes(job),
        "seconds": times.seconds | {"step": times.step_s},
        "tokens_per_step": times.tokens,
        "tokens_per_day": times.tokens_per_day,
        "gpu_hours_per_1000_steps": times.gpu_hours(),
        "cost_per_1000_steps": None if price is None else times.cost(price),
    }


def write(path: Path, content: Any) -> None:
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"json={path}: {error.strerror or error}") from error
