"""Bytes that last from step to step: weights, gradients, optimizer, reference, critic, and ZeRO's buffers."""

from __future__ import annotations

from dataclasses import dataclass

from otcrl.plan.job import Job, Training
from otcrl.plan.shapes import Shape

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "autocast": 4}
GRADIENT_BYTES = 4  # they are added up in float32, whatever the weights
LIVE = 1e9  # parameters that ZeRO-3 keeps gathered: DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True, slots=True)
class States:
    """Bytes of one model that last from step to step."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def share(stage: int, from_stage: int, ranks: int) -> float:
    """Of a state on each rank, when ZeRO partitions it from `from_stage` on. Rajbhandari et al. 2020, section 5."""
    return 1 / ranks if stage >= from_stage else 1.0


def zero_states(
    trained: float, total: float, ranks: int, stage: int, *, weight: float, gradient: float, optimizer: float
) -> States:
    """(2 + 2 + K) Psi of arXiv:1910.02054, figure 1: optimizer from stage 1, gradients from 2, weights from 3.

    `trained` of `total` parameters have gradients; `weight`, `gradient`, `optimizer` are bytes per parameter (2, 2, 12
    in the paper).
    """
    return States(
        weights=total * weight * share(stage, 3, ranks),
        gradients=trained * gradient * share(stage, 2, ranks),
        optimizer=trained * optimizer * share(stage, 1, ranks),
    )


def optimizer_bytes(training: Training) -> float:
    """AdamW's per parameter: two float32 moments, and a float32 master of 16-bit weights; of any with DeepSpeed."""
    return 8 + (4 if training.backend == "deepspeed" or WEIGHT_BYTES[training.precision] < 4 else 0)


def trained_parameters(shape: Shape, training: Training) -> float:
    return shape.adapter_parameters(training.lora) if training.lora else shape.parameters


def held_parameters(shape: Shape, training: Training) -> float:
    return shape.parameters + (shape.adapter_parameters(training.lora) if training.lora else 0)


def policy_states(job: Job, held: float, trained: float) -> States:
    """On the GPU: what is offloaded is not there. ZeRO-Offload (arXiv:2101.06840) moves the gradients too."""
    training = job.training
    states = zero_states(
        trained,
        held,
        job.world,
        training.zero,
        weight=WEIGHT_BYTES[training.precision],
        gradient=GRADIENT_BYTES,
        optimizer=optimizer_bytes(training),
    )
    away = training.offload != "none"
    return States(
        weights=0.0 if training.offload_params != "none" else states.weights,
        gradients=0.0 if away and training.zero >= 2 else states.gradients,
        optimizer=0.0 if away else states.optimizer,
    )


def reference_bytes(job: Job) -> float:
    """A frozen copy, partitioned as the policy is. With LoRA it is the policy with its adapters off: nothing."""
    training = job.training
    if not training.reference or training.lora or training.offload_params != "none":
        return 0.0
    return job.shape.parameters * WEIGHT_BYTES[training.precision] * share(training.zero, 3, job.world)


def critic_parameters(job: Job) -> tuple[float, float]:
    """Held and trained, of a second body; none where there is no critic, or only a head on the policy's states."""
    if job.training.bodies == 1:
        return 0.0, 0.0
    vocabulary = job.shape.head_parameters  # its embedding
    body = job.shape.body_parameters + vocabulary
    return body, job.shape.adapter_parameters(job.training.lora) if job.training.lora else body


def critic_states(job: Job) -> States:
    return policy_states(job, *critic_parameters(job))


def zero_buffers(job: Job) -> float:
    """What ZeRO gathers into and reduces from, in the weights' type.

    Stages 1 and 2 with overlap: 4.5 times both buckets (transformers' DeepSpeed guide, on overlap_comm). Stage 3: the
    parameters that stay gathered, and two reduce buckets.
    """
    training, parameters = job.training, trained_parameters(job.shape, job.training)
    if training.backend == "torch" or training.zero == 0:
        return 0.0
    bucket = min(training.bucket, parameters)
    each = WEIGHT_BYTES[training.precision]
    if training.zero < 3:
        return 4.5 * 2 * bucket * each
    return each * min(LIVE, job.shape.parameters) + 2 * bucket * each
