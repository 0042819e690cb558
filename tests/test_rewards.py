"""What a trajectory is paid, case by case."""

from __future__ import annotations

from math import cos, pi, sin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcrl.rewards.format import format_score
from otcrl.rewards.otc import OTCReward, f, r_tool_grpo, r_tool_ppo
from otcrl.rewards.outcome import OutcomeReward
from otcrl.types import Outcome, Problem, Stop
from tests.make import problem, trajectory

# arXiv:2504.14870: m = 0..5 calls
PPO = {4: [1, 0.8660, 0.7071, 0.5878, 0.5000, 0.4339], 3: [1, 0.8090, 0.6235, 0.5000, 0.4154, 0.3546]}
GRPO = {
    1: [0, 1, 0.8660, 0.7071, 0.5878, 0.5000],
    2: [0, 0.8660, 1, 0.9511, 0.8660, 0.7818],
    3: [0, 0.7071, 0.9511, 1, 0.9749, 0.9239],
    4: [0, 0.5878, 0.8660, 0.9749, 1, 0.9848],
}


def correct(answer: str, of: Problem) -> float:
    return float(answer == of.answers[0])


def otc(form: str = "grpo", scope: str = "global", counter: str = "well_formed", **other: float | bool) -> OTCReward:
    settings = {"alpha": 1.0, "c": 4.0, "format_weight": 0.0, "require_well_formed": True} | other
    return OTCReward(correct=correct, form=form, scope=scope, counter=counter, **settings)  # pyright: ignore


def values(reward: OTCReward, *groups: list) -> list[list[float]]:
    return [[r.value for r in group] for group in reward(list(groups))]


@pytest.mark.parametrize("c", [4, 3])
def test_otc_ppo_pays_the_table(c):
    assert [r_tool_ppo(m, c) for m in range(6)] == pytest.approx(PPO[c], abs=1e-4)
    assert [r_tool_grpo(m, 0, c) for m in range(6)] == pytest.approx(PPO[c], abs=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_otc_grpo_pays_the_table(n):
    assert [r_tool_grpo(m, n, 4) for m in range(6)] == pytest.approx(GRPO[n], abs=1e-4)


@given(st.integers(0, 50), st.integers(1, 50))
def test_f_maps_calls_below_twice_the_optimum_and_peaks_where_they_meet(m, n):
    assert 0 <= f(m, n) < 2 * n
    assert r_tool_grpo(m, n, 4) <= r_tool_grpo(n, n, 4) == pytest.approx(1)
    assert r_tool_grpo(m, n, 4) == pytest.approx(sin(m * pi / (m + n)))  # Eq. 6 simplified by hand


@given(st.integers(0, 200), st.floats(0.1, 20))
def test_every_further_call_pays_less_and_never_nothing(m, c):
    assert r_tool_ppo(m, c) > r_tool_ppo(m + 1, c) > 0


def test_a_wrong_answer_earns_nothing_however_few_its_calls():
    assert values(otc("ppo"), [trajectory(right=False), trajectory(right=False, calls=3)]) == [[0.0, 0.0]]
    assert values(otc("grpo"), [trajectory(right=False), trajectory(calls=2)])[0][0] == 0.0


def test_alpha_scales_the_product():
    assert values(otc("ppo", alpha=2.0), [trajectory(calls=1)])[0][0] == pytest.approx(2 * 0.8660, abs=1e-4)


def test_n_is_lowered_by_the_current_group_before_it_is_scored():
    reward = otc()
    assert values(reward, [trajectory(calls=3), trajectory(calls=1)])[0] == pytest.approx([0.7071, 1.0], abs=1e-4)
    assert reward.table == {"nq/train/0": 1}


def test_n_never_rises_and_is_remembered_across_steps():
    reward = otc()
    reward([[trajectory(calls=1)]])
    assert values(reward, [trajectory(calls=2)])[0] == pytest.approx([0.8660], abs=1e-4)
    assert reward.table == {"nq/train/0": 1}


def test_n_of_the_local_scope_is_the_group_alone():
    reward = otc(scope="local")
    reward([[trajectory(calls=1)]])
    assert values(reward, [trajectory(calls=2)])[0] == pytest.approx([1.0])
    assert reward.table == {}


def test_n_is_kept_per_problem_of_each_source():
    nq, hotpot = problem("nq/train/7"), problem("hotpotqa/train/7")
    reward = otc()
    reward([[trajectory(calls=0, of=nq)], [trajectory(calls=2, of=hotpot)]])
    assert reward.table == {"nq/train/7": 0, "hotpotqa/train/7": 2}


def test_wrong_malformed_and_void_trajectories_leave_n_alone():
    reward = otc()
    reward(
        [
            [
                trajectory(right=False),
                trajectory(violations=("2 answers",)),
                trajectory(stop=Stop.VOID),
                trajectory(calls=4),
            ]
        ]
    )
    assert reward.table == {"nq/train/0": 4}


def test_the_table_survives_a_restart():
    reward, again = otc(), otc()
    reward([[trajectory(calls=1)]])
    again.load_state_dict(reward.state_dict())
    assert values(again, [trajectory(calls=2)]) == values(reward, [trajectory(calls=2)])


@pytest.mark.parametrize(
    ("counter", "m"), [("well_formed", 2), ("emitted", 4), ("executed", 1), ("failed", 1), ("invalid", 1)]
)
def test_the_counter_decides_which_calls_cost(counter, m):
    every = (Outcome.OK, Outcome.MODEL_ERROR, Outcome.INVALID, Outcome.OVER_BUDGET)
    found = values(otc("ppo", counter=counter), [trajectory(outcomes=every)])[0][0]
    assert found == pytest.approx(cos(m * pi / (2 * m + 4)))


def test_a_malformed_trajectory_earns_nothing_unless_asked_for():
    bad = trajectory(violations=("2 answers",))
    assert values(otc("ppo"), [bad]) == [[0.0]]
    assert values(otc("ppo", require_well_formed=False), [bad]) == [[1.0]]


def test_no_answer_is_not_a_right_answer():
    assert values(otc("ppo"), [trajectory(answer=None, stop=Stop.MAX_TOKENS)]) == [[0.0]]


def test_format_weight_gives_the_papers_second_r_phi():
    well_formed_but_wrong = trajectory(right=False, calls=1)
    found = values(otc("ppo", format_weight=0.5), [well_formed_but_wrong, trajectory(calls=1)])[0]
    assert found == pytest.approx([0.8660 * 0.5, 0.8660 * 1.5], abs=1e-4)


@pytest.mark.parametrize(("name", "value"), [("form", "dpo"), ("scope", "world"), ("counter", "all")])
def test_an_unknown_choice_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be one of .*got '{value}'"):
        otc(**{name: value})


def test_outcome_pays_for_right_answers_whatever_the_calls():
    reward = OutcomeReward(correct=correct, format_weight=0.0, require_well_formed=True)
    group = [trajectory(), trajectory(calls=4), trajectory(right=False)]
    assert [r.value for r in reward([group])[0]] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("right", "answered", "valid", "retrieved", "value"),
    [
        (True, True, True, False, 1.0),
        (True, True, False, True, 0.8),
        (False, True, True, False, 0.2),
        (False, True, True, True, 0.3),
        (False, True, False, True, 0.1),
        (False, False, False, True, 0.0),
    ],
    ids=["right+valid", "right+invalid", "wrong+valid", "wrong+valid+retrieved", "wrong+invalid", "nothing"],
)
def test_format_reward_pays_search_r1s_six_cases(right, answered, valid, retrieved, value):
    assert format_score(right, answered, valid, retrieved, 0.2, 0.1, 0.1) == pytest.approx(value)
