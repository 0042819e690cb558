"""Started by torchrun in test_dist.py: what several ranks compute, written down by the first.

torchrun --nproc_per_node 2 -m tests.ranks FILE
torchrun --nproc_per_node 2 -m tests.ranks FILE DISK    # what ZeRO-3 keeps in the folder DISK
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from otcrl import dist
from otcrl.construct import construct_as
from otcrl.learner.deepspeed_backend import DeepSpeed, made_split
from otcrl.learner.learner import Learner
from otcrl.models.critic import Critic
from otcrl.models.twin import twin
from otcrl.rewards.otc import OTCReward
from otcrl.rollout.publication import Publisher
from otcrl.rollout.snapshot import Manifest, read
from otcrl.types import Reward, Trajectory
from tests.test_learner import (
    POLICY,
    adapted,
    grpo,
    make_learner,
    on_the_trunk,
    ppo,
    random_batch,
    with_shared_prompts,
)

ROWS = 5  # mini-batches of 4 and 1: of the second one rank has nothing


def wide() -> dict[str, Any]:
    """Models of which two ranks' parts are large enough that DeepSpeed puts them on a disk: 1 MiB each."""
    torch.manual_seed(4)
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 4}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, num_key_value_heads=4, **sizes))
    return {"policy": policy, "reference": twin(policy), "critic": None}


def wide_with_critic() -> dict[str, Any]:
    parts = wide()
    return parts | {"critic": Critic(parts["policy"])}


ALGORITHMS = {"grpo": grpo(), "ppo": ppo(), "grpo-adapters": grpo(), "ppo-one-trunk": ppo()}
ON_DISK = {"grpo-wide": grpo(), "ppo-wide": ppo()}
EVERY = ALGORITHMS | ON_DISK
PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "grpo-adapters": adapted, "ppo-one-trunk": on_the_trunk, "grpo-wide": wide, "ppo-wide": wide_with_critic,
}  # fmt: skip
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
    if offload == "none" or algo not in PARTS
}
DISK = {f"disk/{algo}/{params}": (algo, params) for algo in ON_DISK for params in ("none", "cpu")}


def zero(stage: int, offload: str) -> DeepSpeed:
    params = offload if stage == 3 else "none"
    settings = {"zero_stage": stage, "offload": offload, "offload_params": params}
    return construct_as(DeepSpeed, settings | {"nvme_path": None, "bucket": 1e6, "overlap": False}, "deepspeed")


def on_disk(params: str, folder: Path) -> DeepSpeed:
    settings = {"zero_stage": 3, "offload": "nvme", "offload_params": params, "nvme_path": str(folder)}
    return construct_as(DeepSpeed, settings | {"bucket": 1e6, "overlap": False}, "deepspeed")


class ByLength(OTCReward):
    """Every group has a signal, so that there is an update, whatever a model of a few seconds writes.

    Only on the first rank: judges may be of two minds, and then the others must learn from that one's rewards.
    """

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]:
        rewards_PG = super().__call__(trajectories_PG)
        pairs = (zip(*both, strict=True) for both in zip(trajectories_PG, rewards_PG, strict=True))
        price = 0.01 if dist.is_first() else 0.0
        return [[replace(r, value=len(t.token_ids) * price) for t, r in group] for group in pairs]


def outcome(algo_name: str, learner: Any) -> dict[str, Any]:
    """Of two updates: scores and metrics of each, moments and weights after them."""
    algo, batch = EVERY[algo_name], with_shared_prompts(random_batch(rows=ROWS, columns=16))
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


def made(algo: str, **settings: Any) -> Learner:
    return make_learner(EVERY[algo], **PARTS.get(algo, dict)() | {"minibatch_size": 4} | settings)


def plain(name: str) -> dict[str, Any]:
    algo, settings = TORCH[name]
    return outcome(algo, made(algo, **settings))


@contextmanager
def float32() -> Iterator[None]:
    POLICY.float()
    try:
        yield
    finally:
        POLICY.double()


def split(algo: str, deepspeed: DeepSpeed) -> dict[str, Any]:
    with float32():
        settings = {"backend": "deepspeed", "deepspeed": deepspeed, "micro_tokens": 30}
        learner = made(algo, **settings)
        found = outcome(algo, learner)
        found["still"] = still(learner)
        found["restored"] = restored(algo, learner, settings)
        found["begun"] = begun(learner)
        return found


def still(learner: Learner) -> bool:
    """Where nothing is to be learned nothing moves, whatever AdamW remembers: no weight, moment or count of steps."""
    algo, batch = grpo(kl_coef=0.0, entropy_coef=0.0), random_batch(rows=ROWS, columns=16)
    batch = replace(batch, rewards=torch.ones(ROWS))
    before = {name: value.clone() for name, value in chain(learner.weights(), learner.state())}
    scores = learner.score(batch)
    metrics = learner.update(2, batch, scores, algo.targets(batch, scores), algo)
    same = [torch.equal(before[name], value) for name, value in chain(learner.weights(), learner.state())]
    return all(same) and all(metrics[f"update/{name}_grad_norm"] == 0 for name in learner.backends)


def begun(learner: Learner) -> bool:
    """Training begins with these weights, and they are the reference's; its optimizer remembers nothing."""
    before = [value.clone() for _, value in learner.weights()]
    learner.begin()
    if any(value.abs().max() > 0 for name, value in learner.state() if name.startswith("policy/exp_avg")):
        return False
    scores = learner.score(with_shared_prompts(random_batch(rows=ROWS, columns=16)))
    same = [torch.equal(a, b) for a, (_, b) in zip(before, learner.weights(), strict=True)]
    return all(same) and torch.allclose(scores.ref_logprobs, scores.old_logprobs, atol=1e-6)


def restored(algo: str, learner: Any, settings: dict[str, Any]) -> bool:
    """Another learner, given this one's weights and state, makes the same update, bit for bit."""
    again = made(algo, **settings)
    again.load_weights([(name, value.clone()) for name, value in learner.weights()])
    again.load_state({name: value.clone() for name, value in learner.state()}.__getitem__)
    metrics = []
    for each in (learner, again):
        batch = with_shared_prompts(random_batch(rows=ROWS, columns=16))
        scores = each.score(batch)
        targets = EVERY[algo].targets(batch, scores)
        metrics.append(each.update(2, batch, scores, targets, EVERY[algo]))
    same = [torch.equal(a, b) for (_, a), (_, b) in zip(learner.weights(), again.weights(), strict=True)]
    return metrics[0] == metrics[1] and all(same)


# -- a model that no rank ever has the whole of ------------------------------------------------------------


def large(layers: int = 16) -> LlamaForCausalLM:
    """Each layer is a small part of it: 130 MB, several times what else a process may take meanwhile."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 2304, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, num_key_value_heads=4, **sizes))


class Peak:
    """How much more main memory of its own this process had at most, in bytes, while this was open."""

    def __enter__(self) -> Peak:
        self._is_over, self._least, self.nbytes = threading.Event(), self._now(), 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.0005):
            self.nbytes = max(self.nbytes, self._now() - self._least)

    def _now(self) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024


def from_file(folder: Path) -> dict[str, Any]:
    """A PPO update of a model that was split as it was loaded, and what each rank held of it meanwhile."""
    if dist.is_first():
        large().save_pretrained(folder)
        large(layers=1).save_pretrained(folder / "small")
    dist.barrier("the model's file")
    settings = zero(3, "none")
    with made_split(settings, torch.float32):
        LlamaForCausalLM.from_pretrained(folder / "small")  # what loading any model needs is there now
        with Peak() as peak:
            policy = LlamaForCausalLM.from_pretrained(folder)
        reference, critic = twin(policy).requires_grad_(False), Critic(policy)
    given = {"policy": policy, "reference": reference, "critic": critic}
    learner = make_learner(ppo(), **given, backend="deepspeed", deepspeed=settings, packing="shared")
    found = updated(learner)
    held = [parameter for parameter in policy.parameters() if not parameter.ds_persist]  # pyright: ignore[reportAttributeAccessIssue]
    at_once = [sum(p.numel() for p in held) for _ in learner.weights()]
    left = sum(p.numel() for p in held)
    found |= {"published": published(learner, policy)}
    found |= {"loading": max(dist.gather(peak.nbytes, "peaks")), "at once": max(at_once), "left": left}
    return found


def published(learner: Learner, policy: LlamaForCausalLM) -> list[list[dict[str, Any]]]:
    """What the engine of each rank is sent, two sets of weights; the second rank's takes its time to read the first."""
    publisher, seen = Publisher(policy, by_handle=True), list[dict[str, Any]]()
    whole = {name: value.clone() for name, value in learner.weights()}
    sets = (learner.weights(), {name: value + 1 for name, value in whole.items()}.items())
    for version, weights in enumerate(sets):
        manifest = Manifest.of(publisher.prepare(weights, version).content)
        time.sleep(0.5 * dist.rank())
        arrived = all(torch.equal(value, whole[name] + version) for name, value in read(manifest))
        again = publisher.again()
        assert again is not None
        seen.append({"path": manifest.path, "arrived": arrived, "again": again.content == manifest.plain()})
    found = dist.gather(seen, "publications")
    publisher.close()
    return found


def updated(learner: Learner) -> dict[str, Any]:
    batch, algo = with_shared_prompts(random_batch(rows=ROWS, columns=16)), ppo()
    begun = {name: value.clone() for name, value in learner.weights()}
    scores = learner.score(batch)
    metrics = learner.update(0, batch, scores, algo.targets(batch, scores), algo)
    weights = {name: value.clone() for name, value in learner.weights()}
    return {"begun": begun, "scores": scores, "metrics": metrics, "weights": weights}


def main() -> None:
    torch.set_num_threads(1)
    dist.start(dist.Ranks(timeout_s=120))
    if sys.argv[2:]:
        found = {name: split(algo, on_disk(params, Path(sys.argv[2]))) for name, (algo, params) in DISK.items()}
    else:
        found = {name: plain(name) for name in TORCH}
        found |= {name: split(algo, zero(stage, offload)) for name, (algo, stage, offload) in ZERO.items()}
        found["from file"] = from_file(Path(sys.argv[1]).parent / "large")
    if dist.is_first():
        torch.save(found, sys.argv[1])
    dist.barrier("the end")
    dist.stop()


if __name__ == "__main__":
    main()
