"""Bytes that come and go in the learner: activations, logits, gradients under way.

What a forward pass keeps for the backward pass was read off transformers' Llama (5.x) with saved-tensor hooks: each
term of `saved_by_layer` is a tensor that autograd holds. benchmarks/plan.py compares the sums with measured peaks.
"""

from __future__ import annotations

import math

from otcrl.plan.job import Job
from otcrl.plan.shapes import Shape
from otcrl.plan.states import GRADIENT_BYTES, WEIGHT_BYTES, share, trained_parameters

PRODUCT_BYTES = {"float32": 4, "bfloat16": 2, "autocast": 2}  # of what matrix products read and write

# Bytes per logit of a tile in the forward pass of otcrl/models/token_logprobs.py: the tile before is there while the
# next product is made, in its own type and in float32.
LOGIT_FORWARD = {"float32": 8, "bfloat16": 10, "autocast": 10}


def saved_by_layer(shape: Shape, precision: str, keys: float = 1.0, *, copied: bool = False) -> float:
    """Bytes per token that autograd keeps of one decoder layer, without checkpointing.

    Two norms: the stream and its normalised copy in the norm's type, and the output, which the products read (under
    autocast each of the five products that read it casts its own copy). Attention: q, k, v, the output, and in float32
    the log-sum-exp of each head (flash attention, arXiv:2205.14135). MLP: gate, its SiLU, up, their product.

    `keys`: of a pass's rows per token of it, above 1 where rows share a prefix. `copied`: attention's output is put in
    another order (packed rows on CPU), so it is kept twice.
    """
    w, q, k, f = shape.width, shape.query_width, shape.kv_width, shape.ff_width
    product = PRODUCT_BYTES[precision]
    norms = {"float32": 2 * (4 + 4 + 4), "bfloat16": 2 * (4 + 2 + 2), "autocast": 2 * (4 + 4) + 5 * 2}[precision] * w
    head_norms = {"float32": 8, "bfloat16": 6, "autocast": 6}[precision] * (q + k) * shape.head_norm
    attention = product * ((3 if copied else 2) * q + 2 * k * keys) + 4 * shape.heads
    return norms + head_norms + attention + product * 4 * f


def saved_once(shape: Shape, precision: str) -> float:
    """Bytes per token beside the layers: the final norm, whose output only acting tokens keep, and rotary tables."""
    norm = {"float32": 8, "bfloat16": 6, "autocast": 8}[precision] * shape.width
    return norm + 2 * shape.head_dim * WEIGHT_BYTES[precision]


def saved_by_checkpoint(shape: Shape, precision: str) -> float:
    """Bytes per token and layer: the stream that enters it. Chen et al. 2016, arXiv:1604.06174."""
    return WEIGHT_BYTES[precision] * shape.width


def backward_of_layer(shape: Shape, precision: str) -> float:
    """Bytes per token that the MLP's backward holds beyond what was saved: three gradients for one saved tensor freed.

    And the stream's gradient, twice where it is added to the residual's.
    """
    return PRODUCT_BYTES[precision] * 2 * shape.ff_width + 2 * WEIGHT_BYTES[precision] * shape.width


def cast_weights(parameters: float, precision: str) -> float:
    """Autocast keeps a 16-bit copy of every matrix until the pass is over."""
    return 2.0 * parameters if precision == "autocast" else 0.0


def head_backward(shape: Shape, precision: str, tile: tuple[float, float], *, on_cpu: bool) -> tuple[float, float]:
    """(bytes of logits, bytes of the weight's gradient) where otcrl/models/token_logprobs.py holds most of both.

    In float32 the gradient is summed in place. With 16-bit products either the next tile is made (the one before in
    float32 and in 16 bits, the product and its float32 copy), or a tile's gradient is added: in 16 bits, and cast to
    float32 where the device cannot add the two types as they are.
    """
    tokens, words = tile
    logits, weight = tokens * words, 4.0 * shape.head_parameters
    if precision == "float32":
        return 8 * logits, weight
    added = (6 if on_cpu else 2) * words * shape.width
    return max((12 * logits, weight), (6 * logits, weight + added), key=sum)


def moments(job: Job) -> dict[str, dict[str, float]]:
    """Activations, logits and working memory where an update may peak; one of these is the peak."""
    shape, training, tokens = job.shape, job.training, job.micro_tokens
    precision, bodies, weight = training.precision, training.bodies, WEIGHT_BYTES[training.precision]
    layer = layer_bytes(job) * tokens
    kept = saved_by_checkpoint(shape, precision) * tokens if training.checkpointing else layer
    body = shape.layers * kept + saved_once(shape, precision) * tokens
    read = weight * shape.width * job.acting_tokens  # by the head
    made = math.prod(job.logit_tile) * LOGIT_FORWARD[precision]
    casts = cast_weights(shape.body_parameters, precision)
    kept_casts = 0.0 if training.checkpointing else casts * bodies
    head_cast = cast_weights(shape.head_parameters, precision)
    logits, gradient = head_backward(shape, precision, job.logit_tile, on_cpu=job.gpu.name == "cpu")
    table = 0.0 if training.lora else float(shape.head_parameters * weight)  # a gradient of its size
    tied = table if shape.tied else 0.0  # the head's waits for the embedding's
    during_layer = shape.layers * kept * bodies + backward_of_layer(shape, precision) * tokens
    again = layer if training.checkpointing else 0.0
    return {
        "loss": part(body + read, made, casts + head_cast),
        "head backward": part(
            bodies * body + 2 * read, logits, kept_casts + head_cast + (0.0 if training.lora else gradient)
        ),
        "layer backward": part(during_layer + again, 0.0, kept_casts + layer_gradient(job) + tied),
        "embedding backward": part(2 * weight * shape.width * tokens, 0.0, table + tied),
        "optimizer": part(0.0, 0.0, optimizer_working(job)),
    }


def layer_bytes(job: Job) -> float:
    """`saved_by_layer` of this job's packed rows."""
    return saved_by_layer(job.shape, job.training.precision, job.keys, copied=job.gpu.name == "cpu")


def part(activations: float, logits: float, working: float) -> dict[str, float]:
    return {"activations": activations, "logits": logits, "working": working}


def layer_gradient(job: Job) -> float:
    """The largest weight's gradient, before it is added to the others."""
    if job.training.lora:
        return 0.0
    return max(job.shape.ff_width, job.shape.query_width) * job.shape.width * WEIGHT_BYTES[job.training.precision]


def optimizer_working(job: Job) -> float:
    """While AdamW steps in float32: torch's foreach kernels hold one more moment, DeepSpeed a copy of its gradients.

    On CPU torch goes parameter by parameter, with two temporaries of the largest.
    """
    training = job.training
    if training.offload != "none":
        return 0.0
    if job.gpu.name == "cpu":
        return 2.0 * job.shape.head_parameters * GRADIENT_BYTES
    return trained_parameters(job.shape, training) * GRADIENT_BYTES * share(training.zero, 1, job.world)


def forward_working(job: Job) -> dict[str, float]:
    """A pass without gradients: one layer's tensors at a time, and the logits."""
    shape, precision, tokens = job.shape, job.training.precision, job.micro_tokens
    logits = math.prod(job.logit_tile) * LOGIT_FORWARD[precision]
    casts = cast_weights(shape.body_parameters + shape.head_parameters, precision)
    return part(layer_bytes(job) * tokens, logits, casts)
