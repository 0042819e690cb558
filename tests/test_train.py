"""The whole loop on a small Atlas: it learns, it repeats itself exactly, and it can stop and go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from otcrl.build import run_eval, run_sft, run_train
from otcrl.cli import eval_config, run_config
from otcrl.errors import TrainingError
from otcrl.train import kept, rollout_metrics
from otcrl.types import Outcome, Reward, Stop
from tests.make import trajectory

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
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/", "calls/cached"))} for row in rows]


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


def test_every_step_reports_calls_rewards_phases_and_agreement_with_the_sampler(finished):
    row = lines(finished / "metrics.jsonl")[0]
    names = "reward/value reward/correct reward/sign_reversals calls/emitted calls/well_formed calls/invalid"
    for name in f"{names} rollout/void_share update/policy_grad_norm time/rollout_s".split():
        assert name in row
    assert row["rollout/logprob_gap_max"] < 1e-4


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
    checkpoints = sorted((whole / "checkpoints").iterdir())
    for file in sorted(checkpoints[-1].rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    checkpoints[-1].rmdir()  # as if it had been killed after step 3
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


def test_void_trajectories_leave_the_group_and_its_statistics():
    down = trajectory(outcomes=(Outcome.INFRA_ERROR,), stop=Stop.VOID)
    group = [trajectory(calls=1), down, trajectory(calls=3)]
    left = kept([group, [down]], max_void_share=0.9)
    assert left == [[group[0], group[2]]]
    rewards = [[Reward(1.0, {"correct": 1.0}), Reward(0.0, {"correct": 0.0})]]
    metrics = rollout_metrics([group, [down]], left, rewards)
    assert metrics["calls/well_formed"] == 2.0
    assert metrics["rollout/void_share"] == 0.5


def test_too_many_void_trajectories_stop_the_run_and_name_the_tool_and_its_error():
    down = trajectory(outcomes=(Outcome.INFRA_ERROR,), stop=Stop.VOID)
    with pytest.raises(TrainingError, match=r"2 of 3 trajectories .*tool 'search' failed 2 times with: r"):
        kept([[trajectory(), down, down]], max_void_share=0.5)


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
