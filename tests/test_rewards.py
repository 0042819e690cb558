"""What a trajectory is paid, case by case."""

from __future__ import annotations

import re
from dataclasses import replace
from math import cos, pi, sin

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from otcrl.construct import construct
from otcrl.errors import ConfigError
from otcrl.presets import conf_dir
from otcrl.protocols import RewardFn
from otcrl.rewards.behaviour import BehaviourReward, factor
from otcrl.rewards.cost import Price, cost
from otcrl.rewards.format import FormatReward, fault, format_score
from otcrl.rewards.otc import OTCReward, Warmup, f, r_tool_grpo, r_tool_ppo
from otcrl.rewards.outcome import OutcomeReward
from otcrl.rewards.overlong import Overlong, overlong
from otcrl.rewards.torl import ToRLReward
from otcrl.types import Outcome, Problem, Stop, ToolCall, Trajectory
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


def prices(**tools: float) -> Price:
    return Price(tools=tools, per_second=0.0, per_token=0.0, per_fee=0.0)


def otc(form: str = "grpo", **other) -> OTCReward:
    settings = {
        "alpha": 1.0, "c": 4.0, "warmup": Warmup(steps=0, alpha=1.0, c=4.0), "scope": "global", "combine": "product",
        "counter": "well_formed", "price": prices(), "format_weight": 0.0, "require_well_formed": True,
    }  # fmt: skip
    return OTCReward(**{"correct": correct, "form": form} | settings | other)


def values(reward: RewardFn, *groups: list) -> list[list[float]]:
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


OUTCOME = OutcomeReward(correct=correct, format_weight=0.0, require_well_formed=True)


def test_n_of_the_local_scope_is_the_group_alone():
    reward = otc(scope="local")
    reward([[trajectory(calls=1)]])
    assert values(reward, [trajectory(calls=2)])[0] == pytest.approx([1.0])
    assert reward.table == {}


def test_two_groups_of_a_problem_have_each_their_own_local_n():
    """A step that reaches over the end of an epoch has some: they are paid as if alone."""
    reward = otc(scope="local")
    first, second = [trajectory(calls=2), trajectory(calls=3)], [trajectory(calls=0), trajectory(calls=1)]
    assert values(reward, first, second) == [*values(reward, first), *values(reward, second)]


@pytest.mark.parametrize("reward", [otc(), otc("ppo"), OUTCOME], ids=["otc-grpo", "otc-ppo", "outcome"])
def test_what_is_logged_as_correct_is_what_the_task_says_though_a_malformed_answer_earns_nothing(reward):
    [[found]] = reward([[trajectory(violations=("2 answers",))]])
    assert (found.parts["correct"], found.value) == (1.0, 0.0)


def test_a_reward_without_a_memory_goes_on_with_a_run_of_one_that_had_one(capsys):
    OUTCOME.load_state_dict({"a": 1.0})
    assert "knew the least calls of 1 problems, which this one does not use" in capsys.readouterr().err
    assert OUTCOME.state_dict() == {}


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


@pytest.mark.parametrize(
    ("name", "value"), [("form", "dpo"), ("scope", "world"), ("combine", "mean"), ("counter", "all")]
)
def test_an_unknown_choice_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be one of .*got '{value}'"):
        otc(**{name: value})


@pytest.mark.parametrize("path", sorted(conf_dir().glob("reward/*.yaml")), ids=lambda path: path.stem)
def test_every_yaml_is_a_reward(path):
    settings = yaml.safe_load(path.read_text())
    if settings.pop("defaults", None):
        settings |= {"max_tokens": 1000, "reward": yaml.safe_load((path.parent / "outcome.yaml").read_text())}
    reward = construct(settings, "reward", correct=correct, tool_names=("search",))
    of = problem(answer="<think> paris </think>")
    (scored,) = reward([[trajectory(of=of), trajectory(of=of, right=False)]])
    assert scored[0].value > scored[1].value
    assert reward.needs_groups is False
    again = construct(settings, "reward", correct=correct, tool_names=("search",))
    again.load_state_dict(reward.state_dict())


# -- OTC: products, sums, schedules, prices ----------------------------------------------------------------


def test_a_sum_pays_for_a_wrong_answer_without_calls_and_a_product_does_not():
    lazy_and_wrong, right_with_calls = trajectory(right=False), trajectory(calls=4)
    product = values(otc("ppo"), [lazy_and_wrong, right_with_calls])[0]
    added = values(otc("ppo", combine="sum"), [lazy_and_wrong, right_with_calls])[0]
    assert product == pytest.approx([0.0, 0.5])
    assert added == pytest.approx([1.0, 1.5])
    many = [lazy_and_wrong, trajectory(right=False, calls=4)]
    assert values(otc("ppo"), many)[0] == [0.0, 0.0]
    assert values(otc("ppo", combine="sum"), many)[0] == pytest.approx([1.0, 0.5])  # wrong is wrong, but cheaper pays


def test_torls_minus_one_under_a_product_would_pay_wrong_answers_for_calling():
    torl = ToRLReward(correct=correct, error_penalty=0.0)
    wrong = [trajectory(right=False, calls=m) for m in range(5)]
    as_it_is = [r_tool_ppo(m, 3) * r.value for m, r in enumerate(torl([wrong])[0])]
    assert as_it_is == sorted(as_it_is)  # -1, -0.81, ... -0.42: each further call hurts less
    shifted = [r_tool_ppo(m, 3) * (r.value + 1) / 2 for m, r in enumerate(torl([wrong])[0])]
    assert shifted == values(otc("ppo", c=3.0), wrong)[0] == [0.0] * 5


def with_versions(t: Trajectory, version: int) -> Trajectory:
    return replace(t, versions=[-1, version])


def test_alpha_and_c_reach_their_values_in_a_straight_line():
    reward = otc("ppo", alpha=1.0, c=4.0, warmup=Warmup(steps=10, alpha=2.0, c=8.0))
    for version, alpha, c in ((0, 2.0, 8.0), (5, 1.5, 6.0), (10, 1.0, 4.0), (99, 1.0, 4.0)):
        found = values(reward, [with_versions(trajectory(calls=1), version)])[0][0]
        assert found == pytest.approx(alpha * cos(pi / (2 + c)))


def test_siblings_of_different_age_are_paid_by_one_schedule():
    reward = otc("ppo", warmup=Warmup(steps=10, alpha=2.0, c=4.0))
    old, new = with_versions(trajectory(calls=1), 4), with_versions(trajectory(calls=1), 5)
    assert len(set(values(reward, [old, new])[0])) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": -1}, "steps must be at least 0, got -1"), ({"c": 0.0}, "c must be above 0, got 0.0")],
)
def test_an_impossible_warmup_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Warmup(**{"steps": 1, "alpha": 1.0, "c": 1.0} | settings)


def called(*calls: ToolCall, observed: int = 0, of: Problem | None = None) -> Trajectory:
    """One token of prompt, one sampled, `observed` tokens of results, one sampled."""
    length = 3 + observed
    return replace(
        trajectory(of=of),
        token_ids=[1] * length,
        action_mask=[False, True, *[False] * observed, True],
        logprobs=[0.0] * length,
        versions=[0] * length,
        tool_calls=calls,
    )


SEARCH = ToolCall("search", "q", "r", Outcome.OK, seconds=2.0, price=0.5)
PYTHON = ToolCall("python", "q", "r", Outcome.MODEL_ERROR, seconds=10.0)
INVALID = ToolCall("", "q", "r", Outcome.INVALID, seconds=99.0)


def test_a_call_costs_one_unless_priced():
    t = called(SEARCH, PYTHON, INVALID, observed=7)
    assert cost(t, "well_formed", prices()) == 2
    assert cost(t, "well_formed", prices(search=3.0)) == 3 + 1
    assert cost(t, "well_formed", replace(prices(), per_second=0.1)) == pytest.approx(2 + 1.2)
    assert cost(t, "well_formed", replace(prices(), per_fee=2.0)) == 2 + 1
    assert cost(t, "well_formed", replace(prices(), per_token=0.01)) == pytest.approx(2 + 0.07)
    assert cost(t, "emitted", prices(search=0.0)) == 2


@given(st.lists(st.sampled_from([SEARCH, PYTHON, INVALID]), max_size=5), st.floats(0, 3), st.floats(0, 1))
def test_a_price_of_one_and_nothing_else_is_counting(calls, search, second):
    t = called(*calls)
    assert cost(t, "well_formed", prices()) == sum(c.outcome is not Outcome.INVALID for c in calls)
    priced = cost(t, "well_formed", replace(prices(search=search), per_second=second))
    one_more = cost(called(*calls, SEARCH), "well_formed", replace(prices(search=search), per_second=second))
    assert one_more == pytest.approx(priced + search + 2 * second)


def test_n_is_the_least_price_of_a_right_answer():
    reward = otc(price=prices(search=3.0))
    assert values(reward, [called(SEARCH), called(PYTHON, PYTHON)])[0] == pytest.approx([sin(3 * pi / 5), 1.0])
    assert reward.table == {"nq/train/0": 2.0}


IN_PARTS = {
    "price.tools.search=0.5": prices(search=0.5),
    "price.per_second=0.01": replace(prices(), per_second=0.01),
    "price.per_token=0.1": replace(prices(), per_token=0.1),
    "price.per_fee=1.0": replace(prices(), per_fee=1.0),  # a fee may be a cent
}


@pytest.mark.parametrize(("name", "price"), IN_PARTS.items(), ids=IN_PARTS.keys())
def test_parts_of_calls_are_refused_where_the_reward_jumps_and_taken_where_it_does_not(name, price):
    assert (r_tool_grpo(1.0, 0.01, 4.0), r_tool_grpo(1.0, 0.0, 4.0)) == pytest.approx((0.0311, 0.8660), abs=1e-4)
    with pytest.raises(ValueError, match=f"form grpo is for whole calls: .*{name} makes n a part of one: use form ppo"):
        otc("grpo", price=price)
    otc("ppo", price=price)
    otc("grpo", price=replace(prices(search=2.0, python=0.0), per_token=1.0))


def test_a_price_for_a_tool_that_is_not_there_is_refused_with_the_nearest_name():
    settings = {"tools": {"serch": 2.0}, "per_second": 0.0, "per_token": 0.0, "per_fee": 0.0}
    section = {"_target_": "otcrl.rewards.cost.Price", **settings}
    with pytest.raises(ConfigError, match=r"price: tools: there is no tool 'serch'. Did you mean 'search'\?"):
        construct(section, "price", tool_names=("search", "python"))
    with pytest.raises(ConfigError, match=r"price: tools.search must be 0 or more, got -1.0"):
        construct(section | {"tools": {"search": -1.0}}, "price", tool_names=("search", "python"))


attempts = st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=6)


@given(attempts, st.randoms(), st.sampled_from(["ppo", "grpo"]), st.sampled_from(["global", "local"]))
def test_the_order_of_siblings_and_of_groups_does_not_matter(attempts, rng, form, scope):
    group = [trajectory(right=right, calls=calls) for right, calls in attempts]
    other = [trajectory(calls=2, of=problem("nq/train/1"))]
    order = rng.sample(range(len(group)), len(group))
    straight, _ = values(otc(form, scope=scope), group, other)
    _, shuffled = values(otc(form, scope=scope), other, [group[i] for i in order])
    assert shuffled == [straight[i] for i in order]


@given(attempts)
def test_a_right_answer_with_the_fewest_calls_earns_the_most_and_a_wrong_one_nothing(attempts):
    found = values(otc("grpo"), [trajectory(right=right, calls=calls) for right, calls in attempts])[0]
    least = min((calls for right, calls in attempts if right), default=None)
    for value, (right, calls) in zip(found, attempts, strict=True):
        assert value == (0 if not right else pytest.approx(1) if calls == least else value)
        assert 0 <= value <= 1 + 1e-9
        assert right == (value > 0)


def test_only_the_local_n_needs_siblings():
    assert otc(scope="local").needs_groups
    assert not otc(scope="global").needs_groups
    assert not otc("ppo", scope="local").needs_groups


# -- other rewards -----------------------------------------------------------------------------------------


def test_torl_pays_plus_and_minus_one_and_takes_off_for_programs_that_fail():
    group = [
        trajectory(), trajectory(right=False), trajectory(answer=None), trajectory(outcomes=(Outcome.OK,)),
        trajectory(outcomes=(Outcome.MODEL_ERROR, Outcome.OK)), trajectory(outcomes=(Outcome.INVALID,)),
    ]  # fmt: skip
    assert values(ToRLReward(correct=correct, error_penalty=0.0), group) == [[1, -1, -1, 1, 1, 1]]
    assert values(ToRLReward(correct=correct, error_penalty=0.5), group) == [[1, -1, -1, 1, 0.5, 1]]


@given(st.integers(0, 30), st.integers(1, 30), st.integers(1, 30))
def test_overlong_is_eq_13(length, cache, more):
    most = cache + more
    if length <= most - cache:
        expected = 0.0
    elif length <= most:
        expected = ((most - cache) - length) / cache
    else:
        expected = -1.0
    assert overlong(length, most, cache) == pytest.approx(expected)


def test_overlong_is_added_to_any_reward_and_keeps_its_state():
    reward = Overlong(reward=otc(scope="global"), max_tokens=10, cache_tokens=4)
    short, near, at_limit = called(SEARCH), called(SEARCH, observed=6), called(SEARCH, observed=8)
    assert [len(t.token_ids) - 1 for t in (short, near, at_limit)] == [2, 8, 10]  # the prompt does not count
    assert values(reward, [short, near, at_limit])[0] == pytest.approx([1.0, 0.5, 0.0])
    assert reward.state_dict() == {"nq/train/0": 1}
    assert not reward.needs_groups
    with pytest.raises(ValueError, match="cache_tokens must be at least 1 and at most max_tokens=10, got 11"):
        Overlong(reward=otc(), max_tokens=10, cache_tokens=11)


def behaviour(acting: str, reasoning: str) -> BehaviourReward:
    return BehaviourReward(
        correct=correct, acting=acting, reasoning=reasoning,  # pyright: ignore
        calls_scale=4.0, tokens_scale=20.0, counter="well_formed", require_well_formed=True,
    )  # fmt: skip


@pytest.mark.parametrize("acting", ["less", "more"])
@pytest.mark.parametrize("reasoning", ["less", "more"])
def test_each_of_the_four_behaviours_prefers_its_own_corner(acting, reasoning):
    def thinking(calls: int, tokens: int) -> Trajectory:
        t = trajectory(calls=calls)
        return replace(t, token_ids=[1] * (tokens + 1), action_mask=[False, *[True] * tokens],
                       logprobs=[0.0] * (tokens + 1), versions=[0] * (tokens + 1))  # fmt: skip

    corners = {(a, r): thinking(3 if a == "more" else 0, 50 if r == "more" else 5)
               for a in ("less", "more") for r in ("less", "more")}  # fmt: skip
    found = dict(zip(corners, values(behaviour(acting, reasoning), list(corners.values()))[0], strict=True))
    assert max(found, key=found.__getitem__) == (acting, reasoning)
    assert min(found.values()) > 0 == values(behaviour(acting, reasoning), [trajectory(right=False)])[0][0]


def test_less_acting_and_any_reasoning_is_otc_ppo():
    group = [trajectory(calls=m) for m in range(5)]
    assert values(behaviour("less", "any"), group) == values(otc("ppo"), group)


@given(st.integers(0, 200), st.floats(0.1, 50))
def test_more_is_paid_more_for_more_and_less_for_less(amount, scale):
    assert factor(amount, scale, "less") > factor(amount + 1, scale, "less") > 0
    assert 0.5 <= factor(amount, scale, "more") < factor(amount + 1, scale, "more") <= 1
    assert factor(amount, scale, "any") == 1


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


# -- Search-R1's state machine -----------------------------------------------------------------------------

TEXT = r"(?:(?!</?(?:think|search|information|answer)>).)*"  # no tag in it
WELL_FORMED = re.compile(
    rf"\s*<think>{TEXT}</think>\s*"
    rf"(?:<search>{TEXT}</search>\s*<information>{TEXT}</information>\s*<think>{TEXT}</think>\s*)*"
    rf"<answer>{TEXT}</answer>",
    re.DOTALL,
)
TAGS = [f"<{slash}{name}>" for name in ("think", "search", "information", "answer") for slash in ("", "/")]
GOOD_TURN = "<think> a </think>\n<search> b </search>\n\n<information> c </information>\n\n"


@given(
    st.lists(st.sampled_from(TAGS), max_size=4),
    st.integers(0, 2),
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([*TAGS, "x", " ", "<b>"])), max_size=2),
)
def test_the_state_machine_accepts_the_same_language_as_a_regular_expression(tail, turns, insertions):
    pieces = re.findall(r"<[^>]*>|[^<]+", turns * GOOD_TURN + "<think> d </think> <answer> e </answer>") + tail
    for place, piece in insertions:
        pieces.insert(place % (len(pieces) + 1), piece)
    response = "".join(pieces)
    looked_at = response[: response.rfind("</answer>") + len("</answer>")] if "</answer>" in response else response
    assert (fault(response) is None) == bool(WELL_FORMED.fullmatch(looked_at))


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (2 * GOOD_TURN + "<think> d </think> <answer> e </answer>.", None),
        ("<think> d </think> <answer> e </answer>", None),
        ("<answer> e </answer>", "<answer> comes first"),
        ("so <think> d </think><answer> e </answer>", "'so' stands between tags"),
        ("<think> d </think><think> d </think><answer> e </answer>", "<think> after </think>"),
        ("<think> d <search> b </search></think><answer> e </answer>", "<search> inside <think>"),
        ("<think> d </search><answer> e </answer>", "</search> closes <think>"),
        ("<think> d </think></search><answer> e </answer>", "</search> closes nothing"),
        ("<think> d </think><search> b </search><answer> e </answer>", "<answer> after </search>"),
        ("<think> d </think><answer> e", "it does not end with an answer"),
        ("", "it does not end with an answer"),
    ],
)  # fmt: skip
def test_a_fault_says_where_the_format_is_left(response, why):
    assert fault(response) == why


def test_the_tags_are_those_of_the_dialect():
    response = "<think>a</think><python>b</python> <observation>c</observation> <think>d</think><answer>e</answer>"
    assert fault(response, calls=["search", "python"], result="observation") is None
    assert fault(response) is not None


@pytest.mark.parametrize(("name", "tag"), [("search_r1", "information"), ("otc", "observation")])
def test_the_tags_are_those_of_the_tools_and_the_dialect_unless_they_are_set(name, tag):
    dialect = construct(yaml.safe_load((conf_dir() / f"dialect/{name}.yaml").read_text()), "dialect")
    said = {"tool_names": ("search", "python"), "dialect": dialect}
    reward = format_reward(calls=[], result="", **said)
    assert (reward.calls, reward.result) == (("search", "python"), tag)
    response = f"<think> d </think>{dialect.write_call('python', 'q')}{dialect.observation('r')}<think> e </think>"
    assert fault(response + dialect.write_answer("a"), reward.calls, reward.result) is None
    reward = format_reward(calls=["python"], result="seen", **said)
    assert (reward.calls, reward.result) == (["python"], "seen")


def format_reward(**other) -> FormatReward:
    settings = {"structure": 0.2, "final": 0.1, "retrieval": 0.1, "rules": "sequence"}
    return FormatReward(**{"correct": correct, "calls": ["search"], "result": "information"} | settings | other)


def test_a_format_reward_judges_the_response_by_the_state_machine_or_by_the_dialect():
    sound = replace(trajectory(), turns=("<think> d </think> <answer> paris </answer>",))
    broken = replace(trajectory(violations=("2 answers",)), turns=("paris <answer> paris </answer>",))
    assert values(format_reward(), [sound, broken]) == [[1.0, 0.8]]
    swapped = [replace(sound, violations=("2 answers",)), replace(broken, violations=())]
    assert values(format_reward(rules="dialect"), swapped) == [[0.8, 1.0]]


@pytest.mark.parametrize(
    ("answer", "seen", "value"), [("US", "a business", 0.2), ("US", "the US.", 0.3), ("The", "x", 0.2)]
)
def test_what_was_retrieved_is_looked_for_in_whole_words(answer, seen, value):
    t = trajectory(right=False, of=problem(answer=answer))
    t = replace(
        t, turns=("<think> d </think> <answer> x </answer>",), tool_calls=(ToolCall("search", "q", seen, Outcome.OK),)
    )
    assert values(format_reward(), [t])[0] == pytest.approx([value])


@pytest.mark.parametrize(("outcome", "retrieved"), [(Outcome.OK, 1), (Outcome.MODEL_ERROR, 0), (Outcome.INVALID, 0)])
def test_an_error_that_repeats_the_policys_words_retrieves_nothing(outcome: Outcome, retrieved: float):
    call = ToolCall("", "<paris></paris>", "Error: There is no tool named 'paris'.", outcome)
    ((earned,),) = format_reward()([[replace(trajectory(), tool_calls=(call,))]])
    assert earned.parts["retrieved"] == retrieved
