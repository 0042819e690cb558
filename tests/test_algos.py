"""Each algorithm is its paper's equation, which is written out here in loops over plain numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otcrl.algos.functional import (
    clipped_surrogate,
    group_advantages,
    leave_one_out,
    mean_normalized,
    row_mean,
    token_weights,
)
from otcrl.algos.parts import loss_of_weighted
from otcrl.errors import TrainingError
from otcrl.protocols import Algorithm
from otcrl.types import Batch, Forward, Scores
from tests.algorithms import NAMES, WITH_GROUPS, algorithm

seeds = st.integers(0, 10_000)


@dataclass
class Row:
    """One trajectory in plain numbers: the log-probs of its action tokens, its reward and its group."""

    new: list[float]
    old: list[float]
    ref: list[float]
    reward: float
    group: int


@dataclass
class Case:
    """The same trajectories for the code and for the oracle."""

    batch: Batch
    scores: Scores
    logprobs: Tensor  # [B, T] under the policy that is updated

    def rows(self) -> list[Row]:
        rows = []
        for b in range(len(self.batch.rewards)):
            acts = self.batch.action_mask[b]
            tensors = (self.logprobs, self.scores.old_logprobs, self.scores.ref_logprobs)
            new, old, ref = (tensor[b][acts].tolist() for tensor in tensors)
            rows.append(Row(new, old, ref, self.batch.rewards[b].item(), int(self.batch.group_ids[b])))
        return rows


def random_case(seed: int, rows: int = 8, columns: int = 7, spread: float = 0.3) -> Case:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=g) > 0.4
    mask[:, 0], mask[:, 2] = False, True
    old, ref = (-torch.rand(rows, columns, generator=g).double() * mask for _ in range(2))
    batch = Batch(
        token_ids=torch.zeros(rows, columns).long(),
        attention_mask=torch.ones(rows, columns).bool(),
        action_mask=mask,
        sampler_logprobs=old,
        rewards=torch.randint(0, 5, (rows,), generator=g).double() / 4,
        group_ids=torch.arange(rows) // 4,
    )
    new = (old + spread * torch.randn(rows, columns, generator=g).double()) * mask
    return Case(batch, Scores(old, ref, torch.zeros_like(old)), new)


def loss(algo: Algorithm, case: Case, logprobs: Tensor | None = None) -> Tensor:
    """What the learner minimises."""
    new = case.logprobs if logprobs is None else logprobs
    forward = Forward(new, torch.zeros_like(new), torch.zeros_like(new))
    weights_BT = token_weights(case.batch.action_mask, algo.weighting)
    targets = algo.targets(case.batch, case.scores)
    out = loss_of_weighted(algo, forward, case.batch, case.scores, targets, weights_BT)
    return (out.loss * weights_BT).sum()


def gradient(algo: Algorithm, case: Case) -> Tensor:
    new = case.logprobs.clone().requires_grad_()
    loss(algo, case, new).backward()
    assert new.grad is not None
    return new.grad


# -- the papers' equations ------------------------------------------------------------------------------


def siblings(rows: list[Row], row: Row) -> list[float]:
    return [other.reward for other in rows if other.group == row.group]


def grpo_advantage(rows: list[Row], row: Row) -> float:
    rewards = siblings(rows, row)
    return 0.0 if len(set(rewards)) == 1 else (row.reward - fmean(rewards)) / (stdev(rewards) + 1e-6)


def clipped(ratio: float, advantage: float, low: float, high: float) -> float:
    return min(ratio * advantage, max(1 - low, min(1 + high, ratio)) * advantage)


def surrogates(row: Row, advantages: list[float], low: float, high: float) -> list[float]:
    return [clipped(math.exp(n - o), a, low, high) for n, o, a in zip(row.new, row.old, advantages, strict=True)]


def token_mean(rows: list[Row], terms: list[list[float]]) -> float:
    return -sum(map(sum, terms)) / sum(len(row.new) for row in rows)


def grpo(rows: list[Row], low: float = 0.2, high: float = 0.2) -> float:
    """DeepSeekMath Eq. 3 without KL."""
    return -fmean(fmean(surrogates(row, [grpo_advantage(rows, row)] * len(row.new), low, high)) for row in rows)


def dr_grpo(rows: list[Row]) -> float:
    total = 0.0
    for row in rows:
        advantage = row.reward - fmean(siblings(rows, row))
        total += sum(surrogates(row, [advantage] * len(row.new), 0.2, 0.2)) / 2048
    return -total / len(rows)


def dapo(rows: list[Row]) -> float:
    return token_mean(rows, [surrogates(r, [grpo_advantage(rows, r)] * len(r.new), 0.2, 0.28) for r in rows])


def rloo(rows: list[Row], beta: float = 0.0) -> float:
    def shaped(row: Row) -> float:
        return row.reward - beta * sum(o - r for o, r in zip(row.old, row.ref, strict=True))

    total = 0.0
    for i, row in enumerate(rows):
        others = [shaped(other) for j, other in enumerate(rows) if other.group == row.group and j != i]
        total += clipped(math.exp(sum(row.new) - sum(row.old)), shaped(row) - fmean(others), 0.2, 0.2)
    return -total / len(rows)


def gspo(rows: list[Row], low: float = 0.0003, high: float = 0.0004) -> float:
    total = 0.0
    for row in rows:
        ratio = math.exp(sum(n - o for n, o in zip(row.new, row.old, strict=True)) / len(row.new))
        total += clipped(ratio, grpo_advantage(rows, row), low, high)
    return -total / len(rows)


def cispo(rows: list[Row]) -> float:
    """Its value. The weight takes no part in its gradient."""
    return token_mean(
        rows,
        [
            [min(math.exp(n - o), 5.0) * grpo_advantage(rows, row) * n for n, o in zip(row.new, row.old, strict=True)]
            for row in rows
        ],
    )


def max_rl(rows: list[Row]) -> float:
    terms = []
    for row in rows:
        mean = fmean(siblings(rows, row))
        terms.append(surrogates(row, [(row.reward - mean) / mean if mean else 0.0] * len(row.new), 0.2, 0.2))
    return token_mean(rows, terms)


def normalised(advantages: list[list[float]]) -> list[list[float]]:
    everything = [a for row in advantages for a in row]
    mean, std = fmean(everything), stdev(everything)
    return [[(a - mean) / std for a in row] for row in advantages]


def reinforce_pp(rows: list[Row], beta: float = 0.001) -> float:
    advantages = []
    for row in rows:
        kl = [o - r for o, r in zip(row.old, row.ref, strict=True)]
        advantages.append([row.reward - beta * sum(kl[t:]) for t in range(len(kl))])
    terms = [surrogates(row, a, 0.2, 0.2) for row, a in zip(rows, normalised(advantages), strict=True)]
    return token_mean(rows, terms)


def reinforce_pp_baseline(rows: list[Row], beta: float = 0.001) -> float:
    advantages = [[row.reward - fmean(siblings(rows, row))] * len(row.new) for row in rows]
    terms = [surrogates(row, a, 0.2, 0.2) for row, a in zip(rows, normalised(advantages), strict=True)]
    k2 = sum((n - r) ** 2 / 2 for row in rows for n, r in zip(row.new, row.ref, strict=True))
    return token_mean(rows, terms) + beta * k2 / sum(len(row.new) for row in rows)


Oracle = Callable[[list[Row]], float]
EQUATIONS: dict[str, tuple[Oracle, dict[str, object]]] = {
    "grpo": (grpo, {"kl_coef": 0.0}),
    "dr_grpo": (dr_grpo, {}),
    "dapo": (dapo, {}),
    "rloo": (rloo, {}),
    "rloo with a KL penalty": (partial(rloo, beta=0.1), {"kl_reward_coef": 0.1}),
    "gspo": (gspo, {}),
    "gspo with a wide clip": (partial(gspo, low=0.2, high=0.3), {"clip_low": 0.2, "clip_high": 0.3}),
    "cispo": (cispo, {}),
    "max_rl": (max_rl, {}),
    "reinforce_pp": (reinforce_pp, {}),
    "reinforce_pp with more KL": (partial(reinforce_pp, beta=0.3), {"kl_reward_coef": 0.3}),
    "reinforce_pp_baseline": (reinforce_pp_baseline, {}),
    "reinforce_pp_baseline with more KL": (partial(reinforce_pp_baseline, beta=0.3), {"kl_coef": 0.3}),
}
EACH_EQUATION = pytest.mark.parametrize("name", EQUATIONS)


def test_every_algorithm_has_its_equation_here():
    assert {name.split()[0] for name in EQUATIONS} == set(NAMES) - {"ppo"}  # whose loops are in test_learner.py


@EACH_EQUATION
@given(seeds)
@settings(max_examples=15, deadline=None)
def test_the_loss_is_the_papers(name, seed):
    oracle, other = EQUATIONS[name]
    case = random_case(seed)
    assert loss(algorithm(name.split()[0], **other), case).item() == pytest.approx(oracle(case.rows()), abs=1e-6)


@EACH_EQUATION
@given(seeds)
@settings(max_examples=5, deadline=None)
def test_the_gradient_is_the_slope_of_the_papers_loss(name, seed):
    if name == "cispo":
        pytest.skip("its weight is a constant of the update: see below")
    oracle, other = EQUATIONS[name]
    case = random_case(seed)
    found = gradient(algorithm(name.split()[0], **other), case)
    for b, t in case.batch.action_mask.nonzero().tolist()[::5]:
        nudge = torch.zeros_like(case.logprobs)
        nudge[b, t] = 1e-6
        high, low = (oracle(replace(case, logprobs=case.logprobs + s * nudge).rows()) for s in (1, -1))
        assert found[b, t].item() == pytest.approx((high - low) / 2e-6, abs=1e-6)


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_no_token_loses_its_gradient_in_cispo_and_none_weighs_more_than_the_bound(seed):
    case = random_case(seed, spread=2.0)  # ratios from 0.01 to 100
    found, rows = gradient(algorithm("cispo"), case), case.rows()
    tokens = sum(len(row.new) for row in rows)
    for b, row in enumerate(rows):
        slopes = found[b][case.batch.action_mask[b]].tolist()
        for slope, n, o in zip(slopes, row.new, row.old, strict=True):
            expected = -min(math.exp(n - o), 5.0) * grpo_advantage(rows, row) / tokens
            assert slope == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("name", "of_a_row"), [("gspo", fmean), ("rloo", sum)])
def test_a_clip_of_trajectories_keeps_or_leaves_out_all_tokens_of_one(name, of_a_row):
    algo, case = algorithm(name, clip_low=0.1, clip_high=0.1), random_case(3)
    found, advantages = gradient(algo, case), algo.targets(case.batch, case.scores).advantages[:, 2].tolist()
    kept = []
    for b, row in enumerate(case.rows()):
        slopes = found[b][case.batch.action_mask[b]]
        ratio = math.exp(of_a_row(row.new) - of_a_row(row.old))
        is_clipped = (ratio > 1.1 and advantages[b] > 0) or (ratio < 0.9 and advantages[b] < 0)
        assert (slopes == slopes[0]).all()
        assert (slopes[0] != 0) == (advantages[b] != 0 and not is_clipped)
        kept.append(not is_clipped)
    assert len(set(kept)) == 2  # the case holds both


@pytest.mark.parametrize("name", ["gspo", "rloo"])
@given(seeds)
@settings(max_examples=10, deadline=None)
def test_weights_of_tokens_weigh_a_trajectory_by_their_mean_where_it_has_one_ratio(name, seed):
    """So a token of weight 0 keeps its gradient: `check_correction` refuses to mask tokens there."""
    case, algo = random_case(seed), algorithm(name)
    mask_BT, targets = case.batch.action_mask, algo.targets(case.batch, case.scores)
    each_BT = 2 * torch.rand(mask_BT.shape, generator=torch.Generator().manual_seed(seed)).double() * mask_BT
    each_BT[:, 2] = 0.0  # which is an action in every row
    found = []
    for weights_BT in (each_BT, row_mean(each_BT, mask_BT)):
        new = case.logprobs.clone().requires_grad_()
        forward = Forward(new, torch.zeros_like(new), torch.zeros_like(new))
        weighted = replace(targets, advantages=targets.advantages * weights_BT)
        out = algo.token_loss(forward, case.batch, case.scores, weighted)
        (out.loss * token_weights(mask_BT, algo.weighting)).sum().backward()
        assert new.grad is not None
        found.append(new.grad)
    assert torch.allclose(found[0], found[1], atol=1e-12)
    kept_B = (found[0][:, 2] != 0) == (found[0] != 0).any(1)
    assert kept_B.all()


def test_on_policy_rloo_is_reinforce_on_whole_trajectories():
    case = random_case(5, spread=0.0)
    found, rows = gradient(algorithm("rloo"), case), case.rows()
    for b, row in enumerate(rows):
        others = [r.reward for j, r in enumerate(rows) if r.group == row.group and j != b]
        expected = -(row.reward - fmean(others)) / len(rows)  # d log pi(trajectory) / d log pi(token) = 1
        assert found[b][case.batch.action_mask[b]].tolist() == pytest.approx([expected] * len(row.new))


# -- what the estimators estimate: every group that can be drawn, with its probability ------------------------


@pytest.mark.parametrize("p", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_on_average_rloo_follows_p_dr_grpo_nearly_and_maxrl_the_log_of_p(p, size):
    """A trajectory is right with probability p, and d log p / d theta = 1 - p, d log(1 - p) / d theta = -p."""

    def expected(estimate: Callable[[Tensor, Tensor], Tensor]) -> float:
        total = 0.0
        for outcome in itertools.product((0.0, 1.0), repeat=size):
            chance = math.prod(p if right else 1 - p for right in outcome)
            advantages = estimate(torch.tensor(outcome).double(), torch.zeros(size).long()).tolist()
            scores = [1 - p if right else -p for right in outcome]
            total += chance * sum(a * s for a, s in zip(advantages, scores, strict=True)) / size
        return total

    slope = p * (1 - p)  # of p itself
    assert expected(leave_one_out) == pytest.approx(slope)
    assert expected(partial(group_advantages, normalize=False)) == pytest.approx(slope * (size - 1) / size)
    series = sum((1 - p) ** (k - 1) for k in range(1, size))  # d/dp of -sum_k (1 - p)^k / k, up to G - 1
    assert expected(mean_normalized) == pytest.approx(slope * series)


# -- invariants ---------------------------------------------------------------------------------------------

CASES = {
    "grpo": {}, "grpo with a floor": {"std_floor": 0.2}, "dr_grpo": {}, "dapo": {}, "rloo": {}, "gspo": {},
    "cispo": {}, "max_rl": {}, "reinforce_pp": {"kl_reward_coef": 0.0}, "reinforce_pp_baseline": {},
}  # fmt: skip
EACH = pytest.mark.parametrize(("name", "other"), CASES.items(), ids=CASES)


def advantages(name: str, other: dict[str, object], batch: Batch, scores: Scores) -> Tensor:
    return algorithm(name.split()[0], **other).targets(batch, scores).advantages


@EACH
@given(seeds, st.floats(-3, 3))
@settings(max_examples=10, deadline=None)
def test_paying_everybody_more_changes_nothing(name, other, seed, more):
    if name == "max_rl":
        pytest.skip("a mean reward is what it divides by")
    case = random_case(seed)
    richer = replace(case.batch, rewards=case.batch.rewards + more)
    a, b = (advantages(name, other, batch, case.scores) for batch in (case.batch, richer))
    assert torch.allclose(a, b, atol=1e-6)


@EACH
@given(seeds, st.floats(0.5, 4))
@settings(max_examples=10, deadline=None)
def test_the_unit_of_reward_matters_only_where_nothing_divides_by_it(name, other, seed, unit):
    case = random_case(seed)
    scaled = replace(case.batch, rewards=case.batch.rewards * unit)
    a, b = (advantages(name, other, batch, case.scores) for batch in (case.batch, scaled))
    if name in ("dr_grpo", "rloo"):
        assert torch.allclose(a * unit, b, atol=1e-9)
    elif name != "grpo with a floor":  # which is in units of reward
        assert torch.allclose(a, b, atol=1e-4)


@EACH
@given(seeds)
@settings(max_examples=10, deadline=None)
def test_the_order_of_trajectories_does_not_matter(name, other, seed):
    case = random_case(seed)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    shuffled = Batch(*(getattr(case.batch, f)[order] for f in case.batch.__dataclass_fields__))
    scores = Scores(*(getattr(case.scores, f)[order] for f in case.scores.__dataclass_fields__))
    assert torch.allclose(advantages(name, other, case.batch, case.scores)[order],
                          advantages(name, other, shuffled, scores))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@given(seeds)
@settings(max_examples=10, deadline=None)
def test_what_stands_at_injected_tokens_never_matters(name, seed):
    case, algo = random_case(seed), algorithm(name)
    noise = torch.randn(case.logprobs.shape, generator=torch.Generator().manual_seed(seed)).double()
    old, ref, values, new = (
        torch.where(case.batch.action_mask, x, noise)
        for x in (case.scores.old_logprobs, case.scores.ref_logprobs, case.scores.values, case.logprobs)
    )
    noisy = Case(case.batch, Scores(old, ref, values), new)
    assert loss(algo, noisy).item() == pytest.approx(loss(algo, case).item(), abs=1e-12)
    found = gradient(algo, noisy)
    assert torch.allclose(found, gradient(algo, case), atol=1e-12)
    assert (found[~case.batch.action_mask] == 0).all()


NUMBERS = torch.tensor([0.0, 90.0, 1e4, -1e4, math.inf, -math.inf, math.nan]).double()  # exp(90) is inf in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
@given(seeds)
@settings(max_examples=20, deadline=None)
def test_injected_tokens_add_exactly_nothing_though_their_ratio_be_inf(name, dtype, seed):
    """0 times inf is NaN: one such token would spoil the mini-batch."""
    case, algo, g = random_case(seed), algorithm(name), torch.Generator().manual_seed(seed)
    plain = (case.logprobs, case.scores.old_logprobs, case.scores.ref_logprobs, case.scores.values)
    clean = Case(case.batch, Scores(*(x.to(dtype) for x in plain[1:])), plain[0].to(dtype))
    junk = (NUMBERS[torch.randint(len(NUMBERS), x.shape, generator=g)] for x in plain)
    new, old, ref, values = (
        torch.where(case.batch.action_mask, x, y).to(dtype) for x, y in zip(plain, junk, strict=True)
    )
    dirty = Case(case.batch, Scores(old, ref, values), new)
    assert torch.equal(loss(algo, dirty), loss(algo, clean))
    assert torch.equal(gradient(algo, dirty), gradient(algo, clean))
    assert (gradient(algo, dirty)[~case.batch.action_mask] == 0).all()


def test_a_token_that_a_correction_has_masked_adds_nothing_though_its_ratio_be_inf():
    """Its advantage is 0, and it counts in the averages still."""
    far = torch.tensor([[200.0, 0.0]]).requires_grad_()
    advantages = torch.tensor([[0.0, 1.0]])
    found = clipped_surrogate(far, torch.zeros(1, 2), advantages, 0.2, 0.2)
    found.sum().backward()
    assert found.tolist() == [[0.0, -1.0]]
    assert far.grad is not None
    assert far.grad.tolist() == [[0.0, -1.0]]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_token_far_beyond_the_bound_has_the_gradient_of_one_just_beyond_it(advantage):
    """Where it is clipped none, and no NaN: RLOO's ratio is of a whole trajectory, and soon overflows."""
    log_ratios = torch.tensor([[0.3, 80.0]] if advantage < 0 else [[0.3, 2000.0]]).requires_grad_()
    clipped_surrogate(log_ratios, torch.zeros(1, 2), torch.full((1, 2), advantage), 0.2, 0.2).sum().backward()
    assert log_ratios.grad is not None
    expected = [0.0, 0.0] if advantage > 0 else log_ratios.detach().exp()[0].tolist()
    assert log_ratios.grad[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_penalty_without_a_coefficient_adds_nothing_though_it_be_inf(name):
    """Without a reference its log-probs are the old ones, of which the policy may be far."""
    algo, case = algorithm(name, kl_coef=0.0), random_case(0)
    far = Case(case.batch, case.scores, torch.where(case.batch.action_mask, case.logprobs - 2000, 0.0))
    assert math.isfinite(loss(algo, far).item())
    assert gradient(algo, far).isfinite().all()


@pytest.mark.parametrize("name", WITH_GROUPS)
def test_a_group_that_agrees_and_a_lone_trajectory_teach_nothing(name):
    case = random_case(0)
    batch = replace(case.batch, rewards=torch.tensor([0.7] * 4 + [0.1, 0.9, 0.4, 1.0]).double())
    batch = replace(batch, group_ids=torch.tensor([0, 0, 0, 0, 1, 1, 1, 2]))
    found = algorithm(name).targets(batch, case.scores).advantages
    if name == "reinforce_pp_baseline":  # the batch's mean is taken off all, and is not exactly 0
        assert found.abs()[[0, 1, 2, 3, 7]].max() < 0.5 < found.abs()[[4, 5]].max()
    else:
        assert (found[[0, 1, 2, 3, 7]] == 0).all()
    assert (found[[4, 5, 6]].abs().sum(1) > 0).all()


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_a_batch_in_which_all_rewards_are_equal_teaches_exactly_nothing(name):
    case = random_case(1)
    batch = replace(case.batch, rewards=torch.full((8,), 0.7071).float())
    found = algorithm(name).targets(batch, replace(case.scores, ref_logprobs=case.scores.old_logprobs)).advantages
    assert (found == 0).all()


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo"])
@given(seeds)
@settings(max_examples=10, deadline=None)
def test_with_keep_sign_no_rewarded_trajectory_is_pushed_down_and_the_others_are_as_before(name, seed):
    case = random_case(seed)
    kept, free = (algorithm(name, keep_sign=k).targets(case.batch, case.scores).advantages for k in (True, False))
    rewarded = case.batch.rewards > 0
    assert (kept[rewarded] >= 0).all()
    assert torch.equal(kept[~rewarded], free[~rewarded])
    assert torch.equal(kept[free > 0], free[free > 0])


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo"])
def test_a_floor_keeps_small_differences_between_right_answers_small(name):
    case = random_case(2)
    batch = replace(case.batch, rewards=torch.tensor([1.0, 1, 1, 0.9] * 2).double())
    free, floored = (algorithm(name, std_floor=f).targets(batch, case.scores).advantages for f in (0.0, 0.5))
    assert free.abs().max() == pytest.approx(1.5, abs=1e-3)
    assert floored.abs().max() == pytest.approx(0.075 / 0.5, abs=1e-3)


@pytest.mark.parametrize("name", ["dr_grpo", "rloo", "max_rl", "reinforce_pp_baseline"])
def test_what_does_not_divide_by_the_groups_spread_does_not_blow_it_up(name):
    """Half the problems are solved now and then; in the others every answer is right and one took a call too many."""
    case = random_case(2)
    batch = replace(case.batch, rewards=torch.tensor([1.0, 1, 1, 0.9, 1, 0, 0, 1]).double())
    found = algorithm(name).targets(batch, case.scores).advantages[:, 2].abs()
    assert found[:4].max() < 0.3 * found[4:].max()
    grpo_found = algorithm("grpo").targets(batch, case.scores).advantages[:, 2].abs()
    assert grpo_found[:4].max() > grpo_found[4:].max()


def test_maxrl_refuses_rewards_below_0_and_says_what_to_do():
    case = random_case(0)
    batch = replace(case.batch, rewards=torch.tensor([1.0, -1.0] * 4).double())
    with pytest.raises(TrainingError, match=r"rewards must be 0 or more, got -1: choose a reward without penalties"):
        algorithm("max_rl").targets(batch, case.scores)


def test_maxrl_weighs_rare_success_more():
    group = torch.zeros(4).long()
    rare, usual = (mean_normalized(torch.tensor(r), group)[0].item() for r in ([1.0, 0, 0, 0], [1.0, 1, 1, 0]))
    assert (rare, usual) == pytest.approx((3, 1 / 3))


def test_dr_grpo_weighs_tokens_alike_whatever_the_lengths_beside_them():
    short, long = torch.zeros(2, 9).bool(), torch.zeros(2, 9).bool()
    short[:, 1:3], long[0, 1:3], long[1, 1:] = True, True, True
    algo = algorithm("dr_grpo", max_tokens=100)
    for mask in (short, long):
        assert token_weights(mask, algo.weighting)[0].tolist() == pytest.approx([0, 0.005, 0.005, *[0] * 6])
