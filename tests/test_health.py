"""What ends badly is said once, when it begins; a run that goes on knows what it knew."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from otcrl.health import CULPRITS, Health, write_culprits
from otcrl.train import checked_health
from otcrl.types import Reward
from tests.make import problem, trajectory


def make_health(**other: float) -> Health:
    return Health(**{"grad_spike": 5.0, "entropy_share": 0.1, "likelihood_drop": 1.0} | other)


def told(health: Health, name: str, values: list[float]) -> list[str]:
    """What is said of the values of one metric, step by step."""
    return [" ".join(health({name: value})[1]) for value in values]


def test_a_gradient_far_above_the_usual_is_a_spike():
    said = told(make_health(), "update/policy_grad_norm", [1.0, 1.2, 0.9, 1.1, 1.0, 6.0, 7.0, 1.0, 6.0])
    assert [bool(text) for text in said] == [False] * 5 + [True, False, False, True]
    assert said[5] == "the gradient norm is 6, and 1 is usual: spikes.jsonl names the trajectories"


def test_the_first_updates_are_never_spikes():
    assert not any(told(make_health(), "update/policy_grad_norm", [1.0, 50.0, 1.0, 90.0]))


def test_entropy_that_is_gone_has_collapsed():
    said = told(make_health(), "update/entropy", [1.0] * 5 + [0.5, 0.11, 0.09, 0.05])
    assert [bool(text) for text in said] == [False] * 7 + [True, False]
    assert "the policy has stopped exploring" in said[7]


def test_right_answers_that_grow_unlikely_are_told():
    said = told(make_health(), "rollout/rewarded_logprob", [-0.5] * 6 + [-1.0] * 4 + [0.0] + [-3.0] * 4)
    assert not any(said[:11])  # 0.0: nothing was rewarded in that step
    assert sum(map(bool, said[11:])) == 1
    assert "right answers grow unlikely" in " ".join(said)


def test_a_finding_is_a_metric_while_it_lasts():
    health = make_health()
    found = [health({"update/entropy": value})[0]["health/entropy_collapse"] for value in [1.0] * 5 + [0.0, 0.0, 1.0]]
    assert found == [0.0] * 5 + [1.0, 1.0, 0.0]


def test_a_resumed_run_judges_as_the_uninterrupted_one():
    rows = [{"step": i, "update/policy_grad_norm": 1.0 + i / 10, "update/entropy": None} for i in range(8)]
    whole, resumed = make_health(), make_health()
    for row in rows:
        whole({name: value for name, value in row.items() if value is not None})
    resumed.hear(rows)
    assert whole({"update/policy_grad_norm": 9.0}) == resumed({"update/policy_grad_norm": 9.0})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk without room is made up by Linux")
def test_a_full_disk_ends_no_run_that_has_a_spike_to_write_down(tmp_path, capsys):
    (tmp_path / "spikes.jsonl").symlink_to("/dev/full")
    run: Any = SimpleNamespace(
        folder=tmp_path, health=lambda metrics: ({"health/grad_spike": 1.0}, ["a spike"]),
        learner=SimpleNamespace(pull_B=torch.ones(1)),
    )  # fmt: skip
    targets: Any = SimpleNamespace(advantages=torch.ones(1, 2))
    assert checked_health(3, run, {}, [(trajectory(), Reward(1.0))], targets) == {"health/grad_spike": 1.0}
    assert re.search(r"spikes.jsonl could not be written: .*; step 3 is not in it", capsys.readouterr().err)


def test_those_that_pulled_most_are_named(tmp_path):
    pairs = [(trajectory(of=problem(f"nq/train/{i}"), calls=i), Reward(float(i))) for i in range(8)]
    write_culprits(tmp_path / "spikes.jsonl", 3, pairs, [0, 1, 9, 0, 0, 5, 0, 5], [float(-i) for i in range(8)])
    rows = [json.loads(line) for line in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert [row["problem"] for row in rows][:3] == ["nq/train/2", "nq/train/5", "nq/train/7"]
    assert len(rows) == CULPRITS
    assert rows[0]["pull_share"] == pytest.approx(0.45)
    assert (rows[0]["calls"], rows[0]["advantage"], rows[0]["step"]) == (2, -2.0, 3)
