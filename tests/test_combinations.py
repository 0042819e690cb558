"""Settings that meet: a run of a few steps with a draw of every one of them, resumed, evaluated and exported.

Every part is tested by itself elsewhere; defects that were found later lay where two of them met. OTCRL_LONG=1 plays
many draws, each of them a minute.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_dist import ROOT

pytest.importorskip("deepspeed")

NO_MODEL = "conf=quickstart sft.steps=40 sft.batch_size=24 loop.steps=0 task.entities=6 evaluate.before=false"
RUN = (
    "conf=quickstart model=pretrained model.chat=false loop.problems_per_step=4 rollout.group_size=4 task.entities=6 "
    "task.large_sums=20 evaluate.sampled=false logger=console learner.minibatch_size=10 engine.tool_patience_s=60 "
    "reward._target_=tests.ranks.ByLength sft.batch_size=6 loop.checkpoint_every=1 loop.transcripts_every=1 "
    "learner.micro_tokens=400 resume_changed=true"
)
ZERO = "learner.backend=deepspeed learner.deepspeed.bucket=1e6 learner.deepspeed.zero_stage="
CHOICES = {
    "ranks": ("1", "2"),
    "backend": (
        "", *(f"{ZERO}{stage}" for stage in (1, 2, 3)), f"{ZERO}2 learner.deepspeed.offload=cpu",
        f"{ZERO}3 learner.deepspeed.offload=cpu learner.deepspeed.offload_params=cpu",
    ),
    "type": ("model.dtype=float32", "model.dtype=bfloat16", "learner.autocast=bfloat16"),
    "lora": ("", "learner.lora.rank=4"),
    "algo": (
        "algo=grpo", "algo=grpo algo.kl_coef=0.01", "algo=dapo", "algo=gspo", "algo=reinforce_pp",
        "algo=ppo reward.form=ppo",
        "algo=ppo reward.form=ppo algo.kl_coef=0.01 learner.critic_trunk=shared",
    ),
    "packing": ("learner.packing=shared", "learner.packing=packed", "learner.packing=padded"),
    "memory": ("", "model.gradient_checkpointing=true"),
    "schedule": (
        "", "rollout.schedule.ahead=1", "rollout.schedule.only_signal=true",
        "rollout.schedule.oversample=1.5 rollout.schedule.stragglers=keep",
        "rollout.schedule.oversample=1.5 rollout.schedule.stragglers=drop rollout.first=least_done",
    ),
    "old": ("learner.old_logprobs=recompute", "learner.old_logprobs=sampler"),
    "sft": ("sft.steps=0", "sft.steps=3"),
}  # fmt: skip
DRAWS = range(40) if "OTCRL_LONG" in os.environ else (16,)  # two ranks, ZeRO-3, adapters, bfloat16


def otcrl(*words: str, ranks: str = "1") -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks] if ranks != "1" else []
    own = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, "-m", "otcrl", *words]
    done = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-6000:]}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    otcrl("train", *NO_MODEL.split(), f"run_dir={folder}")
    return folder / "model"


@pytest.mark.parametrize("draw", DRAWS)
def test_a_draw_of_settings_trains_resumes_is_evaluated_and_exported(draw: int, model: Path, tmp_path: Path):
    rng = random.Random(draw)
    chosen = {name: rng.choice(choices) for name, choices in CHOICES.items()}
    ranks = chosen.pop("ranks")
    words = [
        *RUN.split(),
        *" ".join(chosen.values()).split(),
        f"model.path={model}",
        f"run_dir={tmp_path}",
        f"seed={draw}",
    ]
    for steps in (2, 3):  # the second time it goes on
        otcrl("train", *words, f"loop.steps={steps}", ranks=ranks)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    norms = [row["update/policy_grad_norm"] for row in rows if "update/policy_grad_norm" in row]
    assert len(norms) == 3
    assert all(norm is not None and 0 < norm < math.inf for norm in norms)
    otcrl("eval", f"run={tmp_path}")
    otcrl("export", str(tmp_path), f"out={tmp_path / 'exported'}")
    assert (tmp_path / "exported/config.json").is_file()
