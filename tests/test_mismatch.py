"""Sampler and learner differ: measured as the formulas say, and made up for without any algorithm knowing."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otcrl.algos.functional import token_weights
from otcrl.algos.mismatch import Correction, bounded, check_agreement, corrected, effective_share, mismatch, ratios
from otcrl.errors import TrainingError
from otcrl.models.policy import token_logprobs
from otcrl.types import Batch, Forward, Metrics, Scores, Targets, rows
from tests.test_learner import POLICY, grpo, make_learner, ppo, random_batch

LEVELS = pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
seeds = st.integers(0, 10_000)
EXACT = settings(max_examples=40, deadline=None)


def random_logprobs(seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Learner's and sampler's log-probs and a mask with an action in every row; each [4, 9]."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 9, generator=g) > 0.4
    mask[:, 5] = True
    pi, mu = -torch.rand(4, 9, generator=g).double(), -torch.rand(4, 9, generator=g).double()
    return spread * pi, spread * mu, mask


def batch_of(mask: Tensor, mu: Tensor) -> Batch:
    return Batch(
        token_ids=torch.zeros_like(mask).long(),
        attention_mask=torch.ones_like(mask),
        action_mask=mask,
        sampler_logprobs=mu,
        rewards=torch.arange(len(mask)) / 2,
        group_ids=torch.zeros(len(mask)).long(),
    )


def correction(**other) -> Correction:
    return Correction(**{"level": "token", "bound": "truncate", "low": 0.0, "high": 2.0} | other)


# -- weights ------------------------------------------------------------------------------------------


@given(seeds)
@EXACT
def test_ratios_are_the_formulas_written_out_in_loops(seed):
    pi, mu, mask = random_logprobs(seed)
    found = {level: ratios(pi, mu, mask, level).numpy() for level in ("token", "sequence", "geometric", "none")}
    p, m, acts = np.exp(pi.numpy()), np.exp(mu.numpy()), mask.numpy()
    for b, t in itertools.product(range(4), range(9)):
        product, count = 1.0, 0
        for s in range(9):
            product, count = (product * p[b, s] / m[b, s], count + 1) if acts[b, s] else (product, count)
        expected = {"token": p[b, t] / m[b, t], "sequence": product, "geometric": product ** (1 / count), "none": 1.0}
        for level, weights in found.items():
            assert weights[b, t] == pytest.approx(expected[level] if acts[b, t] else 1.0, rel=1e-12)


@LEVELS
@given(seeds)
@EXACT
def test_weights_are_exactly_one_when_sampler_and_learner_agree(level, seed):
    pi, _, mask = random_logprobs(seed)
    assert (ratios(pi, pi, mask, level) == 1).all()


@given(seeds)
@EXACT
def test_the_sequence_weight_is_the_product_of_the_token_weights_and_the_geometric_one_its_root(seed):
    pi, mu, mask = random_logprobs(seed)
    product_B = ratios(pi, mu, mask, "token").prod(1)
    for b in range(4):
        assert torch.allclose(ratios(pi, mu, mask, "sequence")[b][mask[b]], product_B[b])
        assert torch.allclose(ratios(pi, mu, mask, "geometric")[b][mask[b]] ** mask[b].sum(), product_B[b])


@LEVELS
@given(seeds)
@EXACT
def test_what_stands_off_the_actions_changes_nothing(level, seed):
    pi, mu, mask = random_logprobs(seed)
    noisy_pi, noisy_mu = torch.where(mask, pi, -77.0), torch.where(mask, mu, math.nan)
    assert torch.equal(ratios(noisy_pi, noisy_mu, mask, level), ratios(pi, mu, mask, level))
    assert mismatch(noisy_pi, noisy_mu, mask) == mismatch(pi, mu, mask)


@pytest.mark.parametrize(("bound", "expected"), [("truncate", [0.5, 0.5, 1, 2, 2]), ("mask", [0, 0.5, 1, 2, 0])])
def test_a_weight_outside_the_band_becomes_its_bound_or_nothing(bound, expected):
    assert bounded(torch.tensor([0.1, 0.5, 1.0, 2.0, 7.0]), bound, 0.5, 2.0).tolist() == expected


@LEVELS
@given(seeds, st.floats(0, 1), st.floats(1, 50), st.sampled_from([1.0, 1000.0]))
@EXACT
def test_bounded_weights_stay_in_the_band_however_far_apart_the_two_are(level, seed, low, high, spread):
    pi, mu, mask = random_logprobs(seed, spread)
    free = ratios(pi, mu, mask, level)
    truncated, masked = bounded(free, "truncate", low, high), bounded(free, "mask", low, high)
    assert ((low <= truncated) & (truncated <= high)).all()  # true of no NaN either
    inside = (low <= free) & (free <= high)
    assert torch.equal(truncated[inside], free[inside])
    assert torch.equal(masked, torch.where(inside, free, 0.0))


def test_the_product_over_a_long_trajectory_may_be_larger_than_any_float():
    mask = torch.ones(2, 4000).bool()
    gap = torch.tensor([[1.0], [-1.0]]).expand(2, 4000)
    free = ratios(gap, torch.zeros(2, 4000), mask, "sequence")
    assert bounded(free, "truncate", 0.0, 2.0)[:, 0].tolist() == [2, 0]
    assert bounded(free, "mask", 0.5, 2.0)[:, 0].tolist() == [0, 0]


def test_no_gradient_flows_through_a_weight():
    pi, mu, mask = random_logprobs(0)
    assert not ratios(pi.requires_grad_(), mu, mask, "sequence").requires_grad


# -- statistics ---------------------------------------------------------------------------------------


def test_effective_sample_size_by_hand():
    assert effective_share(torch.tensor([3.0, 1.0]).log()) == pytest.approx(4**2 / (2 * 10))
    assert effective_share(torch.tensor([0.0, -1000.0, -1000.0, -1000.0])) == pytest.approx(1 / 4)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=12), st.floats(-500, 500))
def test_effective_sample_size_is_a_share_and_one_only_for_constant_weights(log_weights, factor):
    logs = torch.tensor(log_weights, dtype=torch.double)
    share = effective_share(logs)
    assert 1 / len(logs) - 1e-12 <= share <= 1 + 1e-12
    assert effective_share(logs + factor) == pytest.approx(share, rel=1e-9)
    assert effective_share(torch.full_like(logs, factor)) == 1
    if max(log_weights) - min(log_weights) > 1e-3:
        assert share < 1 - 1e-9


@given(seeds)
@EXACT
def test_statistics_are_the_formulas_in_numpy(seed):
    pi, mu, mask = random_logprobs(seed)
    found = mismatch(pi, mu, mask)
    gap = (pi - mu).numpy()[mask.numpy()]
    w, per_row = np.exp(gap), np.exp(((pi - mu) * mask).sum(1).numpy())
    assert found == pytest.approx(
        {
            "logprob_gap_mean": np.mean(np.abs(gap)),
            "logprob_gap_max": np.max(np.abs(gap)),
            "mismatch_kl": np.mean(-gap),
            "mismatch_kl_k3": np.mean(w - 1 - gap),
            "ess_token": w.sum() ** 2 / (w.size * (w**2).sum()),
            "ess_sequence": per_row.sum() ** 2 / (4 * (per_row**2).sum()),
        }
    )


def test_both_kl_estimates_average_to_the_kl_of_the_learner_from_the_sampler():
    mu, pi = torch.tensor([1 / 2, 1 / 4, 1 / 4]).double(), torch.tensor([0.7, 0.2, 0.1]).double()
    drawn = torch.tensor([[0, 0, 1, 2]])  # each token as often as mu says
    found = mismatch(pi.log()[drawn], mu.log()[drawn], torch.ones(1, 4).bool())
    exact = (mu * (mu / pi).log()).sum().item()
    assert found["mismatch_kl"] == pytest.approx(exact)
    assert found["mismatch_kl_k3"] == pytest.approx(exact)


def test_rows_without_actions_are_no_trajectories_and_no_actions_at_all_say_nothing():
    pi, mu, mask = random_logprobs(1)
    mask[2] = False
    assert mismatch(pi, mu, mask) == mismatch(pi[[0, 1, 3]], mu[[0, 1, 3]], mask[[0, 1, 3]])
    assert mismatch(pi, mu, torch.zeros_like(mask)) == {}


# -- what it does to the update -------------------------------------------------------------------------


def test_weights_go_on_the_advantages_and_only_there():
    mask = torch.tensor([[False, True, True, True]])
    batch = batch_of(mask, torch.tensor([[0.0, 0.1, 1.0, 0.5]]).log())
    old = torch.tensor([[0.0, 0.2, 0.5, 1.0]]).log()
    scores = Scores(old, old, torch.zeros(1, 4))
    targets = Targets(torch.tensor([[0.0, 1.0, -2.0, 3.0]]), torch.tensor([[0.0, 4.0, 5.0, 6.0]]))
    found, metrics = corrected(targets, batch, scores, correction(high=1.5))
    assert torch.allclose(found.advantages, torch.tensor([[0.0, 1.5, -1.0, 4.5]]))
    assert found.advantages.dtype == torch.float32
    assert torch.equal(found.returns, targets.returns)
    assert metrics["rollout/is_weight_mean"] == pytest.approx((1.5 + 0.5 + 1.5) / 3)
    assert metrics["rollout/is_truncated_share"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("bound", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["none", "token", "sequence", "geometric"])
def test_nothing_changes_by_a_bit_when_the_sampler_is_the_old_policy(level, bound):
    """So `learner.old_logprobs=sampler` makes the correction a no-op: the ratio of the loss is already pi / mu."""
    batch, algo = random_batch(), ppo()
    scores = make_learner(algo, old_logprobs="sampler").score(batch)
    targets = algo.targets(batch, scores)
    found, metrics = corrected(targets, batch, scores, correction(level=level, bound=bound, low=0.9, high=1.1))
    assert torch.equal(found.advantages, targets.advantages)
    assert metrics == {"rollout/is_weight_mean": 1, "rollout/is_truncated_share": 0}


def test_level_none_leaves_any_mismatch_as_it_is():
    batch, algo = random_batch(), grpo()
    scores = make_learner(algo).score(batch)
    targets = algo.targets(batch, scores)
    assert torch.equal(corrected(targets, batch, scores, correction(level="none"))[0].advantages, targets.advantages)


@LEVELS
@pytest.mark.parametrize(
    "algo", [grpo(kl_coef=0.0, entropy_coef=0.0), ppo(kl_coef=0.0, entropy_coef=0.0)], ids=["grpo", "ppo"]
)
def test_a_tokens_policy_gradient_is_multiplied_by_its_weight_and_its_value_gradient_by_nothing(algo, level):
    batch, g = random_batch(2), torch.Generator().manual_seed(3)
    old = (batch.sampler_logprobs + 0.5 * torch.randn(8, 14, generator=g)) * batch.action_mask
    scores = Scores(old, old, torch.randn(8, 14, generator=g))
    plain = algo.targets(batch, scores)
    weighted, _ = corrected(plain, batch, scores, correction(level=level, bound="mask", low=0.8))
    weights = bounded(ratios(old, batch.sampler_logprobs, batch.action_mask, level), "mask", 0.8, 2.0).float()

    def gradients(targets: Targets) -> tuple[Tensor, Tensor]:
        new = (old + 0.2 * torch.randn(old.shape, generator=torch.Generator().manual_seed(4))).requires_grad_()
        values = (scores.values + 0.1).requires_grad_()
        loss = algo.token_loss(Forward(new, torch.zeros_like(new), values), batch, scores, targets).loss
        (loss * token_weights(batch.action_mask, algo.weighting)).sum().backward()
        assert new.grad is not None
        return new.grad, torch.zeros(1) if values.grad is None else values.grad

    (policy, value), (policy_weighted, value_weighted) = gradients(plain), gradients(weighted)
    assert torch.allclose(policy_weighted, policy * weights, atol=1e-9)
    assert torch.equal(value, value_weighted)
    assert (weights[batch.action_mask] == 0).any()
    assert policy.abs().max() > 1e-3


# -- unbiased: every trajectory of a small world, no sampling ---------------------------------------------


def world(length: int, level: str, high: float) -> tuple[Tensor, Tensor]:
    """(Exact policy gradient of the expected reward; that of GRPO's loss on mu's trajectories, in expectation.)

    Three tokens, `length` of them; pi and mu are tables of logits, the reward depends on the whole trajectory.
    """
    g = torch.Generator().manual_seed(length)
    pi_logits = torch.randn(length, 3, 3, generator=g).double().requires_grad_()  # [t, previous token, token]
    mu_logits = pi_logits.detach() + 0.7 * torch.randn(length, 3, 3, generator=g).double()
    ids = torch.tensor(list(itertools.product(range(3), repeat=length)))
    before = torch.cat([torch.zeros(len(ids), 1).long(), ids[:, :-1]], 1)
    places = torch.arange(length).expand_as(ids)
    pi, mu = (logits.log_softmax(-1)[places, before, ids] for logits in (pi_logits, mu_logits))
    rewards = torch.randn(len(ids), generator=g).double()
    exact = torch.autograd.grad((pi.sum(1).exp() * rewards).sum(), pi_logits, retain_graph=True)[0]

    batch = batch_of(torch.ones_like(ids).bool(), mu)
    scores = Scores(pi.detach(), pi.detach(), torch.zeros_like(mu))
    targets = Targets(rewards[:, None].expand_as(mu), torch.zeros_like(mu))
    targets, _ = corrected(targets, batch, scores, correction(level=level, high=high))
    algo = grpo(kl_coef=0.0, entropy_coef=0.0)
    loss = algo.token_loss(Forward(pi, torch.zeros_like(mu), torch.zeros_like(mu)), batch, scores, targets).loss
    return exact, -torch.autograd.grad((mu.sum(1).exp() * loss.sum(1)).sum(), pi_logits)[0]


@pytest.mark.parametrize(
    ("length", "level"), [(1, "token"), (1, "sequence"), (1, "geometric"), (2, "sequence"), (3, "sequence")]
)
def test_the_weighted_gradient_is_the_on_policy_gradient_in_expectation(length, level):
    exact, found = world(length, level, high=1e6)
    assert torch.allclose(found, exact, atol=1e-12)
    assert exact.abs().max() > 0.05


@pytest.mark.parametrize("level", ["none", "token", "geometric"])
def test_over_more_than_one_token_only_the_sequence_weight_is_exact(level):
    exact, found = world(3, level, high=1e6)
    assert (found - exact).abs().max() > 0.01


def test_truncation_takes_away_what_pi_has_above_high_times_mu():
    exact, found = world(1, "token", high=1.2)
    g = torch.Generator().manual_seed(1)
    pi_logits = torch.randn(1, 3, 3, generator=g).double()
    mu_logits = pi_logits + 0.7 * torch.randn(1, 3, 3, generator=g).double()
    rewards = torch.randn(3, generator=g).double()
    pi, mu = pi_logits[0, 0].softmax(-1), mu_logits[0, 0].softmax(-1)
    kept = torch.minimum(pi, 1.2 * mu) * rewards
    assert torch.allclose(found[0, 0], kept - pi * kept.sum())  # gradient of log-softmax
    assert not torch.allclose(found, exact)


# -- in the learner and the loop ---------------------------------------------------------------------------


@pytest.mark.parametrize("algo", [grpo(), ppo()], ids=["grpo", "ppo"])
def test_both_kinds_of_old_logprobs_report_the_same_mismatch_without_another_forward_pass(algo):
    batch, found, passes = random_batch(), {}, {}
    for kind in ("recompute", "sampler"):
        learner = make_learner(algo, old_logprobs=kind, micro_tokens=30)
        count: list[int] = []
        learner.policy.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        scores = learner.score(batch)
        metrics = learner.update(0, batch, scores, algo.targets(batch, scores), algo)
        found[kind] = {k: v for k, v in metrics.items() if k.startswith("rollout/")}
        passes[kind] = len(count)
    assert len(found["sampler"]) == 6
    assert found["sampler"] == pytest.approx(found["recompute"], rel=1e-5)
    assert passes["recompute"] == 2 * passes["sampler"]


def test_with_the_samplers_logprobs_the_first_mini_batch_is_measured_before_any_update():
    algo, batch = grpo(), random_batch()
    learner = make_learner(algo, old_logprobs="sampler", minibatch_size=4, epochs=2)
    first = rows(batch, next(iter(learner._minibatches(0, 8))))
    logprobs = token_logprobs(POLICY, first.token_ids, first.action_mask, 0.7)[0]
    expected = {f"rollout/{k}": v for k, v in mismatch(logprobs, first.sampler_logprobs, first.action_mask).items()}
    scores = learner.score(batch)
    metrics = learner.update(0, batch, scores, algo.targets(batch, scores), algo)
    assert {k: metrics[k] for k in expected} == pytest.approx(expected, rel=1e-5)


def test_a_step_in_which_nothing_was_looked_at_claims_no_agreement():
    algo = grpo(kl_coef=0.0, entropy_coef=0.0)
    batch = replace(random_batch(), rewards=torch.ones(8))
    learner = make_learner(algo, old_logprobs="sampler")
    scores = learner.score(batch)
    metrics = learner.update(0, batch, scores, algo.targets(batch, scores), algo)
    assert not any(name.startswith("rollout/") for name in metrics)
    check_agreement(0, metrics, 0.2)


def test_a_learner_that_forgets_the_samplers_temperature_is_stopped():
    algo, batch = grpo(), random_batch()
    sharp = token_logprobs(POLICY, batch.token_ids, batch.action_mask, temperature=0.25)[0]
    batch = replace(batch, sampler_logprobs=sharp.detach())

    def metrics(temperature: float) -> Metrics:
        learner = make_learner(algo, temperature=temperature)
        scores = learner.score(batch)
        return learner.update(3, batch, scores, algo.targets(batch, scores), algo)

    check_agreement(3, metrics(0.25), 1e-5)
    with pytest.raises(TrainingError, match=r"step 3: sampler and learner disagree by \d\.\d+ nats .* temperature"):
        check_agreement(3, metrics(1.0), 0.2)
    check_agreement(3, metrics(1.0), None)


def test_a_gap_that_is_not_a_number_is_no_agreement():
    with pytest.raises(TrainingError, match="disagree by nan nats"):
        check_agreement(0, {"rollout/logprob_gap_mean": math.nan, "rollout/logprob_gap_max": math.nan}, 0.2)


@pytest.mark.parametrize("bounds", [(0.0, 0.5), (1.5, 2.0), (-1.0, 2.0), (0.0, math.inf), (0.0, math.nan)])
def test_a_band_without_the_weight_of_no_mismatch_is_refused(bounds):
    with pytest.raises(ValueError, match="low and high must be around 1"):
        correction(low=bounds[0], high=bounds[1])
