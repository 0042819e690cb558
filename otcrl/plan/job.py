"""What is planned: the settings of a run that cost memory or time, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from otcrl.plan.gpus import GPU
from otcrl.plan.shapes import Shape

OFFLOADS = {"offload": ("none", "cpu", "nvme"), "offload_params": ("none", "cpu")}  # to where
PRECISIONS = ("float32", "bfloat16", "autocast")  # autocast: float32 weights, 16-bit products
PHASES = ("rollout", "score", "update", "publication")


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How the policy (and critic) is trained."""

    backend: str  # torch | deepspeed
    precision: str  # of PRECISIONS
    zero: int  # stage of partitioning over all ranks; 0: every rank has everything
    offload: str  # where the optimizer's state lies, of OFFLOADS
    offload_params: str  # where weights lie while they are not used (stage 3), of OFFLOADS
    lora: int  # rank of the adapters; 0: all weights are trained
    checkpointing: bool  # activations inside a layer are computed again in the backward pass
    micro_tokens: int  # tokens per forward pass
    logit_tile: tuple[int, int]  # tokens and words whose logits are there at a time, at most
    reference: bool
    critic: str | None  # own: a body of its own | shared: a head on the policy's | None: the algorithm has none
    recompute: bool  # old log-probs by one more forward pass
    epochs: int
    minibatches: int  # optimizer steps in an epoch
    shared_prefix: bool  # a group's prompt is computed once
    bucket: float  # elements that DeepSpeed gathers or reduces at a time

    @property
    def bodies(self) -> int:
        """Stacks of layers that are trained."""
        return 2 if self.critic == "own" else 1

    @property
    def scoring_passes(self) -> int:
        """Forward passes over a step's batch before its update; one says old log-probs and a shared critic's values."""
        return self.reference + (self.critic == "own") + (self.recompute or self.critic == "shared")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The engine that plays rollouts."""

    kind: str  # embedded | vllm (on the GPUs that train) | servers (on their own)
    servers: int  # of kind servers: copies of the model
    tp: int  # GPUs that share one copy
    weight_bytes: int  # per parameter
    context: int
    max_sequences: int  # that decode at a time, in each copy
    batch_tokens: int  # per forward
    gpu_memory: float  # share of each GPU that vLLM fills
    sleep_level: int
    transport: str  # ipc | file | nccl


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step plays and learns from. Means of a trajectory, and its limits."""

    problems: int
    group: int
    concurrency: int  # trajectories in flight, in all
    prompt: float  # tokens
    sampled: float  # tokens, mean
    observed: float  # tokens, mean
    calls: float  # mean
    tool_s: float  # mean seconds of a call
    max_tokens: int  # sampled and observed, the limit
    max_calls: int
    ahead: bool  # rollout and update overlap, on GPUs of their own

    @property
    def trajectories(self) -> int:
        return self.problems * self.group

    @property
    def tokens(self) -> float:
        """Of one trajectory, mean."""
        return self.prompt + self.sampled + self.observed

    @property
    def longest(self) -> int:
        """Tokens of the longest trajectory that the limits allow."""
        return int(self.prompt) + self.max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Shares of the data sheet that are reached at best, and times that do not shrink with the hardware."""

    training: float = 0.40  # of FLOP/s; prime-rl publishes 0.11 to 0.37, well-tuned pretraining 0.4 to 0.5
    prefill: float = 0.50  # of FLOP/s
    decode: float = 0.60  # of memory bandwidth
    link: float = 0.70  # of NVLink, PCIe and network
    decode_step_s: float = 0.003  # vLLM: scheduling and sampling around each forward
    layer_sync_s: float = 20e-6  # one all-reduce of tensor parallelism, two per layer
    publication_s: float = 1.0  # put to sleep, wake up, reset caches, prove the weights
    file_rate: float = 2e9  # bytes/s of a publication through a file in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    shape: Shape
    gpu: GPU
    nodes: int
    gpus: int  # per node
    training: Training
    sampling: Sampling
    work: Work
    ceilings: Ceilings

    @property
    def world(self) -> int:
        """GPUs that train: data-parallel ranks."""
        return self.nodes * self.gpus

    @property
    def copies(self) -> int:
        """Of the model in the engine."""
        if self.sampling.kind == "servers":
            return self.sampling.servers
        return max(self.world // self.sampling.tp, 1)

    @property
    def all_gpus(self) -> int:
        """With those of the servers, which are taken to be of the same kind."""
        return self.world + (self.copies * self.sampling.tp if self.sampling.kind == "servers" else 0)

    @property
    def micro_tokens(self) -> int:
        """Of the largest forward pass: a trajectory longer than the budget has one to itself."""
        return max(self.training.micro_tokens, self.work.longest)

    @property
    def rows(self) -> float:
        """Longest trajectories of one group in a forward pass: those that share a prompt."""
        if not self.training.shared_prefix:
            return 1.0
        return max(min(self.work.group, (self.micro_tokens - self.work.prompt) / self.work.max_tokens), 1.0)

    @property
    def keys(self) -> float:
        """Tokens of a pass's rows for each of its own: above 1 where rows share a prompt."""
        work = self.work
        return self.rows * work.longest / (work.prompt + self.rows * work.max_tokens)

    @property
    def acting_tokens(self) -> float:
        """Of a forward pass, those whose log-probs are asked for: at most all but prompts."""
        work = self.work
        return self.micro_tokens * self.rows * work.max_tokens / (work.prompt + self.rows * work.max_tokens)

    @property
    def logit_tile(self) -> tuple[float, float]:
        """Tokens and words whose logits are there at a time."""
        tokens, words = self.training.logit_tile
        return min(self.acting_tokens, tokens), min(self.shape.vocab, words)
