"""The update is what the formulas say, however the work is split, and whatever stands in an observation."""

from __future__ import annotations

import copy
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from otcrl.algos.functional import token_weights
from otcrl.algos.grpo import GRPO
from otcrl.algos.ppo import PPO
from otcrl.errors import ConfigError, TrainingError
from otcrl.learner.deepspeed_backend import NEEDED, DeepSpeed, check_installed
from otcrl.learner.learner import Learner
from otcrl.learner.optimizer import Optimizer
from otcrl.models.critic import Critic, SharedCritic
from otcrl.models.lora import Lora
from otcrl.models.policy import output_layer, token_logprobs
from otcrl.models.tiny import TinyLlama
from otcrl.protocols import Algorithm
from otcrl.types import Batch, Forward
from tests.algorithms import NAMES, algorithm

WORDS = [f"w{i}" for i in range(20)]
POLICY = TinyLlama(width=16, layers=2, heads=2, ff_width=24, context=64).load(WORDS, seed=0)[0].double()
ZERO = DeepSpeed(
    zero_stage=2, offload="none", offload_params="none", nvme_path=None, bucket=1e6, overlap=False
)  # fmt: skip
ALL_WEIGHTS = Lora(rank=0, alpha=32, targets="all-linear")
SGD_LIKE = Optimizer(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, warmup_steps=0, decay="linear", final_lr_share=1.0)


def grpo(**other) -> GRPO:
    settings = {
        "normalize": True, "std_floor": 0.0, "keep_sign": False, "clip_low": 0.2, "clip_high": 0.2,
        "kl_coef": 0.01, "entropy_coef": 0.01, "weighting": "sequence",
    }  # fmt: skip
    return GRPO(**settings | other)


def ppo(**other) -> PPO:
    settings = {
        "gamma": 0.99, "lam": 0.95, "clip_low": 0.2, "clip_high": 0.2, "value_clip": 0.5, "value_coef": 0.5,
        "kl_reward_coef": 0.01, "kl_coef": 0.01, "entropy_coef": 0.01, "weighting": "token",
    }  # fmt: skip
    return PPO(**settings | other)


ALGORITHMS = pytest.mark.parametrize(
    "algo",
    [grpo(), grpo(kl_coef=0.0, entropy_coef=0.0), ppo()],
    ids=["grpo", "grpo-without-kl", "ppo"],
)
EVERY_ALGORITHM = pytest.mark.parametrize(
    "algo", [algorithm(name) for name in NAMES] + [grpo(), ppo()], ids=[*NAMES, "grpo-with-all", "ppo-with-all"]
)


def make_learner(algo: Algorithm, **other) -> Learner:
    torch.manual_seed(1)
    policy = copy.deepcopy(POLICY)
    reference = copy.deepcopy(POLICY)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.02 * torch.randn_like(p))
    critic = Critic(POLICY) if algo.needs_critic else None
    if critic is not None:
        torch.nn.init.normal_(critic.head.weight, std=0.3)
    settings = {
        "steps": 10, "seed": 0, "temperature": 0.7, "policy_optimizer": SGD_LIKE, "critic_optimizer": SGD_LIKE,
        "epochs": 1, "minibatch_size": 0, "packing": "shared", "micro_tokens": 10_000, "max_grad_norm": 1e9,
        "max_skipped": 0, "old_logprobs": "recompute", "autocast": None, "backend": "torch", "deepspeed": ZERO,
        "lora": ALL_WEIGHTS, "critic_trunk": "own",
    }  # fmt: skip
    reference = reference if algo.needs_reference else None
    return Learner(**{"policy": policy, "reference": reference, "critic": critic} | settings | other)


def adapted(rank: int = 4) -> dict[str, Any]:
    """A policy whose adapters alone are trained, and which is its own reference without them."""
    policy = copy.deepcopy(POLICY)
    return {"policy": policy, "reference": policy, "lora": Lora(rank=rank, alpha=8, targets="all-linear")}


def on_the_trunk() -> dict[str, Any]:
    """A critic that reads the policy's hidden states, and says something."""
    critic = SharedCritic(POLICY)
    torch.manual_seed(2)
    torch.nn.init.normal_(critic.head.weight, std=0.3)
    return {"critic": critic, "critic_trunk": "shared"}


def random_batch(seed: int = 0, rows: int = 8, columns: int = 14) -> Batch:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, columns + 1, (rows,), generator=g)
    attention = torch.arange(columns) < lengths[:, None]
    action = (torch.rand(rows, columns, generator=g) > 0.5) & attention
    action[:, :2] = False
    action[:, 3] = True
    return Batch(
        token_ids=torch.randint(4, 24, (rows, columns), generator=g) * attention,
        attention_mask=attention,
        action_mask=action,
        sampler_logprobs=-torch.rand(rows, columns, generator=g) * action,
        rewards=torch.randint(0, 3, (rows,), generator=g) / 2,
        group_ids=torch.arange(rows) // 4,
    )


def with_shared_prompts(batch: Batch, length: int = 5) -> Batch:
    """The rows of a group begin alike, and begin to act after that."""
    ids, action = batch.token_ids.clone(), batch.action_mask.clone()
    for group in batch.group_ids.unique():
        own = batch.group_ids == group
        ids[own, :length] = ids[own.nonzero()[0], :length]
    action[:, :length] = False
    return replace(batch, token_ids=ids, action_mask=action)


def gradients(learner: Learner, batch: Batch, algo: Algorithm) -> Tensor:
    """The gradient of the first mini-batch, before clipping and stepping, as one vector."""
    scores = learner.score(batch)
    learner._accumulate(batch, scores, algo.targets(batch, scores), algo)
    modules = [learner.policy, *([learner.critic] if learner.critic is not None else [])]
    return torch.cat([p.grad.flatten() for m in modules for p in m.parameters() if p.grad is not None])


@EVERY_ALGORITHM
@pytest.mark.parametrize("micro_tokens", [1, 30, 60], ids=["one-by-one", "pairs", "fours"])
def test_any_micro_batch_split_gives_the_same_gradient(algo, micro_tokens):
    batch = random_batch()
    whole = gradients(make_learner(algo), batch, algo)
    split = gradients(make_learner(algo, micro_tokens=micro_tokens), batch, algo)
    assert torch.allclose(whole, split, atol=1e-7, rtol=1e-5)
    assert whole.abs().max() > 1e-4


@ALGORITHMS
@pytest.mark.parametrize("micro_tokens", [1, 30, 10_000])
@pytest.mark.parametrize("packing", ["shared", "packed"])
def test_no_packing_changes_the_gradient_or_a_statistic(algo, micro_tokens, packing):
    batch = with_shared_prompts(random_batch())
    outcomes = []
    for settings in ({"packing": "padded"}, {"packing": packing, "micro_tokens": micro_tokens}):
        learner = make_learner(algo, **settings)
        scores = learner.score(batch)
        metrics = learner.update(0, batch, scores, algo.targets(batch, scores), algo)
        parameters = [p for m in (learner.policy, learner.critic) if m is not None for p in m.parameters()]
        outcomes.append((scores, metrics, torch.cat([p.detach().flatten() for p in parameters])))
    (scores, metrics, weights), (plain_scores, plain_metrics, plain_weights) = outcomes
    for name in ("old_logprobs", "ref_logprobs", "values"):
        assert torch.allclose(getattr(scores, name), getattr(plain_scores, name), atol=1e-5)
    assert metrics == pytest.approx(plain_metrics, rel=1e-4, abs=1e-5)
    assert torch.allclose(weights, plain_weights, atol=1e-4)


def test_a_model_that_cannot_be_packed_trains_padded_and_says_so(capsys):
    policy = copy.deepcopy(POLICY)
    policy.set_attn_implementation("eager")
    algo, batch = grpo(kl_coef=0.0), random_batch()
    found = gradients(make_learner(algo, policy=policy), batch, algo)
    assert capsys.readouterr().out == (
        "otcrl: learner.packing=shared is padded for this model: its attention is 'eager', and packing replaces only "
        "'sdpa' and 'flash_attention_2'\n"
    )
    assert torch.allclose(found, gradients(make_learner(algo), batch, algo), atol=1e-7, rtol=1e-5)


def test_leaving_out_rows_without_advantage_changes_nothing():
    batch = random_batch()
    batch = replace(batch, rewards=torch.tensor([0.5] * 4 + [0.0, 1.0, 0.0, 1.0]))  # the first group agrees

    class Keeps(GRPO):
        only_advantages_matter = False  # pyright: ignore

    algo = grpo(kl_coef=0.0, entropy_coef=0.0)
    keeps = Keeps(**{name: getattr(algo, name) for name in algo.__dataclass_fields__})
    assert algo.only_advantages_matter
    assert torch.allclose(gradients(make_learner(algo), batch, algo), gradients(make_learner(keeps), batch, keeps))


@EVERY_ALGORITHM
def test_nothing_that_stands_off_the_actions_reaches_a_gradient(algo):
    batch = random_batch()
    off = ~batch.action_mask
    noisy = replace(batch, sampler_logprobs=torch.where(off, torch.randn(off.shape), batch.sampler_logprobs))
    learner, again = make_learner(algo, old_logprobs="sampler"), make_learner(algo, old_logprobs="sampler")
    assert torch.equal(gradients(learner, batch, algo), gradients(again, noisy, algo))


@EVERY_ALGORITHM
def test_observation_tokens_after_the_last_action_change_no_gradient(algo):
    batch = random_batch()
    action, ids = batch.action_mask.clone(), batch.token_ids.clone()
    action[:, 8:] = False  # from column 8 on everything is observation
    batch = replace(batch, action_mask=action)
    changed = ids.clone()
    changed[:, 8:] = torch.randint(4, 24, changed[:, 8:].shape, generator=torch.Generator().manual_seed(5))
    a = gradients(make_learner(algo), batch, algo)
    b = gradients(make_learner(algo), replace(batch, token_ids=changed), algo)
    assert torch.allclose(a, b, atol=1e-10)


@EVERY_ALGORITHM
def test_values_and_reference_at_observation_tokens_change_no_target(algo):
    learner, batch = make_learner(algo), random_batch()
    scores = learner.score(batch)
    off = ~batch.action_mask
    noisy = replace(
        scores,
        values=torch.where(off, torch.full_like(scores.values, 9.0), scores.values),
        ref_logprobs=torch.where(off, torch.full_like(scores.values, -9.0), scores.ref_logprobs),
    )
    clean, dirty = algo.targets(batch, scores), algo.targets(batch, noisy)
    assert torch.equal(clean.advantages, dirty.advantages)
    assert torch.equal(clean.returns, dirty.returns)
    assert (clean.advantages[off] == 0).all()


def test_grpo_loss_is_eq_3_written_out_in_loops():
    algo, batch = grpo(entropy_coef=0.0), random_batch(3)
    learner = make_learner(algo, temperature=1.0)
    scores = learner.score(batch)
    old = scores.old_logprobs + 0.3 * torch.randn(scores.old_logprobs.shape, generator=torch.Generator().manual_seed(1))
    scores = replace(scores, old_logprobs=old)
    sums = learner._accumulate(batch, scores, algo.targets(batch, scores), algo)

    total = 0.0
    for b in range(8):
        group = [batch.rewards[i].item() for i in range(8) if batch.group_ids[i] == batch.group_ids[b]]
        mean = sum(group) / 4
        std = (sum((r - mean) ** 2 for r in group) / 3) ** 0.5
        advantage = (batch.rewards[b].item() - mean) / (std + 1e-6)
        log_softmax = POLICY(batch.token_ids[b : b + 1]).logits[0].log_softmax(-1)
        terms = []
        for t in batch.action_mask[b].nonzero().flatten().tolist():
            new = log_softmax[t - 1, batch.token_ids[b, t]].item()
            ratio = 2.718281828459045 ** (new - old[b, t].item())
            surrogate = min(ratio * advantage, max(0.8, min(1.2, ratio)) * advantage)
            gap = scores.ref_logprobs[b, t].item() - new
            terms.append(-surrogate + 0.01 * (2.718281828459045**gap - gap - 1))
        total += sum(terms) / len(terms) / 8
    assert sums["loss"] == pytest.approx(total, abs=1e-5)


def test_ppo_loss_is_written_out_in_loops():
    algo, batch = ppo(entropy_coef=0.0, kl_coef=0.0), random_batch(4)
    learner = make_learner(algo, temperature=1.0)
    scores = learner.score(batch)
    targets = algo.targets(batch, scores)
    sums = learner._accumulate(batch, scores, targets, algo)

    advantages, returns = {}, {}
    for b in range(8):
        acts = batch.action_mask[b].nonzero().flatten().tolist()
        reward = {
            t: -0.01 * (scores.old_logprobs[b, t] - scores.ref_logprobs[b, t]).item()
            + (batch.rewards[b].item() if t == acts[-1] else 0.0)
            for t in acts
        }
        running, next_value = 0.0, 0.0
        for t in reversed(acts):
            value = scores.values[b, t].item()
            running = reward[t] + 0.99 * next_value - value + 0.99 * 0.95 * running
            advantages[b, t], returns[b, t], next_value = running, running + value, value
    mean = sum(advantages.values()) / len(advantages)
    std = (sum((a - mean) ** 2 for a in advantages.values()) / (len(advantages) - 1)) ** 0.5
    # new policy and values are the old ones, so the ratio is 1 and the value loss is unclipped
    total = 0.0
    for (b, t), a in advantages.items():
        total += -(a - mean) / std + 0.5 * 0.5 * (scores.values[b, t].item() - returns[b, t]) ** 2
    assert sums["loss"] == pytest.approx(total / len(advantages), abs=1e-5)


@ALGORITHMS
def test_the_gradient_is_the_finite_difference_of_the_loss(algo):
    batch, learner = random_batch(), make_learner(algo)
    scores = learner.score(batch)
    old = scores.old_logprobs + 0.05 * batch.action_mask
    scores = replace(scores, old_logprobs=old.double())
    targets = algo.targets(batch, scores)
    learner._accumulate(batch, scores, targets, algo)
    weight = learner.policy.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert weight.grad is not None
    slope = weight.grad[2, 3].item()

    def loss(nudge: float) -> float:
        with torch.no_grad():
            weight[2, 3] += nudge
        found = learner._accumulate(batch, scores, targets, algo)["loss"]
        with torch.no_grad():
            weight[2, 3] -= nudge
        return found

    assert slope == pytest.approx((loss(1e-3) - loss(-1e-3)) / 2e-3, rel=2e-2, abs=1e-5)


def test_log_probs_and_entropy_match_a_plain_softmax():
    batch = random_batch()
    logprobs, entropy = token_logprobs(POLICY, batch.token_ids, batch.action_mask, 0.7, "measure")
    full = (POLICY(batch.token_ids).logits / 0.7).log_softmax(-1)
    for b, t in batch.action_mask.nonzero().tolist():
        assert logprobs[b, t].item() == pytest.approx(full[b, t - 1, batch.token_ids[b, t]].item(), abs=1e-5)
        assert entropy[b, t].item() == pytest.approx(-(full[b, t - 1].exp() * full[b, t - 1]).sum().item(), abs=1e-5)
    assert (logprobs[~batch.action_mask] == 0).all()


def test_a_pass_that_is_made_only_because_others_make_one_adds_nothing_though_its_ratio_be_inf():
    """It asks about a token that was never sampled, whose old log-prob is 0: exp(0 - log-prob) is too large here."""
    algo = grpo()
    learner, batch = make_learner(algo), random_batch()
    setattr(learner.backends["policy"], "in_step", True)  # noqa: B010  as if other ranks had rows
    with torch.no_grad():
        for weight in output_layer(learner.policy).parameters():
            weight.mul_(1e6)
    batch = replace(batch, action_mask=torch.zeros_like(batch.action_mask))
    scores = learner.score(batch)
    assert learner.says(batch.token_ids[0, :2].tolist())[1] < -1000
    learner._accumulate(batch, scores, algo.targets(batch, scores), algo)
    found = [p.grad for p in learner.policy.parameters() if p.grad is not None]
    assert found
    assert all((gradient == 0).all() for gradient in found)


def test_a_loss_that_is_not_finite_stops_before_any_weight_changes():
    algo = grpo()
    learner, batch = make_learner(algo), random_batch()
    before = [p.clone() for p in learner.policy.parameters()]
    poisoned = replace(batch, rewards=torch.tensor([float("nan")] + [0.0] * 7))
    scores = learner.score(poisoned)
    with pytest.raises(TrainingError, match=r"loss is nan, .* at step 4, mini-batch 0 \(rows \["):
        learner.update(4, poisoned, scores, algo.targets(poisoned, scores), algo)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.parameters(), strict=True))


def test_policy_and_critic_are_clipped_and_stepped_apart():
    algo = ppo()
    learner, batch = make_learner(algo), random_batch()
    scores = learner.score(batch)
    metrics = learner.update(0, batch, scores, algo.targets(batch, scores), algo)
    assert metrics["update/policy_grad_norm"] > 0
    assert metrics["update/critic_grad_norm"] > 0
    assert set(learner.backends) == {"policy", "critic"}


@pytest.mark.parametrize(("max_grad_norm", "matters"), [(1e9, False), (30.0, True)], ids=["not clipped", "clipped"])
def test_the_weight_of_the_value_loss_matters_to_a_critic_of_its_own_only_by_clipping(max_grad_norm, matters):
    """AdamW divides a gradient by its own scale, unless steps are scaled apart: conf/algo/ppo.yaml says so."""
    critics, norms = [], []
    for value_coef in (0.1, 10.0):
        algo = ppo(value_coef=value_coef)
        learner = make_learner(algo, max_grad_norm=max_grad_norm)
        for step, seed in enumerate((0, 1, 2)):
            batch = random_batch(seed)
            batch = replace(batch, rewards=batch.rewards * 3**step)
            scores = learner.score(batch)
            found = learner.update(step, batch, scores, algo.targets(batch, scores), algo)
            norms.append(found["update/critic_grad_norm"])
        assert learner.critic is not None
        critics.append(torch.cat([p.detach().flatten() for p in learner.critic.parameters()]))
    assert max(norms[:3]) < 30.0 < min(norms[3:])
    assert ((critics[0] - critics[1]).abs().max().item() > 1e-4) is matters  # the rest is its 1e-8 in the denominator


def test_an_untrained_critic_says_nothing_and_never_sees_the_token_it_values():
    critic, ids = Critic(POLICY), random_batch().token_ids
    assert (critic(ids) == 0).all()
    torch.nn.init.normal_(critic.head.weight)
    changed = ids.clone()
    changed[:, 5] = 4
    assert torch.allclose(critic(ids)[:, :6], critic(changed)[:, :6])


def test_mini_batches_cover_every_row_once_an_epoch_in_a_seeded_order():
    learner = make_learner(grpo(), minibatch_size=3, epochs=2)
    first = [i.tolist() for i in learner._minibatches(5, 8)]
    assert [len(i) for i in first] == [3, 3, 2] * 2
    assert sorted(row for index in first[:3] for row in index) == list(range(8))
    assert first == [i.tolist() for i in learner._minibatches(5, 8)]
    assert first != [i.tolist() for i in learner._minibatches(6, 8)]


def test_rates_warm_up_then_decay():
    settings = {"lr": 1.0, "betas": (0.9, 0.95), "weight_decay": 0.0}
    linear = Optimizer(**settings, warmup_steps=2, decay="linear", final_lr_share=0.5)
    assert [linear.rate(s, 4) for s in range(4)] == pytest.approx([0.5, 0.875, 0.75, 0.625])
    cosine = Optimizer(**settings, warmup_steps=10, decay="cosine", final_lr_share=0.1)
    assert [cosine.rate(s, 100) for s in (0, 9, 50, 99)] == pytest.approx([0.1, 0.98, 0.5, 0.1], abs=0.01)


def test_the_state_of_the_optimizers_and_the_critic_survives():
    algo, batch = ppo(), random_batch()
    learner = make_learner(algo)
    scores = learner.score(batch)
    learner.update(0, batch, scores, algo.targets(batch, scores), algo)
    again = make_learner(algo)
    again.load_weights(learner.weights())
    again.load_state({name: value.clone() for name, value in learner.state()}.__getitem__)
    metrics = []
    for each in (learner, again):
        scores = each.score(batch)
        metrics.append(each.update(1, batch, scores, algo.targets(batch, scores), algo))
    assert metrics[0] == metrics[1]


def test_an_update_that_is_not_finite_is_skipped_and_too_many_in_a_row_end_the_run(capsys):
    algo = grpo(kl_coef=0.0)
    learner, batch = make_learner(algo, max_skipped=1), random_batch()
    poisoned = replace(batch, rewards=batch.rewards.clone().index_fill(0, torch.tensor([0]), torch.nan))
    weights = [p.clone() for p in learner.policy.parameters()]

    def update(step: int, batch: Batch) -> dict[str, float]:
        scores = learner.score(batch)
        return learner.update(step, batch, scores, algo.targets(batch, scores), algo)

    assert update(0, poisoned)["update/skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(weights, learner.policy.parameters(), strict=True))
    assert "Skipped, 1 in a row of at most 1" in capsys.readouterr().out
    assert update(1, batch)["update/skipped"] == 0  # which ends the row
    assert not all(torch.equal(a, b) for a, b in zip(weights, learner.policy.parameters(), strict=True))
    assert update(2, poisoned)["update/skipped"] == 1
    with pytest.raises(TrainingError, match=r"2 in a row; learner.max_skipped=1"):
        update(3, poisoned)


def test_weights_in_16_bits_gather_updates_that_are_smaller_than_their_last_bit():
    tiny = Optimizer(lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, warmup_steps=0, decay="linear", final_lr_share=1.0)
    algo, batch = grpo(kl_coef=0.0, entropy_coef=0.0), random_batch()
    half, wide = (copy.deepcopy(POLICY) for _ in range(2))
    half.bfloat16()
    wide.float()
    wide.load_state_dict(half.state_dict())
    learners = [make_learner(algo, policy=policy, policy_optimizer=tiny) for policy in (half, wide)]
    before = torch.cat([p.detach().flatten().float() for p in wide.parameters()]).clone()
    for step in range(3):
        for learner in learners:
            scores = learner.score(batch)
            learner.update(step, batch, scores, algo.targets(batch, scores), algo)
    masters = dict(learners[0].state())
    found = torch.cat([masters[f"policy/master/{name}"].flatten() for name, _ in half.named_parameters()])
    expected = torch.cat([p.detach().flatten() for p in wide.parameters()])
    moved = (expected - before).norm()
    assert (found - before).norm() > 0.5 * moved  # in bfloat16 itself most of it would be lost
    assert (found - expected).norm() < moved
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())


def test_adapters_alone_are_trained_and_the_engine_gets_them_merged():
    algo, batch = grpo(kl_coef=0.0), random_batch()
    learner = make_learner(algo, lora=Lora(rank=4, alpha=8, targets="all-linear"))
    plain = {name: value.clone() for name, value in learner.weights()}
    assert set(plain) == {name for name, _ in POLICY.named_parameters()}
    assert all(torch.equal(plain[name], p) for name, p in POLICY.named_parameters())
    scores = learner.score(batch)
    for step in range(2):  # B is zero at first, so A moves in the second
        learner.update(step, batch, scores, algo.targets(batch, scores), algo)
    merged = copy.deepcopy(POLICY)
    merged.load_state_dict({name: value.clone() for name, value in learner.weights()}, strict=False)
    merged.tie_weights()
    changed = [name for name, value in learner.weights() if not torch.equal(value, plain[name])]
    assert changed
    assert all("proj" in name for name in changed)
    mask = batch.action_mask
    said = token_logprobs(merged, batch.token_ids, mask)[0]
    assert torch.allclose(said[mask], token_logprobs(learner.policy, batch.token_ids, mask)[0][mask], atol=1e-9)
    again = make_learner(algo, lora=Lora(rank=4, alpha=8, targets="all-linear"), seed=7)
    again.load_state({name: value.clone() for name, value in learner.state()}.__getitem__)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(learner.weights(), again.weights(), strict=True))


def test_the_reference_of_a_run_of_adapters_is_the_policy_without_them():
    algo, batch = grpo(), random_batch()
    alone = make_learner(algo, **adapted())
    scores = alone.score(batch)
    copied = make_learner(algo, **adapted() | {"reference": copy.deepcopy(POLICY)})
    for step in range(3):
        scores, expected = alone.score(batch), copied.score(batch)
        assert torch.equal(scores.ref_logprobs, expected.ref_logprobs)
        found = alone.update(step, batch, scores, algo.targets(batch, scores), algo)
        assert found == copied.update(step, batch, expected, algo.targets(batch, expected), algo)
    assert not torch.equal(scores.ref_logprobs, scores.old_logprobs)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(alone.weights(), copied.weights(), strict=True))


def test_what_adapters_learned_before_training_begins_is_part_of_the_reference():
    algo, batch = grpo(), random_batch()
    learner = make_learner(algo, **adapted())
    scores = learner.score(batch)
    for step in range(2):
        learner.update(step, batch, scores, algo.targets(batch, scores), algo)
    before = {name: value.clone() for name, value in learner.weights()}
    learner.begin()
    assert all(torch.equal(value, before[name]) for name, value in learner.weights())
    scores = learner.score(batch)
    assert torch.equal(scores.ref_logprobs, scores.old_logprobs)
    assert not torch.allclose(scores.ref_logprobs, make_learner(algo, **adapted()).score(batch).ref_logprobs)


def test_a_critic_on_the_policys_trunk_says_and_learns_what_passes_of_their_own_would():
    """The oracle reads the same weights twice, padded, and differentiates the whole loss at once."""
    algo, batch = ppo(entropy_coef=0.02, value_coef=0.7), random_batch()
    learner = make_learner(algo, **on_the_trunk(), temperature=1.0)
    scores = learner.score(batch)
    scores = replace(scores, old_logprobs=scores.old_logprobs + 0.05 * batch.action_mask)
    targets = algo.targets(batch, scores)
    learner._accumulate(batch, scores, targets, algo)

    policy, critic = copy.deepcopy(POLICY), on_the_trunk()["critic"]
    mask = batch.action_mask
    logprobs, entropy = token_logprobs(policy, batch.token_ids, mask, 1.0, "train")
    hidden = policy.model(batch.token_ids).last_hidden_state
    values = torch.nn.functional.pad(critic.head(hidden).squeeze(-1)[:, :-1], (1, 0)) * mask
    assert torch.allclose(scores.values.double(), values, atol=1e-6)
    loss = algo.token_loss(Forward(logprobs, entropy, values), batch, scores, targets).loss
    (loss * token_weights(mask, algo.weighting)).sum().backward()
    for own, expected in ((learner.policy, policy), (learner.critic, critic)):
        assert own is not None
        for (name, a), (_, b) in zip(own.named_parameters(), expected.named_parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert torch.allclose(a.grad, b.grad, atol=1e-5, rtol=1e-4), name  # norms compute in float32
            assert b.grad.abs().max() > 1e-4, name


@pytest.mark.parametrize("packing", ["shared", "packed", "padded"])
def test_a_critic_on_the_trunk_costs_no_pass_of_its_own(packing):
    algo, batch = ppo(kl_coef=0.0, kl_reward_coef=0.0), random_batch()
    learner, passes = make_learner(algo, **on_the_trunk(), packing=packing, reference=None), []
    learner.policy.model.register_forward_hook(lambda *_: passes.append(1))
    scores = learner.score(batch)
    metrics = learner.update(0, batch, scores, algo.targets(batch, scores), algo)
    assert len(passes) == 2  # one to score, one to learn
    assert metrics["update/critic_grad_norm"] > 0
    names = {name for name, _ in learner.state() if name.startswith("critic/weights/")}
    assert names == {"critic/weights/head.weight", "critic/weights/head.bias"}


def test_adapters_for_layers_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"^lora.targets: .*querry"):
        make_learner(grpo(), lora=Lora(rank=4, alpha=8, targets=("querry",)))


def test_a_policy_in_float16_is_refused_wherever_it_came_from():
    with pytest.raises(ConfigError, match=r"model.dtype is 'float16', .* Use bfloat16 or float32"):
        make_learner(grpo(), policy=copy.deepcopy(POLICY).half())


@pytest.mark.parametrize(
    ("installed", "message"),
    [("", "it is not installed"), ("0.19.7", "DeepSpeed 0.19.7 is here, where 0.19.8 or later is needed")],
    ids=["missing", "too old"],
)
def test_a_deepspeed_that_is_missing_or_too_old_is_one_line(installed, message, tmp_path, monkeypatch):
    if installed:
        folder = tmp_path / f"deepspeed-{installed}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {installed}\n")
    check_installed.cache_clear()  # of what an earlier test found; a refusal is not kept
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError) as refused:
        make_learner(grpo(), backend="deepspeed")
    assert str(refused.value) == f"learner.backend is deepspeed, and {message}: pip install 'deepspeed>=0.19.8'"


def test_setup_py_asks_for_the_deepspeed_that_is_needed():
    asked = re.findall(r"deepspeed>=([\d.]+)", (Path(__file__).parents[1] / "setup.py").read_text())
    assert set(asked) == {NEEDED}


def test_a_disk_that_is_not_there_is_named(tmp_path):
    settings = replace(ZERO, zero_stage=3, offload="nvme", nvme_path=str(tmp_path / "scratch"))
    with pytest.raises(ConfigError, match=r"learner.deepspeed.nvme_path is '.*/scratch', and nothing can be kept"):
        settings.of("policy").config(torch.float32, 1.0)
    assert not (tmp_path / "scratch").exists(), "a mistyped path is not made"


def test_only_what_is_trained_lies_on_a_disk(tmp_path):
    settings = replace(ZERO, zero_stage=3, offload="nvme", nvme_path=str(tmp_path))
    config = settings.untrained().config(torch.float32, 1.0)
    assert "offload_optimizer" not in config["zero_optimization"]
    assert not list(tmp_path.iterdir())


def test_values_are_of_float32_though_the_body_computes_in_bfloat16():
    """They go into GAE and are clipped: eight bits are too few."""
    ids_1T = torch.tensor([[5, 6, 7, 8]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Critic(copy.deepcopy(POLICY).float())(ids_1T).dtype == torch.float32


def test_kl_is_told_where_there_is_a_reference_and_nowhere_else():
    """Without one its log-probs are those from before the update: that is another distance."""
    for algo, is_told in ((grpo(kl_coef=0.0), False), (grpo(kl_coef=0.1), True)):
        learner = make_learner(algo)
        batch = random_batch(rows=4, columns=12)
        scores = learner.score(batch)
        assert ("update/kl" in learner.update(0, batch, scores, algo.targets(batch, scores), algo)) is is_told
