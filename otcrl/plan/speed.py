"""Seconds of one step, phase by phase, from FLOPs and bytes and the ceilings of `Ceilings`: a best case, stated.

Nothing here is measured. What is left out: rewards, logging, checkpoints, evaluation, padding, and rows that need no
gradient because their advantages are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

from otcrl.plan import memory, states
from otcrl.plan.job import PHASES, Job
from otcrl.plan.shapes import Shape

DAY_S = 86_400
CPU_ADAM_BYTES = 28  # read and written per parameter by an optimizer in main memory: 3 states in float32 and a gradient
HOST_BANDWIDTH = 200e9  # bytes/s of a node's main memory; half of eight DDR5 channels a socket


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One step in numbers."""

    seconds: dict[str, float]  # by phase
    step_s: float
    tokens: float  # of a step's trajectories, prompts included
    sampled: float
    in_flight: float  # trajectories of one copy at a time
    decode_step_s: float
    rollout_bound: str  # what it waits for
    gpus: int

    @property
    def tokens_per_day(self) -> float:
        return self.tokens / self.step_s * DAY_S

    @property
    def tokens_per_gpu_s(self) -> float:
        return self.tokens / self.step_s / self.gpus

    def gpu_hours(self, steps: int = 1000) -> float:
        return steps * self.step_s * self.gpus / 3600

    def cost(self, price: float, steps: int = 1000) -> float:
        """In the unit of `price`, which is per GPU and hour."""
        return self.gpu_hours(steps) * price


def estimate(job: Job) -> Estimate:
    in_flight, decode_step = decoding(job)
    each = rollout_s(job), score_s(job), update_s(job), publication_s(job)
    seconds: dict[str, float] = dict(zip(PHASES, each, strict=True))
    learner = seconds["score"] + seconds["update"]
    overlapped = job.work.ahead and job.sampling.kind == "servers"
    both = max(seconds["rollout"], learner) if overlapped else seconds["rollout"] + learner
    return Estimate(
        seconds=seconds,
        step_s=both + seconds["publication"],
        tokens=job.work.trajectories * job.work.tokens,
        sampled=job.work.trajectories * job.work.sampled,
        in_flight=in_flight,
        decode_step_s=decode_step,
        rollout_bound=max(rollout_bounds(job).items(), key=lambda bound: bound[1])[0],
        gpus=job.all_gpus,
    )


# -- FLOPs -------------------------------------------------------------------------------------------


def forward_flops(shape: Shape, tokens: float, heads: float, past: float) -> float:
    """2 per parameter and token, and 4 per query dimension and token attended to. Chowdhery et al. 2022, appendix B.

    `heads` of the `tokens` reach the output layer; each attends to `past` tokens on average, half its trajectory.
    """
    attention = 4 * shape.layers * shape.query_width * past * tokens
    return 2 * shape.body_parameters * tokens + attention + 2 * shape.head_parameters * heads


def backward_factor(job: Job) -> float:
    """Backward passes cost two forward passes, one with frozen weights; checkpointing adds a forward pass."""
    return (1 if job.training.lora else 2) + (1 if job.training.checkpointing else 0)


def learned_tokens(job: Job) -> float:
    """Of a step's trajectories that pass through the learner."""
    work = job.work
    prompts = work.problems if job.training.shared_prefix else work.trajectories
    return prompts * work.prompt + work.trajectories * (work.sampled + work.observed)


def learner_forward(job: Job) -> float:
    """FLOPs of one pass over the whole batch."""
    sampled = job.work.trajectories * job.work.sampled
    return forward_flops(job.shape, learned_tokens(job), sampled, job.work.tokens / 2)


def training_rate(job: Job) -> float:
    return job.world * job.gpu.flops * job.ceilings.training


# -- the learner's phases --------------------------------------------------------------------------------


def score_s(job: Job) -> float:
    training = job.training
    passes = training.scoring_passes
    computing = passes * learner_forward(job) / training_rate(job)
    gathering = passes * gathered_bytes(job) * micro_batches(job) / link_rate(job)
    return max(computing, gathering)


def update_s(job: Job) -> float:
    """Compute and communication overlap; what AdamW does in main memory does not."""
    models = job.training.bodies
    forward = learner_forward(job) * models * job.training.epochs
    computing = forward * (1 + backward_factor(job)) / training_rate(job)
    talking = models * job.training.epochs * communicated_bytes(job) / link_rate(job)
    return max(computing, talking) + models * optimizer_s(job)


def micro_batches(job: Job) -> float:
    """Forward passes of one rank for the whole batch."""
    return max(learned_tokens(job) / job.world / job.micro_tokens, 1.0)


def gathered_bytes(job: Job) -> float:
    """That a rank receives to see all weights once: stage 3, or weights in main memory."""
    training = job.training
    weights = job.shape.parameters * states.WEIGHT_BYTES[training.precision]
    return weights * (job.world - 1) / job.world if training.zero == 3 else 0.0


def communicated_bytes(job: Job) -> float:
    """Of one rank in an epoch. Stage 3: gather forward and backward, reduce, for every micro-batch; stages 0 to 2:
    2 Psi for every optimizer step. arXiv:1910.02054, section 7."""
    training, ranks = job.training, job.world
    trained = states.trained_parameters(job.shape, training) * states.WEIGHT_BYTES[training.precision]
    once = trained * (ranks - 1) / ranks
    if training.zero == 3:
        passes = 3 if training.checkpointing else 2
        return micro_batches(job) * (passes * gathered_bytes(job) + once)
    reductions = micro_batches(job) if training.zero == 2 else training.minibatches
    return (reductions + training.minibatches) * once


def link_rate(job: Job) -> float:
    """Bytes per second of one rank in a ring over all ranks: the slower of the node's links and its network."""
    slowest = job.gpu.link if job.nodes == 1 else min(job.gpu.link, job.gpu.network)
    return slowest * job.ceilings.link


def optimizer_s(job: Job) -> float:
    """AdamW's own time: states through the memory that holds them, and updates over PCIe."""
    training = job.training
    trained = states.trained_parameters(job.shape, training)
    steps = training.epochs * training.minibatches
    if training.offload == "none":
        each = trained * states.share(training.zero, 1, job.world) * CPU_ADAM_BYTES
        return steps * each / (job.gpu.bandwidth * job.ceilings.decode)
    in_memory = trained / job.nodes * CPU_ADAM_BYTES / HOST_BANDWIDTH
    moved = 2 * trained / job.world * states.WEIGHT_BYTES[training.precision]
    return steps * (in_memory + moved / (job.gpu.host_link * job.ceilings.link))


# -- the engine's phases ---------------------------------------------------------------------------------


def prefill_s(job: Job) -> float:
    """A group's prompt once, each observation once: the prefix cache has all the rest."""
    work = job.work
    tokens = work.problems * work.prompt + work.trajectories * work.observed
    flops = forward_flops(job.shape, tokens, work.trajectories * (work.calls + 1), work.tokens / 2)
    return flops / (job.copies * job.sampling.tp * job.gpu.flops * job.ceilings.prefill)


def decode_step_s(job: Job, batch: float) -> float:
    """One token for each of `batch` trajectories of a copy: all weights and their caches are read once.

    Pope et al. 2022, arXiv:2211.05102, section 2.1; with the larger of bytes and FLOPs.
    """
    shape, sampling, tp, ceilings = job.shape, job.sampling, job.sampling.tp, job.ceilings
    cache = batch * job.work.tokens / 2 * memory.kv_bytes(shape, sampling.weight_bytes, tp)
    reading = (memory.engine_weights(job) + cache) / (job.gpu.bandwidth * ceilings.decode)
    computing = forward_flops(shape, batch, batch, job.work.tokens / 2) / (tp * job.gpu.flops * ceilings.prefill)
    syncing = 2 * shape.layers * ceilings.layer_sync_s if tp > 1 else 0.0
    return max(reading, computing) + syncing + ceilings.decode_step_s


def decoding(job: Job) -> tuple[float, float]:
    """(trajectories of a copy in flight, seconds of a decode step): a trajectory in a tool call decodes nothing."""
    work = job.work
    in_flight = max(min(work.concurrency / job.copies, memory.trajectories_per_copy(job), cached(job)), 1.0)
    step = decode_step_s(job, min(in_flight, job.sampling.max_sequences))
    for _ in range(20):  # a fixed point: slower steps leave a smaller share of the time to tools
        life = work.sampled * step + work.calls * work.tool_s
        active = min(in_flight * work.sampled * step / life, job.sampling.max_sequences) if life else in_flight
        step = decode_step_s(job, max(active, 1.0))
    return in_flight, step


def cached(job: Job) -> float:
    """Trajectories of mean length that one copy's cache holds; the rest wait or are computed again."""
    return memory.kv_trajectories(job, job.work.tokens)


def rollout_s(job: Job) -> float:
    return max(rollout_bounds(job).values()) + prefill_s(job)


def rollout_bounds(job: Job) -> dict[str, float]:
    """Seconds that a rollout takes at least, each for a reason of its own."""
    work, number = job.work, memory.trajectories_per_copy(job)
    in_flight, step = decoding(job)
    waves = max(number / in_flight, 1.0) * (work.sampled * step + work.calls * work.tool_s)
    return {
        "its longest trajectory": work.max_tokens * decode_step_s(job, 1.0) + work.max_calls * work.tool_s,
        "decoding": number * work.sampled * step / min(in_flight, job.sampling.max_sequences),
        "places in flight": waves,
    }


def publication_s(job: Job) -> float:
    """Weights from the learner's GPUs to the engine's, and what surrounds it."""
    sampling, ceilings = job.sampling, job.ceilings
    if sampling.kind == "embedded":
        return 0.0  # they are the learner's
    everything = job.shape.parameters * sampling.weight_bytes
    gathering = gathered_bytes(job) / link_rate(job)
    if sampling.transport == "file":
        moving = everything / ceilings.file_rate
    elif sampling.kind == "servers":
        moving = everything / (job.gpu.network * ceilings.link)
    else:
        moving = 2 * everything / sampling.tp / (job.gpu.bandwidth * ceilings.decode)
    return gathering + moving + ceilings.publication_s
