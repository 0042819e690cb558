"""What a run leaves on disk so that it can go on: a checkpoint is complete or absent.

step-000030/    model/ (a Hugging Face directory)   state.pt (optimizers, critic)
                run.json (step, reward state, frontier of the problems)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from otcrl import dist
from otcrl.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
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
    if dist.is_first():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    save_model(temporary / "model", learner, tokenizer)
    tensors = {name: value.clone() for name, value in learner.state() if dist.is_first()}
    if not dist.is_first():
        return final
    torch.save(tensors, temporary / "state.pt")
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


def save_model(path: Path, learner: Learner, tokenizer: PreTrainedTokenizerBase) -> None:
    """A directory that transformers and vLLM load. On all ranks."""
    tensors = {name: value.cpu().clone() for name, value in learner.weights() if dist.is_first()}
    if dist.is_first():
        learner.policy.save_pretrained(path, state_dict=tensors)
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

    learner.load_weights(read_weights(checkpoint.path / "model", learner.shapes()))
    state = torch.load(checkpoint.path / "state.pt", map_location="cpu", weights_only=True)
    try:
        learner.load_state(state.__getitem__)
    except KeyError as error:
        what = str(error.args[0]).partition("/")[0]
        raise DataError(
            f"{checkpoint.path} was written without a {what}: resume with the algo it was made with"
        ) from error


def load_weights(path: Path, model: PreTrainedModel) -> None:
    """The weights that `save_model` left in `path`, into `model`. Raises DataError when they do not fit."""
    import torch

    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in read_weights(path, {name: parameter.shape for name, parameter in own.items()}):
            own[name].copy_(value)


def read_weights(path: Path, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
    """The weights that `save_model` left in `path`. Raises DataError unless they have these names and shapes."""
    from safetensors import safe_open

    missing = dict.fromkeys(shapes)
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                if name not in shapes:
                    raise DataError(f"{path}: {name} is no weight of the config's model")
                tensor = file.get_tensor(name)
                if tensor.shape != shapes[name]:
                    found, needed = list(tensor.shape), list(shapes[name])
                    raise DataError(f"{path}: {name} is {found}, and the config's model has {needed}")
                missing.pop(name, None)
                yield name, tensor
    if missing:
        raise DataError(f"{path}: there is no {next(iter(missing))}, which the config's model has")
