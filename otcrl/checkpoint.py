"""What a run leaves on disk so that it can go on: a checkpoint is complete or absent.

step-000030/    model/ (a Hugging Face directory)   state.pt (optimizers, critic)
                run.json (step, reward state, frontier of the problems)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from otcrl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from otcrl.learner.learner import Learner


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """How far a run has come in its problems: all below `cursor` that are not pending have been consumed."""

    cursor: int  # number of the first problem that was never begun
    pending: tuple[int, ...] = ()  # numbers of problems that were begun and not consumed, ascending


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint: training goes on with `step`."""

    path: Path
    step: int
    reward_state: dict[str, float]
    frontier: Frontier


def save(
    folder: Path,
    step: int,
    learner: Learner,
    tokenizer: PreTrainedTokenizerBase,
    reward_state: Mapping[str, float],
    frontier: Frontier,
    keep: int,
) -> Path:
    """Write under a temporary name, then rename; afterwards only the last `keep` are left."""
    import torch

    final, temporary = folder / f"step-{step:06d}", folder / f".writing-{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_model(temporary / "model", learner.policy, tokenizer)
    torch.save(learner.state_dict(), temporary / "state.pt")
    run = {"step": step, "reward_state": dict(reward_state), "frontier": asdict(frontier)}
    (temporary / "run.json").write_text(json.dumps(run))
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
    """The newest complete checkpoint. Raises DataError when there is none, or it lacks what this version needs."""
    found = complete(folder)
    if not found:
        raise DataError(f"{folder} holds no complete checkpoint")
    run = json.loads((found[-1] / "run.json").read_text())
    if "frontier" not in run:
        raise DataError(f"{found[-1]} does not say which problems have been asked: an earlier otcrl wrote it")
    frontier = Frontier(cursor=run["frontier"]["cursor"], pending=tuple(run["frontier"]["pending"]))
    return Checkpoint(path=found[-1], step=run["step"], reward_state=run["reward_state"], frontier=frontier)


def restore(checkpoint: Checkpoint, learner: Learner) -> None:
    """Load weights, critic and optimizers into `learner`, in place. Raises DataError when they are another model's."""
    import torch

    load_weights(checkpoint.path / "model", learner.policy)
    state = torch.load(checkpoint.path / "state.pt", map_location="cpu", weights_only=True)
    if missing := [name for name in learner.optimizers if name not in state]:
        raise DataError(f"{checkpoint.path} was written without a {missing[0]}: resume with the algo it was made with")
    learner.load_state_dict(state)


def load_weights(path: Path, model: PreTrainedModel) -> None:
    """The weights that `save_model` left in `path`, into `model`. Raises DataError when they do not fit."""
    from safetensors.torch import load_file

    tensors = {
        name: tensor for shard in sorted(path.glob("*.safetensors")) for name, tensor in load_file(shard).items()
    }
    for name, parameter in model.state_dict().items():
        if name in tensors and tensors[name].shape != parameter.shape:
            found, needed = list(tensors[name].shape), list(parameter.shape)
            raise DataError(f"{path}: {name} is {found}, and the config's model has {needed}")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {name for name in missing if name.endswith("lm_head.weight")}  # saved once, as the embedding
    if unexpected or set(missing) - tied:
        raise DataError(f"{path}: missing {sorted(set(missing) - tied)}, unexpected {sorted(unexpected)}")
    model.tie_weights()
