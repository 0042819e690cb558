"""The planner's seconds against hand-computed numbers and published ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from otcrl.plan import speed
from otcrl.plan.gpus import GPUS
from otcrl.plan.shapes import KNOWN
from tests.plans import job


@pytest.mark.parametrize(("context", "tokens_per_s", "mfu"), [(16_384, 11_900, 0.111), (65_536, 10_100, 0.268)])
def test_flops_agree_with_the_published_utilisation_of_qwen3_on_one_h100(context: int, tokens_per_s: float, mfu: float):
    """prime-rl, benchmarks/baselines: full fine-tuning of Qwen3-0.6B; a training step is three forward passes."""
    each = 3 * speed.forward_flops(KNOWN["Qwen3-0.6B"], 1, 1, context / 2)
    assert each * tokens_per_s / GPUS["h100-80gb"].flops == pytest.approx(mfu, rel=0.01)


def test_an_update_is_three_forward_passes_and_four_with_checkpointing():
    plain, again = job(checkpointing=False), job(checkpointing=True)
    own = speed.optimizer_s(plain)
    forward = speed.learner_forward(plain) / speed.training_rate(plain)
    assert speed.update_s(plain) == pytest.approx(3 * forward + own)
    assert speed.update_s(again) == pytest.approx(4 * forward + own)


@pytest.mark.parametrize(
    ("critic", "reference", "recompute", "passes", "bodies"),
    [
        (None, False, False, 0, 1),
        (None, True, True, 2, 1),
        ("own", False, False, 1, 2),  # the critic's values
        ("own", True, True, 3, 2),
        ("shared", False, False, 1, 1),  # values and old log-probs come from one pass
        ("shared", True, True, 2, 1),
    ],
)
def test_a_step_costs_what_its_models_read_and_train(
    critic: str | None, reference: bool, recompute: bool, passes: int, bodies: int
):
    a_job = job(critic=critic, reference=reference)
    a_job = replace(a_job, training=replace(a_job.training, recompute=recompute))
    forward = speed.learner_forward(a_job) / speed.training_rate(a_job)
    assert speed.score_s(a_job) == pytest.approx(passes * forward)
    assert speed.update_s(a_job) == pytest.approx(bodies * (4 * forward + speed.optimizer_s(a_job)))


def test_a_decode_step_reads_all_weights_and_the_caches_of_its_batch():
    a_job = job()
    weights, cache = 7_615_616_512 * 2, 57_344 * 32 * (300 + 1024) / 2
    expected = (weights + cache) / (3.35e12 * 0.60) + 0.003
    assert speed.decode_step_s(a_job, 32) == pytest.approx(expected)


def test_a_rollout_is_bound_by_its_longest_trajectory_when_places_are_free():
    a_job = job(gpus=8, concurrency=4096)
    longest = 2048 * speed.decode_step_s(a_job, 1) + 4 * 0.5
    assert speed.rollout_s(a_job) == pytest.approx(longest + speed.prefill_s(a_job))
    assert speed.estimate(a_job).rollout_bound == "its longest trajectory"


def test_slow_tools_and_few_places_lengthen_a_rollout():
    few = job(concurrency=8, tool_s=10)
    life = 512 * speed.decoding(few)[1] + 2 * 10
    assert speed.rollout_s(few) == pytest.approx(256 / 8 * life + speed.prefill_s(few))
    assert speed.estimate(few).rollout_bound == "places in flight"


def test_a_shared_prompt_is_learned_from_once():
    a_job = job()
    apart = replace(a_job, training=replace(a_job.training, shared_prefix=False))
    assert speed.learned_tokens(apart) - speed.learned_tokens(a_job) == 32 * 7 * 300


def test_stage_3_gathers_for_every_pass_and_the_network_bounds_it():
    inside, across = job(gpus=8, zero=3), job(nodes=8, gpus=8, zero=3)
    assert speed.link_rate(inside) == 450e9 * 0.70
    assert speed.link_rate(across) == 50e9 * 0.70
    weights = 7_615_616_512 * 2 * 7 / 8
    assert speed.communicated_bytes(inside) == pytest.approx(speed.micro_batches(inside) * (3 + 1) * weights)


def test_servers_hide_a_rollout_behind_the_update_only_when_it_runs_ahead():
    apart = job(engine="servers")
    ahead = replace(apart, work=replace(apart.work, ahead=True))
    seconds = speed.estimate(apart).seconds
    learner = seconds["score"] + seconds["update"]
    assert speed.estimate(apart).step_s == pytest.approx(sum(seconds.values()))
    assert speed.estimate(ahead).step_s == pytest.approx(max(seconds["rollout"], learner) + seconds["publication"])
    assert speed.estimate(apart).gpus == 1 + 4


def test_cost_is_gpu_hours_times_price():
    times = replace(speed.estimate(job()), step_s=36.0, gpus=8)
    assert times.gpu_hours() == 80
    assert times.cost(price=2.5) == 200
