"""The whole loop on a small Atlas: it learns, it repeats itself exactly, and it can stop and go on."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any, cast

import pytest
import yaml

from otcrl import cli
from otcrl.build import run_eval, run_sft, run_train
from otcrl.cli import eval_config, run_config
from otcrl.construct import construct
from otcrl.errors import ConfigError, TrainingError
from otcrl.evaluate.report import Report
from otcrl.presets import conf_dir
from otcrl.protocols import RewardFn
from otcrl.rewards.given_up import GIVEN_UP
from otcrl.rewards.otc import OTCReward
from otcrl.rewards.overlong import Overlong
from otcrl.rollout.schedule import Group
from otcrl.rollout.scoring import check_void, has_signal, score, score_alike
from otcrl.train import rollout_metrics
from otcrl.types import Outcome, Reward, Stop, Trajectory
from tests.make import problem, trajectory

SMALL = [
    "conf=quickstart", "threads=1",
    "task.entities=6", "task.large_sums=30", "task.held_out_per_kind=5", "model.width=32",
    "model.heads=2", "model.ff_width=48", "sft.steps=12", "sft.batch_size=30", "sft.optimizer.warmup_steps=2",
    "loop.problems_per_step=6", "loop.checkpoint_every=2", "loop.transcripts_every=2", "rollout.group_size=4",
]  # fmt: skip


def train(folder: Path, *overrides: str) -> None:
    run_train(run_config([*SMALL, f"run_dir={folder}", *overrides]))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def learned(folder: Path) -> list[dict]:
    """What a run did, without how long it took."""
    rows = lines(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/", "checkpoint/"))} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    train(folder, "loop.steps=4")
    return folder


def test_a_run_leaves_everything_that_is_needed_to_judge_it(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary) == {"before", "after", "sampled_after", "optimal_tc", "seconds"}
    assert set(summary["after"]) == {"em", "tc", "tp"}
    assert set(summary["seconds"]) == {"sft", "train", "eval"}
    assert [row["step"] for row in lines(finished / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert {row["step"] for row in lines(finished / "transcripts.jsonl")} == {0, 2}
    for path in ("config.yaml", "sft/config.json", "model/model.safetensors", "eval/after/report.json"):
        assert (finished / path).is_file(), path
    assert [p.name for p in sorted((finished / "checkpoints").iterdir())] == ["step-000002", "step-000004"]


def test_every_step_reports_calls_rewards_and_phases(finished):
    row = lines(finished / "metrics.jsonl")[0]
    names = "reward/value reward/correct reward/sign_reversals calls/emitted calls/well_formed calls/invalid"
    for name in f"{names} rollout/void_share update/policy_grad_norm time/rollout_s".split():
        assert name in row


def test_a_step_counts_the_answers_that_its_judge_gave_up(tmp_path, monkeypatch):
    def judged(reward: RewardFn, groups: Sequence[Group]) -> None:
        GIVEN_UP.add("9^9^9", "took too long")
        score_alike(reward, groups)

    monkeypatch.setattr("otcrl.train.score_alike", judged)
    train(tmp_path / "run", *BRIEF, "sft.steps=1", "loop.steps=2")
    assert [row["reward/judge_timeouts"] for row in lines(tmp_path / "run/metrics.jsonl")[:2]] == [1, 1]


class Slow(OTCReward):
    """A judge that thinks: whoever waits for a tool meanwhile must hear its answer, so not on the event loop."""

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]:
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(random.random() * 0.03)
        rewards_PG = super().__call__(trajectories_PG)
        pairs = (zip(*both, strict=True) for both in zip(trajectories_PG, rewards_PG, strict=True))
        return [[replace(r, value=len(t.token_ids) * 0.01) for t, r in group] for group in pairs]


@pytest.mark.parametrize("only_signal", [False, True])
def test_rewards_are_judged_beside_the_event_loop(tmp_path, only_signal):
    judge = ["reward._target_=tests.test_train.Slow", f"rollout.schedule.only_signal={only_signal}"]
    for name in "ab":
        train(tmp_path / name, *BRIEF, "sft.steps=1", "loop.steps=2", *judge)
    assert [row["step"] for row in learned(tmp_path / "a")] == [0, 1, 2]
    assert learned(tmp_path / "a") == learned(tmp_path / "b"), "however long it takes"


def test_every_step_reports_how_well_sampler_and_learner_agree(tmp_path):
    train(tmp_path / "run", "loop.steps=1", "evaluate.before=false", "learner.old_logprobs=recompute")
    row = lines(tmp_path / "run/metrics.jsonl")[0]
    assert row["rollout/logprob_gap_mean"] <= row["rollout/logprob_gap_max"] < 1e-4
    assert abs(row["rollout/mismatch_kl"]) < 1e-4
    assert row["rollout/mismatch_kl_k3"] == pytest.approx(0, abs=1e-8)
    for name in ("ess_token", "ess_sequence", "is_weight_mean"):
        assert row[f"rollout/{name}"] == pytest.approx(1, abs=1e-4)
    assert row["rollout/is_truncated_share"] == 0


def test_a_sampler_further_from_the_learner_than_allowed_stops_the_run_before_a_checkpoint(tmp_path):
    one = ["loop.steps=1", "evaluate.before=false", "learner.old_logprobs=recompute", "loop.max_logprob_gap=1e-12"]
    with pytest.raises(TrainingError, match=r"step 0: .* per token on average .* more than loop.max_logprob_gap=1e-12"):
        train(tmp_path / "run", *one)
    assert not (tmp_path / "run/checkpoints").exists()


def test_transcripts_hold_whole_trajectories(finished):
    row = lines(finished / "transcripts.jsonl")[0]
    assert {"question", "response", "answer", "answers", "calls", "reward", "stop", "parts"} <= set(row)


def test_one_seed_fixes_the_whole_run(finished, tmp_path):
    train(tmp_path / "again", "loop.steps=4")
    for a, b in zip(learned(finished), learned(tmp_path / "again"), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    train(tmp_path / "other", "loop.steps=1", "seed=1")
    assert learned(tmp_path / "other")[0] != pytest.approx(learned(finished)[0], abs=1e-4)


def test_a_run_that_stopped_goes_on_where_it_was(finished, tmp_path):
    whole = tmp_path / "stopped"
    train(whole, "loop.steps=4")
    rmtree(max((whole / "checkpoints").iterdir()))  # as if it had been killed after step 3
    run_train(run_config([f"resume={whole}"]))
    assert [row["step"] for row in lines(whole / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    for a, b in zip(learned(finished), learned(whole), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_an_earlier_run_in_the_same_place_is_renamed_not_lost(tmp_path):
    train(tmp_path / "run", "loop.steps=1")
    train(tmp_path / "run", "loop.steps=1")
    assert (tmp_path / "run/summary.json").is_file()
    assert (tmp_path / "run.1/summary.json").is_file()


@pytest.mark.parametrize(
    "overrides",
    [["algo=ppo", "reward=otc_ppo"], ["reward=outcome", "algo.kl_coef=0.01"], ["learner.old_logprobs=recompute"]],
    ids=["ppo", "outcome-with-reference", "recomputed"],
)
def test_every_algorithm_and_reward_runs_through_the_same_loop(tmp_path, overrides):
    train(tmp_path / "run", "loop.steps=2", "evaluate.before=false", *overrides)
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 3


def test_sft_alone_writes_a_model_that_eval_measures(tmp_path, capsys):
    run_sft(run_config([*SMALL, f"run_dir={tmp_path / 'sft'}"]))
    run_eval(eval_config([f"run={tmp_path / 'sft'}", "evaluate.offloading=true"]))
    shown = capsys.readouterr().out
    assert "greedy" in shown
    assert "ognitive offloading" in shown
    report = json.loads((tmp_path / "sft/eval/greedy/report.json").read_text())
    assert report["offloading"]["right_closed"]["value"] is not None
    assert set(report["sources"]) == {"known", "hidden", "two_hop", "small_sum", "large_sum", "search_sum"}


def test_a_checkpoint_is_evaluated_and_runs_are_compared_by_what_they_left(finished, capsys):
    run_eval(eval_config([f"run={finished}", "step=2", "evaluate.offloading=true", "evaluate.sampled=false"]))
    again = finished / "eval/step-000002/greedy"
    assert json.loads((again / "report.json").read_text())["temperature"] == 0
    assert "step: '2'" in (again / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"has no checkpoint of step '3'\. It has: 2, 4\."):
        run_eval(eval_config([f"run={finished}", "step=3"]))
    capsys.readouterr()
    assert cli.main(["compare", f"{finished}/eval/before", f"{finished}/eval/after"]) == 0
    assert cli.main(["table", str(finished), "eval=all"]) == 0
    assert cli.main(["table", str(finished), "of=training"]) == 0
    assert cli.main(["table", str(finished), "of=difficulty"]) == 0
    assert cli.main(["table", str(finished), "of=offloading", "eval=step-000002/greedy", "format=csv"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split(",")
    assert (last[0], int(last[1]) > 1000, last[2]) == ("quickstart", True, "2")


def test_a_sampled_evaluation_makes_several_attempts_at_a_question(finished):
    words = [f"run={finished}", "evaluate.offloading=true", "rollout.temperature=2.0"]
    for samples in (1, 3):
        run_eval(eval_config([*words, f"as=of_{samples}", f"evaluate.samples={samples}"]))
    one, three = (lines(finished / f"eval/of_{n}/sampled/transcripts.jsonl") for n in (1, 3))
    questions = [row["id"] for row in one]
    assert [(row["id"], row["sample"]) for row in three] == [(id, k) for id in questions for k in range(3)]
    assert [row["group"] for row in three[:4]] == [0, 0, 0, 1]
    responses = [[row["response"] for row in three[k::3]] for k in range(3)]
    assert responses[0] == [row["response"] for row in one], "the first attempt is the one that there is without others"
    assert len(set(map(tuple, responses))) == 3, "each attempt has its own draws"
    report = Report.load(finished / "eval/of_3/sampled")
    assert (report.overall.questions, report.overall.attempts) == (len(questions), 3 * len(questions))
    assert report.overall.em.value == pytest.approx(sum(row["correct"] for row in three) / len(three))
    assert report.offloading is not None
    greedy = Report.load(finished / "eval/of_3/greedy").overall
    assert greedy.attempts == greedy.questions, "greedy attempts are all the same"
    assert cli.main(["compare", f"{finished}/eval/of_1/sampled", f"{finished}/eval/of_3/sampled"]) == 0


# -- which trajectories count ----------------------------------------------------------------------------


def played(number: int, *trajectories: Trajectory) -> Group:
    return Group(number=number, problem=problem(), first=0, began=0, trajectories=list(trajectories))


class Right:
    """1 for a right answer; remembers what it was asked to score."""

    def __init__(self) -> None:
        self.asked: list[list[Trajectory]] = []

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]:
        self.asked += map(list, trajectories_PG)
        return [[Reward(float(t.answer == "paris"), {"correct": 1.0}) for t in group] for group in trajectories_PG]

    needs_groups = False

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None: ...


DOWN = trajectory(outcomes=(Outcome.INFRA_ERROR,), stop=Stop.VOID)
EMPTY = replace(trajectory(stop=Stop.MAX_TOKENS), action_mask=[False, False])


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (0.5, "must return a list for each of 1 groups, got 0.5"),
        ([Reward(1.0)], "must return a Reward for each of 1 trajectories, got Reward"),
        ([[]], r"must return a Reward for each of 1 trajectories, got \[\]"),
        ([[1.0]], r"must return Rewards, Reward\(1.0\), got 1.0"),
        ([[Reward(cast(float, None))]], r"must give a number, got Reward\(None\)"),
    ],
)
def test_a_reward_that_returns_something_else_is_named(given, why):
    class Own(Right):
        def __call__(self, trajectories_PG: object) -> Any:
            return given

    with pytest.raises(TrainingError, match=f"reward: Own {why}"):
        score(Own(), [played(0, trajectory())])


def test_void_trajectories_leave_the_group_and_its_statistics():
    some, none = played(0, trajectory(calls=1), DOWN, trajectory(calls=3)), played(1, DOWN)
    score(reward := Right(), [some, none])
    assert [t for t, _ in some.scored or []] == [some.trajectories[0], some.trajectories[2]]
    assert (none.scored, len(reward.asked)) == ([], 1)
    metrics = rollout_metrics([some, none])
    assert metrics["calls/well_formed"] == 2.0
    assert metrics["rollout/void_share"] == 0.5


def test_a_trajectory_without_a_sampled_token_teaches_nothing_and_is_counted():
    group = played(0, trajectory(), EMPTY)
    score(Right(), [group])
    assert [t for t, _ in group.scored or []] == [group.trajectories[0]]
    assert rollout_metrics([group])["rollout/empty_share"] == 0.5


def test_a_group_carries_a_signal_when_its_rewards_differ_and_is_scored_once():
    reward = Right()
    assert has_signal(reward, played(0, trajectory(), trajectory(right=False)))
    assert not has_signal(reward, played(1, trajectory(), trajectory()))
    assert has_signal(reward, played(2, DOWN, DOWN))  # no signal either, but another would be lost as well
    assert len(reward.asked) == 2


def test_right_answers_that_differ_in_length_alone_are_no_signal_and_those_that_differ_in_calls_are():
    """DAPO's condition is on right answers (Eq. 11): length shaping must not fill a step with what all can do."""

    def longer(t: Trajectory) -> Trajectory:
        return replace(t, token_ids=[1, 2, 2], action_mask=[False, True, True], logprobs=[0.0] * 3, versions=[0] * 3)

    reward = Overlong(reward=Right(), max_tokens=3, cache_tokens=3)
    alike = played(0, trajectory(), longer(trajectory()))
    assert not has_signal(reward, alike)
    assert [r.value for _, r in alike.scored or []] == pytest.approx([1 - 1 / 3, 1 - 2 / 3])  # and they are paid so
    assert has_signal(reward, played(1, trajectory(), longer(trajectory(right=False))))
    settings = yaml.safe_load((conf_dir() / "reward/otc_grpo.yaml").read_text())
    efficient = construct(settings, "reward", correct=lambda answer, problem: 1.0)
    assert has_signal(replace(reward, reward=efficient), played(2, trajectory(calls=1), trajectory(calls=2)))


def test_too_many_void_trajectories_stop_the_run_and_name_the_tool_and_its_error():
    with pytest.raises(TrainingError, match=r"2 of 3 trajectories .*tool 'search' failed 2 times with: r"):
        check_void([played(0, trajectory(), DOWN, DOWN)], max_void_share=0.5)


def test_too_many_late_trajectories_stop_the_run_and_say_what_they_waited_for():
    late = {"deadline_s": 30.0}
    in_tool = replace(DOWN, timings=late)
    generating = replace(trajectory(calls=2, stop=Stop.VOID), turns=("first", "second"), timings=late)
    expected = (
        "3 trajectories passed the deadline of 30 s (rollout.limits.timeout_s): "
        "2 while waiting for tool 'search', 1 while generating turn 3"
    )
    with pytest.raises(TrainingError, match=re.escape(expected)):
        check_void([played(0, in_tool, in_tool, generating)], max_void_share=0.5)


def test_a_step_of_which_nothing_is_left_stops_the_run():
    with pytest.raises(TrainingError, match="none of the step's 2 trajectories is left"):
        check_void([played(0, DOWN, EMPTY)], max_void_share=0.9)


# -- schedules --------------------------------------------------------------------------------------------

BRIEF = ["evaluate.before=false", "evaluate.sampled=false", "loop.transcripts_every=1"]
KEEP = ["rollout.schedule.stragglers=keep", "rollout.schedule.oversample=1.5"]


def asked(folder: Path, step: int | None = None) -> Counter[str]:
    """Problem -> trajectories of it, in all steps or in one."""
    rows = lines(folder / "transcripts.jsonl")
    return Counter(row["id"] for row in rows if step is None or row["step"] == step)


@pytest.mark.parametrize(
    "schedule",
    [["rollout.schedule.ahead=1"], KEEP, [*KEEP, "rollout.schedule.ahead=1"],
     ["rollout.schedule.stragglers=drop", "rollout.schedule.oversample=1.5", "rollout.concurrency=7"]],
    ids=["ahead", "keep", "keep-ahead", "drop"],
)  # fmt: skip
def test_every_schedule_trains_and_asks_no_problem_twice(tmp_path, schedule):
    train(tmp_path / "run", "loop.steps=3", *BRIEF, *schedule)
    rows = lines(tmp_path / "run/metrics.jsonl")
    assert [row["rollout/groups_played"] for row in rows[:3]] == [6, 6, 6]
    found = asked(tmp_path / "run")
    assert len(found) == 18
    assert set(found.values()) == {4}


def test_with_ahead_the_tokens_are_at_most_one_update_old(tmp_path):
    train(tmp_path / "run", "loop.steps=3", *BRIEF, "rollout.schedule.ahead=1")
    rows = lines(tmp_path / "run/metrics.jsonl")[:3]
    assert [row["rollout/age_mean"] for row in rows] == [0, 1, 1]
    assert max(row["rollout/off_policy_steps_max"] for row in rows) <= 1


@pytest.mark.parametrize("schedule", [[], ["rollout.schedule.ahead=1"]], ids=["plain", "ahead"])
def test_a_restart_changes_nothing_in_which_problems_are_asked(tmp_path, schedule):
    train(tmp_path / "whole", "loop.steps=4", *BRIEF, *schedule)
    train(tmp_path / "parts", "loop.steps=4", *BRIEF, *schedule)
    rmtree(tmp_path / "parts/checkpoints/step-000004")  # as if it had been killed after step 3
    run_train(run_config([f"resume={tmp_path / 'parts'}"]))
    for step in range(4):  # and no line of the steps that were made twice is there twice
        assert asked(tmp_path / "parts", step) == asked(tmp_path / "whole", step)


def test_a_checkpoint_knows_the_problems_that_are_under_way(tmp_path):
    train(tmp_path / "run", "loop.steps=4", *BRIEF, "rollout.schedule.ahead=1")
    half, whole = frontiers(tmp_path / "run")
    ahead = [12, 13, 14, 15, 16, 17]
    assert half == {"cursor": 18, "pending": ahead, "since": [[number, 1] for number in ahead]}
    assert whole == {"cursor": 24, "pending": [], "since": []}


def frontiers(folder: Path) -> list[dict]:
    return [json.loads(path.read_text())["frontier"] for path in sorted(folder.glob("checkpoints/*/run.json"))]


def test_a_step_without_any_signal_is_skipped_and_says_so(tmp_path):
    nobody_is_right = ["sft.steps=1", "loop.steps=2"]
    only = ["rollout.schedule.only_signal=true", "rollout.schedule.max_draws=2"]
    train(tmp_path / "run", *BRIEF, *nobody_is_right, *only)
    for row in lines(tmp_path / "run/metrics.jsonl")[:2]:
        assert row["rollout/skipped"] == 1
        assert row["rollout/groups_played"] == row["rollout/groups_dropped_no_signal"] == 12
        assert row["reward/groups_with_signal"] == 0
        assert "update/loss" not in row
    assert frontiers(tmp_path / "run")[-1] == {"cursor": 24, "pending": [], "since": []}


def test_a_restart_after_steps_without_a_signal_calls_the_weights_by_the_same_version(tmp_path):
    """Schedules of rewards go by it: they would jump."""
    nobody_is_right = ["sft.steps=1", "loop.steps=3", "rollout.schedule.only_signal=true", "loop.checkpoint_every=2"]
    train(tmp_path / "run", *BRIEF, *nobody_is_right)
    last = max((tmp_path / "run/checkpoints").iterdir())
    assert json.loads((last / "run.json").read_text())["version"] == 0, "the weights of the cold start"
    rmtree(last)
    run_train(run_config([f"resume={tmp_path / 'run'}"]))
    assert json.loads((last / "run.json").read_text())["version"] == 0


@pytest.mark.slow
def test_the_agent_learns_to_answer_right_with_fewer_calls(tmp_path):
    """A short quickstart: half the cold start, a third of the steps."""
    folder = tmp_path / "run"
    train_short = ["conf=quickstart", "threads=1",
                   "sft.steps=250", "loop.steps=20", "task.entities=16", "task.large_sums=100",
                   "task.held_out_per_kind=15", f"run_dir={folder}"]  # fmt: skip
    run_train(run_config(train_short))
    summary = json.loads((folder / "summary.json").read_text())
    over_before = summary["before"]["tc"] - summary["optimal_tc"]
    over_after = summary["after"]["tc"] - summary["optimal_tc"]
    assert over_before > 0.6
    assert abs(over_after) < 0.5 * over_before
    assert summary["after"]["em"] > 0.8
