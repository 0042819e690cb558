"""Bytes on one GPU, phase by phase: the learner's, the engine's, and what is allowed for neither."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from otcrl.plan.activations import forward_working, moments
from otcrl.plan.gpus import GIB
from otcrl.plan.job import PHASES, Job
from otcrl.plan.shapes import Shape
from otcrl.plan.states import (
    GRADIENT_BYTES,
    WEIGHT_BYTES,
    critic_parameters,
    critic_states,
    held_parameters,
    optimizer_bytes,
    policy_states,
    reference_bytes,
    trained_parameters,
    zero_buffers,
)

LEARNER_CONTEXT = 1.2 * GIB  # CUDA context 0.5, cuBLAS workspaces, NCCL buffers
ENGINE_CONTEXT = {1: 0.8 * GIB, 2: 2.4 * GIB}  # vLLM asleep, tensor parallelism 1 and more: NVIDIA-NeMo/RL#223
CUDA_GRAPHS = 0.6 * GIB  # vLLM's, outside its K/V cache
FRAGMENTATION = 0.10  # of what comes and goes; PyTorch's allocator with expandable segments


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of one phase on each GPU by part, and how many it may fill."""

    phase: str
    parts: Mapping[str, float]
    limit: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def over(self) -> float:
        """Bytes too much; 0 or less fits."""
        return self.total - self.limit


# -- the engine --------------------------------------------------------------------------------------


def kv_bytes(shape: Shape, bytes_each: int, tp: int = 1) -> float:
    """Of one token on each of `tp` GPUs: keys and values of every layer; a K/V head is never split."""
    return 2 * shape.layers * math.ceil(shape.kv_heads / tp) * shape.head_dim * bytes_each


def engine_weights(job: Job) -> float:
    """On each GPU of a vLLM copy."""
    return job.shape.parameters * job.sampling.weight_bytes / job.sampling.tp


def engine_workspace(job: Job) -> float:
    """vLLM's largest forward, the sampler's logits (float32, three copies), and its CUDA graphs."""
    shape, sampling = job.shape, job.sampling
    forward = sampling.batch_tokens * (4 * shape.width + 2 * shape.ff_width / sampling.tp) * sampling.weight_bytes
    return forward + 3 * 4 * sampling.max_sequences * shape.vocab + CUDA_GRAPHS


def kv_cache(job: Job) -> float:
    """Bytes on each GPU: what vLLM's share leaves, or the embedded engine's pool at its largest."""
    sampling = job.sampling
    if sampling.kind == "embedded":
        rows = min(sampling.max_sequences, math.ceil(job.work.concurrency / job.world), trajectories_per_copy(job))
        return rows * min(sampling.context, job.work.longest) * kv_bytes(job.shape, sampling.weight_bytes)
    filled = (0.9 if sampling.kind == "servers" else sampling.gpu_memory) * job.gpu.memory
    return max(filled - engine_weights(job) - engine_workspace(job), 0.0)


def kv_trajectories(job: Job, tokens: float) -> float:
    """Of `tokens` tokens each that one copy's cache holds at a time."""
    return kv_cache(job) / (kv_bytes(job.shape, job.sampling.weight_bytes, job.sampling.tp) * tokens)


def trajectories_per_copy(job: Job) -> int:
    return math.ceil(job.work.trajectories / job.copies)


# -- phases ------------------------------------------------------------------------------------------


def phases(job: Job) -> list[Usage]:
    """What each GPU that trains holds in each phase."""
    return [usage(phase, job) for phase in PHASES]


def usage(phase: str, job: Job) -> Usage:
    parts = learner_parts(phase, job) | engine_parts(phase, job)
    if job.gpu.name != "cpu":
        coming = sum(parts.get(name, 0.0) for name in ("activations", "logits", "working", "buffers"))
        parts["allowance"] = FRAGMENTATION * coming
        parts["contexts"] = LEARNER_CONTEXT + engine_context(job)
    return Usage(phase, {name: value for name, value in parts.items() if value}, job.gpu.memory)


def learner_parts(phase: str, job: Job) -> dict[str, float]:
    """The tensors of the learner where the phase is at its peak."""
    parts = resident(job, updating=phase == "update")
    if phase == "score":
        return parts | forward_working(job)
    if phase == "update":
        return parts | max(moments(job).values(), key=lambda parts: sum(parts.values()))
    if phase == "publication" and job.training.zero == 3:  # gathered one by one; this is the largest
        return parts | {"working": float(job.shape.head_parameters * WEIGHT_BYTES[job.training.precision])}
    return parts


def resident(job: Job, *, updating: bool) -> dict[str, float]:
    """The learner's. torch frees gradients after each step; DeepSpeed keeps what it accumulates them in."""
    policy = policy_states(job, held_parameters(job.shape, job.training), trained_parameters(job.shape, job.training))
    critic = critic_states(job)
    gradients = updating or job.training.backend == "deepspeed"
    return {
        "weights": policy.weights,
        "gradients": policy.gradients if gradients else 0.0,
        "optimizer": policy.optimizer,
        "reference": reference_bytes(job),
        "critic": critic.weights + critic.optimizer + (critic.gradients if gradients else 0.0),
        "buffers": zero_buffers(job),
    }


def engine_parts(phase: str, job: Job) -> dict[str, float]:
    """vLLM's on GPUs that train. Awake in rollout; in publication first its weights, then the rest."""
    kind, level = job.sampling.kind, job.sampling.sleep_level
    if kind == "servers":
        return {}
    if kind == "embedded":
        sampler = job.sampling.max_sequences * job.shape.vocab * 12 if phase == "rollout" else 0
        return {"KV cache": kv_cache(job), "engine workspace": float(sampler)}
    if phase == "publication" and level > 0:
        return {"engine weights": engine_weights(job)}
    if phase == "rollout" or level == 0:
        return {
            "engine weights": engine_weights(job),
            "engine workspace": engine_workspace(job),
            "KV cache": kv_cache(job),
        }
    return {}


def engine_context(job: Job) -> float:
    if job.sampling.kind != "vllm":
        return 0.0
    return ENGINE_CONTEXT[min(job.sampling.tp, 2)]


def host_bytes(job: Job) -> float:
    """Main memory of a node for what was offloaded or waits there; NVMe has what went to it."""
    training, per_node = job.training, job.gpus / job.world
    critic_held, critic_trained = critic_parameters(job)
    held = held_parameters(job.shape, training) + critic_held
    trained = trained_parameters(job.shape, training) + critic_trained
    total = 0.0
    if training.offload == "cpu":  # master, moments and gradients
        total += trained * (optimizer_bytes(training) + GRADIENT_BYTES) * per_node
    if training.offload_params == "cpu":
        frozen = job.shape.parameters if training.reference and not training.lora else 0.0
        total += (held + frozen) * WEIGHT_BYTES[training.precision] * per_node
    copies = job.copies * per_node if job.sampling.kind == "vllm" else 0.0
    waiting = (job.sampling.sleep_level == 1) + (job.sampling.transport == "file")
    return total + waiting * copies * job.shape.parameters * job.sampling.weight_bytes
