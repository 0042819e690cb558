"""Every formula against an oracle that shares no code with it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otcrl.algos import functional as F

seeds = st.integers(0, 10_000)


def random_mask(generator: torch.Generator, rows: int = 3, columns: int = 9) -> torch.Tensor:
    mask = torch.rand(rows, columns, generator=generator) > 0.4
    mask[:, 0] = False
    return mask


@given(seeds, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
@settings(max_examples=50, deadline=None)
def test_gae_is_the_double_sum_over_action_tokens(seed, gamma, lam):
    g = torch.Generator().manual_seed(seed)
    mask = random_mask(g)
    rewards, values = torch.randn(3, 9, generator=g).double(), torch.randn(3, 9, generator=g).double()
    found = F.gae(rewards, values, mask, gamma, lam)
    for b in range(3):
        acts = mask[b].nonzero().flatten().tolist()
        r, v = [rewards[b, t].item() for t in acts], [values[b, t].item() for t in acts] + [0.0]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(acts))]
        for i, t in enumerate(acts):  # Eq. 16: A_i = sum over k of (gamma lam)^k delta_{i+k}
            expected = sum((gamma * lam) ** k * delta[i + k] for k in range(len(acts) - i))
            assert found[b, t].item() == pytest.approx(expected, abs=1e-9)
    assert (found[~mask] == 0).all()


def test_gae_never_reads_observation_tokens():
    mask = torch.tensor([[False, True, False, False, True]])
    rewards, values = torch.zeros(1, 5), torch.tensor([[0.0, 0.5, 9.0, 9.0, 0.25]])
    rewards[0, 4] = 1.0
    changed = values.clone()
    changed[0, 2:4] = -77.0
    assert torch.equal(F.gae(rewards, values, mask, 0.9, 0.8), F.gae(rewards, changed, mask, 0.9, 0.8))


def test_gae_by_hand():
    advantages = F.gae(torch.tensor([[0.0, 1]]), torch.tensor([[0.5, 0.25]]), torch.tensor([[True, True]]), 0.9, 0.8)
    last = 1 - 0.25
    first = 0 + 0.9 * 0.25 - 0.5 + 0.9 * 0.8 * last
    assert advantages[0].tolist() == pytest.approx([first, last])


def test_group_advantages_use_the_unbiased_std_of_their_own_group():
    rewards, groups = torch.tensor([0.0, 1.0, 5.0, 5.0, 8.0]), torch.tensor([0, 0, 1, 1, 1])
    found = F.group_advantages(rewards, groups, normalize=True, eps=0.0)
    assert found[:2].tolist() == pytest.approx([-0.5 / math.sqrt(0.5), 0.5 / math.sqrt(0.5)])
    assert found[2:].tolist() == pytest.approx([-1 / math.sqrt(3), -1 / math.sqrt(3), 2 / math.sqrt(3)])


def test_group_advantages_without_normalisation_are_distances_from_the_mean():
    found = F.group_advantages(torch.tensor([0.0, 1, 5, 5]), torch.tensor([0, 0, 1, 1]), normalize=False)
    assert found.tolist() == [-0.5, 0.5, 0, 0]


@given(st.floats(-10, 10, width=32), st.integers(2, 16))
def test_equal_rewards_give_exactly_no_advantage(value, size):
    rewards = torch.full((size,), value)
    assert (F.group_advantages(rewards, torch.zeros(size).long(), normalize=True) == 0).all()


def test_a_lone_trajectory_learns_nothing():
    assert F.group_advantages(torch.tensor([3.0]), torch.tensor([7]), normalize=True).tolist() == [0.0]


def test_std_floor_keeps_small_differences_small():
    rewards, groups = torch.tensor([0.99, 1.0]), torch.tensor([0, 0])
    free = F.group_advantages(rewards, groups, normalize=True)
    floored = F.group_advantages(rewards, groups, normalize=True, std_floor=0.1)
    assert free[1].item() == pytest.approx(0.707, abs=1e-3)
    assert floored[1].item() == pytest.approx(0.05, abs=1e-3)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_clipped_surrogate_gradient_is_the_finite_difference(seed):
    g = torch.Generator().manual_seed(seed)
    old, adv = torch.randn(6, generator=g).double(), torch.randn(6, generator=g).double()
    new = (old + 0.3 * torch.randn(6, generator=g).double()).requires_grad_()
    F.clipped_surrogate(new, old, adv, 0.2, 0.2).sum().backward()
    assert new.grad is not None
    for i in range(6):
        nudge = torch.zeros(6, dtype=torch.double)
        nudge[i] = 1e-6
        high = F.clipped_surrogate(new.detach() + nudge, old, adv, 0.2, 0.2).sum()
        low = F.clipped_surrogate(new.detach() - nudge, old, adv, 0.2, 0.2).sum()
        assert new.grad[i].item() == pytest.approx(((high - low) / 2e-6).item(), abs=1e-5)


def test_a_bounded_weight_is_counted_whatever_the_advantage():
    ratio = torch.tensor([20.0, 1.5, 1.0, 0.1])
    assert F.bound_fraction(ratio.log(), torch.zeros(4), 0.5, 1.0).tolist() == [1, 0, 0, 1]


def test_clipped_surrogate_and_clip_fraction_case_by_case():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    adv = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    loss = F.clipped_surrogate(ratio.log(), torch.zeros(5), adv, 0.2, 0.2)
    assert loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8, -1.1])
    assert F.clip_fraction(ratio.log(), torch.zeros(5), adv, 0.2, 0.2).tolist() == [1, 0, 0, 1, 0]


def test_clip_higher_is_asymmetric():
    loss = F.clipped_surrogate(torch.tensor([1.5, 0.5]).log(), torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2, 0.28)
    assert loss.tolist() == pytest.approx([-1.28, 0.8])


def test_value_loss_takes_the_worse_of_the_clipped_and_the_free_value():
    # V moved from 0 to 2 with clip 0.5: free error (2-1)^2 = 1, clipped error (0.5-1)^2 = 0.25.
    loss = F.clipped_value_loss(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([1.0]), 0.5)
    assert loss.item() == pytest.approx(0.5)


@given(st.lists(st.tuples(st.floats(-3, 0), st.floats(-3, 0)), min_size=1, max_size=8))
def test_k3_is_never_negative_and_zero_at_equality(pairs):
    new, ref = torch.tensor([p[0] for p in pairs]).double(), torch.tensor([p[1] for p in pairs]).double()
    assert (F.kl_k3(new, ref) >= -1e-12).all()
    assert (F.kl_k3(ref, ref) == 0).all()


def test_k1_and_k3_both_average_to_the_kl():
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.5, 0.3, 0.2]).double()
    exact = (p * (p / q).log()).sum()
    assert (p * F.kl_k1(p.log(), q.log())).sum().item() == pytest.approx(exact.item())
    assert (p * F.kl_k3(p.log(), q.log())).sum().item() == pytest.approx(exact.item())


@pytest.mark.parametrize("weighting", ["token", "sequence"])
@given(seeds)
@settings(max_examples=20, deadline=None)
def test_token_weights_sum_to_one_and_vanish_off_actions(weighting, seed):
    mask = random_mask(torch.Generator().manual_seed(seed))
    mask[0, 1] = True
    weights = F.token_weights(mask, weighting)
    assert weights.sum().item() == pytest.approx(1)
    assert (weights[~mask] == 0).all()


def test_sequence_weighting_is_the_mean_of_means_and_token_weighting_the_mean():
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    loss = torch.tensor([[1.0, 2.0, 3.0, 99.0], [10.0, 99.0, 99.0, 99.0]])
    assert (F.token_weights(mask, "sequence") * loss).sum().item() == pytest.approx((2 + 10) / 2)
    assert (F.token_weights(mask, "token") * loss).sum().item() == pytest.approx(16 / 4)


def test_an_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="'token' or 'sequence', got 'tokens'"):
        F.token_weights(torch.ones(1, 1).bool(), "tokens")


def test_last_action_of_a_row_without_actions_is_empty():
    mask = torch.tensor([[False, True, True, False], [False, False, False, False]])
    assert F.last_action(mask).tolist() == [[False, False, True, False], [False] * 4]


def test_whitening_sees_action_tokens_only():
    mask = torch.tensor([[True, False, True, True]])
    a = F.whiten(torch.tensor([[1.0, 5.0, 2.0, 3.0]]), mask)
    b = F.whiten(torch.tensor([[1.0, -999.0, 2.0, 3.0]]), mask)
    assert torch.equal(a, b)
    assert a[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert a[mask].std().item() == pytest.approx(1, abs=1e-5)
    assert a[0, 1] == 0


def test_whitening_without_actions_is_zero():
    assert F.whiten(torch.ones(2, 3), torch.zeros(2, 3).bool()).tolist() == [[0.0] * 3] * 2
