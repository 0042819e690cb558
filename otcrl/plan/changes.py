"""Whether a job fits, and the least change that makes it fit.

Changes come in tiers. First those that cost time only; then LoRA, which trains something else; then more GPUs, as few
as will do. Within a tier the fewest settings change, those that cost least first. Each proposal is planned again before
it is made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from otcrl.plan import memory
from otcrl.plan.gpus import GIB
from otcrl.plan.job import Job

LEAST_MICRO_TOKENS = 512
RANKS = (64, 16)
MOST_GPUS_TIMES = 64


@dataclass(frozen=True, slots=True)
class Change:
    """One setting, as it would be written on the command line, and its price among the other values of that setting."""

    text: str
    apply: Callable[[Job], Job]
    price: int


@dataclass(frozen=True, slots=True)
class Proposal:
    changes: tuple[Change, ...]
    job: Job  # with them

    @property
    def settings(self) -> list[str]:
        return [change.text for change in self.changes]


def obstacle(job: Job, host_gib: float | None = None) -> str | None:
    """Why the job cannot run, in one line; None: it fits."""
    worst = max(memory.phases(job), key=lambda usage: usage.over)
    if worst.over > 0:
        return (
            f"{worst.phase} needs {worst.total / GIB:.1f} GiB on each {job.gpu.name}, which has "
            f"{worst.limit / GIB:.1f}: {worst.over / GIB:.1f} GiB too much"
        )
    held = memory.kv_trajectories(job, job.work.longest)
    if held < 1 and job.sampling.kind != "embedded":
        need = memory.kv_bytes(job.shape, job.sampling.weight_bytes, job.sampling.tp) * job.work.longest
        short = need - memory.kv_cache(job)
        return (
            f"rollout: beside its weights vLLM's share of each {job.gpu.name} has no room for the K/V cache of one "
            f"trajectory of {job.work.longest} tokens: {short / GIB:.1f} GiB too little"
        )
    if host_gib is not None and memory.host_bytes(job) > host_gib * GIB:
        over = memory.host_bytes(job) / GIB - host_gib
        return f"main memory of each node: {over:.0f} GiB more than host_gib={host_gib:g} would be offloaded there"
    return None


def proposal(job: Job, host_gib: float | None = None) -> Proposal | None:
    """The least change after which `obstacle` is None; None: there is none among those known."""
    gentle = gentle_axes(job)
    tries = itertools.chain(
        combinations(gentle),
        combinations([*gentle, [*adapters(job)]]),
        *(with_change(more, gentle_axes(more.apply(job))) for more in more_gpus(job)),
    )
    for changes in tries:
        changed = applied(changes, job)
        if is_possible(changed) and obstacle(changed, host_gib) is None:
            return Proposal(changes, changed)
    return None


def applied(changes: Sequence[Change], job: Job) -> Job:
    for change in changes:
        job = change.apply(job)
    return job


def combinations(axes: Sequence[Sequence[Change]]) -> Iterator[tuple[Change, ...]]:
    """At most one change of each axis: fewest first, then cheapest, then by the order of the axes."""
    for size in range(1, len(axes) + 1):
        found = [changes for chosen in itertools.combinations(axes, size) for changes in itertools.product(*chosen)]
        yield from sorted(found, key=lambda changes: sum(change.price for change in changes))


def with_change(first: Change, axes: Sequence[Sequence[Change]]) -> Iterator[tuple[Change, ...]]:
    yield (first,)
    for changes in combinations(axes):
        yield (first, *changes)


def is_possible(job: Job) -> bool:
    """Whether it can be asked for at all; `obstacle` says whether it fits."""
    training, sampling = job.training, job.sampling
    if training.offload_params != "none" and training.zero < 3:
        return False
    return sampling.kind != "vllm" or job.gpus % sampling.tp == 0


def gentle_axes(job: Job) -> list[list[Change]]:
    """What changes neither the result nor the machine, in the order in which it is tried."""
    return [
        [*micro_tokens(job)],
        [*checkpointing(job)],
        [*zero(job)],
        [*sleep(job)],
        [*gpu_memory(job)],
        [*offload(job)],
        [*offload_params(job)],
        [*tensor_parallel(job)],
    ]


# -- axes: what may change, cheapest first ------------------------------------------------------------------


def micro_tokens(job: Job) -> Iterator[Change]:
    tokens, price = job.training.micro_tokens, 0
    while tokens // 2 >= max(LEAST_MICRO_TOKENS, min(job.work.longest, job.training.micro_tokens // 2)):
        tokens, price = tokens // 2, price + 1
        yield training_change(f"learner.micro_tokens={tokens}", price, micro_tokens=tokens)


def checkpointing(job: Job) -> Iterator[Change]:
    if not job.training.checkpointing:
        yield training_change("model.gradient_checkpointing=true", 2, checkpointing=True)


def zero(job: Job) -> Iterator[Change]:
    if job.world > 1:
        for price, stage in enumerate(range(job.training.zero + 1, 4), start=1):
            yield training_change(f"zero={stage}", price, zero=stage, backend="deepspeed")


def sleep(job: Job) -> Iterator[Change]:
    if job.sampling.kind == "vllm" and job.sampling.sleep_level < 1:
        yield sampling_change("engine.sleep_level=2", 1, sleep_level=2)


def gpu_memory(job: Job) -> Iterator[Change]:
    """vLLM's share of each GPU, nearest first."""
    if job.sampling.kind != "vllm":
        return
    own = job.sampling.gpu_memory
    shares = sorted((step / 10 for step in range(2, 10)), key=lambda share: abs(share - own))
    for price, share in enumerate((share for share in shares if abs(share - own) > 0.01), start=1):
        yield sampling_change(f"engine.gpu_memory={share:g}", price, gpu_memory=share)


def offload(job: Job) -> Iterator[Change]:
    if job.training.offload == "none" and job.gpu.name != "cpu":
        stage = max(job.training.zero, 2)  # the least that DeepSpeed offloads from
        yield training_change("offload=cpu", 6, offload="cpu", backend="deepspeed", zero=stage)


def offload_params(job: Job) -> Iterator[Change]:
    if job.training.offload_params == "none" and job.gpu.name != "cpu":
        yield training_change("offload_params=cpu", 8, offload_params="cpu", backend="deepspeed")


def tensor_parallel(job: Job) -> Iterator[Change]:
    if job.sampling.kind != "vllm":
        return
    degrees = [tp for tp in (2, 4, 8) if job.sampling.tp < tp <= job.gpus and job.shape.heads % tp == 0]
    for price, tp in enumerate(degrees, start=3):
        yield sampling_change(f"tp={tp}", price, tp=tp)


def adapters(job: Job) -> Iterator[Change]:
    if not job.training.lora:
        for price, rank in enumerate(RANKS, start=1):
            yield training_change(f"lora={rank}", price, lora=rank)


def more_gpus(job: Job) -> Iterator[Change]:
    """Up to eight in a node, then more nodes."""
    if job.gpu.name == "cpu":
        return
    price, times = 0, 2
    while times <= MOST_GPUS_TIMES:
        gpus = min(job.gpus * times, max(job.gpus, 8))
        nodes = -(-job.nodes * job.gpus * times // gpus)
        price, times = price + 10, times * 2
        yield Change(f"nodes={nodes} gpus={gpus}", enlarged(nodes, gpus), price)


def enlarged(nodes: int, gpus: int) -> Callable[[Job], Job]:
    def apply(job: Job) -> Job:
        stage = job.training.zero if job.world > 1 else job.training.zero or 2  # what several GPUs begin with
        training = replace(job.training, backend="deepspeed", zero=stage)
        return replace(job, nodes=nodes, gpus=gpus, training=training)

    return apply


def training_change(text: str, price: int, **settings: object) -> Change:
    return Change(text, lambda job: replace(job, training=replace(job.training, **settings)), price)


def sampling_change(text: str, price: int, **settings: object) -> Change:
    return Change(text, lambda job: replace(job, sampling=replace(job.sampling, **settings)), price)
