"""What a run leaves on disk so that it can go on: a checkpoint is complete or absent.

step-000030/    model/ (a Hugging Face directory)   state.pt (optimizers, critic)   run.json (step, reward state)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from otcrl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from otcrl.learner.learner import Learner


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint: training goes on with `step`."""

    path: Path
    step: int
    reward_state: dict[str, int]


def save(
    folder: Path,
    step: int,
    learner: Learner,
    tokenizer: PreTrainedTokenizerBase,
    reward_state: Mapping[str, int],
    keep: int,
) -> Path:
    """Write under a temporary name, then rename; afterwards only the last `keep` are left."""
    import torch

    final, temporary = folder / f"step-{step:06d}", folder / f".writing-{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_model(temporary / "model", learner.policy, tokenizer)
    torch.save(learner.state_dict(), temporary / "state.pt")
    (temporary / "run.json").write_text(json.dumps({"step": step, "reward_state": dict(reward_state)}))
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def save_model(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A directory that transformers and vLLM load."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/run.json"))


def latest(folder: Path) -> Checkpoint:
    """The newest complete checkpoint. Raises DataError when there is none."""
    found = complete(folder)
    if not found:
        raise DataError(f"{folder} holds no complete checkpoint")
    run = json.loads((found[-1] / "run.json").read_text())
    return Checkpoint(path=found[-1], step=run["step"], reward_state=run["reward_state"])


def restore(checkpoint: Checkpoint, learner: Learner) -> None:
    """Load weights, critic and optimizers into `learner`, in place."""
    import torch
    from safetensors.torch import load_file

    shards = sorted((checkpoint.path / "model").glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    missing, unexpected = learner.policy.load_state_dict(tensors, strict=False)
    tied = {name for name in missing if name.endswith("lm_head.weight")}  # saved once, as the embedding
    if unexpected or set(missing) - tied:
        raise DataError(f"{checkpoint.path}: missing {sorted(set(missing) - tied)}, unexpected {sorted(unexpected)}")
    learner.policy.tie_weights()
    learner.load_state_dict(torch.load(checkpoint.path / "state.pt", map_location="cpu", weights_only=True))
