"""Started by torchrun in test_dist.py: what several ranks compute, written down by the first.

torchrun --nproc_per_node 2 -m tests.ranks FILE
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from otcrl import dist
from otcrl.construct import construct_as
from otcrl.learner.deepspeed_backend import DeepSpeed
from otcrl.rewards.otc import OTCReward
from otcrl.types import Reward, Trajectory
from tests.test_learner import POLICY, grpo, make_learner, ppo, random_batch, with_shared_prompts

ROWS = 5  # mini-batches of 4 and 1: of the second one rank has nothing
ALGORITHMS = {"grpo": grpo(), "ppo": ppo()}
TORCH = {
    f"torch/{algo}/{packing}/{tokens}": (algo, {"packing": packing, "micro_tokens": tokens})
    for algo in ALGORITHMS
    for packing in ("shared", "packed", "padded")
    for tokens in (1, 30, 10_000)
}
ZERO = {
    f"zero-{stage}/{algo}/{offload}": (algo, stage, offload)
    for stage in (1, 2, 3)
    for algo in ALGORITHMS
    for offload in ("none", "cpu")
}


def zero(stage: int, offload: str) -> DeepSpeed:
    params = offload if stage == 3 else "none"
    settings = {"zero_stage": stage, "offload": offload, "offload_params": params}
    return construct_as(DeepSpeed, settings | {"nvme_path": None, "bucket": 1e6, "overlap": False}, "deepspeed")


class ByLength(OTCReward):
    """Every group has a signal, so that there is an update, whatever a model of a few seconds writes."""

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]:
        rewards_PG = super().__call__(trajectories_PG)
        pairs = (zip(*both, strict=True) for both in zip(trajectories_PG, rewards_PG, strict=True))
        return [[replace(r, value=len(t.token_ids) / 100) for t, r in group] for group in pairs]


def outcome(algo_name: str, learner: Any) -> dict[str, Any]:
    """Of two updates: scores and metrics of each, moments and weights after them."""
    algo, batch = ALGORITHMS[algo_name], with_shared_prompts(random_batch(rows=ROWS, columns=16))
    found: dict[str, Any] = {}
    for step in range(2):
        scores = learner.score(batch)
        found[f"old {step}"] = scores.old_logprobs.clone()
        found[f"ref {step}"] = scores.ref_logprobs.clone()
        found[f"values {step}"] = scores.values.clone()
        found[f"metrics {step}"] = learner.update(step, batch, scores, algo.targets(batch, scores), algo)
        if step == 0:  # Adam's first moment is the gradient, but for a factor
            found["state"] = {name: value.clone() for name, value in learner.state()}
    found["weights"] = {name: value.clone() for name, value in learner.weights()}
    found["says"] = learner.says([5, 6, 7, 8, 9])
    return found


def plain(name: str) -> dict[str, Any]:
    algo, settings = TORCH[name]
    return outcome(algo, make_learner(ALGORITHMS[algo], minibatch_size=4, **settings))


@contextmanager
def float32() -> Iterator[None]:
    POLICY.float()
    try:
        yield
    finally:
        POLICY.double()


def split(name: str) -> dict[str, Any]:
    algo, stage, offload = ZERO[name]
    with float32():
        settings = {"backend": "deepspeed", "deepspeed": zero(stage, offload), "minibatch_size": 4, "micro_tokens": 30}
        learner = make_learner(ALGORITHMS[algo], **settings)
        found = outcome(algo, learner)
        found["restored"] = restored(algo, learner, settings)
        return found


def restored(algo: str, learner: Any, settings: dict[str, Any]) -> bool:
    """Another learner, given this one's weights and state, makes the same update, bit for bit."""
    again = make_learner(ALGORITHMS[algo], **settings)
    again.load_weights([(name, value.clone()) for name, value in learner.weights()])
    again.load_state({name: value.clone() for name, value in learner.state()}.__getitem__)
    metrics = []
    for each in (learner, again):
        batch = with_shared_prompts(random_batch(rows=ROWS, columns=16))
        scores = each.score(batch)
        targets = ALGORITHMS[algo].targets(batch, scores)
        metrics.append(each.update(2, batch, scores, targets, ALGORITHMS[algo]))
    same = [torch.equal(a, b) for (_, a), (_, b) in zip(learner.weights(), again.weights(), strict=True)]
    return metrics[0] == metrics[1] and all(same)


def main() -> None:
    torch.set_num_threads(1)
    dist.start(dist.Ranks(timeout_s=120))
    found = {name: plain(name) for name in TORCH} | {name: split(name) for name in ZERO}
    if dist.is_first():
        torch.save(found, sys.argv[1])
    dist.barrier("the end")
    dist.stop()


if __name__ == "__main__":
    main()
