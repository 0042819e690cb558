"""OTC multiplies a reward, so it goes with any algorithm: right first, then with fewer calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from otcrl.build import run_sft, run_train
from otcrl.cli import run_config
from otcrl.construct import construct
from otcrl.presets import conf_dir
from otcrl.types import Scores, pack
from tests import algorithms
from tests.algorithms import NAMES, algorithm
from tests.make import trajectory

REWARDS = {"otc_ppo": {}, "otc_grpo": {}, "otc_grpo within the group": {"scope": "local"}}
SMALL = [
    "conf=quickstart", "threads=1", "tools.python.workers=1",
    "task.entities=6", "task.large_sums=30", "task.held_out_per_kind=1", "model.width=48", "model.heads=2",
    "model.ff_width=96", "sft.steps=150", "sft.batch_size=60", "sft.optimizer={lr: 6.0e-3, warmup_steps: 10}",
    "loop.steps=2", "loop.problems_per_step=6", "loop.transcripts_every=0", "rollout.group_size=4",
    "evaluate.before=false", "evaluate.sampled=false",
]  # fmt: skip
EVERY_REWARD = pytest.mark.parametrize("form", REWARDS)
EVERY_ALGORITHM = pytest.mark.parametrize("name", NAMES)


def section(group: str, name: str, settings: dict[str, object]) -> dict[str, object]:
    return yaml.safe_load((conf_dir() / group / f"{name.split()[0]}.yaml").read_text()) | settings


@EVERY_ALGORITHM
@EVERY_REWARD
def test_fewest_calls_beat_more_calls_beat_wrong_answers(form: str, name: str):
    correct = {"correct": lambda answer, problem: float(answer in problem.answers)}
    reward = construct(section("reward", form, REWARDS[form]), "reward", **correct)
    group = [trajectory(calls=1), trajectory(calls=3), trajectory(right=False), trajectory(right=False, calls=4)]
    batch = pack([list(zip(group, reward([group])[0], strict=True))], pad_id=0)
    zeros = torch.zeros_like(batch.sampler_logprobs)
    least, more, wrong, wrong_with_calls = algorithm(name).targets(batch, Scores(zeros, zeros, zeros)).advantages[:, 1]
    assert least > more > wrong == wrong_with_calls
    assert wrong < 0 < least


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that begins with a policy that sometimes keeps to the format."""
    folder = tmp_path_factory.mktemp("start")
    config = run_config([*SMALL, f"run_dir={folder}"])
    run_sft(config)
    model = section("model", "pretrained", {"path": str(folder / "model"), "chat": False})
    return {**config, "model": model, "sft": {**config["sft"], "steps": 0}}


def test_dapo_in_full_trains_with_otc_from_the_command_line(tmp_path: Path):
    words = [
        *SMALL, "sft.steps=5", "algo=dapo", "rollout.schedule.only_signal=true", "rollout.schedule.max_draws=2",
        "reward=overlong", "reward@reward.reward=otc_grpo", "reward.reward.c=3", "reward.cache_tokens=50",
        "reward.reward.format_weight=0.5", f"run_dir={tmp_path}",
    ]  # fmt: skip
    words = [word for word in words if word != "sft.steps=150"]
    config = run_config(words)
    assert config["reward"]["reward"]["_target_"] == "otcrl.rewards.otc.OTCReward"
    assert (config["reward"]["reward"]["c"], config["reward"]["max_tokens"]) == (3, 100)
    run_train(config)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][:2]
    assert [row["step"] for row in steps] == [0, 1]
    assert all({"reward/tool", "reward/overlong"} <= row.keys() for row in steps)


@EVERY_ALGORITHM
@EVERY_REWARD
def test_every_otc_reward_trains_atlas_with_every_algorithm(
    form: str, name: str, config: dict[str, Any], tmp_path: Path
):
    reward = section("reward", form, REWARDS[form] | {"format_weight": 0.5})  # it is hardly ever right so early
    run_train({**config, "reward": reward, "algo": algorithms.section(name), "run_dir": str(tmp_path / "run")})
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][:2]
    assert [row["step"] for row in steps] == [0, 1]
    assert all(row["reward/groups_with_signal"] > 0 for row in steps)
    assert all(row["update/policy_grad_norm"] > 0 for row in steps)
